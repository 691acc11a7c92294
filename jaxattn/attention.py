"""Attention over a paged KV cache: decode, prefill and append; and prefill over contiguous keys."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxattn import reference
from jaxattn.checks import (
    check_choice,
    check_float,
    check_same_dtype,
    check_scale,
    check_shape,
)
from jaxattn.dispatch import dispatch
from jaxattn.kernels.attention import contiguous_attention, paged_attention
from jaxattn.kv_cache import LAYOUTS, PagedKVCache
from jaxattn.plan import DecodePlan, PrefillPlan


def paged_decode(
    q: Array,
    paged_kv_cache: PagedKVCache,
    plan: DecodePlan,
    *,
    sm_scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention of one query token per request over its paged keys, split-K (FlashDecoding).

    `o = sum_j softmax_j(sm_scale <q, k_j>) v_j` over the request's kv_len keys; query head i uses KV head
    `i // (num_qo_heads // num_kv_heads)`. Scores, softmax and partial results are float32.

    Args:
      q: [b, num_qo_heads, head_dim], the dtype of the cache: float16, bfloat16 or float32. Row i is request i.
      paged_kv_cache: the cache of one layer. It already holds the new token's key and value.
      plan: from `plan_decode`; the same for every layer of a step.
      sm_scale: softmax scale, a positive float; default 1 / sqrt(head_dim).
      return_lse: also return the logsumexp of the scaled scores.
      backend: "triton", "xla", "interpret", or None: Triton on an NVIDIA GPU, XLA elsewhere.

    Returns:
      o [b, num_qo_heads, head_dim] in q's dtype; with return_lse, (o, lse float32 [b, num_qo_heads], natural
      log). A request without keys gives 0 and -inf.

    Raises:
      ValueError: shapes that do not fit the plan and the cache; a backend that cannot run here.
      TypeError: an unsupported dtype, or q and the cache of different dtypes.
    """
    if not isinstance(plan, DecodePlan):
        raise TypeError(f"plan must come from plan_decode; got {type(plan).__name__}")
    check_shape("q", q, (plan.batch_size, plan.num_qo_heads, "head_dim"))
    _check_cache(q, paged_kv_cache, plan)
    sm_scale = check_scale(sm_scale, q.shape[-1])

    def kernel(q, cache, plan, *, interpret):
        return paged_attention(
            q, cache, plan, sm_scale=sm_scale, name="jaxattn_paged_decode", interpret=interpret
        )

    def xla(q, cache, plan):
        return reference.paged_decode(q, cache, plan, sm_scale=sm_scale, return_lse=True)

    o, lse = dispatch(backend, kernel, xla, q, paged_kv_cache, plan)
    return (o, lse) if return_lse else o


