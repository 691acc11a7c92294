"""Whether an output is right: its error against `jaxattn.reference` in float32, on the case's own inputs.

The error is the largest relative error of a row (a token, a page slot): ||out - ref|| / ||ref||. Attention is checked
on up to ROWS query tokens of every request, the first and the last among them, or of REQUESTS requests in
CHECKED_LAYERS of a decode step; everything else in full. A decode loop is held, for LOOP_REQUESTS requests,
against one prefill of its tokens by the same model in plain jnp: by what it appended in a few layers, and by how far a
token it took falls short of the likeliest, as a share of the largest logit. A plan has no reference: its error is 0
where it is sound, else 1. Draws differ: their error is the share of tokens that should not have been kept.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

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
    SHOWN_LAYERS,
    AttentionInputs,
    LoopInputs,
    Pages,
    SampleInputs,
    appended,
    loop_config,
    loop_pages,
    written,
)
from jaxattn import reference
from jaxattn.models import decoder
from jaxattn.models.weights import Params
from jaxattn.spec import Score
from jaxattn.work_list import WorkItem

ROWS = 16
REQUESTS = 8
CHECKED_LAYERS = (0, 1, -1)
LOOP_REQUESTS = 2

# Twice and more what rounding the inputs of the matrix products costs; a wrong row is off by far more.
TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5, "int32": 0.0}
# Every layer rounds: two sound computations of 32 layers differ by 2% of a row of the last.
LOOP_TOLERANCE = {"bfloat16": 5e-2, "float16": 1e-2, "float32": 1e-4}

# What is stored in 8 bits may fall on either side where it lies near the middle of two numbers.
STORED_TOLERANCE = {"float8_e4m3fn": 5e-2}

# Its products are few: searching for the fastest algorithm would take longer than they do.
NO_SEARCH = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


def tolerance(case: Case) -> float:
    """The largest error of a right output."""
    if isinstance(case, Append | RopeAppend) and case.kv_dtype:
        return STORED_TOLERANCE[case.kv_dtype]
    return (LOOP_TOLERANCE if isinstance(case, Loop) else TOLERANCE)[case.dtype]


class Oracle(NamedTuple):
    error: Callable[[Sequence[Array]], float]  # of a call's outputs
    checked: str


def make_oracle(case: Case, inputs: Any) -> Oracle:
    """The oracle of a case; what it needs is computed here, once for all providers."""
    if isinstance(case, Attention):
        if case.op == "decode_step":
            return _step_oracle(case, inputs)
        rows = {r: _spread(n, ROWS) for r, n in enumerate(case.qo_lens)}
        tokens, o = _attention(case, inputs, inputs.caches[0], inputs.q, rows)
        checked = f"{tokens.size} of {case.num_qo_tokens} query tokens"
        return Oracle(lambda out: _error([out[0][tokens]], [o]), checked)
    if isinstance(case, Loop):
        return _loop_oracle(case, inputs)
    if isinstance(case, Plan):
        return Oracle(lambda out: float(not _is_sound(case, inputs, out)), "all")
    if isinstance(case, Sample):
        return Oracle(_drawn_oracle(case, inputs), "all")
    expected = _expected(case, inputs)
    return Oracle(lambda out: _error(out, expected), "all")


def _expected(case: Case, x: Any) -> Sequence[Array]:
    """All outputs of an op other than attention, float32; of append, the caches as they must be."""

    def float32(tree):
        return jax.tree.map(lambda a: a.astype(jnp.float32), tree)

    match case:
        case Append():
            write = jax.jit(reference.append_paged_kv_cache)
            table = x.pages.table
            cache = write(x.key, x.value, x.batch_indices, x.positions, x.cache, table)
            return [pages.reshape(-1, *pages.shape[2:]) for pages in written(cache)]
        case Merge():
            merge = jax.jit(functools.partial(reference.merge_states, lse_base="log2"))
            return merge(*float32((x.v, x.s)))
        case Norm() if x.residual is not None:
            norm = jax.jit(functools.partial(reference.fused_add_rmsnorm, eps=EPS))
            return norm(*float32((x.x, x.residual, x.weight)))
        case Norm():
            norm = jax.jit(functools.partial(reference.rmsnorm, eps=EPS))
            return [norm(*float32((x.x, x.weight)))]
        case Grouped():
            product = jax.jit(reference.grouped_matmul)
            return [product(*float32((x.x, x.weights)), x.groups.order, x.groups.ends)]
        case Rope():
            rope = jax.jit(functools.partial(reference.rope, interleave=False))
            return rope(*float32((x.query, x.key)), x.positions, x.cos_sin_cache)
        case Activation():
            activation = case.op.removesuffix("_and_mul")
            return [reference.activate_and_multiply(float32(x), activation)]
        case RopeAppend():
            write = jax.jit(
                functools.partial(reference.rope_append_paged_kv_cache, interleave=False, eps=EPS)
            )
            heads = x.qkv.astype(jnp.float32).reshape(x.qkv.shape[0], -1, x.cache.head_dim)
            where = (x.batch_indices, x.positions, None, x.cos_sin_cache)
            q, cache = write((heads,), *where, x.norm_weights, x.cache, x.pages.table)
            return [*(pages.reshape(-1, *pages.shape[2:]) for pages in written(cache)), q]
    raise TypeError(f"no oracle for {type(case).__name__}")


def _drawn_oracle(case: Sample, x: SampleInputs) -> Callable[[Sequence[Array]], float]:
    """The share of tokens outside of the nucleus of a sort in float64; a token at its border may be in or out."""
    rows = np.asarray(x.rows, np.float64)
    if case.logits:
        rows = np.exp(rows - rows.max(axis=1, keepdims=True))
    rows /= rows.sum(axis=1, keepdims=True)
    descending = -np.sort(-rows, axis=1)
    if case.top_k is not None:
        descending[:, case.top_k :] = 0
        descending /= descending.sum(axis=1, keepdims=True)
    before = np.cumsum(descending, axis=1) - descending
    kept = (before < (case.top_p or 1.0) + 1e-6) & (descending > 0)
    scale = rows.max(axis=1) / descending[:, 0]
    least = np.where(kept, descending, np.inf).min(axis=1) * scale

    def error(outputs: Sequence[Array]) -> float:
        token = np.asarray(outputs[0])
        exists = (0 <= token) & (token < case.vocab)
        chosen = rows[np.arange(case.batch), np.where(exists, token, 0)]
        return float(np.mean(~exists | (chosen < least * (1 - 1e-6))))

    return error


def _step_oracle(case: Attention, inputs: AttentionInputs) -> Oracle:
    """Each checked layer against the attention of what this very step gave it as its query."""
    rows = {r: np.array([0]) for r in _spread(len(case.kv_lens), REQUESTS)}

    def error(outputs: Sequence[Array]) -> float:
        errors = []
        for layer in {i % case.num_layers for i in CHECKED_LAYERS}:
            q = outputs[layer - 1] if layer else inputs.q
            tokens, expected = _attention(case, inputs, inputs.caches[layer], q, rows)
            errors.append(_error([outputs[layer][tokens]], [expected]))
        return float(np.max(errors))

    return Oracle(
        error,
        f"{len(rows)} of {len(case.kv_lens)} requests in layers "
        f"{sorted({i % case.num_layers for i in CHECKED_LAYERS})}",
    )


def _loop_oracle(case: Loop, x: LoopInputs) -> Oracle:
    """The tokens of a few requests, and the keys and values they appended, against one prefill of these tokens."""
    checked = _spread(case.batch, LOOP_REQUESTS)
    pages = {
        window: table[checked, : loop_pages(case, window)].reshape(-1)
        for window, table in zip(loop_config(case).windows, x.block_tables)
    }
    caches = tuple(
        jax.tree.map(lambda a, own=pages[window]: a[own], cache)
        for window, cache in zip(case.windows, x.caches)
    )

    def error(outputs: Sequence[Array]) -> float:
        tokens, *rows = outputs
        chosen = tokens.T[checked]  # [r, steps]
        told = jnp.concatenate([x.token[checked, None], chosen[:, :-1]], axis=1)
        shortfall, expected = _replay(x.params, caches, told, chosen, case)
        ours = [a.reshape(case.batch, case.steps, -1)[checked] for a in rows]
        flat = [[a.reshape(chosen.size, -1) for a in each] for each in (ours, expected)]
        return float(np.max([float(shortfall), _error(*flat)]))

    return Oracle(error, f"{checked.size} of {case.batch} requests, layers {SHOWN_LAYERS}")


@functools.partial(jax.jit, static_argnames="case", compiler_options=NO_SEARCH)
def _replay(
    params: Params, caches: decoder.Caches, tokens: Array, chosen: Array, case: Loop
) -> tuple[Array, list[Array]]:
    """Tokens [r, steps] through the model at once: (shortfall of the chosen ones, k and v appended in a few layers)."""
    requests, steps = tokens.shape
    config = loop_config(case)
    kv_len = jnp.full(requests, case.kv_len + steps, jnp.int32)
    qo_indptr = jnp.arange(requests + 1, dtype=jnp.int32) * steps
    width = jnp.arange(-(-(case.kv_len + steps) // case.page_size), dtype=jnp.int32)
    first = jnp.arange(requests, dtype=jnp.int32)[:, None]
    block_tables = [
        first * n + width[None, :] % n
        for n in (loop_pages(case, window) for window in config.windows)
    ]
    owner, positions = ja.get_batch_indices_positions(qo_indptr, kv_len, tokens.size)
    batch = decoder.make_batch(
        config,
        tokens.reshape(-1),
        positions,
        owner,
        block_tables,
        kv_len,
        page_size=case.page_size,
        qo_indptr=qo_indptr,
    )
    logits, caches = decoder.forward(
        params,
        config,
        batch,
        caches,
        decoder.rope_tables(config, case.kv_len + steps),
        jnp.arange(tokens.size, dtype=jnp.int32),
        backend="xla",
    )
    best, taken = logits.max(axis=1), logits[jnp.arange(tokens.size), chosen.reshape(-1)]
    shortfall = ((best - taken) / jnp.abs(logits).max(axis=1)).max()
    return shortfall, appended(case, caches, block_tables)


def _is_sound(case: Plan, pages: Pages, outputs: Sequence[Array]) -> bool:
    """Whether a plan's items meet every key of every request exactly once, on its pages, and can be merged."""
    page_ids, page_start, kv_len, page_range, rows = map(np.asarray, outputs)
    sound = np.array_equal(page_ids, pages.indices) and np.array_equal(kv_len, case.kv_lens)
    sound &= np.array_equal(page_start, pages.indptr[:-1])
    sound &= np.array_equal(page_range, [pages.indices.min(), pages.indices.max()])

    group = case.num_qo_heads // case.num_kv_heads
    keys, start = (np.repeat(a, group) for a in (case.kv_lens, pages.indptr[:-1]))
    # Slices would be cut at the bounds, and what lies beyond them go unseen.
    columns = WorkItem(*rows.T)
    # A query's position, negative in later requests' tokens, matters to windows alone.
    sound &= bool(min(x.min() for x in columns._replace(q_position=columns.split)) >= 0)
    sound &= bool(columns.row_end.max() <= keys.size and columns.kv_end.max() <= keys.max())
    met = np.zeros((keys.size, keys.max()), np.int32)
    tiles: dict[Any, list[Any]] = {}
    for item in (WorkItem(*row) for row in rows.tolist() if row[0] < row[1]):
        met[item.row_begin : item.row_end, item.kv_begin : item.kv_end] += 1
        sound &= bool((start[item.row_begin : item.row_end] == item.page_start).all())
        splits = tiles.setdefault((item.row_begin, item.row_end), [])
        splits.append((item.split, item.num_splits, item.slot))
    sound &= np.array_equal(met, np.arange(met.shape[1]) < keys[:, None])

    # The splits of a tile are all there, and no two tiles' partial states share a slot.
    slots = []
    for splits in tiles.values():
        n, slot = len(splits), splits[0][2]
        sound &= sorted(splits) == [(i, n, slot) for i in range(n)]
        slots += [slot + i for i in range(n)] if n > 1 else []
    return sound and len(set(slots)) == len(slots)


