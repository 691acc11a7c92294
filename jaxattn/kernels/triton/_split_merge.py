"""Split tiles: each program leaves its partial state, and whichever finishes last merges a tile's states.

Where they are many, the last of each team of programs merges the team's before. Few tall tiles are for a kernel of its
own instead (`_merge_apart`). The order is that of the splits, whoever is last: results do not depend on timing.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxattn.kernels.triton._rows import pow2
from jaxattn.kernels.triton.merge import merge_rows
from jaxattn.kernels.triton.tiles import Config
from jaxattn.plan import MAX_FEW_ROWS, MID_ROWS, AttentionPlan
from jaxattn.work_list import WorkItem

Store = Callable[..., None]  # (r, o, lse, chosen=True): rows r of the tile's output, where chosen
StoreAt = Callable[..., None]  # (o_ref, lse_ref, rows, r, o, lse, chosen): the same, elsewhere


@dataclasses.dataclass(frozen=True)
class Merging:
    """How the last program of a split tile merges its states."""

    rows: int  # at once
    states: int  # at once
    # More states than these are merged in teams of so many, each by its last program, and then those of the teams;
    # None: never. It decides how the result is rounded: with fixed splits it must not depend on the batch.
    team: int | None

    @classmethod
    def of(
        cls,
        plan: AttentionPlan,
        config: Config,
        head_dim: int,
        *,
        wgmma: bool,
        fp8: bool = False,
    ) -> "Merging":
        group = plan.num_qo_heads // plan.num_kv_heads
        most = min(group, config.block_rows) if plan.is_decode else config.block_rows
        # 64 elements a thread: half of what the accumulator of the largest tiles takes.
        elements = 2048 * config.num_warps // pow2(head_dim)
        if config.block_rows == MID_ROWS and wgmma:
            # Half the accumulator, twice the states: measured with few tiles, which are merged apart since
            # (`benchmarks/results/h200_sweeps_attention.txt`), not with what is left.
            return cls(min(pow2(most), elements // 2), 4, team=8)
        if config.block_rows > MAX_FEW_ROWS:
            # 512 on 32768, two splits: 589 us; 16 rows of 4 states 603, twice as many elements 598. The mere code for
            # teams: 598 for 587, and without splits 4 x 4096 1176 for 1153.
            return cls(min(pow2(most), elements // 2), 2, team=None)
        # Few programs leave registers for twice as many, except in code for an A100, which would spill. Decode of
        # 1 x 8192: 15.2 us; 16.0.
        elements *= 2 if plan.programs_per_sm == 2 and wgmma else 1
        if fp8 and plan.programs_per_sm > 2:
            # Four programs of four warps have 128 registers a thread. The loop over keys takes as many; merging twice
            # as much took 142 at page size 1, and three programs ran: decode of 32 x 4096 92.1 us, and now 72.8.
            elements //= 2
        rows = min(pow2(most), 16)
        states = min(32, max(1, elements // rows))
        # Two steps cost 1.1 us. 1 x 32768 of 8/1 heads, 256 splits: 13.7 us; teams of 32 15.4, one step 21.4; of 32/4
        # heads, 64 splits: 24.8; 25.9. Many programs have many splits only where one request is far longer than all.
        team = 96 if plan.programs_per_sm > 2 else 16 if states <= 16 else 64
        return cls(rows, states, team)


@dataclasses.dataclass(frozen=True)
class Partials:
    """The memory of partial states, and this program's place in it."""

    o_ref: jax.Ref  # float32 [num_slots * columns * r, d]
    lse_ref: jax.Ref  # float32 [num_slots * columns * r]
    # int32 [num_slots * columns]: how many programs of a tile, or of a team, have arrived, at its first slot; how many
    # teams, at the tile's second.
    arrivals_ref: jax.Ref | None  # None where a kernel of its own merges
    column: jax.Array  # the program's place among those of an item
    columns: int
    block_rows: int
    store_at: StoreAt

    def first_row(self, item: WorkItem, split: jax.Array) -> jax.Array:
        return ((item.slot + split) * self.columns + self.column) * self.block_rows

    def leave(
        self,
        item: WorkItem,
        split: jax.Array,
        r: jax.Array,
        o: jax.Array,
        lse: jax.Array,
        chosen: Any = True,
    ) -> None:
        """The state (o, lse) of rows r of a split tile."""
        rows = self.first_row(item, split) + r
        self.store_at(self.o_ref, self.lse_ref, rows, r, o, lse, chosen)

    def merge(
        self, item: WorkItem, merging: Merging, store: Store, barrier: Callable[[], None]
    ) -> None:
        """By the tile's last program, once each has left its state; store writes the output."""
        assert self.arrivals_ref is not None

        def is_last(split, count):
            """Counts this program at the counter of a split; whether it is the last of so many."""
            # Every thread's stores come before the program's arrival, and the last one's loads after it.
            barrier()
            at = (item.slot + split) * self.columns + self.column
            return plgpu.atomic_add(self.arrivals_ref, (at,), jnp.int32(1)) == count - 1

        def merge(split, stride, count, write):
            """Merges `count` states, every stride-th from `split` on."""
            rows = merging.rows

            def some_rows(i, _):
                r = i * rows + jnp.arange(rows, dtype=jnp.int32)
                o, lse = merge_rows(
                    self.o_ref,
                    self.lse_ref,
                    self.first_row(item, split) + r,
                    stride * self.columns * self.block_rows,
                    count,
                    block=merging.states,
                    empty_may_hold_anything=False,
                )
                write(r, o, lse)

            blocks = (item.row_end - item.row_begin + rows - 1) // rows
            jax.lax.fori_loop(0, blocks, some_rows, None)

        team = merging.team
        # Without code for teams where no tile has as many splits.
        if not team or self.arrivals_ref.shape[0] // self.columns <= team:

            @pl.when(is_last(0, item.num_splits))
            def _():
                merge(0, 1, item.num_splits, store)

            return

        captain = item.split - item.split % team
        members = jnp.minimum(item.num_splits - captain, team)
        num_teams = (item.num_splits + team - 1) // team

        def write_team(r, o, lse):
            store(r, o, lse, num_teams == 1)
            barrier()  # every thread has read the captain's state
            self.leave(item, captain, r, o, lse, num_teams > 1)

        @pl.when(is_last(captain, members))
        def _():
            merge(captain, 1, members, write_team)

            @pl.when(num_teams > 1)
            def _():
                # The second split's counter: it is no captain.
                @pl.when(is_last(1, num_teams))
                def _():
                    merge(0, team, num_teams, store)
