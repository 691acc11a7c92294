"""Paged FlashAttention-2: prefill, append and split-K decode, which is a prefill of one token a request.

    s_j = <q, k_j>,   o = sum_j softmax_j(sm_scale s) v_j,   lse = log sum_j exp(sm_scale s_j)

A program takes one work item of the plan: up to `block_rows` packed rows (query token x query head of one KV
group, so that one K tile serves the whole group) against the item's keys. Scores are masked in the few tiles that
not every row sees in full: at the causal boundary and at the end. A whole tile writes the output. A split one writes
its partial attention state in float32, and the program that finishes its tile last merges the tile's states; where they
are many, the last of each team of programs merges the team's before. The order is that of the splits, whoever is last:
results do not depend on timing.

Axes: t query tokens, h query heads, kh KV heads, g = h // kh, d head dim, w work items, r rows of a program, of which
`parts` share a plan's tile where registers hold no whole one.
Grid: (kh, w, parts), KV heads fastest: neighbours read one page together. H200, an earlier kernel with items fastest:
decode 32 x 4096 165 us instead of 127, prefill 1 x 4096 390 us instead of 372; only 1 x 16384 gained, 5053 us for
5362.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxattn.device import has_wgmma
from jaxattn.kernels._launch import launch
from jaxattn.kernels._online_softmax import OnlineSoftmax
from jaxattn.kernels._paged_tile import PagedTile, divmod_by, load_rows
from jaxattn.kernels._rows import pow2
from jaxattn.kernels.merge import merge_rows
from jaxattn.kv_cache import PagedKVCache, RowStrides
from jaxattn.plan import MAX_FEW_ROWS, MID_ROWS, DecodePlan, PrefillPlan, WorkItem


@dataclasses.dataclass(frozen=True)
class Config:
    block_rows: int  # of a program; those of a plan's tile, or a part of them
    block_kv: int  # keys of a tile
    num_warps: int
    num_stages: int


def default_config(
    block_rows: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    *,
    group: int,
    programs_per_sm: int,
    paged: bool,
    wgmma: bool,
) -> Config:
    """The tile for a shape; a pure function of it. Figures: H200, kernel time, page size 16, head_dim 128."""
    if jnp.dtype(dtype) == jnp.float32:
        # What shared memory and registers hold.
        if head_dim > 128:
            return Config(min(block_rows, 32), block_kv=16, num_warps=4, num_stages=2)
        # 32 x 4096, an earlier kernel: 8 warps took 1.8 times as long.
        return Config(min(block_rows, 64), block_kv=32, num_warps=4, num_stages=2)
    if head_dim > 256:
        # What shared memory holds; not tuned.
        return Config(min(block_rows, 32), block_kv=32, num_warps=4, num_stages=2)
    if block_rows == MID_ROWS and wgmma:
        # They wait for memory, with many loads in flight. 32 x 16 on 4096, head_dim 256: 268 us, one program at a time;
        # a stage less, two of them, 274; 64 keys 314.
        if head_dim > 128:
            return Config(block_rows, block_kv=32, num_warps=4, num_stages=5)
        # Head_dim 64: 71.9 us; a stage less 82, 64 keys 84.
        if head_dim <= 64:
            return Config(block_rows, block_kv=128, num_warps=4, num_stages=5)
        # 32 x 16 on 8192: 252 us, two programs at once; a stage less 278, 32 keys and 6 stages 301, 128 keys 334.
        return Config(block_rows, block_kv=64, num_warps=4, num_stages=5 if paged else 4)
    if block_rows > MAX_FEW_ROWS:
        if head_dim > 128:
            # 4 x 4096, head_dim 256: 446 TFLOP/s; 32 keys 373, 64 rows 373.
            return Config(block_rows, block_kv=64, num_warps=8, num_stages=3 if paged else 2)
        if head_dim > 64 and not wgmma:
            # mma.sync keeps its operands in registers: for an A100, 4 warps spill and 8 do not.
            return Config(min(block_rows, 64), block_kv=64, num_warps=8, num_stages=3)
        if head_dim <= 64 and wgmma:
            # 4 x 4096, head_dim 64: 767 us, although registers do for one product at a time only (C7511); 64 keys 849.
            return Config(block_rows, block_kv=128, num_warps=4, num_stages=2)
        # 4 x 4096: 473 TFLOP/s; 2 stages 455. With a loop of its own for masked tiles, 128 rows 461, 64 rows 398, 256
        # rows and 16 warps 450. One stage is that of the page ids: contiguous keys want 2 (500 TFLOP/s), with which two
        # programs fit on a multiprocessor.
        return Config(block_rows, block_kv=64, num_warps=4, num_stages=4 if paged else 2)
    if programs_per_sm == 2:
        # Two tiles of keys at once. 8 x 4096: 37.1 us; 128 keys 38.3, one tile at once 39.8.
        return Config(block_rows, block_kv=64, num_warps=4, num_stages=5)
    if head_dim > 128:
        # 32 x 4096, head_dim 256: 250.2 us; 64 keys and 8 warps 252.7.
        return Config(block_rows, block_kv=32, num_warps=2, num_stages=4)
    if head_dim <= 64:
        # 32 x 4096, head_dim 64: 69.5 us; 64 keys and 2 warps 72.5.
        return Config(block_rows, block_kv=128, num_warps=4, num_stages=3)
    if group == 1:
        # 32 x 64 of 32 heads: 13.0 us; 64 keys and 4 warps 14.6.
        return Config(block_rows, block_kv=32, num_warps=2, num_stages=4)
    # 32 x 4096: 128.1 us; 4 warps 129.5, 32 keys 133.8.
    return Config(block_rows, block_kv=64, num_warps=2, num_stages=4)


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
        cls, plan: DecodePlan | PrefillPlan, config: Config, head_dim: int, *, wgmma: bool
    ) -> "Merging | None":
        """None where no tile is ever split."""
        if not plan.num_slots:
            return None
        group = plan.num_qo_heads // plan.num_kv_heads
        most = min(group, config.block_rows) if isinstance(plan, DecodePlan) else config.block_rows
        # 64 elements a thread: half of what the accumulator of the largest tiles takes.
        elements = 2048 * config.num_warps // pow2(head_dim)
        if config.block_rows == MID_ROWS and wgmma:
            # Half the accumulator, twice the states. 16 on 16384, 32 splits: 35.6 us; in one step 40.6, and of 2 states
            # 48.8. 32 on 32768: teams of 8 63.4, of 4 58.6; but 16 on 4096: 18.3 and 20.1.
            return cls(min(pow2(most), elements // 2), 4, team=8)
        if config.block_rows > MAX_FEW_ROWS:
            # 512 on 32768, two splits: 589 us; 16 rows of 4 states 603, twice as many elements 598. The mere code for
            # teams: 598 for 587, and without splits 4 x 4096 1176 for 1153.
            return cls(min(pow2(most), elements // 2), 2, team=None)
        # Few programs leave registers for twice as many, except in code for an A100, which would spill. Decode of
        # 1 x 8192: 15.2 us; 16.0.
        elements *= 2 if plan.programs_per_sm == 2 and wgmma else 1
        rows = min(pow2(most), 16)
        states = min(32, max(1, elements // rows))
        # Two steps cost 1.1 us. 1 x 32768 of 8/1 heads, 256 splits: 13.7 us; teams of 32 15.4, one step 21.4; of 32/4
        # heads, 64 splits: 24.8; 25.9. Many programs have many splits only where one request is far longer than all.
        team = 96 if plan.programs_per_sm > 2 else 16 if states <= 16 else 64
        return cls(rows, states, team)


def _attention_kernel(
    q_ref,  # [t * h, d]
    k_ref,  # [num_rows, d]
    v_ref,  # [num_rows, d]
    items_ref,  # int32 [w, 9]
    *more,  # as named below
    num_qo_heads: int,
    num_kv_heads: int,
    parts: int,
    config: Config,
    page_size: int,
    causal: bool,
    strides: RowStrides,
    softmax: OnlineSoftmax,
    paged: bool,
    merging: Merging | None,
):
    refs = list(more)
    indices_ref = refs.pop(0) if paged else None  # int32 [capacity]
    if merging:
        del refs[0]  # the zeros that are arrivals_ref's memory
        # float32 [num_slots * kh * parts * r, d] and without d: the states of split tiles; int32
        # [num_slots * kh * parts]: how many programs of a tile, or of a team, have arrived, at its first slot; how many
        # teams, at the tile's second.
        *refs, o_partial_ref, lse_partial_ref, arrivals_ref = refs
    barrier = (lambda: None) if softmax.interpret else plgpu.debug_barrier
    o_ref, lse_ref = refs  # [t * h, d], float32 [t * h]
    head, work, part = (pl.program_id(i) for i in range(3))
    d, block_rows, block_kv = q_ref.shape[1], config.block_rows, config.block_kv
    group = num_qo_heads // num_kv_heads

    def read_item():
        item = WorkItem(*(items_ref[work, i] for i in range(len(WorkItem._fields))))
        if parts == 1:
            return item
        begin = item.row_begin + part * block_rows
        end = jnp.minimum(item.row_end, begin + block_rows)
        # A part without rows needs no keys.
        kv_end = jnp.where(begin < end, item.kv_end, item.kv_begin)
        return item._replace(row_begin=begin, row_end=end, kv_end=kv_end)

    def token_and_row(row):
        """Of packed rows: their query token, and their row of q and o."""
        token, member = divmod_by(row, group)
        return token, (token * num_kv_heads + head) * group + member

    # 1. The rows of this program.
    item = read_item()
    r = jnp.arange(block_rows, dtype=jnp.int32)
    cols = jnp.arange(pow2(d), dtype=jnp.int32)
    token, q_row = token_and_row(item.row_begin + r)
    owned = item.row_begin + r < item.row_end
    inside = owned[:, None] & (cols < d)[None, :]
    q = load_rows(q_ref, jnp.where(owned, q_row, 0), cols, inside)

    # 2. The keys: the tiles before `whole` are seen in full by every row, those before `end` in part.
    kv = PagedTile(
        k_ref,
        v_ref,
        indices_ref,
        item.page_start,
        head,
        strides,
        page_size,
        block_kv,
        d,
        # Its address alone moves from tile to tile. H200, prefill of 4 x 4096, page size 64: 1162 -> 1135 us, 256:
        # 1171 -> 1140; but tiles of few rows, decode of 32 x 4096: 127.7 -> 132.6.
        page_at_once=block_rows > MAX_FEW_ROWS,
    )
    end = item.kv_end
    whole = end
    if causal:
        whole = jnp.clip(item.row_begin // group + item.causal_offset, item.kv_begin, end)

    def mask(s, position):
        key = kv.tokens(position)
        seen = jnp.broadcast_to((key < end)[None, :], s.shape)
        if causal:
            seen &= key[None, :] < (token + item.causal_offset)[:, None]
        return jnp.where(seen, s, -jnp.inf)

    def step(i, state):
        position = item.kv_begin + i * block_kv
        k, v = kv.load(position, end)
        s = softmax.dot(q, k, trans_b=True)
        # Most tiles are seen in full by every row.
        s = jax.lax.cond(position + block_kv > whole, mask, lambda s, position: s, s, position)
        return softmax.update(state, s, v)

    num_tiles = (end - item.kv_begin + block_kv - 1) // block_kv
    state = jax.lax.fori_loop(0, num_tiles, step, softmax.init(block_rows, block_kv, cols.size))

    # 3. A whole tile is the answer; a split one is a partial state.
    o, lse = softmax.finalize(state)
    # Read again, the item's fields leave the loop above the registers that its rows would take there.
    item = read_item()

    def store_at(o_ref, lse_ref, row, r, o, lse, chosen):
        owned = (item.row_begin + r < item.row_end) & chosen
        inside = owned[:, None] & (cols < d)[None, :]
        plgpu.store(o_ref.at[row[:, None], cols[None, :]], o.astype(o_ref.dtype), mask=inside)
        plgpu.store(lse_ref.at[row], lse, mask=owned)

    def store(r, o, lse, chosen=True):
        store_at(o_ref, lse_ref, token_and_row(item.row_begin + r)[1], r, o, lse, chosen)

    store(r, o, lse, item.num_splits == 1)
    if merging is None:
        return

    @pl.when(item.num_splits > 1)
    def _():
        # A column is the program's place among those of an item.
        column, num_columns = head * parts + part, num_kv_heads * parts
        # Without code for them where no tile has as many splits.
        num_slots = arrivals_ref.shape[0] // num_columns
        team = merging.team if merging.team and num_slots > merging.team else None

        def first_row(split):
            return ((item.slot + split) * num_columns + column) * block_rows

        def store_partial(split, r, o, lse, chosen=True):
            store_at(o_partial_ref, lse_partial_ref, first_row(split) + r, r, o, lse, chosen)

        def is_last(split, count):
            """Counts this program at the counter of a split; whether it is the last of so many."""
            # Every thread's stores come before the program's arrival, and the last one's loads after it.
            barrier()
            at = (item.slot + split) * num_columns + column
            return plgpu.atomic_add(arrivals_ref, (at,), jnp.int32(1)) == count - 1

        def merge(split, stride, count, write):
            """Merges `count` states, every stride-th from `split` on."""

            def some_rows(i, _):
                r = i * merging.rows + jnp.arange(merging.rows, dtype=jnp.int32)
                o, lse = merge_rows(
                    o_partial_ref,
                    lse_partial_ref,
                    first_row(split) + r,
                    stride * num_columns * block_rows,
                    count,
                    block=merging.states,
                    empty_may_hold_anything=False,
                )
                write(r, o, lse)

            blocks = (item.row_end - item.row_begin + merging.rows - 1) // merging.rows
            jax.lax.fori_loop(0, blocks, some_rows, None)

        store_partial(item.split, r, o, lse)
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
            barrier()  # every thread has read the captain's state
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


def paged_attention(
    q: jax.Array,
    cache: PagedKVCache,
    plan: DecodePlan | PrefillPlan,
    *,
    sm_scale: float,
    name: str,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Attention over a paged cache: (o [t, h, d] in q's dtype, lse float32 [t, h], natural log)."""
    rows = [x.reshape(-1, cache.head_dim) for x in cache.arrays]
    return _attention(
        q,
        rows[0],
        rows[-1],
        plan,
        strides=cache.row_strides,
        sm_scale=sm_scale,
        name=name,
        interpret=interpret,
    )


