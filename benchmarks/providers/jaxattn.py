"""This library: on a GPU its kernels, elsewhere its XLA reference.

Kernel times of attention leave the plan out, as those of FlashInfer do; a decode step has it in, and a decode loop is
`jaxattn.generate`'s.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import jaxattn as ja
from benchmarks.cases import (
    Activation,
    Append,
    Attention,
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
from benchmarks.inputs import (
    EPS,
    AttentionInputs,
    LoopInputs,
    appended,
    loop_config,
    with_written,
    written,
)
from benchmarks.timing import Call
from jaxattn.generate import Requests, Sampling, State, decode_steps
from jaxattn.grouped_matmul import grouped_matmul
from jaxattn.kernels.mosaic import serves
from jaxattn.models import decoder


def versions() -> dict[str, str]:
    return {}


def build(case: Case, inputs: Any) -> dict[str, Callable[[], Call]]:
    calls = {"jaxattn": lambda: make_call(case, inputs)}
    if isinstance(case, Attention) and case.op == "prefill" and serves.why_not() is None:
        calls["jaxattn-triton"] = lambda: make_call(case, inputs, backend="triton")
    if isinstance(case, RopeAppend | Loop):
        calls["jaxattn-separate"] = lambda: make_call(case, inputs, separate=True)
    return calls


def make_call(case: Case, x: Any, *, backend: str | None = None, separate: bool = False) -> Call:
    """The op of a case, bound to its inputs; `separate`, by an op for each of its parts."""
    # XLA's fusions write to new buffers; made to write in place, it would copy the inputs first.
    update = out_of_place if backend == "xla" else in_place
    match case:
        case Attention():
            return _attention(case, x, backend)
        case Plan():
            shape: dict[str, Any] = dict(page_size=case.page_size)
            shape |= dict(num_qo_heads=case.num_qo_heads, num_kv_heads=case.num_kv_heads)

            def plan_arrays(table):
                plan = ja.plan_decode(table, **shape)
                pages = (plan.page_indices, plan.page_start, plan.kv_len, plan.page_range)
                return *pages, plan.items

            plan_arrays = jax.jit(plan_arrays)
            return Call(lambda: plan_arrays(x.table))
        case Append():
            pages = written(x.cache)

            def append(*args):
                cache = with_written(x.cache, args[: len(pages)])
                key, value, batch_indices, positions, table = args[len(pages) :]
                return written(
                    ja.append_paged_kv_cache(
                        key, value, batch_indices, positions, cache, table, backend=backend
                    )
                )

            new = (x.key, x.value, x.batch_indices, x.positions)
            return in_place(append, pages, (*new, x.pages.table))
        case Merge():
            merge = jax.jit(functools.partial(ja.merge_states, lse_base="log2", backend=backend))
            return Call(lambda: merge(x.v, x.s))
        case Norm() if x.residual is not None:
            fused = functools.partial(ja.fused_add_rmsnorm, eps=EPS, backend=backend)
            return update(fused, (x.x, x.residual), (x.weight,))
        case Norm():
            norm = jax.jit(functools.partial(ja.rmsnorm, eps=EPS, backend=backend))
            return Call(lambda: (norm(x.x, x.weight),))
        case Grouped():
            product = jax.jit(functools.partial(grouped_matmul, backend=backend))
            return Call(lambda: (product(x.x, x.weights, x.groups),))
        case Rope():

            def rope(query, key, positions, table):
                return ja.apply_rope_with_cos_sin_cache_inplace(
                    positions, query, key, case.head_dim, table, backend=backend
                )

            return update(rope, (x.query, x.key), (x.positions, x.cos_sin_cache))
        case RopeAppend():
            fused_or_not: Any = _rope_append_by_parts if separate else ja.rope_append_paged_kv_cache

            pages = written(x.cache)

            def rope_append(*args):
                norm_weights, table, *tokens = args[len(pages) :]
                q_weight, k_weight = norm_weights or (None, None)
                q, cache = fused_or_not(
                    *tokens,
                    with_written(x.cache, args[: len(pages)]),
                    table,
                    q_norm_weight=q_weight,
                    k_norm_weight=k_weight,
                    eps=EPS,
                    backend=backend,
                )
                return (*written(cache), q)

            tokens = (x.qkv, x.batch_indices, x.positions, x.cos_sin_cache)
            return in_place(rope_append, pages, (x.norm_weights, x.pages.table, *tokens))
        case Sample():
            draw = jax.jit(functools.partial(_draw, case, backend=backend))
            return Call(lambda: (draw(x.rows, x.key),))
        case Activation():
            activate = jax.jit(functools.partial(getattr(ja, case.op), backend=backend))
            return Call(lambda: (activate(x),))
        case Loop():
            return _decode_loop(case, x, backend, separate)
    raise TypeError(f"no call for {type(case).__name__}")


def _draw(case: Sample, rows: jax.Array, key: jax.Array, *, backend: str | None) -> jax.Array:
    k, p = case.top_k, case.top_p
    if case.logits:
        return ja.sampling_from_logits(rows, key, top_k=k, top_p=p, backend=backend)
    if k and p:
        return ja.top_k_top_p_sampling_from_probs(rows, k, p, key, backend=backend)
    if k:
        return ja.top_k_sampling_from_probs(rows, k, key, backend=backend)
    if p:
        return ja.top_p_sampling_from_probs(rows, p, key, backend=backend)
    return ja.sampling_from_probs(rows, key, backend=backend)


def in_place(fn: Callable[..., Any], updated: tuple[jax.Array, ...], rest: tuple[Any, ...]) -> Call:
    """`fn(*updated, *rest)` writing its first results over `updated`: donated, each call takes the last one's."""
    step = jax.jit(fn, donate_argnums=tuple(range(len(updated))))
    state = [jnp.copy(array) for array in updated]

    def run() -> tuple[jax.Array, ...]:
        outputs = step(*state, *rest)
        state[:] = outputs[: len(state)]
        return tuple(outputs)

    return Call(run)


