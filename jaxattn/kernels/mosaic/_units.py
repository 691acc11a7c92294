"""Which work a block does, unit by unit, and who tells whom.

A unit is a work item for one KV head. The loading warpgroup draws units, reads what they are, and tells the computing
ones, to whom nothing of the work list in device memory is known.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxattn.kernels.mosaic import _warpgroup as wg
from jaxattn.kernels.mosaic._keys import KeySource, Span
from jaxattn.kernels.mosaic.tiles import Config
from jaxattn.spec import AttentionSpec, Score
from jaxattn.work_list import WorkItem

# Units in shared memory. The loading warpgroup loads the queries of at most two units ahead, and tells of one more.
RING = 4


@dataclasses.dataclass(frozen=True)
class Statics:
    """What the kernel is compiled for."""

    spec: AttentionSpec
    score: Score
    source: KeySource
    config: Config
    num_blocks: int
    drawn: bool  # blocks draw units; else each has one


class Unit(NamedTuple):
    """What a block does at a time; int32 scalars."""

    item: WorkItem
    head: jax.Array  # KV head; -1: no unit
    span: Span

    @property
    def exists(self) -> jax.Array:
        return self.head >= 0


FIELDS, TREE = (lambda leaves, tree: (len(leaves), tree))(
    *jax.tree.flatten(Unit(WorkItem(*[0] * len(WorkItem._fields)), 0, Span(*[0] * len(Span._fields))))
)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A block's first unit is that of its own number; then it takes the next one that no block has taken.

    Units with many keys come first of a request's, so that the last ones are short.
    """

    static: Statics
    items_ref: Any
    num_items_ref: Any
    page_range_ref: Any
    counts_ref: Any  # int32, the last element counts the units taken, but for each block's first
    number: Any  # int32 [1], shared memory: the unit drawn last
    units: Any  # int32 [RING, FIELDS], shared memory
    told: Any  # barriers [RING]

    def first(self) -> jax.Array:
        return lax.axis_index("block").astype(jnp.int32)

    def begin_draw(self) -> None:
        """Begins to draw a further unit."""
        if self.static.drawn:
            wg.take_number(self.counts_ref, self.counts_ref.shape[0] - 1, self.number)

    def end_draw(self) -> jax.Array:
        """The number of the unit drawn."""
        if not self.static.drawn:
            return jnp.int32(2**31 - 1)
        wg.sync()
        return self.number[0] + self.static.num_blocks

    def exists(self, n: jax.Array) -> jax.Array:
        return n < self.num_items_ref[0] * self.static.spec.num_kv_heads

    def unit(self, n: jax.Array) -> Unit:
        """The n-th unit, from device memory."""
        spec = self.static.spec
        work, head = lax.div(n, spec.num_kv_heads), lax.rem(n, spec.num_kv_heads)
        item = WorkItem(*(self.items_ref[work, i] for i in range(len(WorkItem._fields))))
        pages = None
        if self.page_range_ref is not None:
            pages = self.page_range_ref[0], self.page_range_ref[1]
        first_position = lax.div(item.row_begin, spec.group) + item.q_position
        first_seen = jnp.maximum(spec.visible.begin(first_position), 0)
        return Unit(item, head, self.static.source.span(item, first_seen, pages))

    def tell(self, r: jax.Array, unit: Unit | None) -> None:
        """By the loading warpgroup: the unit of the r-th round, None: there is none."""
        fields = [jnp.int32(-1)] * FIELDS if unit is None else jax.tree.leaves(unit)
        slot = lax.rem(r, RING)
        wg.put_numbers(self.units.at[slot], fields)
        wg.sync()
        plgpu.barrier_arrive(self.told.at[slot])

    def wait(self, r: jax.Array) -> jax.Array:
        """By the computing ones: waits for the unit of the r-th round; whether there is one."""
        plgpu.barrier_wait(self.told.at[lax.rem(r, RING)])
        return self.look(r).exists

    def look(self, r: jax.Array) -> Unit:
        """The unit of the r-th round, once it was waited for. A second look costs less than registers to remember it."""
        slot = lax.rem(r, RING)
        return jax.tree.unflatten(TREE, [self.units[slot, i] for i in range(FIELDS)])
