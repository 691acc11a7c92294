"""Attention over a paged KV cache: decode, prefill and append; and prefill over contiguous keys."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxattn import reference
from jaxattn.checks import (
    FLOAT_DTYPES,
    check_choice,
    check_float,
    check_same_dtype,
    check_scale,
    check_shape,
)
from jaxattn.dispatch import dispatch
from jaxattn.kernels.mosaic.serves import why_not_attention
from jaxattn.kernels.triton.attention import contiguous_attention, paged_attention
from jaxattn.kv_cache import LAYOUTS, PagedKVCache
from jaxattn.kv_scales import FP8_DTYPES, KVScales
from jaxattn.operands import ScoreMod, alibi
from jaxattn.plan import AttentionPlan
from jaxattn.spec import Score, check_soft_cap


def paged_decode(
    q: Array,
    paged_kv_cache: PagedKVCache,
    plan: AttentionPlan,
    *,
    sm_scale: float | None = None,
    logits_soft_cap: float | None = None,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    score_mod: Callable[..., Array] | None = None,
    score_mod_arrays: Sequence[Array] = (),
    out_dtype: DTypeLike | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention of one query token per request over its paged keys, split-K (FlashDecoding).

    `o = sum_j softmax_j(x_j) v_j` with logits `x_j = sm_scale <q, k_j>`, or what the options make of it, over the keys
    that the plan's window admits; query head i uses KV head `i // (num_qo_heads // num_kv_heads)`. Scores, softmax and
    partial results are float32.

    Args:
      q: [b, num_qo_heads, head_dim]; float16, bfloat16 or float32. Row i is request i.
      paged_kv_cache: the cache of one layer, of q's dtype or of a float8 dtype. It already holds the new token's key
        and value. V may have a head_dim of its own.
      plan: from `plan_decode`; the same for every layer of a step.
      sm_scale: softmax scale, a positive float; default 1 / sqrt(head_dim).
      logits_soft_cap: a positive float: logits become `cap * tanh(x / cap)` (Gemma 2); None or 0: as they are. For
        16-bit inputs by the hardware's tanh, whose relative error is 2^-11.
      sinks: float32 [num_qo_heads], a further logit of each head that takes part in the softmax and has no value
        (attention sinks, gpt-oss). lse counts it.
      alibi_slopes: float32 [num_qo_heads]: logits get `slope * (key position - query position)` added (ALiBi), after
        the cap. lse is that of these logits.
      score_mod: a jnp function `(score, query_position, key_position, query_head, *arrays) -> logit`, traced into the
        kernel. It gets the logit so far (scale, cap, ALiBi), float32, and int32 positions in the request; it works
        elementwise on arguments that broadcast against each other.
      score_mod_arrays: [num_qo_heads] each; score_mod gets its query head's element.
      out_dtype: dtype of o, float16, bfloat16 or float32; default: q's.
      return_lse: also return the logsumexp of the logits.
      backend: "triton", "mosaic", "xla", "interpret", or None: on an NVIDIA GPU Triton, or on Hopper Mosaic for what
        it serves (prefill of 16-bit queries of head_dim 64, 128 and 256, over a float8 cache at 256 where prompts are
        long, without masks, spans and score mods); XLA elsewhere.

    Returns:
      o [b, num_qo_heads, V's head_dim]; with return_lse, (o, lse float32 [b, num_qo_heads], natural log). A request
      without keys gives 0 and -inf, or its sink.

    Raises:
      ValueError: shapes or options that do not fit the plan and the cache; a backend that cannot run here.
      TypeError: an unsupported dtype, or q and a cache that is not float8 of different dtypes.
    """
    if not isinstance(plan, AttentionPlan) or not plan.is_decode:
        raise TypeError(f"plan must come from plan_decode; got {_kind(plan)}")
    return _paged(
        "jaxattn_paged_decode",
        q,
        paged_kv_cache,
        plan,
        _Options(
            sm_scale,
            logits_soft_cap,
            sinks,
            alibi_slopes,
            score_mod,
            score_mod_arrays,
            out_dtype,
            return_lse,
            backend,
        ),
    )