def _spread(n: int, count: int) -> np.ndarray:
    """Up to `count` of 0 .. n - 1, evenly spread, both ends among them."""
    return np.unique(np.linspace(0, n - 1, min(n, count)).astype(int))


def _attention(
    case: Attention,
    inputs: AttentionInputs,
    cache: ja.PagedKVCache,
    q: Array,
    rows: dict[int, np.ndarray],
) -> tuple[np.ndarray, Array]:
    """Attention of some rows of some requests: (their tokens, o float32 [rows, h, d])."""
    tokens, outputs = [], []
    for request, own in rows.items():
        begin, end = inputs.pages.indptr[request : request + 2]
        first = inputs.qo_indptr[request]
        kv_len = case.kv_lens[request]
        key, position = np.arange(kv_len)[None, :], (own + kv_len - case.qo_lens[request])[:, None]
        seen = np.ones((own.size, kv_len), bool)
        if case.causal:
            seen &= key <= position
        if case.window_left is not None:
            seen &= key >= position - case.window_left
        if inputs.tree is not None:
            seen &= inputs.tree[request][own]
        outputs.append(
            _attend(
                q[first + own],
                cache,
                jnp.asarray(inputs.pages.indices[begin:end]),
                jnp.asarray(seen),
                inputs.sinks,
                soft_cap=case.soft_cap,
            )
        )
        tokens.append(first + own)
    return np.concatenate(tokens), jnp.concatenate(outputs)


