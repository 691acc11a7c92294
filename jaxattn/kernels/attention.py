"""Paged FlashAttention-2: prefill, append and split-K decode, which is a prefill of one token a request.

    s_j = <q, k_j>,   o = sum_j softmax_j(sm_scale s) v_j,   lse = log sum_j exp(sm_scale s_j)

A program takes one work item of the plan: up to `block_rows` packed rows (query token x query head of one KV
group, so that one K tile serves the whole group) against the item's keys. It visits the tiles that every row sees
in full without masks, then the few at the causal boundary and at the end with masks. A whole tile writes the
output; a split one writes its partial attention state in float32, for `merge_splits`.

Axes: t query tokens, h query heads, kh KV heads, g = h // kh, d head dim, w work items, r rows of a tile.
Grid: (kh, w), KV heads fastest: neighbours read one page together. H200, items fastest: decode 32 x 4096 165 us
instead of 127, prefill 1 x 4096 390 us instead of 372; only 1 x 16384 gains, 5053 us instead of 5362 (L2).
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
from jaxattn.kernels.merge import merge_splits
from jaxattn.kv_cache import PagedKVCache, RowStrides
from jaxattn.plan import DecodePlan, PrefillPlan, WorkItem


@dataclasses.dataclass(frozen=True)
class Config:
    block_kv: int  # keys of a tile
    num_warps: int
    num_stages: int
    # Load the next tile's page ids an iteration ahead, or leave that to the pipeliner, which gives up a stage
    # of K and V for it. H200, page size 16. Prefill 1 x 16384: 411 TFLOP/s ahead, 369 not. Decode, where the
    # first tile's latency counts: 1 x 8192 takes 13.4 us ahead, 9.6 not; 32 x 64 x 32 heads 16.3 and 12.0.
    pages_ahead: bool


def default_config(
    block_rows: int, head_dim: int, dtype: jax.typing.DTypeLike, *, wgmma: bool
) -> Config:
    """The tile for a shape; a pure function of it. Figures: H200, kernel time."""
    ahead = block_rows > 32
    if jnp.dtype(dtype) == jnp.float32:
        if head_dim > 128:
            # The largest tile whose operands an A100's shared memory holds.
            return Config(block_kv=16, num_warps=8, num_stages=2, pages_ahead=ahead)
        # 32 x 4096: 8 warps take 1.8 times as long.
        return Config(block_kv=32, num_warps=4, num_stages=2, pages_ahead=ahead)
    if ahead:
        if head_dim > 128:
            # 4 x 4096: 343 TFLOP/s; 8 warps 153, 64 keys with 8 warps 217.
            return Config(block_kv=32, num_warps=4, num_stages=2, pages_ahead=True)
        if head_dim > 64 and not wgmma:
            # mma.sync keeps its operands in registers: for an A100, 4 warps spill and 8 do not.
            return Config(block_kv=64, num_warps=8, num_stages=3, pages_ahead=True)
        # 1 x 16384: 411 TFLOP/s; 4 stages 308. In prototypes 32 keys cost a quarter, 128 keys a third.
        return Config(block_kv=64, num_warps=4, num_stages=3, pages_ahead=True)
    if head_dim > 128:
        # 32 x 4096: 249 us; 4 warps 268, 32 keys 302.
        return Config(block_kv=64, num_warps=8, num_stages=2, pages_ahead=False)
    if head_dim <= 64:
        # 64 x 8192: 248 us; 64 keys 331.
        return Config(block_kv=128, num_warps=4, num_stages=3, pages_ahead=False)
    # 64 x 8192: 474 us; 4 warps 538. 32 x 4096: 125 us; 4 warps 128.
    return Config(block_kv=64, num_warps=2, num_stages=4, pages_ahead=False)


def _attention_kernel(
    q_ref,  # [t * h, d]
    k_ref,  # [num_rows, d]
    v_ref,  # [num_rows, d]
    items_ref,  # int32 [w, 7]
    *refs,  # indices int32 [capacity] unless contiguous; then o, lse, partial o, partial lse
    num_qo_heads: int,
    num_kv_heads: int,
    block_rows: int,
    config: Config,
    page_size: int,
    causal: bool,
    strides: RowStrides,
    softmax: OnlineSoftmax,
):
    *indices_ref, o_ref, lse_ref, o_partial_ref, lse_partial_ref = refs
    head, work = pl.program_id(0), pl.program_id(1)
    d, block_kv = q_ref.shape[1], config.block_kv
    group = num_qo_heads // num_kv_heads
    item = WorkItem(*(items_ref[work, i] for i in range(len(WorkItem._fields))))

    # 1. The rows of this tile.
    row = item.row_begin + jnp.arange(block_rows, dtype=jnp.int32)
    owned = row < item.row_end
    token, member = divmod_by(row, group)
    out_row = token * num_qo_heads + head * group + member
    cols = jnp.arange(1 << (d - 1).bit_length(), dtype=jnp.int32)
    inside = owned[:, None] & (cols < d)[None, :]
    q = load_rows(q_ref, jnp.where(owned, out_row, 0), cols, inside)

    # 2. The keys: the tiles before `whole` are seen in full by every row, those before `end` in part.
    kv = PagedTile(
        k_ref,
        v_ref,
        indices_ref[0] if indices_ref else None,
        item.page_start,
        head,
        strides,
        page_size,
        block_kv,
        d,
    )
    end = item.kv_end
    whole = end
    if causal:
        whole = jnp.clip(item.row_begin // group + item.causal_offset, item.kv_begin, end)

    def step(i, carry, masked):
        state, pages = carry
        position = item.kv_begin + i * block_kv
        if config.pages_ahead:
            next_pages = kv.pages(position + block_kv, end)
        else:
            pages, next_pages = kv.pages(position, end if masked else None), None
        k, v = kv.load(pages, position, end if masked else None)
        s = softmax.dot(q, k, trans_b=True)
        if masked:
            key = kv.tokens(position)
            seen = jnp.broadcast_to((key < end)[None, :], s.shape)
            if causal:
                seen &= key[None, :] < (token + item.causal_offset)[:, None]
            s = jnp.where(seen, s, -jnp.inf)
        return softmax.update(state, s, v), next_pages

    num_whole = (whole - item.kv_begin) // block_kv
    num_tiles = (end - item.kv_begin + block_kv - 1) // block_kv
    first_pages = kv.pages(item.kv_begin, end) if config.pages_ahead else None
    carry = softmax.init(block_rows, cols.size), first_pages
    carry = jax.lax.fori_loop(0, num_whole, functools.partial(step, masked=False), carry)
    carry = jax.lax.fori_loop(num_whole, num_tiles, functools.partial(step, masked=True), carry)

    # 3. A whole tile is the answer; a split one is a partial state.
    o, lse = softmax.finalize(carry[0])
    alone = item.slot < 0
    done = owned & alone
    plgpu.store(
        o_ref.at[out_row[:, None], cols[None, :]], o.astype(o_ref.dtype), mask=inside & alone
    )
    plgpu.store(lse_ref.at[out_row], lse, mask=done)
    partial_row = (item.slot * num_kv_heads + head) * block_rows + jnp.arange(
        block_rows, dtype=jnp.int32
    )
    plgpu.store(
        o_partial_ref.at[partial_row[:, None], cols[None, :]],
        o,
        mask=inside & jnp.logical_not(alone),
    )
    plgpu.store(lse_partial_ref.at[partial_row], lse, mask=owned & jnp.logical_not(alone))


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
    config = default_config(plan.block_rows, d, q.dtype, wgmma=has_wgmma())
    num_partials = plan.num_slots * plan.num_kv_heads * plan.block_rows
    indices = () if plan.page_indices is None else (plan.page_indices,)
    o, lse, o_partial, lse_partial = launch(
        functools.partial(
            _attention_kernel,
            num_qo_heads=h,
            num_kv_heads=plan.num_kv_heads,
            block_rows=plan.block_rows,
            config=config,
            page_size=plan.page_size,
            causal=plan.causal,
            strides=strides,
            softmax=OnlineSoftmax(sm_scale, interpret),
        ),
        q.reshape(t * h, d),
        k_rows,
        v_rows,
        plan.items,
        *indices,
        name=name,
        grid=(plan.num_kv_heads, plan.items.shape[0]),
        out_shape=[
            ((t * h, d), q.dtype),
            ((t * h,), jnp.float32),
            ((num_partials, d), jnp.float32),
            ((num_partials,), jnp.float32),
        ],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )
    o, lse = merge_splits(o, lse, o_partial, lse_partial, plan, interpret=interpret)
    return o.reshape(t, h, d), lse.reshape(t, h)