def out_of_place(
    fn: Callable[..., Any], updated: tuple[jax.Array, ...], rest: tuple[Any, ...]
) -> Call:
    """`fn(*updated, *rest)`, its arguments left as they are."""
    step = jax.jit(fn)
    return Call(lambda: step(*updated, *rest))


def _rope_append_by_parts(
    qkv,
    batch_indices,
    positions,
    cos_sin_cache,
    cache,
    page_table,
    *,
    q_norm_weight,
    k_norm_weight,
    eps,
    backend,
):
    """`rope_append_paged_kv_cache` by the ops it is made of."""
    t, kh, d = qkv.shape[0], cache.num_kv_heads, cache.head_dim
    ends = (qkv.shape[1] - 2 * kh * d, qkv.shape[1] - kh * d)
    query, key, value = (x.reshape(t, -1, d) for x in jnp.split(qkv, ends, axis=1))
    if q_norm_weight is not None:
        query = ja.rmsnorm(query, q_norm_weight, eps, backend=backend)
        key = ja.rmsnorm(key, k_norm_weight, eps, backend=backend)
    query, key = ja.apply_rope_with_cos_sin_cache_inplace(
        positions, query, key, d, cos_sin_cache, backend=backend
    )
    cache = ja.append_paged_kv_cache(
        key, value, batch_indices, positions, cache, page_table, backend=backend
    )
    return query, cache


def _add_rmsnorm_by_parts(x, residual, weight, eps, *, backend):
    """`fused_add_rmsnorm` by the sum, rounded, and its norm."""
    total = x + residual
    return ja.rmsnorm(total, weight, eps, backend=backend), total


def _attention(case: Attention, x: AttentionInputs, backend: str | None) -> Call:
    heads: dict[str, Any] = dict(num_qo_heads=case.num_qo_heads, num_kv_heads=case.num_kv_heads)
    heads |= dict(window_left=case.window_left)
    queries: dict[str, Any] = dict(num_qo_tokens=case.num_qo_tokens, causal=case.causal)
    how: dict[str, Any] = dict(backend=backend, logits_soft_cap=case.soft_cap)
    qo_indptr = jnp.asarray(x.qo_indptr)
    if case.page_size is None and case.op != "prefill":
        return dense_decode(case, x, functools.partial(ja.dot_product_attention, backend=backend))
    if case.page_size is None:
        k, v = (pages[:, 0] for pages in x.caches[0].arrays)
        plan_ragged = jax.jit(functools.partial(ja.plan_ragged_prefill, **heads, **queries))
        ragged_plan = plan_ragged(qo_indptr, jnp.asarray(x.kv_indptr))
        ragged = jax.jit(functools.partial(ja.ragged_prefill, **how))
        return Call(lambda: (ragged(x.q, k, v, ragged_plan, sinks=x.sinks),))

    heads |= dict(page_size=case.page_size)
    plan_decode = jax.jit(functools.partial(ja.plan_decode, **heads))
    # Traced once, called in every layer.
    decode = jax.jit(functools.partial(ja.paged_decode, **how))
    match case.op:
        case "decode":
            decode_plan = plan_decode(x.pages.table)
            return Call(lambda: (decode(x.q, x.caches[0], decode_plan, sinks=x.sinks),))
        case "prefill":
            plan = jax.jit(functools.partial(ja.plan_prefill, **heads, **queries))
            mask = None
            if x.tree is not None:
                bits = jnp.asarray(np.concatenate([m.ravel() for m in x.tree]))
                mask = ja.MaskBits.of(bits, qo_indptr, jnp.asarray(case.kv_lens, jnp.int32))
            prefill_plan = plan(qo_indptr, x.pages.table, mask=mask)
            prefill = jax.jit(functools.partial(ja.paged_prefill, **how))
            return Call(lambda: (prefill(x.q, x.caches[0], prefill_plan, sinks=x.sinks),))

    @jax.jit
    def step(q, caches, table):
        plan = plan_decode(table)
        outputs = []
        for cache in caches:
            q = decode(q, cache, plan)
            outputs.append(q)
        return outputs

    return Call(lambda: step(x.q, x.caches, x.pages.table))


