"""Split tiles: each work item leaves its partial state, and whichever finishes last merges a tile's states.

The order is that of the splits, whoever is last: results do not depend on timing.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxattn.kernels.mosaic import _warpgroup as wg
from jaxattn.kernels.mosaic._elements import ROW, ROWS, TILE
from jaxattn.kernels.mosaic._online_softmax import LN2, LOG2E, along_keys
from jaxattn.work_list import WorkItem


@dataclasses.dataclass(frozen=True)
class Partials:
    """The memory of partial states, and this warpgroup's place in it."""

    o_ref: jax.Ref  # float32 [num_slots * columns * 64, d]
    lse_ref: jax.Ref  # float32 [num_slots * columns * 64]
    arrivals_ref: (
        jax.Ref
    )  # int32 [num_slots * columns]: how many of a tile's items have arrived, at its first slot
    column: jax.Array  # this warpgroup's, among those of an item
    columns: int
    seen: Any  # int32 [1], shared memory

    def merge(
        self,
        item: WorkItem,
        o: jax.Array,
        lse: jax.Array,
        store: Callable[[jax.Array, jax.Array], None],
    ) -> None:
        """Leaves the state (o [64, d], lse [64]) of a split tile; the last item stores the merged one."""

        def rows_of(split):
            return pl.ds(((item.slot + split) * self.columns + self.column) * ROWS, ROWS)

        mine = rows_of(item.split)
        self.o_ref[mine, :] = o
        self.lse_ref[mine] = lse
        wg.count_arrival(self.arrivals_ref, item.slot * self.columns + self.column, self.seen)

        @pl.when(self.seen[0] == item.num_splits - 1)
        def _():
            def load(split):
                rows = rows_of(split)
                return (
                    plgpu.load(self.o_ref.at[rows], layout=TILE, optimized=False),
                    plgpu.load(self.lse_ref.at[rows], layout=ROW, optimized=False) * LOG2E,
                )

            def take(split, state):
                m, l, acc = state
                o, lse = load(split)
                peak = jnp.maximum(m, lse)
                safe = jnp.where(peak == -jnp.inf, 0.0, peak)
                alpha, weight = jnp.exp2(m - safe), jnp.exp2(lse - safe)
                acc = acc * along_keys(alpha, acc) + o * along_keys(weight, o)
                return peak, l * alpha + weight, acc

            o, lse = load(0)
            one = jnp.where(lse == -jnp.inf, 0.0, 1.0)
            m, l, acc = lax.fori_loop(1, item.num_splits, take, (lse, one, o))
            empty = l == 0.0
            l = jnp.where(empty, 1.0, l)
            lse = jnp.where(empty, -jnp.inf, (m + jnp.log2(l)) * LN2)
            store(acc * along_keys(1.0 / l, acc), lse)
