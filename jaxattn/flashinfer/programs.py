"""The compiled programs that all wrappers share."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxattn.attention import ragged_prefill
from jaxattn.decode_plan import plan_decode
from jaxattn.flashinfer.arguments import check_scale_of
from jaxattn.flashinfer.logits import Logits, alibi_slopes
from jaxattn.flashinfer.masks import CustomMask
from jaxattn.kv_cache import PagedKVCache
from jaxattn.kv_scales import KVScales
from jaxattn.page_table import PageTable, get_batch_indices_positions
from jaxattn.plan import AttentionPlan
from jaxattn.prefill_plan import plan_prefill, plan_ragged_prefill

_STATIC = ("num_qo_heads", "num_kv_heads", "fixed_split_size", "disable_split_kv", "window_left")
_PREFILL = (*_STATIC, "num_qo_tokens", "causal", "window_right")

compiled_plan_decode = jax.jit(plan_decode, static_argnames=_STATIC)


@functools.partial(jax.jit, static_argnames=_PREFILL)
def compiled_plan_prefill(
    qo_indptr: Array, page_table: PageTable, mask: CustomMask | None = None, **how: Any
) -> AttentionPlan:
    """`plan_prefill`; a mask takes the place of causal."""
    if mask is not None:
        how |= dict(causal=False, mask=mask.bits(qo_indptr, page_table.kv_len()))
    return plan_prefill(qo_indptr, page_table, **how)


@functools.partial(jax.jit, static_argnames=_PREFILL)
def compiled_plan_ragged_prefill(
    qo_indptr: Array, kv_indptr: Array, mask: CustomMask | None = None, **how: Any
) -> AttentionPlan:
    """`plan_ragged_prefill`; a mask takes the place of causal."""
    if mask is not None:
        how |= dict(causal=False, mask=mask.bits(qo_indptr, kv_indptr[1:] - kv_indptr[:-1]))
    return plan_ragged_prefill(qo_indptr, kv_indptr, **how)


@functools.partial(jax.jit, static_argnames=(*_PREFILL, "range_window_left"))
def compiled_plan_of_ranges(
    qo_indptr: Array, page_table: PageTable, ranges: Array, *, range_window_left: int, **how: Any
) -> AttentionPlan:
    """`plan_prefill` of causal queries that see their range besides.

    Args:
      ranges: int32 [num_qo_tokens, 2].
      range_window_left: if positive, a query sees so many keys of its range up to its own.
    """
    if range_window_left > 0:
        rows = ranges.shape[0]
        _, position = get_batch_indices_positions(qo_indptr, page_table.kv_len(), rows)
        first = ranges[:, 0]
        nearest = jnp.maximum(first, position - (range_window_left - 1))
        ranges = ranges.at[:, 0].set(jnp.where(first < 0, first, nearest))
    return plan_prefill(qo_indptr, page_table, causal=True, bidirectional_spans=ranges, **how)


class Scales(NamedTuple):
    """What q, k and v are multiplied by: numbers or arrays, [] or one element a head; None: nothing."""

    q: ArrayLike | None = None
    k: ArrayLike | None = None
    v: ArrayLike | None = None

    def check(self, num_qo_heads: int, num_kv_heads: int) -> None:
        """Raises ValueError for what is no scale of so many heads."""
        heads = (num_qo_heads, num_kv_heads, num_kv_heads)
        for name, x, count in zip(self._fields, self, heads):
            check_scale_of(f"{name}_scale", x, count)

    def applied(self, q: Array, own: KVScales | None) -> tuple[Array, KVScales | None]:
        """q, and the scales of keys and values; own: those that a cache came with.

        One scale for all of q is as good for k. A product with q is rounded.
        """
        q_scale, k_scale = self.q, self.k
        if q_scale is not None and (own is not None or jnp.ndim(q_scale)):
            by_head = jnp.broadcast_to(jnp.asarray(q_scale).astype(jnp.float32), q.shape[1:2])
            q = (q.astype(jnp.float32) * by_head[None, :, None]).astype(q.dtype)
        elif q_scale is not None:
            k_scale = q_scale if k_scale is None else jnp.asarray(k_scale) * q_scale
        if k_scale is None and self.v is None:
            return q, own
        return q, KVScales.of(k_scale, self.v)


@functools.partial(jax.jit, static_argnames=("op", "kv_layout", "logits", "out_dtype", "lse_base"))
def attend(
    op: Callable[..., Any],
    q: Array,
    kv: Any,
    plan: AttentionPlan,
    sinks: Array | None,
    scales: Scales,
    *,
    kv_layout: str,
    logits: Logits,
    out_dtype: jnp.dtype,
    lse_base: str | None,
) -> Any:
    """The op on what its wrapper was given; without an lse_base, o alone."""
    own = kv.scales if isinstance(kv, PagedKVCache) else None
    q, kv_scales = scales.applied(q, own)
    if op is ragged_prefill:
        op = functools.partial(op, q, *kv, plan, kv_layout=kv_layout, kv_scales=kv_scales)
    else:
        # Outside of jit, a page axis that is missing would cost a copy of the cache.
        is_cache = isinstance(kv, PagedKVCache)
        cache = kv if is_cache else PagedKVCache.from_flashinfer(kv, kv_layout)
        op = functools.partial(op, q, dataclasses.replace(cache, scales=kv_scales), plan)
    o, lse = op(
        sm_scale=logits.sm_scale,
        logits_soft_cap=logits.soft_cap,
        alibi_slopes=jnp.asarray(alibi_slopes(plan.num_qo_heads)) if logits.alibi else None,
        sinks=sinks,
        out_dtype=out_dtype,
        return_lse=True,
    )
    if lse_base is None:
        return o
    return o, lse if lse_base == "ln" else lse * jnp.float32(1 / math.log(2))
