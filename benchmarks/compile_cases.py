"""The configurations of each kernel that the compile report and the lowering tests compile: those that users hit."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxattn as ja
from benchmarks.compiled import ARCHITECTURES, KernelReport
from jaxattn.grouped_matmul import Groups, grouped_matmul


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration that users hit; `build` gives a function and the shapes to compile it for."""

    name: str
    build: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]
    hot: bool = False
    # Part of a fault that is none here: what does not show it was measured, and is slower.
    accepted: str = ""
    mosaic: bool = False
    targets: tuple[str, ...] = tuple(ARCHITECTURES)  # that have what it needs
    programs: int = 1  # that a multiprocessor must hold the registers of

    def faults(self, kernel: KernelReport) -> list[str]:
        """What this case's kernel must not show, and shows."""
        found = [
            fault
            for fault in kernel.faults
            if self.hot and not (self.accepted and self.accepted in fault)
        ]
        if kernel.programs < self.programs:
            found.append(
                f"{kernel.registers} registers, of {kernel.programs} programs instead of {self.programs}"
            )
        return found


def _struct(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _paged_kv(
    batch: int,
    kv_len: int,
    page_size: int,
    num_kv_heads: int,
    d: int,
    dtype: Any,
    dv: int | None = None,
    scales: str | None = None,
):
    """A cache with just the pages that `batch` requests of `kv_len` tokens need, and its table."""
    pages = batch * -(-kv_len // page_size)
    return jax.eval_shape(
        lambda: (
            ja.PagedKVCache.zeros(
                pages,
                page_size,
                num_kv_heads,
                d,
                dtype,
                head_dim_v=dv,
                scales=ja.KVScales.of(1.0, 1.0) if scales == "tensor" else scales,
            ),
            ja.PageTable(
                jnp.zeros(batch + 1, jnp.int32),
                jnp.zeros(pages, jnp.int32),
                jnp.zeros(batch, jnp.int32),
                page_size,
            ),
        )
    )


def _operands(heads: int, sinks: bool, alibi: bool) -> dict[str, Any]:
    names = ["sinks"] * sinks + ["alibi_slopes"] * alibi
    return {name: _struct(heads, dtype=jnp.float32) for name in names}


def _decode(
    heads: int,
    kv_heads: int,
    d: int,
    page_size: int,
    dtype: Any = jnp.bfloat16,
    *,
    batch: int = 64,
    kv: Any = None,
    scales: str | None = None,
    dv: int | None = None,
    window: int | None = None,
    cap: float | None = None,
    sinks: bool = False,
    alibi: bool = False,
):
    def step(q, cache, table, operands):
        plan = ja.plan_decode(table, num_qo_heads=heads, num_kv_heads=kv_heads, window_left=window)
        return ja.paged_decode(q, cache, plan, logits_soft_cap=cap, **operands)

    cache, table = _paged_kv(batch, 8192, page_size, kv_heads, d, kv or dtype, dv, scales)
    q = _struct(batch, heads, d, dtype=dtype)
    return step, (q, cache, table, _operands(heads, sinks, alibi))


def _prefill(
    heads: int,
    kv_heads: int,
    d: int,
    page_size: int,
    dtype: Any = jnp.bfloat16,
    *,
    batch: int = 4,
    new: int = 4096,
    kv: Any = None,
    scales: str | None = None,
    dv: int | None = None,
    causal: bool | None = None,
    window: int | None = None,
    cap: float | None = None,
    sinks: bool = False,
    alibi: bool = False,
    mask: bool = False,
    spans: bool = False,
    backend: str = "triton",
):
    tokens = batch * new
    cache, table = _paged_kv(batch, 4096, page_size, kv_heads, d, kv or dtype, dv, scales)
    bits = jax.eval_shape(
        lambda: ja.MaskBits(jnp.zeros(tokens * 512, jnp.uint8), jnp.zeros(batch + 1, jnp.int32))
    )

    def planned(qo_indptr, table, mask, spans):
        return ja.plan_prefill(
            qo_indptr,
            table,
            num_qo_tokens=tokens,
            num_qo_heads=heads,
            num_kv_heads=kv_heads,
            causal=causal,
            window_left=window,
            mask=mask,
            bidirectional_spans=spans,
        )

    def step(q, cache, plan, operands):
        return ja.paged_prefill(q, cache, plan, logits_soft_cap=cap, backend=backend, **operands)

    see = (bits if mask else None, _struct(tokens, 2) if spans else None)
    plan = jax.eval_shape(planned, _struct(batch + 1), table, *see)
    q = _struct(tokens, heads, d, dtype=dtype)
    return step, (q, cache, plan, _operands(heads, sinks, alibi))


def _ragged_prefill(
    heads: int, kv_heads: int, d: int, dtype: Any = jnp.bfloat16, backend: str = "triton"
):
    tokens = 16384

    def planned(indptr):
        return ja.plan_ragged_prefill(
            indptr, indptr, num_qo_tokens=tokens, num_qo_heads=heads, num_kv_heads=kv_heads
        )

    def step(q, k, v, plan):
        return ja.ragged_prefill(q, k, v, plan, backend=backend)

    kv = _struct(tokens, kv_heads, d, dtype=dtype)
    return step, (
        _struct(tokens, heads, d, dtype=dtype),
        kv,
        kv,
        jax.eval_shape(planned, _struct(5)),
    )


def _dense(
    heads: int,
    kv_heads: int,
    d: int,
    tokens: int,
    mask: tuple[int, int] | None = None,
    dtype: Any = jnp.bfloat16,
    backend: str = "triton",
):
    """`dot_product_attention` of 32 requests; mask: which keys take part, its B and T, none: their lengths."""
    how: dict[str, Any] = dict(is_causal=tokens > 1, backend=backend)
    batch, length = 32, 4096
    operands = dict(key_value_seq_lengths=_struct(batch))
    if mask is not None:
        operands = dict(mask=_struct(mask[0], 1, mask[1], length, dtype=jnp.bool_))

    def step(q, k, v, operands):
        return ja.dot_product_attention(q, k, v, **operands, **how)

    kv = _struct(batch, length, kv_heads, d, dtype=dtype)
    return step, (_struct(batch, tokens, heads, d, dtype=dtype), kv, kv, operands)


def _merge_state(d: int, dtype: Any = jnp.bfloat16):
    v, s = _struct(4096, 32, d, dtype=dtype), _struct(4096, 32, dtype=jnp.float32)
    return ja.merge_state, (v, s, v, s)


def _merge_states(d: int, dtype: Any = jnp.bfloat16):
    return ja.merge_states, (
        _struct(4096, 8, 32, d, dtype=dtype),
        _struct(4096, 8, 32, dtype=jnp.float32),
    )


def _rmsnorm(hidden: int, dtype: Any = jnp.bfloat16):
    return ja.rmsnorm, (_struct(4096, hidden, dtype=dtype), _struct(hidden, dtype=dtype))


def _fused_add_rmsnorm(hidden: int, dtype: Any = jnp.bfloat16):
    x = _struct(4096, hidden, dtype=dtype)
    return ja.fused_add_rmsnorm, (x, x, _struct(hidden, dtype=dtype))


def _activation(op: str, dtype: Any = jnp.bfloat16):
    return getattr(ja, op), (_struct(4096, 2 * 14336, dtype=dtype),)


ALL_LIMITS: dict[str, Any] = dict(temperature=None, top_k=None, top_p=None, min_p=None)


def _sampling(vocab: int, logits: bool, dtype: Any = jnp.float32, **limits: None):
    """Each row with limits of its own."""
    batch = 32
    names = list(limits)
    dtypes = {"top_k": jnp.int32}
    arrays = [_struct(batch, dtype=dtypes.get(name, jnp.float32)) for name in names]

    def draw(rows, *arrays):
        key = jax.random.key(0)
        given = dict(zip(names, arrays, strict=True))
        if logits:
            return ja.sampling_from_logits(rows, key, **given)
        if names == ["top_k", "top_p"]:
            return ja.top_k_top_p_sampling_from_probs(rows, arrays[0], arrays[1], key)
        if names:
            return ja.top_p_sampling_from_probs(rows, arrays[0], key)
        return ja.sampling_from_probs(rows, key)

    return draw, (_struct(batch, vocab, dtype=dtype), *arrays)


def _rope_cache(heads: int, kv_heads: int, d: int, is_neox: bool = True, dtype: Any = jnp.bfloat16):
    def step(positions, query, key, cos_sin_cache):
        return ja.apply_rope_with_cos_sin_cache(
            positions, query, key, d, cos_sin_cache, is_neox=is_neox
        )

    query, key = (_struct(4096, h * d, dtype=dtype) for h in (heads, kv_heads))
    return step, (_struct(4096), query, key, _struct(8192, d, dtype=jnp.float32))


def _rope_pos_ids(heads: int, kv_heads: int, d: int, dtype: Any = jnp.bfloat16):
    query, key = (_struct(4096, h, d, dtype=dtype) for h in (heads, kv_heads))
    return ja.apply_llama31_rope_pos_ids, (query, key, _struct(4096))


def _rope_append(
    heads: int,
    kv_heads: int,
    d: int,
    norm: bool = False,
    apart: bool = False,
    dtype: Any = jnp.bfloat16,
    *,
    kv: Any = None,
    scales: str | None = None,
):
    cache, table = _paged_kv(64, 8192, 16, kv_heads, d, kv or dtype, None, scales)
    weights = {f"{x}_norm_weight": _struct(d, dtype=dtype) for x in ("q", "k") if norm}

    def step(qkv, batch_indices, positions, cos_sin_cache, cache, table, weights):
        where = (batch_indices, positions, cos_sin_cache, cache, table)
        return ja.rope_append_paged_kv_cache(qkv, *where, **weights)

    qkv: Any = _struct(4096, (heads + 2 * kv_heads) * d, dtype=dtype)
    if apart:
        qkv = tuple(_struct(4096, h * d, dtype=dtype) for h in (heads, kv_heads, kv_heads))
    cos_sin_cache = _struct(8192, d, dtype=jnp.float32)
    return step, (qkv, _struct(4096), _struct(4096), cos_sin_cache, cache, table, weights)


def _append(
    kv_heads: int,
    d: int,
    page_size: int,
    dtype: Any = jnp.bfloat16,
    *,
    kv: Any = None,
    scales: str | None = None,
):
    cache, table = _paged_kv(64, 8192, page_size, kv_heads, d, kv or dtype, None, scales)
    kv = _struct(4096, kv_heads, d, dtype=dtype)
    return ja.append_paged_kv_cache, (kv, kv, _struct(4096), _struct(4096), cache, table)


def _grouped(tokens: int, repeat: int, groups: int, outs: int, size: int, dtype=jnp.bfloat16):
    weights = _struct(groups, outs, size, dtype=dtype)
    of_rows = Groups._make([_struct(tokens * repeat), _struct(groups)])
    return grouped_matmul, (_struct(tokens, size, dtype=dtype), weights, of_rows)


def _case(
    name: str,
    build: Callable[..., Any],
    *args: Any,
    hot: bool = False,
    accepted: str = "",
    targets: tuple[str, ...] = tuple(ARCHITECTURES),
    programs: int = 1,
    **kwargs: Any,
):
    mosaic = kwargs.get("backend") == "mosaic"
    build = functools.partial(build, *args, **kwargs)
    return Case(name, build, hot, accepted, mosaic, targets, programs)


MOSAIC: dict[str, Any] = dict(backend="mosaic", targets=("h200",))
# Prompts so short that pages of few tokens, and keys of 8 bits, are read row by row.
ROWS: dict[str, Any] = MOSAIC | dict(new=64, batch=256)
# An A100 does not convert e4m3.
FP8: dict[str, Any] = dict(kv=jnp.float8_e4m3fn, scales="tensor", targets=("h200",))
FP8_TOKEN: dict[str, Any] = FP8 | dict(scales="token")
LOCAL: dict[str, Any] = dict(window=127, sinks=True)  # gpt-oss
E5M2: dict[str, Any] = dict(kv=jnp.float8_e5m2)

# 255 registers hold the 128-row tile but for two values.
TWO = "8 + 8 bytes"

# Names: heads/KV heads, d head_dim, p page size; prefill is 4 x 4096 tokens unless it says so.
CASES = (
    _case("decode bf16 32/8 d128 p1", _decode, 32, 8, 128, 1, hot=True),
    _case("decode bf16 32/8 d128 p16", _decode, 32, 8, 128, 16, hot=True),
    _case("decode fp16 32/8 d128 p16", _decode, 32, 8, 128, 16, jnp.float16, hot=True),
    _case("decode fp32 32/8 d128 p16", _decode, 32, 8, 128, 16, jnp.float32),
    _case("decode fp32 32/8 d256 p16", _decode, 32, 8, 256, 16, jnp.float32),
    _case("decode bf16 128/1 d128 p16", _decode, 128, 1, 128, 16),
    _case("decode bf16 32/32 d128 p16", _decode, 32, 32, 128, 16, hot=True),
    _case("decode bf16 8/1 d128 p16", _decode, 8, 1, 128, 16, hot=True),
    _case("decode bf16 32/8 d64 p16", _decode, 32, 8, 64, 16, hot=True),
    _case("decode bf16 32/8 d80 p16", _decode, 32, 8, 80, 16),
    _case("decode bf16 32/8 d256 p16", _decode, 32, 8, 256, 16),
    _case("decode bf16 32/8 d256 p16 x4", _decode, 32, 8, 256, 16, batch=4, hot=True),
    _case("prefill bf16 32/8 d128 p1", _prefill, 32, 8, 128, 1, hot=True),
    _case("prefill bf16 32/8 d128 p16", _prefill, 32, 8, 128, 16, hot=True, accepted=TWO),
    _case(
        "prefill fp16 32/8 d128 p16", _prefill, 32, 8, 128, 16, jnp.float16, hot=True, accepted=TWO
    ),
    _case("prefill fp32 32/8 d128 p16", _prefill, 32, 8, 128, 16, jnp.float32),
    _case("prefill fp32 32/8 d256 p16", _prefill, 32, 8, 256, 16, jnp.float32),
    _case("prefill bf16 32/32 d128 p16", _prefill, 32, 32, 128, 16, hot=True, accepted=TWO),
    _case("prefill bf16 32/4 d128 p16", _prefill, 32, 4, 128, 16),
    _case("prefill bf16 32/8 d64 p16", _prefill, 32, 8, 64, 16, hot=True, accepted="serialized"),
    _case("prefill bf16 32/8 d80 p16", _prefill, 32, 8, 80, 16),
    _case("prefill bf16 32/8 d256 p16", _prefill, 32, 8, 256, 16),
    _case("prefill bf16 32/8 d128 p16 32x4", _prefill, 32, 8, 128, 16, batch=32, new=4, hot=True),
    _case("prefill bf16 32/8 d128 p16 8x4", _prefill, 32, 8, 128, 16, batch=8, new=4, hot=True),
    _case("prefill bf16 32/8 d128 p16 1x16", _prefill, 32, 8, 128, 16, batch=1, new=16, hot=True),
    _case("prefill bf16 32/8 d64 p16 32x16", _prefill, 32, 8, 64, 16, batch=32, new=16, hot=True),
    _case("prefill bf16 32/8 d256 p16 32x16", _prefill, 32, 8, 256, 16, batch=32, new=16),
    _case("prefill bf16 32/32 d128 p16 32x4", _prefill, 32, 32, 128, 16, batch=32, new=4),
    _case(
        "prefill bf16 32/8 d128 p16 8x128",
        _prefill,
        32,
        8,
        128,
        16,
        batch=8,
        new=128,
        hot=True,
        accepted=TWO,
    ),
    _case("ragged bf16 32/8 d128", _ragged_prefill, 32, 8, 128, hot=True),
    _case("ragged fp16 32/8 d128", _ragged_prefill, 32, 8, 128, jnp.float16),
    _case("ragged bf16 32/32 d64", _ragged_prefill, 32, 32, 64),
    # The Hopper lowering.
    _case("mosaic bf16 32/8 d128 p1", _prefill, 32, 8, 128, 1, hot=True, **ROWS),
    _case("mosaic bf16 32/8 d128 p1 in line", _prefill, 32, 8, 128, 1, hot=True, **MOSAIC),
    _case("mosaic bf16 32/8 d128 p16", _prefill, 32, 8, 128, 16, hot=True, **MOSAIC),
    _case("mosaic bf16 32/8 d128 p128", _prefill, 32, 8, 128, 128, **MOSAIC),
    _case("mosaic fp16 32/8 d64 p16", _prefill, 32, 8, 64, 16, jnp.float16, hot=True, **MOSAIC),
    _case("mosaic bf16 32/8 d256 p16", _prefill, 32, 8, 256, 16, hot=True, **MOSAIC),
    _case("mosaic gemma3 32/16 d128 w1024", _prefill, 32, 16, 128, 16, window=1023, **MOSAIC),
    _case("mosaic gemma2 16/8 d256 cap", _prefill, 16, 8, 256, 16, cap=50.0, **MOSAIC),
    _case("mosaic gpt-oss 64/8 d64 sinks", _prefill, 64, 8, 64, 16, sinks=True, **MOSAIC),
    _case("mosaic bf16 40/8 d128 p16", _prefill, 40, 8, 128, 16, **MOSAIC),
    _case("mosaic bf16 32/8 d128 p16 no mask", _prefill, 32, 8, 128, 16, causal=False, **MOSAIC),
    _case("mosaic ragged bf16 32/8 d128", _ragged_prefill, 32, 8, 128, hot=True, **MOSAIC),
    _case("mosaic dense bf16 32/8 d128", _dense, 32, 8, 128, 1024, **MOSAIC),
    _case("mosaic gpt-oss 64/8 d64 w128", _prefill, 64, 8, 64, 16, hot=True, **(LOCAL | MOSAIC)),
    _case("mosaic gpt-oss 64/8 d64 w128 p1", _prefill, 64, 8, 64, 1, **(LOCAL | ROWS)),
    _case("mosaic fp8 32/8 d128 p16", _prefill, 32, 8, 128, 16, hot=True, **(FP8 | ROWS)),
    _case(
        "mosaic fp8 32/8 d128 p16 token", _prefill, 32, 8, 128, 16, hot=True, **(FP8_TOKEN | ROWS)
    ),
    _case("mosaic fp8 fp16 32/8 d64 p16", _prefill, 32, 8, 64, 16, jnp.float16, **(FP8 | ROWS)),
    _case("mosaic fp8 32/8 d128 p16 in line", _prefill, 32, 8, 128, 16, **(FP8 | MOSAIC)),
    _case(
        "mosaic fp8 32/8 d128 p1 token in line",
        _prefill,
        32,
        8,
        128,
        1,
        hot=True,
        **(FP8_TOKEN | MOSAIC),
    ),
    _case(
        "mosaic fp8 fp16 32/8 d256 p16 token in line",
        _prefill,
        32,
        8,
        256,
        16,
        jnp.float16,
        **(FP8_TOKEN | MOSAIC),
    ),
    # Dense caches: by lengths, by a mask of keys, by one of queries and keys.
    _case("dense decode bf16 32/8 d128", _dense, 32, 8, 128, 1, hot=True),
    _case("dense decode bf16 32/8 d128 key mask", _dense, 32, 8, 128, 1, (32, 1), hot=True),
    _case("dense prefill bf16 32/8 d128", _dense, 32, 8, 128, 1024, hot=True),
    _case("dense prefill bf16 32/8 d128 key mask", _dense, 32, 8, 128, 1024, (32, 1)),
    _case("dense prefill bf16 32/8 d128 mask", _dense, 32, 8, 128, 256, (1, 256)),
    # gpt-oss; Gemma 3 27B, local layers; Gemma 2 9B, local and global ones.
    _case(
        "decode gpt-oss 64/8 d64 w128 sinks",
        _decode,
        64,
        8,
        64,
        16,
        window=127,
        sinks=True,
        hot=True,
    ),
    _case("decode gemma3 32/16 d128 w1024", _decode, 32, 16, 128, 16, window=1023, hot=True),
    _case("decode gemma2 16/8 d256 cap", _decode, 16, 8, 256, 16, cap=50.0, hot=True),
    _case("decode bf16 32/8 d128 p16 alibi", _decode, 32, 8, 128, 16, alibi=True),
    _case("decode bf16 16/16 d192 v128", _decode, 16, 16, 192, 16, dv=128),
    _case("decode bf16 16/1 d512 v256", _decode, 16, 1, 512, 16, dv=256),
    _case("prefill gpt-oss 64/8 d64 w128 sinks", _prefill, 64, 8, 64, 16, window=127, sinks=True),
    _case("prefill gpt-oss 64/8 d64 sinks", _prefill, 64, 8, 64, 16, sinks=True),
    _case("prefill gemma3 32/16 d128 w1024", _prefill, 32, 16, 128, 16, window=1023),
    _case("prefill gemma2 16/8 d256 cap", _prefill, 16, 8, 256, 16, cap=50.0),
    _case("prefill bf16 32/8 d128 p16 no mask", _prefill, 32, 8, 128, 16, causal=False),
    _case("prefill bf16 32/8 d128 p16 cap", _prefill, 32, 8, 128, 16, cap=50.0),
    _case("prefill bf16 32/8 d128 p16 alibi", _prefill, 32, 8, 128, 16, alibi=True),
    _case("prefill bf16 32/8 d128 p16 mask bits", _prefill, 32, 8, 128, 16, mask=True),
    _case("prefill bf16 32/8 d128 p16 spans", _prefill, 32, 8, 128, 16, spans=True),
    _case("prefill bf16 16/16 d192 v128", _prefill, 16, 16, 192, 16, dv=128),
    _case("prefill bf16 16/1 d512 v256", _prefill, 16, 1, 512, 16, dv=256),
    # FP8 caches: scales for all, or for each token and head.
    _case("decode fp8 32/8 d128 p1", _decode, 32, 8, 128, 1, hot=True, programs=4, **FP8),
    _case("decode fp8 32/8 d128 p16", _decode, 32, 8, 128, 16, hot=True, programs=4, **FP8),
    _case("decode fp8 32/8 d128 p64", _decode, 32, 8, 128, 64, hot=True, programs=4, **FP8),
    _case(
        "decode fp8 32/8 d128 p1 token", _decode, 32, 8, 128, 1, hot=True, programs=4, **FP8_TOKEN
    ),
    _case(
        "decode fp8 32/8 d128 p16 token", _decode, 32, 8, 128, 16, hot=True, programs=4, **FP8_TOKEN
    ),
    _case(
        "decode fp8 32/8 d128 p64 token", _decode, 32, 8, 128, 64, hot=True, programs=4, **FP8_TOKEN
    ),
    _case("decode fp8 32/32 d128 p16", _decode, 32, 32, 128, 16, **FP8),
    _case("decode fp8 8/1 d128 p16", _decode, 8, 1, 128, 16, **FP8),
    _case("decode fp8 32/8 d64 p16", _decode, 32, 8, 64, 16, **FP8),
    _case("decode fp8 32/8 d256 p16", _decode, 32, 8, 256, 16, **FP8),
    _case("decode fp8 128/1 d128 p16", _decode, 128, 1, 128, 16, **FP8),
    _case("decode fp8 64/8 d64 w128 sinks", _decode, 64, 8, 64, 16, window=127, sinks=True, **FP8),
    _case("decode fp8 16/8 d256 cap", _decode, 16, 8, 256, 16, cap=50.0, **FP8),
    _case("decode e5m2 32/8 d128 p16", _decode, 32, 8, 128, 16, **E5M2),
    _case("prefill fp8 32/8 d128 p1", _prefill, 32, 8, 128, 1, **FP8),
    _case("prefill fp8 32/8 d128 p16", _prefill, 32, 8, 128, 16, **FP8),
    _case("prefill fp8 32/8 d128 p64", _prefill, 32, 8, 128, 64, **FP8),
    _case("prefill fp8 32/8 d128 p16 token", _prefill, 32, 8, 128, 16, **FP8_TOKEN),
    _case("prefill fp8 32/8 d128 p16 8x4", _prefill, 32, 8, 128, 16, batch=8, new=4, **FP8),
    _case("prefill fp8 32/8 d128 p16 32x16", _prefill, 32, 8, 128, 16, batch=32, new=16, **FP8),
    _case("prefill fp8 32/8 d64 p16", _prefill, 32, 8, 64, 16, **FP8),
    _case("prefill fp8 32/8 d256 p16", _prefill, 32, 8, 256, 16, **FP8),
    _case("prefill fp8 32/8 d128 p16 mask bits", _prefill, 32, 8, 128, 16, mask=True, **FP8),
    _case("append fp8 8 d128 p16", _append, 8, 128, 16, hot=True, **FP8),
    _case("append fp8 8 d128 p16 token", _append, 8, 128, 16, hot=True, **FP8_TOKEN),
    _case("rope_append fp8 32/8 d128", _rope_append, 32, 8, 128, hot=True, **FP8),
    _case("rope_append fp8 32/8 d128 token", _rope_append, 32, 8, 128, hot=True, **FP8_TOKEN),
    _case("merge_state bf16 d128", _merge_state, 128, hot=True),
    _case("merge_states bf16 d128", _merge_states, 128, hot=True),
    _case("rmsnorm bf16 111", _rmsnorm, 111),
    _case("rmsnorm bf16 3072", _rmsnorm, 3072, hot=True),
    _case("rmsnorm bf16 4096", _rmsnorm, 4096, hot=True),
    _case("rmsnorm bf16 8192", _rmsnorm, 8192, hot=True),
    _case("rmsnorm bf16 16384", _rmsnorm, 16384, hot=True),
    _case("fused_add_rmsnorm bf16 4096", _fused_add_rmsnorm, 4096, hot=True),
    _case("fused_add_rmsnorm fp32 4096", _fused_add_rmsnorm, 4096, jnp.float32),
    _case("fused_add_rmsnorm bf16 5120", _fused_add_rmsnorm, 5120, hot=True),
    _case("fused_add_rmsnorm bf16 8192", _fused_add_rmsnorm, 8192, hot=True),
    _case("fused_add_rmsnorm bf16 16384", _fused_add_rmsnorm, 16384, hot=True),
    _case("fused_add_rmsnorm bf16 20480", _fused_add_rmsnorm, 20480),
    _case("silu_and_mul bf16", _activation, "silu_and_mul", hot=True),
    _case("gelu_and_mul bf16", _activation, "gelu_and_mul", hot=True),
    _case("gelu_tanh_and_mul fp32", _activation, "gelu_tanh_and_mul", jnp.float32, hot=True),
    _case("sampling probs 128256", _sampling, 128256, False, hot=True),
    _case("sampling probs 128256 top_p", _sampling, 128256, False, top_p=None, hot=True),
    _case(
        "sampling probs 151936 top_k top_p",
        _sampling,
        151936,
        False,
        top_k=None,
        top_p=None,
        hot=True,
    ),
    _case(
        "sampling logits bf16 50257 all limits",
        _sampling,
        50257,
        True,
        jnp.bfloat16,
        **ALL_LIMITS,
        hot=True,
    ),
    _case("rope cache neox bf16 32/8 d128", _rope_cache, 32, 8, 128, hot=True),
    _case("rope cache interleaved bf16 32/8 d128", _rope_cache, 32, 8, 128, False),
    _case("rope llama31 pos_ids bf16 32/8 d128", _rope_pos_ids, 32, 8, 128),
    _case("rope cache neox bf16 8/1 d128", _rope_cache, 8, 1, 128),
    _case("rope cache neox bf16 16/8 d256", _rope_cache, 16, 8, 256),
    _case("rope_append bf16 32/8 d128", _rope_append, 32, 8, 128, hot=True),
    _case("rope_append norm bf16 32/8 d128", _rope_append, 32, 8, 128, True, hot=True),
    _case("rope_append apart bf16 32/8 d128", _rope_append, 32, 8, 128, False, True, hot=True),
    _case("rope_append norm bf16 64/8 d128", _rope_append, 64, 8, 128, True),
    _case("rope_append bf16 8/1 d128", _rope_append, 8, 1, 128),
    _case("append bf16 8 d128 p1", _append, 8, 128, 1, hot=True),
    _case("append bf16 8 d128 p16", _append, 8, 128, 16, hot=True),
    # gpt-oss-20b's experts: decode of 32 tokens, a chunk of 512, prefill of 4096; Qwen3-30B-A3B's.
    _case("grouped_matmul bf16 128x2880 e32", _grouped, 32, 4, 32, 5760, 2880, hot=True),
    _case("grouped_matmul bf16 2048x2880 e32", _grouped, 512, 4, 32, 5760, 2880, hot=True),
    _case("grouped_matmul bf16 16384x2880 e32", _grouped, 16384, 1, 32, 2880, 2880, hot=True),
    _case("grouped_matmul bf16 256x768 e128", _grouped, 256, 1, 128, 2048, 768, hot=True),
    _case("grouped_matmul fp32 2048x2880 e32", _grouped, 512, 4, 32, 5760, 2880, jnp.float32),
)
