"""FlashInfer, in this process: the arrays of the case are handed to PyTorch by DLPack, without a copy.

Programmatic dependent launch is off where kernel time is measured: it lets a call's kernels overlap, and their times
would then be counted twice. Decode steps, measured by the clock, have it on as FlashInfer's default has it.
"""

import functools
from collections.abc import Callable
from typing import Any

import flashinfer
import jax
import numpy as np
import torch

from benchmarks.cases import (
    Activation,
    Append,
    Attention,
    Cached,
    Case,
    Grouped,
    Loop,
    Merge,
    Norm,
    Plan,
    Rope,
    RopeAppend,
    Sample,
)
from benchmarks.inputs import EPS, AttentionInputs
from benchmarks.timing import Call

WORKSPACE_BYTES = 512 * 2**20
FUSED_HEADS = ((8, 1), (64, 8))  # of 128: those its one kernel from projection to cache is made for


def versions() -> dict[str, str]:
    return {"flashinfer": flashinfer.__version__, "torch": torch.__version__}


def build(case: Case, inputs: Any) -> dict[str, Callable[[], Call]]:
    if jax.default_backend() != "gpu" or isinstance(case, Grouped | Loop | Plan):
        return {}
    if isinstance(case, Cached) and case.kv_dtype:
        # Its append casts and scales nothing, and no kernel of its takes a scale for each token.
        if not isinstance(case, Attention) or case.kv_scales == "token":
            return {}
    if not isinstance(case, Attention):
        calls = {"flashinfer": lambda: _call(case, inputs)}
        if isinstance(case, RopeAppend) and _has_fused(case):
            calls["flashinfer-fused"] = lambda: _fused_rope_append(case, inputs)
        return calls
    if case.page_size is None and case.op != "prefill":
        return {}  # it decodes on pages
    if case.sinks:
        return {}  # its ordinary kernels leave sinks out; those that have them are compiled on the spot, with nvcc
    make = {"decode": _decode, "decode_step": _decode_step, "prefill": _prefill}[case.op]
    choices = ["fa2", "fa3"] if case.op == "prefill" else ["cuda-cores", "tensor-cores"]
    if case.kv_dtype and case.op == "prefill":
        choices.remove("fa3")  # which wants q in 8 bits too
    return {
        f"flashinfer-{choice}": functools.partial(make, case, inputs, choice) for choice in choices
    }


def _call(case: Case, x: Any) -> Call:
    match case:
        case Append():
            cache = tuple(_torch(pages).clone() for pages in x.cache.arrays)
            new = [_torch(a) for a in (x.key, x.value, x.batch_indices, x.positions)]
            table = x.pages.table
            where = [_torch(a) for a in (table.indices, table.indptr, table.last_page_len)]

            def run():
                flashinfer.append_paged_kv_cache(*new, cache, *where)
                return cache
        case Merge():
            v, s = _torch(x.v), _torch(x.s)

            def run():
                return flashinfer.merge_states(v, s)
        case Norm() if x.residual is not None:
            normed, residual = _torch(x.x).clone(), _torch(x.residual).clone()
            weight = _torch(x.weight)

            def run():
                flashinfer.fused_add_rmsnorm(normed, residual, weight, EPS, enable_pdl=False)
                return normed, residual
        case Norm():
            rows, weight = _torch(x.x), _torch(x.weight)
            y = torch.empty_like(rows)

            def run():
                flashinfer.rmsnorm(rows, weight, EPS, out=y, enable_pdl=False)
                return (y,)
        case Rope():
            q, k = _torch(x.query).clone(), _torch(x.key).clone()
            positions, table = _torch(x.positions), _torch(x.cos_sin_cache)

            def run():
                flashinfer.apply_rope_with_cos_sin_cache_inplace(
                    positions, q, k, case.head_dim, table
                )
                return q, k
        case Sample():
            rows = _torch(x.rows)
            limits = [limit for limit in (case.top_k, case.top_p) if limit]
            source = "logits" if case.logits else "probs"
            limited = [f"top_{n}" for n in "kp" if getattr(case, f"top_{n}")]
            draw = getattr(flashinfer.sampling, "_".join([*limited, "sampling_from", source]))

            def run():
                return (draw(rows, *limits),)
        case Activation():
            rows = _torch(x)
            y = torch.empty_like(rows[:, : case.hidden])
            activate = getattr(flashinfer, case.op)

            def run():
                activate(rows, out=y, enable_pdl=False)
                return (y,)
        case RopeAppend():
            return _rope_append(case, x)
        case _:
            raise TypeError(f"no call for {type(case).__name__}")
    return Call(run, _wait)


