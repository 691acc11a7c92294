"""One plain float32 oracle per op, with the op's signature; also what runs where there is no GPU.

Nothing here is tuned: each function is the definition of its op. All are differentiable. Attention reads a plan's
lengths, tables and masks, never its work list.

Axes: b requests, t query tokens, s key tokens, h query heads, kh KV heads, g = h // kh, d head dim, n pages,
p page size.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, PartitionSpec
from jax.typing import DTypeLike

from jaxattn.as_program import as_program
from jaxattn.kv_cache import PagedKVCache
from jaxattn.kv_scales import KVScales, largest, own_scale, stored
from jaxattn.operands import ScoreMod, may_be_kept, modified
from jaxattn.page_table import PageTable
from jaxattn.plan import AttentionPlan
from jaxattn.spec import FAR, Score
from jaxattn.work_list import expand

# Queries and keys that are taken at once; of the longest tables, larger pieces, so that they are at most so many.
QUERY_BLOCK, KEY_BLOCK, MAX_PIECES = 128, 1024, 64


def _attention_program(op: Callable[..., tuple[Array, Array]]) -> Callable[..., Any]:
    """`as_program` of an attention op, where what is compiled may be kept."""
    program = as_program("score", "out_dtype")(op)

    @functools.wraps(op)
    def run(*args: Any, score_mods: tuple[ScoreMod, ...] = (), **how: Any) -> tuple[Array, Array]:
        return (program if may_be_kept(score_mods) else op)(*args, score_mods=score_mods, **how)

    return run


def attention(
    q: Array, k: Array, v: Array, mask: Array, logit: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """Softmax attention, `o_i = sum_j softmax_j(x_ij) v_j` over the keys that mask[i, j] admits.

    Args:
      q: [t, h, d].
      k, v: [s, kh, d], [s, kh, dv]; query head i uses KV head i // g. Keys that no query sees may be NaN.
      mask: bool [t, s].
      logit: from scores <q_i, k_j>, float32 [t, kh, g, s], to the logits x; `Score(sm_scale).logit`, say.

    Returns:
      (o [t, h, dv] in q's dtype, lse float32 [t, h], natural log); a query without keys gives 0 and -inf.
    """
    o, lse = _finish(_state(q.astype(jnp.float32), k, v, mask, logit))
    return o.astype(q.dtype), lse


class _State(NamedTuple):
    """The softmax of t queries over some keys, float32: what of it is exact to add up."""

    peak: Array  # [t, h], the largest logit; -inf before the first key
    total: Array  # [t, h], sum of exp(logit - peak)
    acc: Array  # [t, h, dv], sum of exp(logit - peak) v


def _state(q: Array, k: Array, v: Array, mask: Array, logit: Callable[[Array], Array]) -> _State:
    """Of `attention`'s arguments, q in float32."""
    heads = k.shape[1]
    t, h, d = q.shape
    seen = mask.any(axis=0)[:, None, None]
    k = jnp.where(seen, k, 0).astype(jnp.float32)
    v = jnp.where(seen, v, 0).astype(jnp.float32)
    grouped = q.reshape(t, heads, h // heads, d)
    scores = logit(jnp.einsum("tkgd,skd->tkgs", grouped, k, precision="highest"))
    scores = jnp.where(mask[:, None, None, :], scores, -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, initial=-jnp.inf))
    weights = jnp.exp(scores - jnp.where(peak == -jnp.inf, 0, peak)[..., None])
    acc = jnp.einsum("tkgs,skd->tkgd", weights, v, precision="highest")
    total = weights.sum(axis=-1)
    return _State(peak.reshape(t, h), total.reshape(t, h), acc.reshape(t, h, v.shape[-1]))


def _joined(a: _State, b: _State) -> _State:
    """The state over the keys of both."""
    peak = jnp.maximum(a.peak, b.peak)
    shift = jnp.where(peak == -jnp.inf, 0, peak)
    scales = [jnp.exp(x.peak - shift) for x in (a, b)]
    total = sum(x.total * scale for x, scale in zip((a, b), scales))
    acc = sum(x.acc * scale[..., None] for x, scale in zip((a, b), scales))
    return _State(peak, jnp.asarray(total), jnp.asarray(acc))


def _finish(state: _State) -> tuple[Array, Array]:
    """(o, lse): 0 and -inf without keys."""
    peak, total, acc = state
    empty = total == 0
    total = jnp.where(empty, 1, total)
    lse = jnp.log(total) + jnp.where(empty, 0, peak)
    return acc / total[..., None], jnp.where(empty, -jnp.inf, lse)


@_attention_program
def paged_attention(
    q: Array,
    paged_kv_cache: PagedKVCache,
    plan: AttentionPlan,
    *,
    score: Score,
    sinks: Array | None = None,
    score_mods: tuple[ScoreMod, ...] = (),
    out_dtype: DTypeLike | None = None,
) -> tuple[Array, Array]:
    """Ragged queries against the pages of their requests: (o [t, h, dv], lse float32 [t, h])."""
    assert plan.page_indices is not None  # the ops refuse a plan for contiguous keys
    cache, indices = paged_kv_cache, plan.page_indices
    n, p = cache.num_pages, cache.page_size

    def keys(request: Array, position: Array) -> tuple[Array, Array, Array]:
        page = indices.at[plan.page_start[request] + position // p].get(mode="clip")
        slot = position % p
        at = (page, slot) if cache.layout == "NHD" else (page, slice(None), slot)
        k, v = (x.at[at].get(mode="clip") for x in (cache.k, cache.v))
        if cache.scales is not None:
            per_token = cache.scales.per_token
            k, v = (
                x.astype(jnp.float32) * _each(s.at[at].get(mode="clip") if per_token else s, x)
                for x, s in ((k, cache.scales.k), (v, cache.scales.v))
            )
        return k, v, (0 <= page) & (page < n)

    return _attend(q, keys, indices.size * p, plan, score, sinks, score_mods, out_dtype)


@_attention_program
def ragged_attention(
    q: Array,
    k: Array,
    v: Array,
    plan: AttentionPlan,
    *,
    scales: KVScales | None = None,
    score: Score,
    sinks: Array | None = None,
    score_mods: tuple[ScoreMod, ...] = (),
    out_dtype: DTypeLike | None = None,
) -> tuple[Array, Array]:
    """Ragged queries against contiguous keys, k and v [s, kh, d], as `paged_attention`."""
    if k.shape[0] == 0:  # there is no row to look up, only queries without keys
        k, v = (jnp.zeros((1, *x.shape[1:]), x.dtype) for x in (k, v))

    def keys(request: Array, position: Array) -> tuple[Array, Array, Array]:
        row = plan.page_start[request] + position
        own_k, own_v = (x.at[row].get(mode="clip") for x in (k, v))
        if scales is not None:
            own_k, own_v = (
                x.astype(jnp.float32) * _each(s, x)
                for x, s in ((own_k, scales.k), (own_v, scales.v))
            )
        return own_k, own_v, row < k.shape[0]

    return _attend(q, keys, k.shape[0], plan, score, sinks, score_mods, out_dtype)


def _attend(
    q: Array,
    keys: Callable[[Array, Array], tuple[Array, Array, Array]],
    capacity: int,
    plan: AttentionPlan,
    score: Score,
    sinks: Array | None,
    score_mods: Sequence[ScoreMod],
    out_dtype: DTypeLike | None,
) -> tuple[Array, Array]:
    """Each request's queries against its own keys, and no others: some queries at a time, some keys at a time.

    keys(request, position) gives k and v [s, kh, d] of a request's tokens at position [s], and whether they exist.
    """
    t, h, _ = q.shape
    if t == 0:
        dv = keys(jnp.int32(0), jnp.zeros(1, jnp.int32))[1].shape[-1]
        return jnp.zeros((0, h, dv), out_dtype or q.dtype), jnp.zeros((0, h), jnp.float32)
    block = 1 if plan.is_decode else min(t, QUERY_BLOCK)
    piece = min(max(KEY_BLOCK, -(-capacity // MAX_PIECES)), max(capacity, 1))
    indptr = plan.query_bounds()
    # Queries that no request owns are one more request, without keys.
    bounds = jnp.clip(indptr, 0, t)
    begin, end = bounds, jnp.append(bounds[1:], jnp.int32(t))
    blocks = jnp.maximum(-(-(end - begin) // block), 0)
    arrays = [[_by_head(x, plan) for x in mod.arrays] for mod in score_mods]
    head = _by_head(jnp.arange(h, dtype=jnp.int32), plan)

    def attend_block(args: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        request, nth, used = args
        token = begin[request] + nth * block + jnp.arange(block, dtype=jnp.int32)
        token = jnp.where(used & (token < end[request]), token, t)
        own = jnp.minimum(request, plan.batch_size - 1)
        kv_end = jnp.where(request < plan.batch_size, plan.kv_end[own], 0)
        position = token - indptr[own + 1] + plan.kv_len[own]
        if plan.limits is None:
            first, stop = plan.spec.visible.some(position, position, kv_end)
        else:
            seen = plan.limits.at[token].get(mode="fill", fill_value=0)
            first, stop = seen[:, 0], seen[:, 1]
        first, stop = (jnp.broadcast_to(jnp.asarray(x, jnp.int32), (block,)) for x in (first, stop))
        stop = jnp.where(token < t, jnp.minimum(stop, kv_end), 0)
        rows = q.at[token].get(mode="clip").astype(jnp.float32)

        def attend_piece(start: Array) -> _State:
            key = start + jnp.arange(piece, dtype=jnp.int32)
            k, v, exists = keys(own, key)
            mask = (first[:, None] <= key[None, :]) & (key[None, :] < stop[:, None])
            mask &= exists[None, :]
            if plan.mask is not None:
                bits = plan.mask.mask
                index = 8 * bits.indptr[own] + (token - indptr[own]) * plan.kv_len[own]
                mask &= bits.seen(index[:, None] + key[None, :])

            def logit(s: Array) -> Array:
                at = position[:, None, None, None], key[None, None, None, :]
                return modified(score_mods, score.logit(s), *at, head, arrays)

            return _state(rows, k, v, mask, logit)

        begin_of_all, end_of_all = jnp.min(first, where=stop > first, initial=FAR), stop.max()
        begin_of_all = jnp.minimum(begin_of_all, kv_end)
        state = attend_piece(begin_of_all)
        rest = jnp.arange(1, -(-capacity // piece), dtype=jnp.int32) * piece
        if rest.size:
            state, _ = jax.lax.scan(
                lambda state, offset: (
                    jax.lax.cond(
                        begin_of_all + offset < end_of_all,
                        lambda: _joined(state, attend_piece(begin_of_all + offset)),
                        lambda: state,
                    ),
                    None,
                ),
                state,
                rest,
            )
        if sinks is not None:
            # A sink is a logit that has no value.
            sink = jnp.broadcast_to(sinks[None, :], state.peak.shape)
            state = _joined(
                state, _State(sink, (sink > -jnp.inf).astype(jnp.float32), state.acc * 0)
            )
        return token, *_finish(state)

    each = expand(blocks, t // block + begin.size)
    token, o, lse = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(attend_block, each)
    )
    o = jnp.zeros((t, *o.shape[1:]), jnp.float32).at[token].set(o, mode="drop")
    lse = jnp.full((t, h), -jnp.inf, jnp.float32).at[token].set(lse, mode="drop")
    return o.astype(out_dtype or q.dtype), lse


def _by_head(x: Array, plan: AttentionPlan) -> Array:
    """x [h] as [1, kh, g, 1], to go with scores [t, kh, g, s]."""
    return jnp.asarray(x).reshape(1, plan.num_kv_heads, plan.spec.group, 1)


@as_program("lse_base")
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


@as_program()
def rmsnorm(x: Array, weight: Array, *, eps: float, weight_offset: float = 0.0) -> Array:
    """`x / sqrt(mean(x^2) + eps) * (weight_offset + weight)` over the last axis, rounded once."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    weight = weight.astype(jnp.float32) + weight_offset
    return (x32 * scale * weight.reshape((1,) * (x.ndim - 1) + weight.shape)).astype(x.dtype)


@as_program()
def fused_add_rmsnorm(
    x: Array, residual: Array, weight: Array, *, eps: float, weight_offset: float = 0.0
) -> tuple[Array, Array]:
    """`residual' = x + residual` rounded once, and the norm of the unrounded float32 sum."""
    total = x.astype(jnp.float32) + residual.astype(jnp.float32)
    normed = rmsnorm(total, weight, eps=eps, weight_offset=weight_offset)
    return normed.astype(x.dtype), total.astype(residual.dtype)


@as_program("activation")
def activate_and_multiply(x: Array, activation: str) -> Array:
    """`activation(x[..., :d]) * x[..., d:]` of x [..., 2 d], rounded once; "silu", "gelu" or "gelu_tanh"."""
    gate, up = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    if activation == "silu":
        activated = jax.nn.silu(gate)
    else:
        activated = jax.nn.gelu(gate, approximate=activation == "gelu_tanh")
    return (activated * up).astype(x.dtype)


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


@as_program("interleave")
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


@as_program()
def append_paged_kv_cache(
    append_key: Array,
    append_value: Array,
    batch_indices: Array,
    positions: Array,
    paged_kv_cache: PagedKVCache,
    page_table: PageTable,
) -> PagedKVCache:
    """Writes token i at `positions[i]` of request `batch_indices[i]`, divided by its scale, in the cache's dtype.

    A token whose request is not in [0, b) or whose position lies past the request's pages is dropped. Scales per token
    are those of `kv_scales.own_scale`, and written beside the tokens.
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
        return pages.at[at].set(tokens, mode="drop")

    tokens, scales = (append_key, append_value), cache.scales
    each: list[Array | None] = [None, None]
    if scales is not None and scales.per_token:
        each = [own_scale(largest(x), cache.dtype) for x in tokens]
        scales = KVScales(*(write(old, new) for old, new in zip((scales.k, scales.v), each)))
    elif scales is not None:
        each = [scales.k, scales.v]
    k, v = (
        stored(x, None if s is None else _each(s, x), cache.dtype) for x, s in zip(tokens, each)
    )
    if cache.combined:
        data = write(write(cache.data, k, 0), v, 1)
    else:
        data = (write(cache.k, k), write(cache.v, v))
    return dataclasses.replace(cache, data=data, scales=scales)


def _each(scale: Array, x: Array) -> Array:
    """The scale of each vector of x [t, kh, d], [t, kh, 1], from one for all, for each head, or for each vector."""
    return jnp.broadcast_to(scale, x.shape[:-1])[..., None]


@as_program("interleave")
def rope_append_paged_kv_cache(
    qkv: tuple[Array, ...],
    batch_indices: Array,
    positions: Array,
    rope_positions: Array | None,
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
      qkv: one array [t, h + 2 kh, d], the heads of q, of k, of v; or three, [t, h, d], [t, kh, d] and [t, kh, dv].
      rope_positions: rows of the table; None: positions.
      norm_weights: of q and of k, [d] each; None: no norm.
    """
    cache, dtype = paged_kv_cache, qkv[0].dtype
    heads = [x.astype(jnp.float32) for x in qkv]
    if len(heads) == 1:
        num_heads = qkv[0].shape[1] - 2 * cache.num_kv_heads
        heads = jnp.split(heads[0], (num_heads, num_heads + cache.num_kv_heads), axis=1)
    q, k, v = heads
    if norm_weights is not None:
        q, k = (rmsnorm(x, weight, eps=eps) for x, weight in zip((q, k), norm_weights))
    row = positions if rope_positions is None else rope_positions
    q, k = rope(q, k, row, cos_sin_cache, interleave=interleave)
    cache = append_paged_kv_cache(k, v, batch_indices, positions, cache, page_table)
    return q.astype(dtype), cache


@as_program()
def grouped_matmul(x: Array, weights: Array, order: Array, ends: Array) -> Array:
    """`x[i / repeat] @ weights[g].T` in float32 for the rows i of group g; zeros for those that are in none."""
    repeat = order.shape[0] // x.shape[0] if x.size else 1
    # Under explicit axes, which partition no operand of an op, ragged_dot wants to be told that they do not.
    explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
    rows = jax.lax.ragged_dot(
        x[order // repeat],
        jnp.swapaxes(weights, 1, 2),
        jnp.diff(ends, prepend=0),
        precision="highest" if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
        out_sharding=PartitionSpec(None, None) if explicit else None,
    )
    return jnp.zeros_like(rows).at[order].set(rows)
