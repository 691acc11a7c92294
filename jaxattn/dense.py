"""`dot_product_attention` over dense caches [B, S, K, H], with the signature and the meaning of `jax.nn`'s.

Keys are read where they lie. Without a mask those of a request are contiguous rows. With one, its pages are the single
tokens that some query sees, in order, so that the others are not read:

    T = 1                what is seen is all there is to say: plain decode
    a mask of keys       a query sees a run of these tokens: those of its causal mask and its window, counted among them
    a mask of queries    a bit for each of its queries and these tokens

Axes: B requests, T queries, S keys, N query heads, K KV heads, H head dim.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxattn.as_program import as_program
from jaxattn.attention import paged_decode, paged_prefill, ragged_prefill
from jaxattn.checks import (
    check_array,
    check_index,
    check_same_dtype,
    check_scale,
    check_shape,
    copied_from_host,
)
from jaxattn.decode_plan import decode_plan
from jaxattn.device import num_sms
from jaxattn.kv_cache import PagedKVCache
from jaxattn.operands import MaskBits
from jaxattn.padded import of_runs, row_indptr, run_indptr
from jaxattn.plan import AttentionPlan, Splits
from jaxattn.prefill_plan import prefill_plan
from jaxattn.spec import AttentionSpec, Visible
from jaxattn.work_list import Keys


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: None = None,
    mask: Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: None = None,
    return_residual: bool = False,
    logits_soft_cap: float | None = None,
    sinks: Array | None = None,
    backend: str | None = None,
) -> Any:
    """`jax.nn.dot_product_attention` for dense KV caches: split-K decode at T = 1, FlashAttention-2 above.

    Query i stands at position i of the keys, as in `jax.nn`: the causal mask and the window are aligned at the top
    left. A decode step over a cache says by `key_value_seq_lengths` or by `mask` which keys there are; with
    `is_causal` its one query would see the first key alone. A key that no query sees (padding, a free slot of the
    cache) may hold anything, NaN included. A query that sees no key gives 0, where `jax.nn` gives the mean of all
    values.

    Args:
      query: [B, T, N, H]; float16, bfloat16 or float32. Or [T, N, H], with key and value [S, K, H].
      key, value: [B, S, K, H], query's dtype; N a multiple of K. V may have a head dim of its own.
      bias: None. Additive biases are not served; see `alibi_slopes` and `score_mod` of `paged_decode`.
      mask: bool, what takes part: [B, 1, T, S], in which B, T and S may be 1; [B, 1, 1, S] is a mask of keys. The same
        for all heads.
      scale: softmax scale, a positive float; default 1 / sqrt(H).
      is_causal: query i sees no key behind i.
      query_seq_lengths: int32 [B]; queries from there on give 0.
      key_value_seq_lengths: int32 [B]; keys from there on are not there.
      local_window_size: (left, right), keys that a query sees before and behind its own position; one integer: both.
      implementation: None. `jax.nn`'s are not ours; `backend` picks here.
      return_residual: also return the logsumexp of the logits.
      logits_soft_cap: as `paged_decode`'s: `cap * tanh(x / cap)`.
      sinks: float32 [N], as `paged_decode`'s.
      backend: as for `paged_decode`.

    Returns:
      [B, T, N, value's H], query's dtype; with return_residual, (that, logsumexp [B, T, N] in key's dtype, -inf without
      keys).

    Raises:
      ValueError: shapes that do not fit; a bias, an implementation, a mask that differs between heads.
      TypeError: unsupported or different dtypes; a mask that is not bool.
    """
    _refuse(bias, implementation)
    q, k, v = (_batched(*named) for named in (("query", query), ("key", key), ("value", value)))
    b, t, n, h = q.shape
    check_shape("key", k, (b, "S", "K", h))
    check_shape("value", v, (*k.shape[:3], "head_dim of value"))
    check_same_dtype(query=q, key=k, value=v)
    s, heads = k.shape[1:3]
    visible = _visible(is_causal, local_window_size)
    lengths = dict(query_seq_lengths=query_seq_lengths, key_value_seq_lengths=key_value_seq_lengths)
    for name, x in lengths.items():
        if x is not None:
            check_index(name, x, b)
    mask = _checked_mask(mask, (b, n, t, s))
    if not (b and s):
        raise ValueError(f"key must hold at least one request and one key; got {list(k.shape)}")

    given = {name: copied_from_host(x) for name, x in lengths.items() if x is not None}
    plan = _plan(b, t, s, AttentionSpec(n, heads, visible), given, mask)

    how: dict[str, Any] = dict(
        sm_scale=check_scale(scale, h, "scale"),
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        return_lse=True,
        backend=backend,
    )
    q = q.reshape(b * t, n, h)
    if plan.page_indices is None:
        k, v = (x.reshape(b * s, *x.shape[2:]) for x in (k, v))
        o, lse = ragged_prefill(q, k, v, plan, **how)
    else:
        k, v = (x.reshape(b * s, 1, *x.shape[2:]) for x in (k, v))
        pool = PagedKVCache((k, v))
        attend: Callable[..., Any] = paged_decode if plan.is_decode else paged_prefill
        o, lse = attend(q, pool, plan, **how)
    o = o.reshape(*query.shape[:-1], v.shape[-1])
    return (o, lse.reshape(query.shape[:-1]).astype(k.dtype)) if return_residual else o


@as_program("b", "t", "s", "spec")
def _plan(
    b: int, t: int, s: int, spec: AttentionSpec, given: dict[str, Array], mask: Array | None
) -> AttentionPlan:
    """Of a `_Batch`, under a mask bool [B or 1, T or 1, S]."""
    batch = _Batch(b, t, s, spec, given)
    if mask is None:
        return batch.plan(padded="query_seq_lengths" in given)
    if t > 1 and mask.shape[1] == 1:
        return batch.plan_key_mask(mask[:, 0])
    return batch.plan_mask(mask)


@dataclasses.dataclass(frozen=True)
class _Batch:
    """B requests of T queries on S keys, and what a query sees but for a mask."""

    b: int
    t: int
    s: int
    spec: AttentionSpec
    # query_seq_lengths and key_value_seq_lengths, int32 [B], where they were given.
    given: dict[str, Array]

    @property
    def length(self) -> Array:
        """int32 [B], queries."""
        return self._bounds(self.given, self.b)[0]

    @property
    def end(self) -> Array:
        """int32 [B], keys that any of them may see."""
        return self._bounds(self.given, self.b)[1]

    def _bounds(self, given: dict[str, Array], b: int) -> tuple[Array, Array]:
        """(length, end) of b requests."""
        queries, keys = (given.get(f"{name}_seq_lengths") for name in ("query", "key_value"))
        length = jnp.full(b, self.t, jnp.int32) if queries is None else jnp.clip(queries, 0, self.t)
        end = jnp.full(b, self.s, jnp.int32) if keys is None else jnp.clip(keys, 0, self.s)
        # No query sees a key behind what the last one does.
        return length, jnp.where(length > 0, self.spec.visible.end(length - 1, end), 0)

    def plan(self, padded: bool) -> AttentionPlan:
        """Without a mask; padded: there may be fewer than T queries."""
        row, s = jnp.arange(self.b, dtype=jnp.int32), self.s
        if self.t == 1:
            return self._decode(self._rows_of, self.given.values())
        # The last query stands at length - 1, wherever the keys end.
        if not padded:
            return self._prefill(Keys(None, row * s, self.length, self.end, 1, most=s), self.spec)
        keys = Keys(
            None, jnp.repeat(row * s, 2), of_runs(self.length), of_runs(self.end), 1, most=s
        )
        indptr = run_indptr(jnp.zeros_like(self.length), self.length, self.t)
        return self._prefill(keys, self.spec, indptr)

    def _rows_of(self, *given: Array) -> Keys:
        """Contiguous keys, of the lengths given."""
        b = given[0].shape[0] if given else self.b
        _, end = self._bounds(dict(zip(self.given, given)), b)
        return Keys(None, jnp.arange(b, dtype=jnp.int32) * self.s, end, end, 1, most=self.s)

    def plan_key_mask(self, mask: Array) -> AttentionPlan:
        """Under a mask of keys, bool [B or 1, S]: a query sees a run of those that are left."""
        j = jnp.arange(self.s, dtype=jnp.int32)[None, :]
        keys, before = _seen_keys(mask & (j < self.end[:, None]))
        limits = [jnp.take_along_axis(before, x, axis=1) for x in self._limits()]
        flat = jnp.stack(limits, axis=2).reshape(self.b * self.t, 2)
        return self._prefill(keys, self._unmasked, limits=flat)

    def plan_mask(self, mask: Array) -> AttentionPlan:
        """Under a mask of queries and keys, bool [B or 1, T or 1, S]."""
        j = jnp.arange(self.s, dtype=jnp.int32)[None, None, :]
        first, last = (x[:, :, None] for x in self._limits())
        mask = mask & (first <= j) & (j < last)
        keys, _ = _seen_keys(mask.any(axis=1))
        if self.t == 1:
            return self._decode(*keys.as_function())
        assert keys.page_indices is not None
        token = keys.page_indices.reshape(self.b, 1, self.s) % self.s
        bits = jnp.take_along_axis(mask, token, axis=2).reshape(self.b, self.t * self.s)
        bits = jnp.packbits(bits, axis=1, bitorder="little")
        packed = MaskBits(bits.reshape(-1), row_indptr(self.b, bits.shape[1]))
        # A query has a bit for each of S keys, of which there may be fewer.
        keys = dataclasses.replace(keys, kv_len=jnp.full_like(self.end, self.s))
        return self._prefill(keys, self._unmasked, mask=packed)

    def _limits(self) -> tuple[Array, Array]:
        """(first, last) int32 [B, T]: without a mask, a query would see the keys first .. last - 1."""
        i = jnp.arange(self.t, dtype=jnp.int32)[None, :]
        last = self.spec.visible.end(i, self.end[:, None])
        last = jnp.where(i < self.length[:, None], last, 0)
        return jnp.minimum(self.spec.visible.begin(i), last), last

    @property
    def _unmasked(self) -> AttentionSpec:
        """The heads alone: what a query sees is said otherwise."""
        return AttentionSpec(self.spec.num_qo_heads, self.spec.num_kv_heads)

    def _decode(self, keys_of: Callable[..., Keys], lengths: Iterable[Array]) -> AttentionPlan:
        return decode_plan(keys_of, tuple(lengths), self._unmasked, Splits(), num_sms())

    def _prefill(
        self, keys: Keys, spec: AttentionSpec, qo_indptr: Array | None = None, **how: Any
    ) -> AttentionPlan:
        indptr = row_indptr(self.b, self.t) if qo_indptr is None else qo_indptr
        return prefill_plan(indptr, keys, self.b * self.t, spec, Splits(), num_sms(), **how)


def _seen_keys(seen: Array) -> tuple[Keys, Array]:
    """The keys that bool [B, S] admits, on pages of one token, and how many lie before each: int32 [B, S + 1]."""
    b, s = seen.shape
    before = jnp.pad(jnp.cumsum(seen, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    row = jnp.arange(b, dtype=jnp.int32)
    first = row * s
    slot = jnp.arange(s, dtype=jnp.int32)[None, :]
    # Entries behind a request's keys are of no meaning, but pages of the cache.
    pages = jnp.broadcast_to(first[:, None], (b, s))
    at = row[:, None], jnp.where(seen, before[:, :-1], s + slot)
    pages = pages.at[at].set(first[:, None] + slot, mode="drop", unique_indices=True)
    count = before[:, -1]
    return Keys(pages.reshape(-1), first, count, count, 1, b * s, most=s), before


def _refuse(bias: Any, implementation: Any) -> None:
    if bias is not None:
        raise ValueError(
            "bias is not served: ALiBi and other functions of the positions are alibi_slopes and score_mod of "
            "paged_decode and paged_prefill; for any other bias use jax.nn.dot_product_attention"
        )
    if implementation is not None:
        raise ValueError(
            f"implementation={implementation!r} is one of jax.nn.dot_product_attention's: call that, or leave it out "
            "here, where backend picks"
        )


def _batched(name: str, x: Array) -> Array:
    """x with its axis of requests."""
    check_array(name, x)
    if x.ndim not in (3, 4):
        raise ValueError(
            f"{name} must have shape [B, tokens, heads, H] or [tokens, heads, H]; got {list(x.shape)}"
        )
    return x[None] if x.ndim == 3 else x


def _visible(is_causal: bool, window: int | tuple[int, int] | None) -> Visible:
    if window is None:
        return Visible.of(is_causal)
    sizes = tuple(window) if isinstance(window, (tuple, list)) else (window, window)
    static = all(
        hasattr(x, "__index__") and not isinstance(x, (bool, jax.core.Tracer)) for x in sizes
    )
    if len(sizes) != 2 or not static or min(sizes) < 0:
        raise ValueError(
            "local_window_size must be an integer or (left, right), at least 0 and known when the function is traced, "
            f"or None; got {window}"
        )
    left, right = sizes
    return Visible.of(is_causal, left, None if is_causal else right)


def _checked_mask(mask: Array | None, sizes: tuple[int, int, int, int]) -> Array | None:
    """bool [B or 1, T or 1, S]."""
    if mask is None:
        return None
    check_array("mask", mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(
            f"mask must be bool, what takes part; got {mask.dtype}: use mask.astype(bool), or, of an additive mask, "
            "mask >= 0"
        )
    mask = copied_from_host(mask)
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    b, n, t, s = sizes
    must = f"[B or 1, 1, T or 1, S or 1] with B={b}, T={t}, S={s}; got {list(mask.shape)}"
    if mask.ndim != 4 or any(got not in (1, want) for got, want in zip(mask.shape, sizes)):
        raise ValueError(f"mask must have shape {must}")
    if mask.shape[1] != 1:
        raise ValueError(
            f"mask must be the same for all heads, {must}: for a mask of each head use jax.nn.dot_product_attention"
        )
    return jnp.broadcast_to(mask[:, 0], (mask.shape[0], mask.shape[2], s))
