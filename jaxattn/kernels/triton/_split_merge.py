"""Split tiles: each program leaves its partial state, and whichever finishes last merges a tile's states.

Where they are many, the last of each team of programs merges the team's before. Few tall tiles are merged apart, by a
second kernel whose programs share a tile's rows. The order is that of the splits, whoever is last: results do
not depend on timing.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxattn.device import num_sms
from jaxattn.kernels.triton._keys import divmod_by
from jaxattn.kernels.triton._launch import launch, like
from jaxattn.kernels.triton._rows import pow2
from jaxattn.kernels.triton.merge import merge_rows
from jaxattn.kernels.triton.tiles import Config
from jaxattn.plan import MAX_FEW_ROWS, MID_ROWS, AttentionPlan
from jaxattn.spec import AttentionSpec
from jaxattn.work_list import WorkItem

Store = Callable[..., None]  # (r, o, lse, chosen=True): rows r of the tile's output, where chosen


@dataclasses.dataclass(frozen=True)
class Merging:
    """How the last program of a split tile merges its states."""

    rows: int  # at once
    states: int  # at once
    # More states than these are merged in teams of so many, each by its last program, and then those of the teams;
    # None: never. It decides how the result is rounded: with fixed splits it must not depend on the batch.
    team: int | None
    apart: bool = False  # by a kernel of its own

    @classmethod
    def of(
        cls,
        plan: AttentionPlan,
        config: Config,
        head_dim: int,
        *,
        wgmma: bool,
        fp8: bool = False,
    ) -> "Merging | None":
        """None where no tile is ever split."""
        if not plan.num_slots:
            return None
        group = plan.num_qo_heads // plan.num_kv_heads
        tiles = max(plan.batch_size, plan.num_qo_tokens * group // MID_ROWS)
        few = tiles * plan.num_kv_heads <= num_sms() // 4
        if few and plan.block_rows == MID_ROWS and not plan.is_decode:
            # Of many keys they have 8 splits and more, and 64 rows are long for one program: 16 on 16384, 32 splits,
            # 35.4 us by the last program and 25.4 apart; 16 on 4096, 8 splits, 18.5 and 15.7; of 4 splits there is no
            # difference. A decode's splits may be fixed, such a prefill's are not.
            return cls(4, min(16, 2048 // pow2(head_dim)), team=None, apart=True)
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
    arrivals_ref: jax.Ref | None  # None where they are merged apart
    column: jax.Array  # the program's place among those of an item
    columns: int
    block_rows: int
    merging: Merging
    barrier: Callable[[], None]

    @property
    def team(self) -> int | None:
        """None, without code for teams, where no tile has as many splits."""
        team = self.merging.team
        if not team:
            return None
        assert self.arrivals_ref is not None
        return team if self.arrivals_ref.shape[0] // self.columns > team else None

    def merge(
        self,
        item: WorkItem,
        r: jax.Array,
        o: jax.Array,
        lse: jax.Array,
        store: Store,
        store_at: Callable[..., None],
    ) -> None:
        """Leaves the state (o, lse) of rows r of a split tile, which its last program merges, or `merge_apart` does.

        store(r, o, lse, chosen) writes the output, store_at(o_ref, lse_ref, rows, r, o, lse, chosen) other rows.
        """

        def first_row(split):
            return ((item.slot + split) * self.columns + self.column) * self.block_rows

        def store_partial(split, r, o, lse, chosen=True):
            store_at(self.o_ref, self.lse_ref, first_row(split) + r, r, o, lse, chosen)

        def is_last(split, count):
            """Counts this program at the counter of a split; whether it is the last of so many."""
            # Every thread's stores come before the program's arrival, and the last one's loads after it.
            self.barrier()
            at = (item.slot + split) * self.columns + self.column
            return plgpu.atomic_add(self.arrivals_ref, (at,), jnp.int32(1)) == count - 1

        def merge(split, stride, count, write):
            """Merges `count` states, every stride-th from `split` on."""
            rows = self.merging.rows

            def some_rows(i, _):
                r = i * rows + jnp.arange(rows, dtype=jnp.int32)
                o, lse = merge_rows(
                    self.o_ref,
                    self.lse_ref,
                    first_row(split) + r,
                    stride * self.columns * self.block_rows,
                    count,
                    block=self.merging.states,
                    empty_may_hold_anything=False,
                )
                write(r, o, lse)

            blocks = (item.row_end - item.row_begin + rows - 1) // rows
            jax.lax.fori_loop(0, blocks, some_rows, None)

        store_partial(item.split, r, o, lse)
        if self.merging.apart:
            return
        team = self.team
        if not team:

            @pl.when(is_last(0, item.num_splits))
            def _():
                merge(0, 1, item.num_splits, store)

            return

        captain = item.split - item.split % team
        members = jnp.minimum(item.num_splits - captain, team)
        num_teams = (item.num_splits + team - 1) // team

        def write_team(r, o, lse):
            store(r, o, lse, num_teams == 1)
            self.barrier()  # every thread has read the captain's state
            store_partial(captain, r, o, lse, num_teams > 1)

        @pl.when(is_last(captain, members))
        def _():
            merge(captain, 1, members, write_team)

            @pl.when(num_teams > 1)
            def _():
                # The second split's counter: it is no captain.
                @pl.when(is_last(1, num_teams))
                def _():
                    merge(0, team, num_teams, store)


def token_and_row(
    spec: AttentionSpec, head: jax.Array, packed: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of packed rows for a KV head: their query token, and their row of q and o."""
    token, member = divmod_by(packed, spec.group)
    return token, (token * spec.num_kv_heads + head) * spec.group + member


