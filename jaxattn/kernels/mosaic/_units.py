"""Which work a block does, unit by unit, and who tells whom.

A unit is a work item for one KV head. The loading warpgroup draws units, reads what they are, and tells the computing
ones, to whom nothing of the work list in device memory is known.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxattn.kernels.mosaic import _warpgroup as wg
from jaxattn.kernels.mosaic._keys import KeySource, Span
from jaxattn.kernels.mosaic.tiles import Config
from jaxattn.spec import AttentionSpec, Score, Visible
from jaxattn.work_list import WorkItem

# Units in shared memory. The loading warpgroup tells of the unit after the next one, and has loaded the queries of this
# one, for which those of the unit two before it were given back: so four are alive, and there is room to spare.
RING = 8

# Units that a plan has room for, for each multiprocessor, from which on blocks draw ahead. With fewer they would not
# share the last ones fairly: 4 x 512, with 6.2, would lose 7%; 1 x 4096, with 9.9, loses nothing.
UNITS_AHEAD = 8
# Tiles of a window from which on a unit has enough of them. With a window of 128 keys, one or two, blocks lose 2%.
TILES_AHEAD = 4


@dataclasses.dataclass(frozen=True)
class Ahead:
    """What is done for coming units while this unit's tiles are computed; else it is done between two units.

    What each is worth: `benchmarks/results/h200_sweeps_mosaic.txt`, 13.
    """

    queries: bool  # those of the coming unit are loaded before its first tiles, not after them
    draw: bool  # the unit after it is drawn before this one's tiles are loaded, not after them

    @classmethod
    def of(
        cls, units_per_sm: float, source: KeySource, config: Config, visible: Visible
    ) -> "Ahead":
        """units_per_sm: that the plan has room for.

        With room for one unit's queries, the coming ones wait for this unit to end. Of rows, one tile is under way when
        a unit begins: to draw ahead gains nothing there.
        """
        window = visible.window_left
        long = window is None or window >= TILES_AHEAD * config.block_kv
        queries = long and config.num_queries > 1
        return cls(queries, queries and source.in_boxes and units_per_sm > UNITS_AHEAD)


@dataclasses.dataclass(frozen=True)
class Statics:
    """What the kernel is compiled for."""

    spec: AttentionSpec
    score: Score
    source: KeySource
    config: Config
    num_blocks: int
    drawn: bool  # blocks draw units; else each has one
    ahead: Ahead


class Phases(NamedTuple):
    """The tiles of a unit, counted from the last; int32 scalars.

    Masked at both ends are 0 .. plain - 1; those from `low` on at their rows' beginnings alone.
    """

    short: jax.Array  # 1: `Config.short_kv` keys of tile 0 are enough, and tile 1 has no mask; or 0
    plain: jax.Array  # at least 1
    low: jax.Array

    @classmethod
    def of(cls, static: Statics, item: WorkItem, span: Span) -> "Phases":
        """Tiles that every row of the item sees in full are not masked."""
        spec, block = static.spec, static.source.block
        first = lax.div(item.row_begin, spec.group) + item.q_position
        last = lax.div(item.row_end - 1, spec.group) + item.q_position
        begin, end = spec.visible.all(first, last, span.end)
        below = jnp.clip(lax.div(jnp.maximum(end - span.origin, 0), block), 0, span.tiles)
        plain = jnp.maximum(span.tiles - below, 1)
        begin = jnp.maximum(begin, span.begin)
        low = span.tiles - lax.div(jnp.maximum(begin - span.origin, 0) + (block - 1), block)
        # Where a page in use is not in the cache, no tile goes unmasked.
        plain = jnp.where(span.absent != 0, span.tiles, plain)
        low = jnp.maximum(low, plain)
        last_keys = span.end - span.origin - (span.tiles - 1) * block
        short = (last_keys <= static.config.short_kv) & (plain == 1) & (low > 1)
        return cls(short.astype(jnp.int32), plain, low)

    def ranges(self, tiles: Any) -> Iterator[tuple[Any, Any]]:
        """(first, end) of the tiles after tile 0, and after tile 1 behind a short one: masked, plain, masked."""
        yield 1, self.plain
        yield self.plain + self.short, self.low
        yield self.low, tiles


class Unit(NamedTuple):
    """What a block does at a time; int32 scalars."""

    item: WorkItem
    head: jax.Array  # KV head; -1: no unit
    span: Span
    phases: Phases

    @property
    def exists(self) -> jax.Array:
        return self.head >= 0


def _flat() -> tuple[int, Any]:
    """(the numbers of a unit, how they make one)."""

    def blank(kind: Any) -> Any:
        return kind(*[0] * len(kind._fields))

    leaves, tree = jax.tree.flatten(Unit(blank(WorkItem), jnp.int32(0), blank(Span), blank(Phases)))
    return len(leaves), tree


FIELDS, TREE = _flat()


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

    def unit(self, n: jax.Array) -> Unit:
        """The n-th unit, from device memory; without a head and without tiles where there is none."""
        spec = self.static.spec
        exists = n < self.num_items_ref[0] * spec.num_kv_heads
        work = lax.div(jnp.where(exists, n, 0), spec.num_kv_heads)
        item = WorkItem.read(self.items_ref, work)
        pages = None
        if self.page_range_ref is not None:
            pages = self.page_range_ref[0], self.page_range_ref[1]
        first_position = lax.div(item.row_begin, spec.group) + item.q_position
        first_seen = jnp.maximum(spec.visible.begin(first_position), 0)
        span = self.static.source.span(item, first_seen, pages)
        head = jnp.where(exists, lax.rem(n, spec.num_kv_heads), -1)
        phases = Phases.of(self.static, item, span)
        return Unit(item, head, span._replace(tiles=jnp.where(exists, span.tiles, 0)), phases)

    def tell(self, r: jax.Array, unit: Unit) -> None:
        """By the loading warpgroup: the unit of the r-th round."""
        slot = lax.rem(r, RING)
        wg.put_numbers(self.units.at[slot], jax.tree.leaves(unit))
        wg.sync()
        plgpu.barrier_arrive(self.told.at[slot])

    def wait(self, r: jax.Array) -> jax.Array:
        """By the others: waits for the unit of the r-th round; whether there is one."""
        plgpu.barrier_wait(self.told.at[lax.rem(r, RING)])
        return self.look(r).exists

    def look(self, r: jax.Array) -> Unit:
        """The unit of the r-th round, once it was told. A second look costs less than registers to remember it."""
        slot = lax.rem(r, RING)
        return jax.tree.unflatten(TREE, [self.units[slot, i] for i in range(FIELDS)])