def dense_decode(case: Attention, x: AttentionInputs, attend: Callable[..., jax.Array]) -> Call:
    """`attend(q, k, v, key_value_seq_lengths=...)` on q [b, 1, h, d] and each layer's dense cache [b, s, kh, d]."""
    (kv_len,) = set(case.kv_lens)
    dense = (len(case.kv_lens), kv_len, case.num_kv_heads, case.head_dim)
    lengths = jnp.asarray(case.kv_lens, jnp.int32)

    @jax.jit
    def step(q, caches, lengths):
        outputs = []
        for cache in caches:
            k, v = (pages.reshape(dense) for pages in cache.arrays)
            q = attend(q[:, None], k, v, key_value_seq_lengths=lengths)[:, 0]
            outputs.append(q)
        return outputs

    return Call(lambda: step(x.q, x.caches, lengths))


# Undecorated: what JAX traced of the fused ones, under their names, must not be taken for these.
_layer, _decode_steps = inspect.unwrap(decoder._layer), inspect.unwrap(decode_steps)


@functools.partial(jax.jit, static_argnames=("spec", "config", "backend"))
@functools.wraps(_layer)
def _layer_by_parts(*args, **options):
    """A layer of the model that fuses nothing."""
    # Nothing else traces the model meanwhile: a case's calls start in turn, its oracle's after them.
    with mock.patch.multiple(
        decoder,
        rope_append_paged_kv_cache=_rope_append_by_parts,
        fused_add_rmsnorm=_add_rmsnorm_by_parts,
    ):
        return _layer(*args, **options)


def _decode_steps_by_parts(*args, **options):
    """`decode_steps` of a model that fuses nothing."""
    with mock.patch.object(decoder, "_layer", _layer_by_parts):
        return _decode_steps(*args, **options)


def _decode_loop(case: Loop, x: LoopInputs, backend: str | None, separate: bool) -> Call:
    """Every call decodes the same steps: the caches move on with it, the lengths begin anew."""
    config = loop_config(case)

    def zeros(dtype: Any = jnp.int32) -> jax.Array:
        return jnp.zeros(case.batch, dtype)

    def loop(caches, params, block_tables, token, cos_sin_caches):
        requests = Requests(
            block_tables=block_tables,
            prompt_len=zeros() + case.kv_len,
            limit=zeros() + case.steps + 1,  # nobody ends
            eos=jnp.zeros(0, jnp.int32),
            key=jax.random.split(jax.random.key(0), case.batch),
            cos_sin_caches=cos_sin_caches,
        )
        state = State(caches, zeros() + case.kv_len, token, zeros(), zeros(bool))
        options: dict[str, Any] = dict(config=config, sampling=Sampling(), backend=backend)
        take_steps = _decode_steps_by_parts if separate else decode_steps
        state, tokens = take_steps(params, state, requests, num_steps=case.steps, **options)
        new = appended(case, state.caches, block_tables)
        return state.caches, (tokens, *new)

    tables = decoder.rope_tables(config, case.kv_len + case.steps)
    caches = jax.tree.map(jnp.copy, x.caches)

    def runner(**options: Any) -> Callable[[], tuple[jax.Array, ...]]:
        step = jax.jit(loop, donate_argnums=0, **options)

        def run() -> tuple[jax.Array, ...]:
            nonlocal caches
            caches, outputs = step(caches, x.params, x.block_tables, x.token, tables)
            return outputs

        return run

    no_graphs = {"xla_gpu_enable_command_buffer": ""}
    return Call(runner(), run_apart=runner(compiler_options=no_graphs))