@functools.partial(jax.jit, static_argnames="soft_cap", compiler_options=NO_SEARCH)
def _attend(
    q: Array,
    cache: ja.PagedKVCache,
    page_ids: Array,
    seen: Array,
    sinks: Array | None,
    *,
    soft_cap: float | None,
) -> Array:
    k, v = (pages[page_ids].reshape(-1, *pages.shape[2:]) for pages in cache.arrays)
    if cache.scales is not None:
        scales = [cache.scales.k, cache.scales.v]
        if cache.scales.per_token:
            scales = [pages[page_ids].reshape(-1, pages.shape[2]) for pages in scales]
        k, v = (
            x.astype(jnp.float32) * jnp.broadcast_to(scale, x.shape[:-1])[..., None]
            for x, scale in zip((k, v), scales)
        )
    mask = jnp.pad(seen, ((0, 0), (0, k.shape[0] - seen.shape[1])))
    score = Score(1 / math.sqrt(q.shape[-1]), soft_cap)
    o, lse = reference.attention(q.astype(jnp.float32), k, v, mask, score.logit)
    return o if sinks is None else o * jax.nn.sigmoid(lse - sinks[None, :])[..., None]


def _error(outputs: Sequence[Array], expected: Sequence[Array]) -> float:
    errors = [float(_row_error(*pair)) for pair in zip(outputs, expected, strict=True)]
    return float(np.max(errors))  # unlike max(), it keeps a NaN


@jax.jit
def _row_error(out: Array, expected: Array) -> Array:
    a, b = (x.astype(jnp.float32).reshape(expected.shape[0], -1) for x in (out, expected))
    norm = jnp.linalg.norm(b, axis=1)
    return jnp.max(jnp.linalg.norm(a - b, axis=1) / jnp.maximum(norm, 1e-30))
