"""Attention of one request over its contiguous keys."""

import functools
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxattn.attention import ragged_prefill
from jaxattn.checks import check_choice, check_shape
from jaxattn.flashinfer.arguments import check_layout, float_dtype
from jaxattn.flashinfer.logits import Logits
from jaxattn.flashinfer.masks import CustomMask
from jaxattn.flashinfer.options import flashinfer_options
from jaxattn.flashinfer.programs import Scales, attend, compiled_plan_ragged_prefill
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
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
    *,
    lse_base: str = "log2",
) -> Any:
    """Attention of one request's queries over its contiguous keys, as FlashInfer's function.

    Args:
      q: [qo_len, num_qo_heads, head_dim]; float16, bfloat16 or float32.
      k, v: [kv_len, num_kv_heads, head_dim] ("NHD") or [num_kv_heads, kv_len, head_dim] ("HND"),
        q's dtype, float8_e4m3fn or float8_e5m2. V may have a head_dim of its own.
      o_dtype: dtype of the output; default: q's.
      custom_mask: bool [qo_len, kv_len], True where a query sees a key.
      packed_custom_mask: uint8 [ceil(qo_len * kv_len / 8)], the bits of that mask, flattened, as
        `packbits(..., bitorder="little")` gives them. It goes before custom_mask, which goes before
        causal.
      causal: query i sees keys 0 .. kv_len - qo_len + i; needs kv_len >= qo_len.
      pos_encoding_mode: "NONE", or "ALIBI" with ALiBi's slopes for num_qo_heads; as for
        `BatchPrefillWithPagedKVCacheWrapper.plan`.
      sm_scale: default 1 / sqrt(head_dim).
      window_left: keys that a query sees before its own position, besides its own, whatever else
        says what it sees; -1: all.
      logits_soft_cap: logits become `cap * tanh(logit / cap)`; None or 0: as they are.
      return_lse: also return the logsumexp of the logits.
      k_scale, v_scale: what keys and values are multiplied by: positive numbers, or float arrays of
        shape [] or [num_kv_heads].
      lse_base: "log2" or "ln".

    Returns:
      o [qo_len, num_qo_heads, V's head_dim]; with return_lse, (o, lse float32 [qo_len,
      num_qo_heads]).

    Raises:
      KeyError: an unknown kv_layout or pos_encoding_mode.
      ValueError, TypeError: shapes or dtypes that do not fit; causal with fewer keys than queries.
      NotImplementedError: an option that is not built.
    """
    return _single(
        q,
        k,
        v,
        Scales(None, k_scale, v_scale),
        o_dtype=o_dtype,
        custom_mask=custom_mask,
        packed_custom_mask=packed_custom_mask,
        causal=causal,
        kv_layout=kv_layout,
        pos_encoding_mode=pos_encoding_mode,
        sm_scale=sm_scale,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        return_lse=return_lse,
        lse_base=lse_base,
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
    q_scale: ArrayLike | None = None,
    k_scale: ArrayLike | None = None,
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
        q's dtype, float8_e4m3fn or float8_e5m2.
      q_scale: what q is multiplied by, a positive number, or a float array of shape [] or
        [num_qo_heads].
      The rest: as for `single_prefill_with_kv_cache`.

    Returns:
      o [num_qo_heads, V's head_dim], q's dtype; with return_lse, (o, lse float32 [num_qo_heads]).

    Raises: as `single_prefill_with_kv_cache`.
    """
    check_shape("q", q, ("num_qo_heads", "head_dim"))
    result = _single(
        q[None],
        k,
        v,
        Scales(q_scale, k_scale, v_scale),
        kv_layout=kv_layout,
        pos_encoding_mode=pos_encoding_mode,
        sm_scale=sm_scale,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        return_lse=return_lse,
        lse_base=lse_base,
    )
    return jax.tree.map(lambda x: x[0], result)


def _single(
    q: Array,
    k: Array,
    v: Array,
    scales: Scales,
    *,
    o_dtype: DTypeLike | None = None,
    custom_mask: ArrayLike | None = None,
    packed_custom_mask: ArrayLike | None = None,
    causal: bool = False,
    kv_layout: str,
    pos_encoding_mode: str,
    sm_scale: float | None,
    window_left: int,
    logits_soft_cap: float | None,
    return_lse: bool,
    lse_base: str,
) -> Any:
    check_layout(kv_layout)
    check_choice("lse_base", lse_base, LSE_BASES)
    check_shape("q", q, ("qo_len", "num_qo_heads", "head_dim"))
    check_shape("k", k, ("kv_len", "num_kv_heads", q.shape[-1]))
    qo_len, num_qo_heads, head_dim = q.shape
    logits = Logits.of(head_dim, sm_scale, logits_soft_cap, pos_encoding_mode)
    kv_len, num_kv_heads = (k.shape[kv_layout.index(axis)] for axis in "NH")
    scales.check(num_qo_heads, num_kv_heads)
    if packed_custom_mask is None and custom_mask is not None:
        check_shape("custom_mask", custom_mask, (qo_len, kv_len))
    qo_indptr = np.array([0, qo_len], np.int32)
    mask = CustomMask.of(custom_mask, packed_custom_mask, qo_indptr, np.array([kv_len]))
    if causal and mask is None and kv_len < qo_len:
        raise ValueError(
            f"a causal prefill needs at least as many keys as queries; got {kv_len=}, {qo_len=}"
        )
    plan = compiled_plan_ragged_prefill(
        qo_indptr,
        np.array([0, kv_len], np.int32),
        mask,
        num_qo_tokens=qo_len,
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        causal=causal,
        window_left=window_left,
    )
    return attend(
        ragged_prefill,
        q,
        (k, v),
        plan,
        None,
        scales,
        kv_layout=kv_layout,
        logits=logits,
        out_dtype=q.dtype if o_dtype is None else float_dtype("o_dtype", o_dtype),
        lse_base=lse_base if return_lse else None,
    )
