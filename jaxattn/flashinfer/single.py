"""Attention of one request over its contiguous keys."""

import functools
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxattn.attention import ragged_prefill
from jaxattn.checks import check_choice, check_scale, check_shape
from jaxattn.flashinfer.arguments import (
    check_layout,
    check_scalar,
    fold_scales,
    one_dtype,
)
from jaxattn.flashinfer.options import OPTIONS, flashinfer_options
from jaxattn.flashinfer.programs import attend, compiled_plan_ragged_prefill
from jaxattn.merge import LSE_BASES


@flashinfer_options()
def single_prefill_with_kv_cache(
    q: Array,
    k: Array,
    v: Array,
    scale_q: Any = None,
    scale_k: Any = None,
    scale_v: Any = None,
    o_dtype: DTypeLike | None = None,
    custom_mask: ArrayLike | None = None,
    packed_custom_mask: ArrayLike | None = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    kv_cache_sf: Any = None,
    k_scale: float | None = None,
    v_scale: ArrayLike | None = None,
    *,
    lse_base: str = "log2",
) -> Any:
    """Attention of one request's queries over its contiguous keys, as FlashInfer's function.

    Args:
      q: [qo_len, num_qo_heads, head_dim]; float16, bfloat16 or float32.
      k, v: [kv_len, num_kv_heads, head_dim] ("NHD") or [num_kv_heads, kv_len, head_dim] ("HND"),
        q's dtype.
      causal: query i sees keys 0 .. kv_len - qo_len + i; needs kv_len >= qo_len.
      sm_scale: default 1 / sqrt(head_dim).
      return_lse: also return the logsumexp of the scaled scores.
      k_scale: a Python number that multiplies sm_scale.
      v_scale: a number or scalar array that multiplies the output.
      lse_base: "log2" or "ln".

    Returns:
      o, shaped and typed as q; with return_lse, (o, lse float32 [qo_len, num_qo_heads]).

    Raises:
      KeyError: an unknown kv_layout or pos_encoding_mode.
      ValueError, TypeError: shapes or dtypes that do not fit; causal with fewer keys than queries.
      NotImplementedError: an option that is not built.
    """
    check_layout(kv_layout)
    check_choice("lse_base", lse_base, LSE_BASES)
    check_shape("q", q, ("qo_len", "num_qo_heads", "head_dim"))
    check_shape("k", k, ("kv_len", "num_kv_heads", q.shape[-1]))
    qo_len, num_qo_heads, head_dim = q.shape
    if v.shape[:-1] == k.shape[:-1]:
        OPTIONS["head_dim_vo"].check("head_dim_vo", v.shape[-1], dict(head_dim_qk=head_dim))
    if o_dtype is not None:
        one_dtype(q=q.dtype, o_dtype=o_dtype)
    kv_len, num_kv_heads = (k.shape[kv_layout.index(axis)] for axis in "NH")
    if causal and kv_len < qo_len:
        raise ValueError(
            f"a causal prefill needs at least as many keys as queries; got {kv_len=}, {qo_len=}"
        )
    plan = compiled_plan_ragged_prefill(
        np.array([0, qo_len], np.int32),
        np.array([0, kv_len], np.int32),
        num_qo_tokens=qo_len,
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        causal=causal,
    )
    return attend(
        ragged_prefill,
        q,
        (k, v),
        plan,
        check_scalar("v_scale", v_scale),
        kv_layout=kv_layout,
        sm_scale=fold_scales(check_scale(sm_scale, head_dim), k_scale=k_scale),
        lse_base=lse_base if return_lse else None,
    )


single_prefill_with_kv_cache_return_lse = functools.partial(
    single_prefill_with_kv_cache, return_lse=True
)


@flashinfer_options()
def single_decode_with_kv_cache(
    q: Array,
    k: Array,
    v: Array,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: ArrayLike | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    return_lse: bool = False,
    *,
    lse_base: str = "log2",
) -> Any:
    """Attention of one query token over its contiguous keys, as FlashInfer's function.

    Args:
      q: [num_qo_heads, head_dim]; float16, bfloat16 or float32.
      k, v: [kv_len, num_kv_heads, head_dim] ("NHD") or [num_kv_heads, kv_len, head_dim] ("HND"),
        q's dtype.
      q_scale, k_scale: Python numbers that multiply sm_scale.
      The rest: as for `single_prefill_with_kv_cache`.

    Returns:
      o, shaped and typed as q; with return_lse, (o, lse float32 [num_qo_heads]).

    Raises: as `single_prefill_with_kv_cache`.
    """
    check_shape("q", q, ("num_qo_heads", "head_dim"))
    result = single_prefill_with_kv_cache(
        q[None],
        k,
        v,
        kv_layout=kv_layout,
        sm_scale=fold_scales(check_scale(sm_scale, q.shape[-1]), q_scale=q_scale),
        return_lse=return_lse,
        k_scale=k_scale,
        v_scale=v_scale,
        lse_base=lse_base,
    )
    return jax.tree.map(lambda x: x[0], result)