def _rope_append(case: RopeAppend, x: Any) -> Call:
    """By the ops it has for any heads: q, k and v are views of the projection, and need not be cut out of it."""
    h, kh, d = case.num_qo_heads, case.num_kv_heads, case.head_dim
    qkv, cache = _torch(x.qkv).clone(), tuple(_torch(pages).clone() for pages in x.cache.arrays)
    q, k, v = qkv.split((h * d, kh * d, kh * d), dim=1)
    heads = [part.view(case.num_tokens, -1, d) for part in (q, k, v)]
    weights = [_torch(weight) for weight in x.norm_weights or ()]
    batch, positions, cos_sin_cache = map(_torch, (x.batch_indices, x.positions, x.cos_sin_cache))
    table = x.pages.table
    where = [_torch(a) for a in (table.indices, table.indptr, table.last_page_len)]

    def run():
        query, key = q, k
        if weights:
            query, key = (
                flashinfer.rmsnorm(part, weight, EPS, enable_pdl=False).view(case.num_tokens, -1)
                for part, weight in zip(heads, weights)
            )
        query, key = flashinfer.apply_rope_with_cos_sin_cache(
            positions, query, key, d, cos_sin_cache
        )
        new = (key.view(heads[1].shape), heads[2], batch, positions)
        flashinfer.append_paged_kv_cache(*new, cache, *where)
        return (*cache, query.view(heads[0].shape))

    return Call(run, _wait)


def _has_fused(case: RopeAppend) -> bool:
    heads = (case.num_qo_heads, case.num_kv_heads)
    return heads in FUSED_HEADS and case.head_dim == 128 and case.dtype == "bfloat16"


def _fused_rope_append(case: RopeAppend, x: Any) -> Call:
    """By the kernel that it generates for some heads, for few tokens; it wants float32 weights."""
    qkv, cache = _torch(x.qkv), tuple(_torch(pages).clone() for pages in x.cache.arrays)
    q_weight, k_weight = [_torch(weight).float() for weight in x.norm_weights or ()] or (None, None)
    block_table = _torch(x.pages.table.indices).reshape(case.batch, -1)
    kv_lens = torch.full((case.batch,), case.kv_len, dtype=torch.int32, device="cuda")
    qo_indptr = torch.arange(case.batch + 1, dtype=torch.int32, device="cuda") * case.new
    query = torch.empty(
        (case.num_tokens, case.num_qo_heads, case.head_dim), dtype=qkv.dtype, device="cuda"
    )
    where = (_torch(x.cos_sin_cache), kv_lens, qo_indptr, block_table)

    def run():
        flashinfer.rope.cake_fused_qk_rmsnorm_rope_append_paged_kv_cache(
            qkv,
            *where,
            *cache,
            num_q_heads=case.num_qo_heads,
            num_kv_heads=case.num_kv_heads,
            qk_norm_policy=2 if x.norm_weights else 0,  # 2: before the rotation
            q_norm_weight=q_weight,
            k_norm_weight=k_weight,
            eps=EPS,
            out_q=query,
            clear_unused_last_page_rows=False,
        )
        return (*cache, query)

    return Call(run, _wait)


def probe() -> Call:
    """A small kernel of PyTorch's, for choosing a timer that sees it."""
    x = torch.ones(1024, device="cuda")
    return Call(lambda: x + 1, _wait)


def _torch(array: jax.Array) -> torch.Tensor:
    name = array.dtype.name
    if name.startswith("float8"):  # DLPack has no name for it everywhere
        array = jax.lax.bitcast_convert_type(array, jax.numpy.uint8)
        return torch.from_dlpack(jax.block_until_ready(array)).view(getattr(torch, name))
    return torch.from_dlpack(jax.block_until_ready(array))


def _wait(outputs: Any) -> None:
    torch.cuda.synchronize()


