"""From a layer's projection to its attention in one launch: the queries and keys of each token,
normed if the model norms them, are rotated; the queries are returned, and the keys and the values
written to the pages of a KV cache, in place.

    x = x / sqrt(mean(x^2) + eps) * weight           of each query and key head, if there are weights
    y1 = x1 cos - x2 sin,   y2 = x2 cos + x1 sin     as in rope.py

in float32, rounded once: q to its own dtype, k and v to the cache's, by its scales. `_page_slots` says
where a token goes and how it is stored; of a token without a slot, only the queries are computed.

Axes: t tokens, h query heads, kh KV heads, d head dim, dv that of V, r = rotary_dim / 2 pairs, b requests.
Grid: (t / block_tokens * head_blocks): a program takes a block of the query heads and a block of the
KV heads of a few tokens.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxattn.device import check_fp8
from jaxattn.kernels.triton._heads import Heads, Rotary, default_config
from jaxattn.kernels.triton._launch import Out, launch, like
from jaxattn.kernels.triton._page_slots import Pages, PageSlots, given_scales, rows_of, with_rows
from jaxattn.kernels.triton._rows import Rows, block_of, divmod_by, load
from jaxattn.kv_cache import PagedKVCache
from jaxattn.page_table import PageTable


def _rope_append_kernel(
    qkv_refs,  # [t * (h + 2 * kh), d]: a token's heads of q, of k, of v; or q [t * h, d], k and v [t * kh, d] apart
    batch_ref,  # int32 [t]
    positions_ref,  # int32 [t]
    rope_positions_ref,  # int32 [t], rows of the table; None: positions_ref's
    table_ref,  # float32 [max_position, 2 * r], cosines, then sines
    indptr_ref,  # int32 [b + 1]
    indices_ref,  # int32 [capacity]
    weight_refs,  # q's and k's norm weights [1, d]; or none
    scale_refs,  # scales that are given, or None
    cache_refs,  # the memory of written_refs
    q_ref,  # [t * h, d]
    written_refs,  # what `rows_of` lists
    *,
    rotary: Rotary,
    slots: PageSlots,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    block_tokens: int,
    head_blocks: int,
):
    pages = Pages(slots, written_refs, scale_refs)
    (num_tokens,) = positions_ref.shape
    d = rotary.head_dim
    block, head_block = divmod_by(pl.program_id(0), head_blocks)
    token, exist = block_of(block, block_tokens, num_tokens)
    q_heads, kv_heads = (Heads.of(head_block, head_blocks, n) for n in (num_heads, num_kv_heads))

    # Loads start in this order, and the first use of one waits for it and holds up those behind:
    # first what waits for nothing, then what waits for the position and for the request.
    position, batch = load(positions_ref, token, exist), load(batch_ref, token, exist)
    row = position if rope_positions_ref is None else load(rope_positions_ref, token, exist)
    if len(qkv_refs) == 1:
        q_in = k_in = v_in = qkv_refs[0]
        first = token * (num_heads + 2 * num_kv_heads)
        first_k, first_v = first + num_heads, first + num_heads + num_kv_heads
    else:
        q_in, k_in, v_in = qkv_refs
        first, first_k = token * num_heads, token * num_kv_heads
        first_v = first_k
    q = [q_heads.rows(first, exist).load(q_in, run) for run in rotary.columns]
    k = [kv_heads.rows(first_k, exist).load(k_in, run) for run in rotary.columns]
    v = kv_heads.rows(first_v, exist).load(v_in, range(v_in.shape[1]))
    weight_row = Rows(jnp.zeros((1,) * (v.ndim - 1), jnp.int32))
    weights = [[weight_row.load(ref, run) for run in rotary.columns] for ref in weight_refs]
    cos, sin = rotary.load_row(table_ref, row)
    slot_row, has_slot = slots.rows(indptr_ref, indices_ref, batch, position, exist)

    if weights:
        q, k = (_norm(x, weight, d, eps) for x, weight in zip((q, k), weights))
    to_q = q_heads.rows(token * num_heads, exist)
    to = kv_heads.rows(slot_row, has_slot, slots.strides.head)
    for run, y in zip(rotary.columns, rotary.turn(q, cos, sin)):
        to_q.store(q_ref, run, y)
    pages.store_k(to, kv_heads.index, list(zip(rotary.columns, rotary.turn(k, cos, sin))))
    pages.store_v(to, kv_heads.index, [(range(v_in.shape[1]), v)])


def _norm(
    x: Sequence[jax.Array], weight: Sequence[jax.Array], head_dim: int, eps: float
) -> list[jax.Array]:
    """The RMSNorm of heads that come in runs of their dims, [t, h, ...] each, in float32."""
    x = [run.astype(jnp.float32) for run in x]
    total = sum(jnp.sum(run * run, axis=-1) for run in x)
    scale = jax.lax.rsqrt(total / head_dim + eps)[..., None]
    return [run * scale * w.astype(jnp.float32) for run, w in zip(x, weight)]


def rope_append(
    qkv: tuple[jax.Array, ...],
    batch_indices: jax.Array,
    positions: jax.Array,
    rope_positions: jax.Array | None,
    cos_sin_cache: jax.Array,
    norm_weights: tuple[jax.Array, jax.Array] | None,
    cache: PagedKVCache,
    table: PageTable,
    *,
    interleave: bool,
    eps: float,
    interpret: bool,
) -> tuple[jax.Array, PagedKVCache]:
    """The heads of q, k and v -> (q [t, h, d], the cache).

    qkv: one array [t, h + 2 * kh, d], or q [t, h, d], k [t, kh, d] and v [t, kh, dv]. norm_weights: of q and of k, [d].
    """
    t, num_heads, d = qkv[0].shape
    check_fp8(cache.dtype)
    num_kv_heads = cache.num_kv_heads
    if len(qkv) == 1:
        num_heads -= 2 * num_kv_heads
    config = default_config(t, (num_heads, num_kv_heads, num_kv_heads), d)
    weights = [weight.reshape(1, d) for weight in norm_weights or ()]
    rows = rows_of(cache)
    out = launch(
        functools.partial(
            _rope_append_kernel,
            rotary=Rotary(d, cos_sin_cache.shape[1], interleave),
            slots=PageSlots.of(cache, interpret=interpret),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            eps=eps,
            block_tokens=config.block_tokens,
            head_blocks=config.head_blocks,
        ),
        dict(
            qkv_refs=[x.reshape(-1, x.shape[-1]) for x in qkv],
            batch_ref=batch_indices,
            positions_ref=positions,
            rope_positions_ref=rope_positions,
            table_ref=cos_sin_cache,
            indptr_ref=table.indptr,
            indices_ref=table.indices,
            weight_refs=weights,
            scale_refs=given_scales(cache),
            cache_refs=rows,
        ),
        dict(q_ref=Out((t * num_heads, d), qkv[0].dtype), written_refs=like(rows)),
        name="jaxattn_rope_append_paged_kv_cache",
        grid=(pl.cdiv(t, config.block_tokens) * config.head_blocks,),
        num_warps=config.num_warps,
        num_stages=1,
        interpret=interpret,
        aliases=dict(cache_refs="written_refs"),
    )
    return out["q_ref"].reshape(t, num_heads, d), with_rows(cache, out["written_refs"])