def contiguous_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    plan: PrefillPlan,
    *,
    kv_layout: str,
    sm_scale: float,
    name: str,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Attention over contiguous k, v [tokens, kh, d] ("NHD") or [kh, tokens, d] ("HND"), as `paged_attention`."""
    a, b, d = k.shape
    slot, head = (b, 1) if kv_layout == "NHD" else (1, b)
    return _attention(
        q,
        k.reshape(a * b, d),
        v.reshape(a * b, d),
        plan,
        strides=RowStrides(page=0, slot=slot, head=head, value=0),
        sm_scale=sm_scale,
        name=name,
        interpret=interpret,
    )


def _attention(
    q: jax.Array,
    k_rows: jax.Array,
    v_rows: jax.Array,
    plan: DecodePlan | PrefillPlan,
    *,
    strides: RowStrides,
    sm_scale: float,
    name: str,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    t, h, d = q.shape
    config = default_config(
        plan.block_rows,
        d,
        q.dtype,
        group=h // plan.num_kv_heads,
        programs_per_sm=plan.programs_per_sm,
        paged=plan.page_indices is not None,
        wgmma=has_wgmma(),
    )
    merging = Merging.of(plan, config, d, wgmma=has_wgmma())
    parts = plan.block_rows // config.block_rows
    indices = () if plan.page_indices is None else (plan.page_indices,)
    columns = plan.num_slots * plan.num_kv_heads * parts
    # XLA writes the zeros of all the layers of a step in one kernel.
    arrivals = (jnp.zeros(columns, jnp.int32),) if merging else ()
    states = [
        ((columns * config.block_rows, d), jnp.float32),
        ((columns * config.block_rows,), jnp.float32),
        ((columns,), jnp.int32),
    ]
    o, lse, *_ = launch(
        functools.partial(
            _attention_kernel,
            num_qo_heads=h,
            num_kv_heads=plan.num_kv_heads,
            parts=parts,
            config=config,
            page_size=plan.page_size,
            # Decode's one token sees all keys. A prefill without a mask says so by its offsets: compiled without the
            # comparison, the kernel spills.
            causal=isinstance(plan, PrefillPlan),
            strides=strides,
            softmax=OnlineSoftmax(
                sm_scale, late_sum=config.block_rows <= MAX_FEW_ROWS, interpret=interpret
            ),
            paged=plan.page_indices is not None,
            merging=merging,
        ),
        q.reshape(t * h, d),
        k_rows,
        v_rows,
        plan.items,
        *indices,
        *arrivals,
        name=name,
        grid=(plan.num_kv_heads, plan.items.shape[0], parts),
        out_shape=[((t * h, d), q.dtype), ((t * h,), jnp.float32), *(states if merging else ())],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
        aliases={4 + len(indices): 4} if merging else None,
    )
    return o.reshape(t, h, d), lse.reshape(t, h)