@functools.cache
def _workspace() -> torch.Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")


def _host(x: Any) -> torch.Tensor:
    return torch.from_numpy(x).pin_memory()


def _paged_call(wrapper: Any, x: AttentionInputs) -> Call:
    q, cache = _torch(x.q), tuple(map(_torch, x.caches[0].arrays))
    out, scales = torch.empty_like(q), {}
    if (
        own := x.caches[0].scales
    ) is not None:  # v's, it multiplies its output by in a kernel of its own
        scales = dict(k_scale=float(own.k), v_scale=float(own.v))

    def run():
        wrapper.run(q, cache, out=out, enable_pdl=False, **scales)
        return (out,)

    return Call(run, _wait)


def _plan_decode(wrapper: Any, case: Attention, x: AttentionInputs) -> Any:
    """A function that plans: lengths from the host, page ids already on the device, as engines have them."""
    return functools.partial(
        wrapper.plan,
        _host(x.pages.indptr),
        _torch(x.pages.table.indices),
        _host(x.pages.last_page_len),
        case.num_qo_heads,
        case.num_kv_heads,
        case.head_dim,
        case.page_size,
        **_variant(case),
    )


def _variant(case: Attention) -> dict[str, Any]:
    window = -1 if case.window_left is None else case.window_left
    types = dict(q_data_type=getattr(torch, case.dtype))
    types |= dict(kv_data_type=getattr(torch, case.kv_dtype or case.dtype))
    return dict(window_left=window, logits_soft_cap=case.soft_cap, **types)


def _decode(case: Attention, x: AttentionInputs, choice: str) -> Call:
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        _workspace(), "NHD", use_tensor_cores=choice == "tensor-cores"
    )
    _plan_decode(wrapper, case, x)()
    return _paged_call(wrapper, x)


def _prefill(case: Attention, x: AttentionInputs, choice: str) -> Call:
    shape = (case.num_qo_heads, case.num_kv_heads, case.head_dim)
    how = dict(causal=case.causal, **_variant(case))
    if x.tree is not None:
        how |= dict(
            custom_mask=torch.from_numpy(np.concatenate([m.ravel() for m in x.tree])).cuda()
        )
    if case.page_size is not None:
        paged = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(), "NHD", backend=choice)
        paged.plan(
            _host(x.qo_indptr),
            _host(x.pages.indptr),
            _torch(x.pages.table.indices),
            _host(x.pages.last_page_len),
            *shape,
            case.page_size,
            **how,
        )
        return _paged_call(paged, x)

    ragged = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(_workspace(), "NHD", backend=choice)
    ragged.plan(_host(x.qo_indptr), _host(x.kv_indptr), *shape, **how)
    q, k, v = _torch(x.q), *(_torch(pages)[:, 0] for pages in x.caches[0].arrays)
    out = torch.empty_like(q)

    def run():
        ragged.run(q, k, v, out=out, enable_pdl=False)
        return (out,)

    return Call(run, _wait)


def _decode_step(case: Attention, x: AttentionInputs, choice: str) -> Call:
    """plan() and the replay of one CUDA graph that holds the attention of every layer."""
    q, indices = _torch(x.q), _torch(x.pages.table.indices)
    caches = [tuple(map(_torch, cache.arrays)) for cache in x.caches]
    batch = len(case.kv_lens)
    wrapper = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(
        _workspace(),
        torch.empty(batch + 1, dtype=torch.int32, device="cuda"),
        torch.empty_like(indices),
        torch.empty(batch, dtype=torch.int32, device="cuda"),
        "NHD",
        use_tensor_cores=choice == "tensor-cores",
    )
    plan = _plan_decode(wrapper, case, x)
    outputs = [torch.empty_like(q) for _ in caches]

    def layers():
        hidden = q
        for cache, out in zip(caches, outputs):
            hidden = wrapper.run(hidden, cache, out=out)

    plan()
    layers()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Only this thread: JAX's own query events meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        layers()
    planned = torch.cuda.Event()

    def run():
        # plan() stages its results in one pinned buffer: it must not start before the last copy from it is done.
        planned.synchronize()
        plan()
        planned.record()
        graph.replay()
        return outputs

    return Call(run, _wait)
