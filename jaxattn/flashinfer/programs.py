"""The compiled programs that all wrappers share."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxattn.attention import ragged_prefill
from jaxattn.kv_cache import PagedKVCache
from jaxattn.plan import AttentionPlan, plan_decode, plan_prefill, plan_ragged_prefill

_HEADS = ("num_qo_heads", "num_kv_heads")
_SPLITS = ("fixed_split_size", "disable_split_kv")
compiled_plan_decode = jax.jit(plan_decode, static_argnames=("page_size", *_SPLITS, *_HEADS))
_ROWS = ("num_qo_tokens", "causal", *_HEADS)
compiled_plan_prefill = jax.jit(plan_prefill, static_argnames=("page_size", *_SPLITS, *_ROWS))
compiled_plan_ragged_prefill = jax.jit(
    plan_ragged_prefill, static_argnames=("disable_split_kv", *_ROWS)
)


@functools.partial(jax.jit, static_argnames=("op", "kv_layout", "sm_scale", "lse_base"))
def attend(
    op: Callable[..., Any],
    q: Array,
    kv: Any,
    plan: AttentionPlan,
    v_scale: ArrayLike | None,
    *,
    kv_layout: str,
    sm_scale: float,
    lse_base: str | None,
) -> Any:
    """The op on what its wrapper was given; without an lse_base, o alone."""
    if op is ragged_prefill:
        op = functools.partial(op, q, *kv, plan, kv_layout=kv_layout)
    else:
        # Outside of jit, a page axis that is missing would cost a copy of the cache.
        is_cache = isinstance(kv, PagedKVCache)
        cache = kv if is_cache else PagedKVCache.from_flashinfer(kv, kv_layout)
        op = functools.partial(op, q, cache, plan)
    o, lse = op(sm_scale=sm_scale, return_lse=True)
    if v_scale is not None:
        o = (o.astype(jnp.float32) * v_scale).astype(o.dtype)
    if lse_base is None:
        return o
    return o, lse if lse_base == "ln" else lse * jnp.float32(1 / math.log(2))