def paged_prefill(
    q: Array,
    paged_kv_cache: PagedKVCache,
    plan: PrefillPlan,
    *,
    sm_scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """FlashAttention-2 of ragged query tokens over paged keys (Dao 2023, algorithm 1).

    Request i has query tokens `qo_indptr[i]:qo_indptr[i + 1]`, the last of its kv_len tokens. Causal plans are
    bottom-right aligned: query j of a request sees its keys 0 .. kv_len - qo_len + j. Query head i uses KV head
    `i // (num_qo_heads // num_kv_heads)`. Scores, softmax and partial results are float32.

    Args:
      q: [num_qo_tokens, num_qo_heads, head_dim], the dtype of the cache: float16, bfloat16 or float32.
      paged_kv_cache: the cache of one layer. It already holds the new tokens' keys and values.
      plan: from `plan_prefill`; the same for every layer of a step.
      sm_scale: softmax scale, a positive float; default 1 / sqrt(head_dim).
      return_lse: also return the logsumexp of the scaled scores.
      backend: "triton", "xla", "interpret", or None: Triton on an NVIDIA GPU, XLA elsewhere.

    Returns:
      o [num_qo_tokens, num_qo_heads, head_dim] in q's dtype; with return_lse, (o, lse float32
      [num_qo_tokens, num_qo_heads], natural log). Rows without keys, and rows that no request owns, give 0
      and -inf.

    Raises:
      ValueError: shapes that do not fit the plan and the cache; a backend that cannot run here.
      TypeError: an unsupported dtype, or q and the cache of different dtypes.
    """
    _check_plan(q, plan)
    if plan.page_indices is None:
        raise ValueError("plan is for contiguous keys (plan_ragged_prefill): use plan_prefill")
    _check_cache(q, paged_kv_cache, plan)
    sm_scale = check_scale(sm_scale, q.shape[-1])

    def kernel(q, cache, plan, *, interpret):
        return paged_attention(
            q, cache, plan, sm_scale=sm_scale, name="jaxattn_prefill", interpret=interpret
        )

    def xla(q, cache, plan):
        return reference.paged_prefill(q, cache, plan, sm_scale=sm_scale, return_lse=True)

    backend = backend if q.size else "xla"  # a kernel takes no array without elements
    o, lse = dispatch(backend, kernel, xla, q, paged_kv_cache, plan)
    return (o, lse) if return_lse else o


def ragged_prefill(
    q: Array,
    k: Array,
    v: Array,
    plan: PrefillPlan,
    *,
    kv_layout: str = "NHD",
    sm_scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """`paged_prefill` over contiguous keys: those of request i are tokens `kv_indptr[i]:kv_indptr[i + 1]`.

    Args:
      q: [num_qo_tokens, num_qo_heads, head_dim]; float16, bfloat16 or float32.
      k, v: [num_kv_tokens, num_kv_heads, head_dim] for kv_layout "NHD", [num_kv_heads, num_kv_tokens, head_dim]
        for "HND"; q's dtype.
      plan: from `plan_ragged_prefill`.
      kv_layout: "NHD" or "HND".
      sm_scale, return_lse, backend: as for `paged_prefill`.

    Returns, raises: as `paged_prefill`.
    """
    _check_plan(q, plan)
    if plan.page_indices is not None:
        raise ValueError("plan is for paged keys (plan_prefill): use plan_ragged_prefill")
    check_choice("kv_layout", kv_layout, LAYOUTS)
    tokens = "num_kv_tokens"
    axes = (tokens, plan.num_kv_heads) if kv_layout == "NHD" else (plan.num_kv_heads, tokens)
    check_shape("k", k, (*axes, q.shape[-1]))
    check_shape("v", v, k.shape)
    check_float("q", q)
    check_same_dtype(q=q, k=k, v=v)
    sm_scale = check_scale(sm_scale, q.shape[-1])

    def kernel(q, k, v, plan, *, interpret):
        return contiguous_attention(
            q,
            k,
            v,
            plan,
            kv_layout=kv_layout,
            sm_scale=sm_scale,
            name="jaxattn_prefill",
            interpret=interpret,
        )

    def xla(q, k, v, plan):
        if kv_layout == "HND":
            k, v = jnp.swapaxes(k, 0, 1), jnp.swapaxes(v, 0, 1)
        return reference.ragged_prefill(q, k, v, plan, sm_scale=sm_scale, return_lse=True)

    backend = backend if q.size and k.size else "xla"  # a kernel takes no array without elements
    o, lse = dispatch(backend, kernel, xla, q, k, v, plan)
    return (o, lse) if return_lse else o


def _check_cache(q: Array, cache: PagedKVCache, plan: DecodePlan | PrefillPlan) -> None:
    """Raises unless the cache has q's dtype and head_dim and the plan's page size and KV heads."""
    cache.check()
    check_float("q", q)
    check_same_dtype(q=q, paged_kv_cache=cache)
    for name, want, got in (
        ("head_dim", q.shape[-1], cache.head_dim),
        ("page_size", plan.page_size, cache.page_size),
        ("num_kv_heads", plan.num_kv_heads, cache.num_kv_heads),
    ):
        if want != got:
            raise ValueError(
                f"paged_kv_cache ({cache.layout}) must have {name}={want}, as {'q' if name == 'head_dim' else 'plan'}; "
                f"got {name}={got}"
            )


def _check_plan(q: Array, plan: PrefillPlan) -> None:
    if not isinstance(plan, PrefillPlan):
        raise TypeError(f"plan must come from plan_prefill; got {type(plan).__name__}")
    check_shape("q", q, (plan.num_qo_tokens, plan.num_qo_heads, "head_dim"))