def _merge_kernel(
    items_ref,  # int32 [w, 10]
    o_partial_ref,  # as in `Partials`
    lse_partial_ref,
    whole_o_ref,  # o_ref's memory, with the tiles that are not split
    whole_lse_ref,
    o_ref,  # [t * h, dv]
    lse_ref,  # float32 [t * h]
    *,
    spec: AttentionSpec,
    merging: Merging,
    block_rows: int,
    parts: int,
):
    """Each split's program merges a share of its tile's rows. Grid: (kh * parts, w), as `Partials.column` and items."""
    column, work = pl.program_id(0), pl.program_id(1)
    item = WorkItem.read(items_ref, work)
    head, part = divmod_by(column, parts)
    columns = spec.num_kv_heads * parts
    begin = item.row_begin + part * block_rows
    num_rows = jnp.clip(item.row_end - begin, 0, block_rows)
    share = (num_rows + item.num_splits - 1) // item.num_splits
    first = item.split * share
    end = jnp.minimum(first + share, num_rows)

    def some_rows(i, _):
        r = first + i * merging.rows + jnp.arange(merging.rows, dtype=jnp.int32)
        mine = r < end
        o, lse = merge_rows(
            o_partial_ref,
            lse_partial_ref,
            (item.slot * columns + column) * block_rows + jnp.where(mine, r, first),
            columns * block_rows,
            item.num_splits,
            block=merging.states,
            empty_may_hold_anything=False,
        )
        _, row = token_and_row(spec, head, begin + r)
        cols = jnp.arange(o.shape[1], dtype=jnp.int32)
        inside = mine[:, None] & (cols < o_ref.shape[1])[None, :]
        plgpu.store(o_ref.at[row[:, None], cols[None, :]], o.astype(o_ref.dtype), mask=inside)
        plgpu.store(lse_ref.at[row], lse, mask=mine)

    @pl.when(item.num_splits > 1)
    def _():
        jax.lax.fori_loop(0, (end - first + merging.rows - 1) // merging.rows, some_rows, None)


def merge_apart(
    o: jax.Array,
    lse: jax.Array,
    o_partial: jax.Array,
    lse_partial: jax.Array,
    plan: AttentionPlan,
    merging: Merging,
    *,
    block_rows: int,
    name: str,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """(o [t * h, dv], lse [t * h]) with the rows of split tiles, whose states the partial ones are."""
    parts = plan.block_rows // block_rows
    merged = launch(
        functools.partial(
            _merge_kernel, spec=plan.spec, merging=merging, block_rows=block_rows, parts=parts
        ),
        dict(
            items_ref=plan.items,
            o_partial_ref=o_partial,
            lse_partial_ref=lse_partial,
            whole_o_ref=o,
            whole_lse_ref=lse,
        ),
        dict(o_ref=like(o), lse_ref=like(lse)),
        name=f"{name}_merge",
        grid=(plan.num_kv_heads * parts, plan.items.shape[0]),
        num_warps=4,
        num_stages=1,
        interpret=interpret,
        aliases=dict(whole_o_ref="o_ref", whole_lse_ref="lse_ref"),
    )
    return merged["o_ref"], merged["lse_ref"]