def paged_prefill(
    q: Array,
    paged_kv_cache: PagedKVCache,
    plan: AttentionPlan,
    *,
    sm_scale: float | None = None,
    logits_soft_cap: float | None = None,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    score_mod: Callable[..., Array] | None = None,
    score_mod_arrays: Sequence[Array] = (),
    out_dtype: DTypeLike | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """FlashAttention-2 of ragged query tokens over paged keys (Dao 2023, algorithm 1).

    Request i has query tokens `qo_indptr[i]:qo_indptr[i + 1]`, the last of its kv_len tokens. Causal plans are
    bottom-right aligned: query j of a request sees its keys 0 .. kv_len - qo_len + j. What else a query sees, its plan
    says: windows, spans, masks. Query head i uses KV head `i // (num_qo_heads // num_kv_heads)`. Scores, softmax and
    partial results are float32.

    Args:
      q: [num_qo_tokens, num_qo_heads, head_dim]; float16, bfloat16 or float32.
      paged_kv_cache: the cache of one layer, of q's dtype or of a float8 dtype. It already holds the new tokens' keys
        and values. V may have a head_dim of its own.
      plan: from `plan_prefill`; the same for every layer of a step.
      The rest: as for `paged_decode`.

    Returns:
      o [num_qo_tokens, num_qo_heads, V's head_dim] in out_dtype; with return_lse, (o, lse float32
      [num_qo_tokens, num_qo_heads], natural log). Rows without keys, and rows that no request owns, give 0 and -inf,
      or their sink.

    Raises: as `paged_decode`.
    """
    _check_prefill(plan)
    if plan.page_indices is None:
        raise ValueError("plan is for contiguous keys (plan_ragged_prefill): use plan_prefill")
    return _paged(
        "jaxattn_prefill",
        q,
        paged_kv_cache,
        plan,
        _Options(
            sm_scale,
            logits_soft_cap,
            sinks,
            alibi_slopes,
            score_mod,
            score_mod_arrays,
            out_dtype,
            return_lse,
            backend,
        ),
    )


def ragged_prefill(
    q: Array,
    k: Array,
    v: Array,
    plan: AttentionPlan,
    *,
    kv_layout: str = "NHD",
    kv_scales: KVScales | None = None,
    sm_scale: float | None = None,
    logits_soft_cap: float | None = None,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    score_mod: Callable[..., Array] | None = None,
    score_mod_arrays: Sequence[Array] = (),
    out_dtype: DTypeLike | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """`paged_prefill` over contiguous keys: those of request i are tokens `kv_indptr[i]:kv_indptr[i + 1]`.

    Args:
      q: [num_qo_tokens, num_qo_heads, head_dim]; float16, bfloat16 or float32.
      k, v: [num_kv_tokens, num_kv_heads, head_dim] for kv_layout "NHD", [num_kv_heads, num_kv_tokens, head_dim]
        for "HND"; q's dtype, float8_e4m3fn or float8_e5m2. V may have a head_dim of its own.
      plan: from `plan_ragged_prefill`.
      kv_layout: "NHD" or "HND".
      kv_scales: what k and v are multiplied by, for all or for each KV head; None: nothing.
      The rest: as for `paged_decode`.

    Returns, raises: as `paged_prefill`.
    """
    if not isinstance(plan, AttentionPlan) or plan.page_indices is not None:
        _check_prefill(plan)
        raise ValueError("plan is for paged keys (plan_prefill): use plan_ragged_prefill")
    check_choice("kv_layout", kv_layout, LAYOUTS)
    _check_queries(q, plan)
    tokens = "num_kv_tokens"
    axes = (tokens, plan.num_kv_heads) if kv_layout == "NHD" else (plan.num_kv_heads, tokens)
    check_shape("k", k, (*axes, q.shape[-1]))
    check_shape("v", v, (*k.shape[:2], "head_dim of v"))
    if k.dtype.name in FP8_DTYPES:
        check_same_dtype(k=k, v=v)
    else:
        check_same_dtype(q=q, k=k, v=v)
    if kv_scales is not None:
        if kv_scales.per_token:
            raise ValueError("kv_scales of contiguous keys must be [] or [num_kv_heads]")
        kv_scales.check((), plan.num_kv_heads)
    options = _Options(
        sm_scale,
        logits_soft_cap,
        sinks,
        alibi_slopes,
        score_mod,
        score_mod_arrays,
        out_dtype,
        return_lse,
        backend,
    )

    def xla(q, k, v, scales, plan, sinks, score_mods, **how):
        if kv_layout == "HND":
            k, v = jnp.swapaxes(k, 0, 1), jnp.swapaxes(v, 0, 1)
        how |= dict(scales=scales, sinks=sinks, score_mods=score_mods)
        return reference.ragged_attention(q, k, v, plan, **how)

    def mosaic(*args, **how):
        from jaxattn.kernels.mosaic.attention import contiguous_attention

        return contiguous_attention(*args, name=name, kv_layout=kv_layout, **how)

    name = "jaxattn_decode" if plan.is_decode else "jaxattn_prefill"
    kernel = functools.partial(contiguous_attention, name=name, kv_layout=kv_layout)
    return _run(options, kernel, xla, mosaic, q, (k, v, kv_scales), plan, v)


class _Options(NamedTuple):
    """The options that all ops share, as they came."""

    sm_scale: float | None
    logits_soft_cap: float | None
    sinks: Array | None
    alibi_slopes: Array | None
    score_mod: Callable[..., Array] | None
    score_mod_arrays: Sequence[Array]
    out_dtype: DTypeLike | None
    return_lse: bool
    backend: str | None


def _paged(name: str, q: Array, cache: PagedKVCache, plan: AttentionPlan, options: _Options) -> Any:
    _check_queries(q, plan)
    _check_cache(q, cache, plan)

    def xla(q, cache, plan, sinks, score_mods, **how):
        return reference.paged_attention(q, cache, plan, sinks=sinks, score_mods=score_mods, **how)

    def mosaic(*args, **how):
        from jaxattn.kernels.mosaic.attention import paged_attention

        return paged_attention(*args, name=name, **how)

    kernel = functools.partial(paged_attention, name=name)
    return _run(options, kernel, xla, mosaic, q, (cache,), plan, cache.arrays[-1])


def _run(
    options: _Options,
    kernel: Callable[..., Any],
    xla: Callable[..., Any],
    mosaic: Callable[..., Any],
    q: Array,
    kv: tuple[Any, ...],
    plan: AttentionPlan,
    values: Array,
) -> Any:
    """Checks the options, and runs the op on (q, *kv, plan, sinks, score mods).

    values: of kv, the array that has V.
    """
    how: dict[str, Any] = dict(
        score=Score(
            check_scale(options.sm_scale, q.shape[-1]), check_soft_cap(options.logits_soft_cap)
        ),
        out_dtype=jnp.dtype(q.dtype if options.out_dtype is None else options.out_dtype),
    )
    check_choice("out_dtype", how["out_dtype"].name, FLOAT_DTYPES)
    heads = plan.num_qo_heads
    for name in ("sinks", "alibi_slopes"):
        x = getattr(options, name)
        if x is not None:
            check_shape(name, x, (heads,))
            if x.dtype != jnp.float32:
                raise TypeError(
                    f"{name} must be float32; got {x.dtype}: use {name}.astype(jnp.float32)"
                )
    score_mods = []
    if options.alibi_slopes is not None:
        score_mods.append(ScoreMod.of(alibi, (options.alibi_slopes,), heads))
    if options.score_mod is not None:
        score_mods.append(ScoreMod.of(options.score_mod, options.score_mod_arrays, heads))
    elif len(options.score_mod_arrays):
        raise ValueError("score_mod_arrays are arguments of score_mod, which is None: give both")
    why_not = why_not_attention(
        q,
        values,
        plan,
        score_mods=bool(score_mods),
        out_dtype=how["out_dtype"],
    )
    # A kernel takes no array without elements.
    empty = not all(x.size for x in jax.tree.leaves((q, kv)))
    o, lse = dispatch(
        "xla" if empty else options.backend,
        functools.partial(kernel, **how),
        functools.partial(xla, **how),
        q,
        *kv,
        plan,
        options.sinks,
        tuple(score_mods),
        mosaic=why_not or functools.partial(mosaic, **how),
    )
    return (o, lse) if options.return_lse else o


def _check_queries(q: Array, plan: AttentionPlan) -> None:
    check_shape("q", q, (plan.num_qo_tokens, plan.num_qo_heads, "head_dim"))
    check_float("q", q)


def _check_cache(q: Array, cache: PagedKVCache, plan: AttentionPlan) -> None:
    """Raises unless the cache has q's dtype and head_dim and the plan's page size and KV heads."""
    if not isinstance(cache, PagedKVCache):
        raise TypeError(
            f"paged_kv_cache must be a PagedKVCache; got {type(cache).__name__}: "
            "make one of the arrays (k, v) by PagedKVCache((k, v), layout)"
        )
    cache.check()
    if not cache.is_fp8:
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


def _check_prefill(plan: AttentionPlan) -> None:
    if not isinstance(plan, AttentionPlan) or plan.is_decode:
        raise TypeError(f"plan must come from plan_prefill; got {_kind(plan)}")


def _kind(plan: Any) -> str:
    """What a plan that does not fit is, in words."""
    if not isinstance(plan, AttentionPlan):
        return type(plan).__name__
    return "one of plan_decode" if plan.is_decode else "one of plan_prefill"
