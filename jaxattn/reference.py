"""One plain float32 oracle per op, with the op's signature; also what runs where there is no GPU.

Nothing here is tuned: each function is the definition of its op. All are differentiable. Attention oracles read
a plan's lengths and tables, never its work lists.

Axes: b requests, t query tokens, s key tokens, h query heads, kh KV heads, g = h // kh, d head dim, n pages,
p page size.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxattn.kv_cache import PagedKVCache, PageTable
from jaxattn.plan import DecodePlan, PrefillPlan

MAX_SCORES = 2**26  # scores held at once; query tokens are taken in blocks that stay below it


def attention(q: Array, k: Array, v: Array, mask: Array, sm_scale: float) -> tuple[Array, Array]:
    """Softmax attention, `o_i = sum_j softmax_j(sm_scale <q_i, k_j>) v_j` over the keys that mask[i, j] admits.

    Args:
      q: [t, h, d].
      k, v: [s, kh, d]; query head i uses KV head i // g. Keys that no query sees may be NaN.
      mask: bool [t, s].
      sm_scale: softmax scale.

    Returns:
      (o [t, h, d] in q's dtype, lse float32 [t, h], natural log); a query without keys gives 0 and -inf.
    """
    heads = k.shape[1]
    t, h, d = q.shape
    seen = mask.any(axis=0)[:, None, None]
    k = jnp.where(seen, k, 0).astype(jnp.float32)
    v = jnp.where(seen, v, 0).astype(jnp.float32)
    grouped = q.astype(jnp.float32).reshape(t, heads, h // heads, d)
    scores = jnp.einsum("tkgd,skd->tkgs", grouped, k, precision="highest") * sm_scale
    scores = jnp.where(mask[:, None, None, :], scores, -jnp.inf)
    peak = jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf)
    peak = jax.lax.stop_gradient(jnp.where(peak == -jnp.inf, 0, peak))
    weights = jnp.exp(scores - peak)
    total = weights.sum(axis=-1)
    o = jnp.einsum("tkgs,skd->tkgd", weights, v, precision="highest")
    o = o / jnp.where(total == 0, 1, total)[..., None]
    lse = jnp.where(total == 0, -jnp.inf, jnp.log(jnp.where(total == 0, 1, total)) + peak[..., 0])
    return o.reshape(t, h, d).astype(q.dtype), lse.reshape(t, h)


def _blocked_attention(
    q: Array,
    k: Array,
    v: Array,
    see: tuple[Array, ...],
    mask_of: Callable[..., Array],
    sm_scale: float,
) -> tuple[Array, Array]:
    """`attention` a block of query tokens at a time; mask_of(*see[block]) is the block's mask."""
    t, h, d = q.shape
    block = max(1, MAX_SCORES // max(1, k.shape[0] * h))
    if block >= t:
        return attention(q, k, v, mask_of(*see), sm_scale)

    def blocks(x: Array) -> Array:
        padding = [(0, -t % block)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding, mode="edge").reshape(-1, block, *x.shape[1:])

    o, lse = jax.lax.map(
        lambda args: attention(args[0], k, v, mask_of(*args[1:]), sm_scale),
        tuple(map(blocks, (q, *see))),
    )
    return o.reshape(-1, h, d)[:t], lse.reshape(-1, h)[:t]


def _owned_tokens(cache: PagedKVCache, plan: DecodePlan | PrefillPlan) -> tuple[Array, ...]:
    """Every entry of the page table as tokens: k, v [s, kh, d], their request and position, int32 [s].

    The request of a slot that no request owns is -1.
    """
    assert plan.page_indices is not None  # the ops refuse a plan for contiguous keys
    p = cache.page_size
    entry = jnp.arange(plan.page_indices.size, dtype=jnp.int32)
    request = jnp.searchsorted(plan.page_start, entry, side="right").astype(jnp.int32) - 1
    request = jnp.repeat(request, p)
    first = jnp.repeat(entry, p) - plan.page_start.at[request].get(mode="clip")
    position = first * p + jnp.tile(jnp.arange(p, dtype=jnp.int32), entry.size)
    owned = (request >= 0) & (position < plan.kv_len.at[request].get(mode="clip"))

    def tokens(pages):
        pages = pages if cache.layout == "NHD" else pages.swapaxes(1, 2)
        return pages.at[plan.page_indices].get(mode="clip").reshape(-1, *pages.shape[2:])

    return tokens(cache.k), tokens(cache.v), jnp.where(owned, request, -1), position


def paged_decode(
    q: Array,
    paged_kv_cache: PagedKVCache,
    plan: DecodePlan,
    *,
    sm_scale: float,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """One query token per request against its paged keys."""
    k, v, request, _ = _owned_tokens(paged_kv_cache, plan)
    row = jnp.arange(q.shape[0], dtype=jnp.int32)
    o, lse = _blocked_attention(
        q, k, v, (row,), lambda row: row[:, None] == request[None, :], sm_scale
    )
    return (o, lse) if return_lse else o


def _prefill(q, k, v, key_request, key_position, plan, sm_scale, return_lse):
    row = jnp.arange(q.shape[0], dtype=jnp.int32)
    request = jnp.searchsorted(plan.qo_indptr[1:], row, side="right").astype(jnp.int32)
    qo_end = plan.qo_indptr[1:].at[request].get(mode="clip")
    kv_len = plan.kv_len.at[request].get(mode="clip")
    last_key = row - qo_end + kv_len if plan.causal else kv_len - 1

    def mask(request, last_key):
        own = request[:, None] == key_request[None, :]
        return own & (key_position[None, :] <= last_key[:, None])

    o, lse = _blocked_attention(q, k, v, (request, last_key), mask, sm_scale)
    return (o, lse) if return_lse else o


def paged_prefill(
    q: Array,
    paged_kv_cache: PagedKVCache,
    plan: PrefillPlan,
    *,
    sm_scale: float,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Ragged queries against paged keys; causal is bottom-right aligned."""
    k, v, request, position = _owned_tokens(paged_kv_cache, plan)
    return _prefill(q, k, v, request, position, plan, sm_scale, return_lse)


def ragged_prefill(
    q: Array, k: Array, v: Array, plan: PrefillPlan, *, sm_scale: float, return_lse: bool = False
) -> Array | tuple[Array, Array]:
    """Ragged queries against ragged contiguous keys, k and v [s, kh, d]."""
    token = jnp.arange(k.shape[0], dtype=jnp.int32)
    request = jnp.searchsorted(plan.page_start, token, side="right").astype(jnp.int32) - 1
    position = token - plan.page_start.at[request].get(mode="clip")
    owned = (request >= 0) & (position < plan.kv_len.at[request].get(mode="clip"))
    return _prefill(q, k, v, jnp.where(owned, request, -1), position, plan, sm_scale, return_lse)


def merge_states(v: Array, s: Array, *, lse_base: str = "ln") -> tuple[Array, Array]:
    """Attention states of disjoint key sets into one: `lse = logsumexp_j s_j`, `o = sum_j exp(s_j - lse) v_j`.

    Args:
      v: [n, states, h, d].
      s: [n, states, h]; -inf marks an empty state, whose v is ignored.
      lse_base: "ln" or "log2", the logarithm of s.

    Returns:
      (v [n, h, d] in v's dtype, s float32 [n, h]).
    """
    exp, log = (jnp.exp, jnp.log) if lse_base == "ln" else (jnp.exp2, jnp.log2)
    s = s.astype(jnp.float32)
    peak = jnp.max(s, axis=1, keepdims=True, initial=-jnp.inf)
    peak = jax.lax.stop_gradient(jnp.where(peak == -jnp.inf, 0, peak))
    weights = exp(s - peak)
    total = weights.sum(axis=1)
    empty = total == 0
    values = jnp.where((s == -jnp.inf)[..., None], 0, v).astype(jnp.float32)
    o = (weights[..., None] * values).sum(axis=1) / jnp.where(empty, 1, total)[..., None]
    lse = jnp.where(empty, -jnp.inf, log(jnp.where(empty, 1, total)) + peak[:, 0])
    return o.astype(v.dtype), lse


def merge_state(
    v_a: Array, s_a: Array, v_b: Array, s_b: Array, *, lse_base: str = "ln"
) -> tuple[Array, Array]:
    """Two attention states into one; v [n, h, d], s [n, h]."""
    v, s = jnp.stack([v_a, v_b], axis=1), jnp.stack([s_a, s_b], axis=1)
    return merge_states(v, s, lse_base=lse_base)


def merge_state_in_place(
    v: Array,
    s: Array,
    v_other: Array,
    s_other: Array,
    mask: Array | None = None,
    *,
    lse_base: str = "ln",
) -> tuple[Array, Array]:
    """`merge_state` in the rows that mask (bool [n]) selects; the other rows keep v and s."""
    merged_v, merged_s = merge_state(v, s, v_other, s_other, lse_base=lse_base)
    if mask is None:
        return merged_v, merged_s
    return jnp.where(mask[:, None, None], merged_v, v), jnp.where(mask[:, None], merged_s, s)


def rmsnorm(x: Array, weight: Array, *, eps: float, weight_offset: float = 0.0) -> Array:
    """`x / sqrt(mean(x^2) + eps) * (weight_offset + weight)` over the last axis, rounded once."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    weight = weight.astype(jnp.float32) + weight_offset
    return (x32 * scale * weight.reshape((1,) * (x.ndim - 1) + weight.shape)).astype(x.dtype)


def fused_add_rmsnorm(
    x: Array, residual: Array, weight: Array, *, eps: float, weight_offset: float = 0.0
) -> tuple[Array, Array]:
    """`residual' = x + residual` rounded once, and the norm of the unrounded float32 sum."""
    total = x.astype(jnp.float32) + residual.astype(jnp.float32)
    normed = rmsnorm(total, weight, eps=eps, weight_offset=weight_offset)
    return normed.astype(x.dtype), total.astype(residual.dtype)


def rope_frequencies(
    rotary_dim: int,
    rope_theta: float,
    rope_scale: float,
    low_freq_factor: float | None = None,
    high_freq_factor: float | None = None,
    old_context_len: int | None = None,
) -> Array:
    """float32 [rotary_dim // 2]: `theta^(-2i / rotary_dim) / rope_scale` (RoFormer, eq. 15), or, with the last
    three arguments, Llama-3.1's interpolation between scaled and unscaled frequencies by wavelength."""
    exponent = jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim
    freq = jnp.float32(rope_theta) ** -exponent
    if low_freq_factor is None or high_freq_factor is None or old_context_len is None:
        return freq / rope_scale
    wavelength = 2 * math.pi / freq
    smooth = (old_context_len / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    smooth = jnp.clip(smooth, 0, 1)
    return (1 - smooth) * freq / rope_scale + smooth * freq


def rope(
    query: Array, key: Array, positions: Array, cos_sin_cache: Array, *, interleave: bool
) -> tuple[Array, Array]:
    """Rotary embedding: pairs (x1, x2) of the first rotary_dim dims become
    `(x1 cos - x2 sin, x2 cos + x1 sin)`; the other dims are copied (RoFormer, eq. 34).

    Args:
      query, key: [t, heads, d].
      positions: [t], rows of the table; a position outside it gives NaN.
      cos_sin_cache: float32 [max_position, rotary_dim], cos in the first half, sin in the second.
      interleave: pairs are (even, odd) neighbours instead of the two halves.
    """
    half = cos_sin_cache.shape[1] // 2
    inside = (positions >= 0) & (positions < cos_sin_cache.shape[0])
    row = cos_sin_cache.at[positions].get(mode="clip")
    row = jnp.where(inside[:, None], row, jnp.nan)
    cos, sin = row[:, None, :half], row[:, None, half:]

    def rotate(x):
        x32 = x[..., : 2 * half].astype(jnp.float32)
        x1, x2 = (
            (x32[..., ::2], x32[..., 1::2]) if interleave else (x32[..., :half], x32[..., half:])
        )
        y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
        if interleave:
            y = jnp.stack([y1, y2], axis=-1).reshape(x32.shape)
        else:
            y = jnp.concatenate([y1, y2], axis=-1)
        return jnp.concatenate([y.astype(x.dtype), x[..., 2 * half :]], axis=-1)

    return rotate(query), rotate(key)


def append_paged_kv_cache(
    append_key: Array,
    append_value: Array,
    batch_indices: Array,
    positions: Array,
    paged_kv_cache: PagedKVCache,
    page_table: PageTable,
) -> PagedKVCache:
    """Writes token i at `positions[i]` of request `batch_indices[i]`, in the cache's dtype.

    A token whose request is not in [0, b) or whose position lies past the request's pages is dropped.
    """
    cache, table = paged_kv_cache, page_table
    p = cache.page_size
    valid = (batch_indices >= 0) & (batch_indices < table.batch_size) & (positions >= 0)
    first, count = (x.at[batch_indices].get(mode="fill", fill_value=0) for x in table.rows())
    valid &= positions // p < count
    page = table.indices.at[jnp.where(valid, first + positions // p, 0)].get(mode="clip")
    valid &= (page >= 0) & (page < cache.num_pages)
    page = jnp.where(valid, page, cache.num_pages)
    slot = positions % p

    def write(pages, tokens, *where):
        at = (page, *where, slot) if cache.layout == "NHD" else (page, *where, slice(None), slot)
        return pages.at[at].set(tokens.astype(pages.dtype), mode="drop")

    if cache.combined:
        data = write(write(cache.data, append_key, 0), append_value, 1)
    else:
        data = (write(cache.k, append_key), write(cache.v, append_value))
    return PagedKVCache(data, cache.layout)


def rope_append_paged_kv_cache(
    qkv: Array,
    batch_indices: Array,
    positions: Array,
    cos_sin_cache: Array,
    norm_weights: tuple[Array, Array] | None,
    paged_kv_cache: PagedKVCache,
    page_table: PageTable,
    *,
    interleave: bool,
    eps: float,
) -> tuple[Array, PagedKVCache]:
    """`rmsnorm` of each query and key head, `rope` and `append_paged_kv_cache`, rounded once at their end.

    Args:
      qkv: [t, (h + 2 kh) * d], the heads of q, of k, of v.
      norm_weights: of q and of k, [d] each; None: no norm.
    """
    cache = paged_kv_cache
    t, width = qkv.shape
    heads = qkv.reshape(t, width // cache.head_dim, cache.head_dim)
    num_heads = heads.shape[1] - 2 * cache.num_kv_heads
    q, k, v = jnp.split(
        heads.astype(jnp.float32), (num_heads, num_heads + cache.num_kv_heads), axis=1
    )
    if norm_weights is not None:
        q, k = (rmsnorm(x, weight, eps=eps) for x, weight in zip((q, k), norm_weights))
    q, k = rope(q, k, positions, cos_sin_cache, interleave=interleave)
    cache = append_paged_kv_cache(k, v, batch_indices, positions, cache, page_table)
    return q.astype(qkv.dtype), cache
