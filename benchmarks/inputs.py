"""Random inputs of a case, made on the device: standard normal values, randomly permuted pages.

Lengths and page tables are also kept as NumPy arrays, since host-side planners want them there.
"""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jaxattn as ja
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
from jaxattn.grouped_matmul import Groups
from jaxattn.kv_scales import largest, own_scale, stored
from jaxattn.models.config import DecoderConfig
from jaxattn.models.decoder import Caches
from jaxattn.models.feed_forward import FeedForward, Gated
from jaxattn.models.layer_spec import LayerSpec
from jaxattn.models.linear import Source
from jaxattn.models.moe import ClampedSwiglu
from jaxattn.models.rope_scaling import RopeConfig
from jaxattn.models.stored_experts import GptOssExperts
from jaxattn.models.weights import Params, sources
from jaxattn.page_rings import pages_of

ROPE_THETA = 5e5
EPS = 1e-6
NORMAL_SCALE = 1 / 64  # takes normal numbers to the middle of float8's range
SHOWN_LAYERS = (0, -1)  # of a decode loop


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
    """A page table, on the device and on the host."""

    table: ja.PageTable
    indptr: np.ndarray
    indices: np.ndarray
    last_page_len: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionInputs:
    q: Array  # [t, h, d]
    caches: tuple[
        ja.PagedKVCache, ...
    ]  # one a layer; contiguous keys are pages of one token in order
    pages: Pages
    qo_indptr: np.ndarray
    kv_indptr: np.ndarray  # in tokens
    sinks: Array | None = None  # float32 [h]
    tree: tuple[np.ndarray, ...] | None = None  # of each request, bool [qo_len, kv_len]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AppendInputs:
    key: Array  # [t, kh, d]
    value: Array
    batch_indices: Array
    positions: Array
    cache: ja.PagedKVCache
    pages: Pages


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MergeInputs:
    v: Array  # [n, s, h, d]
    s: Array  # float32 [n, s, h], log2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NormInputs:
    x: Array  # [rows, hidden]
    residual: Array | None  # of fused_add_rmsnorm
    weight: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupedInputs:
    x: Array  # [t, size], or [t * chosen, size]
    weights: Array  # [e, outs, size]
    groups: Groups  # of t * chosen rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RopeInputs:
    query: Array  # [t, h, d]
    key: Array  # [t, kh, d]
    positions: Array  # int32 [t], a permutation: every token reads its own row of the table
    cos_sin_cache: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampleInputs:
    rows: Array  # [b, vocab], probabilities or logits
    key: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoopInputs:
    params: Params
    caches: Caches
    block_tables: tuple[
        Array, ...
    ]  # int32 [b, w] for each window of the model, with room for all steps
    token: Array  # int32 [b], each request's next


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RopeAppendInputs:
    qkv: Array  # [t, (h + 2 kh) * d]
    norm_weights: tuple[Array, Array] | None  # of q and of k, [d]
    batch_indices: Array
    positions: Array
    cos_sin_cache: Array
    cache: ja.PagedKVCache
    pages: Pages


def _trees(case: Attention, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """A query sees all of its request's earlier tokens, itself, and half of the new ones before it."""
    masks = []
    for qo_len, kv_len in zip(case.qo_lens, case.kv_lens):
        mask = np.ones((qo_len, kv_len), bool)
        new = np.tril(rng.random((qo_len, qo_len)) < 0.5, -1) | np.eye(qo_len, dtype=bool)
        mask[:, kv_len - qo_len :] = new
        masks.append(mask)
    return tuple(masks)


def make_inputs(case: Case) -> Any:
    """The inputs of a case; the same values at every call."""
    seed = zlib.crc32(case.id.encode()) >> 2  # an int32, also after the additions below
    rng = np.random.default_rng(seed)
    normal = functools.partial(_normal, dtype=case.dtype)
    match case:
        case Attention():
            pages = _pages(case.kv_lens, case.page_size, rng)
            shape = (pages.indices.size, case.page_size or 1, case.num_kv_heads, case.head_dim)
            caches = tuple(_cache(case, seed + 2 * i + 1, shape) for i in range(case.num_layers))
            q = normal(seed, shape=(case.num_qo_tokens, case.num_qo_heads, case.head_dim))
            sinks = _normal(seed, shape=(case.num_qo_heads,), dtype="float32")
            return AttentionInputs(
                q,
                caches,
                pages,
                _indptr(case.qo_lens),
                _indptr(case.kv_lens),
                sinks if case.sinks else None,
                _trees(case, rng) if case.tree else None,
            )
        case Plan():
            return _pages(case.kv_lens, case.page_size, rng)
        case Append():
            pages = _pages((case.kv_len,) * case.batch, case.page_size, rng)
            tokens = (case.batch * case.new, case.num_kv_heads, case.head_dim)
            shape = (pages.indices.size, case.page_size, *tokens[1:])
            position = np.tile(np.arange(case.kv_len - case.new, case.kv_len), case.batch)
            return AppendInputs(
                normal(seed, shape=tokens),
                normal(seed + 1, shape=tokens),
                _int32(np.repeat(np.arange(case.batch), case.new)),
                _int32(position),
                _cache(case, seed + 2, shape),
                pages,
            )
        case Merge():
            heads = (case.tokens, case.states, case.num_qo_heads)
            return MergeInputs(
                normal(seed, shape=(*heads, case.head_dim)),
                _normal(seed + 1, shape=heads, dtype="float32"),
            )
        case Norm():
            rows = (case.rows, case.hidden)
            residual = normal(seed + 1, shape=rows) if case.op == "fused_add_rmsnorm" else None
            weight = normal(seed + 2, shape=(case.hidden,))
            return NormInputs(normal(seed, shape=rows), residual, weight)
        case Grouped():
            chosen = rng.random((case.tokens, case.experts)).argsort(axis=1)[:, : case.chosen]
            matrices = (case.experts, case.outs, case.size)
            return GroupedInputs(
                normal(seed, shape=(chosen.size if case.apart else case.tokens, case.size)),
                _normal(seed + 1, case.size**-0.5, shape=matrices, dtype=case.dtype),
                Groups.of(_int32(chosen.reshape(-1)), case.experts),
            )
        case RopeAppend():
            pages = _pages((case.kv_len,) * case.batch, case.page_size, rng)
            kv_heads = (case.num_kv_heads, case.head_dim)
            shape = (pages.indices.size, case.page_size, *kv_heads)
            width = (case.num_qo_heads + 2 * case.num_kv_heads) * case.head_dim
            position = np.tile(np.arange(case.kv_len - case.new, case.kv_len), case.batch)
            weights = tuple(normal(seed + i, shape=(case.head_dim,)) for i in (3, 4))
            return RopeAppendInputs(
                normal(seed, shape=(case.num_tokens, width)),
                weights if case.qk_norm else None,
                _int32(np.repeat(np.arange(case.batch), case.new)),
                _int32(position),
                ja.precompute_freqs_cis(case.head_dim, case.kv_len, ROPE_THETA),
                _cache(case, seed + 1, shape),
                pages,
            )
        case Rope():
            length = max(case.tokens, 8192)
            return RopeInputs(
                normal(seed, shape=(case.tokens, case.num_qo_heads, case.head_dim)),
                normal(seed + 1, shape=(case.tokens, case.num_kv_heads, case.head_dim)),
                _int32(rng.permutation(length)[: case.tokens]),
                ja.precompute_freqs_cis(case.head_dim, length, ROPE_THETA),
            )
        case Sample():
            logits = _normal(seed, shape=(case.batch, case.vocab), dtype="float32")
            drawn_from = logits * case.deviation
            if not case.logits:
                drawn_from = jax.nn.softmax(drawn_from, axis=-1)
            return SampleInputs(drawn_from.astype(case.dtype), jax.random.key(seed))
        case Activation():
            return normal(seed, shape=(case.tokens, 2 * case.hidden))
        case Loop():
            return _loop_inputs(case, seed, rng)
    raise TypeError(f"no inputs for {type(case).__name__}")


def loop_config(case: Loop) -> DecoderConfig:
    """The model of a decode loop."""
    feed_forward: FeedForward = Gated(
        case.intermediate, "gelu_pytorch_tanh" if case.gemma else "silu"
    )
    if case.experts:
        feed_forward = GptOssExperts(
            case.experts, case.experts_per_token, case.intermediate, activation=ClampedSwiglu()
        )
    return DecoderConfig(
        vocab_size=case.vocab,
        hidden_size=case.hidden,
        num_qo_heads=case.num_qo_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        rms_norm_eps=EPS,
        max_position_embeddings=case.kv_len + case.steps,
        layers=tuple(
            LayerSpec(feed_forward, RopeConfig(ROPE_THETA), window) for window in case.windows
        ),
        tie_word_embeddings=case.gemma,
        qkv_bias=bool(case.experts),
        o_bias=bool(case.experts),
        sinks=bool(case.experts),
        qk_norm=case.qk_norm,
        norm_after=case.gemma,
        unit_offset=case.gemma,
        embedding_scale=case.hidden**0.5 if case.gemma else None,
    )


def loop_pages(case: Loop, window: int | None) -> int:
    """Pages of each request in the layers of a window: its past and all steps at once, as the oracle takes them."""
    return pages_of(case.kv_len + case.steps, case.page_size, window, case.steps)


def appended(case: Loop, caches: Caches, block_tables: Sequence[Array]) -> list[Array]:
    """K and V [b * steps, kh, d] of each request's steps, in SHOWN_LAYERS."""
    config = loop_config(case)
    position = jnp.arange(case.kv_len, case.kv_len + case.steps, dtype=jnp.int32)
    rows = []
    for i in SHOWN_LAYERS:
        block_table = block_tables[config.windows.index(config.layers[i].window)]
        page, slot = block_table[:, position // case.page_size], position % case.page_size
        rows += [a[page, slot[None, :]] for a in caches[i].arrays]
    return [a.reshape(-1, *a.shape[2:]) for a in rows]


def _loop_inputs(case: Loop, seed: int, rng: np.random.Generator) -> LoopInputs:
    """Random weights that keep activations of order one, and a random past."""
    seeds = itertools.count(seed)

    def weight(source: Source) -> Array:
        name, shape, dtype = source.tensors[0][0], source.shape, source.dtype or case.dtype
        if name.endswith("norm.weight"):
            return jnp.ones(shape, dtype)
        # One that is scaled by sqrt(hidden), or is the head too, has rows of length one.
        scale = 1.0 if "embed" in name and not case.gemma else shape[-1] ** -0.5
        if ".experts." in name:
            # Of experts that a router finds nearly alike, rounding chooses; what comes out must not hang on it. Each
            # has a copy of its own, and is read as if it were another.
            one = _normal(next(seeds), scale, shape=shape[1:], dtype=dtype)
            return jnp.repeat(one[None], shape[0], axis=0)
        return _normal(next(seeds), scale, shape=shape, dtype=dtype)

    config = loop_config(case)
    width = -(-(case.kv_len + case.steps) // case.page_size)
    owned = {window: loop_pages(case, window) for window in config.windows}
    ids = {window: rng.permutation(case.batch * n) for window, n in owned.items()}
    page = (case.page_size, case.num_kv_heads, case.head_dim)
    # The mean of so many random values would be lost beside the residual stream, and a wrong one with it.
    scales = {window: (1.0, min(case.kv_len, window or case.kv_len) ** 0.5) for window in owned}
    return LoopInputs(
        jax.tree.map(weight, sources(config)),
        tuple(
            ja.PagedKVCache(
                tuple(
                    _normal(next(seeds), scale, shape=(ids[w].size, *page), dtype=case.dtype)
                    for scale in scales[w]
                )
            )
            for w in case.windows
        ),
        tuple(
            _int32(ids[w].reshape(case.batch, n)[:, np.arange(width) % n]) for w, n in owned.items()
        ),
        _int32(rng.integers(0, case.vocab, case.batch)),
    )


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(seed: Any, scale: float = 1.0, *, shape: tuple[int, ...], dtype: str) -> Array:
    # In float32, then rounded: drawn in 16 bits, the values would be a few hundred distinct ones.
    key = jax.random.key(seed, impl="rbg")
    return (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def _cache(case: Cached, seed: int, shape: tuple[int, ...]) -> ja.PagedKVCache:
    """Normal keys and values [n, p, kh, d], as the case's cache holds them."""
    if case.kv_dtype is None:
        k, v = (_normal(seed + i, shape=shape, dtype=case.dtype) for i in (0, 1))
        return ja.PagedKVCache((k, v))
    pairs = [_normal_fp8(seed + i, shape, case.kv_dtype, case.kv_scales) for i in (0, 1)]
    (k, k_scale), (v, v_scale) = pairs
    return ja.PagedKVCache((k, v), scales=ja.KVScales(k_scale, v_scale))


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "scales"))
def _normal_fp8(
    seed: Any, shape: tuple[int, ...], dtype: str, scales: str | None
) -> tuple[Array, Array]:
    """(stored numbers, their scale), one for all or one for each vector."""
    x = _normal(seed, shape=shape, dtype="float32")
    scale = own_scale(largest(x), dtype) if scales == "token" else jnp.float32(NORMAL_SCALE)
    return stored(x, jnp.broadcast_to(scale, shape[:-1])[..., None], dtype), scale


def written(cache: ja.PagedKVCache) -> tuple[Array, ...]:
    """The arrays that an append writes: K's and V's pages, and their scales where each token has its own."""
    scales = cache.scales
    return (*cache.arrays, *((scales.k, scales.v) if scales and scales.per_token else ()))


def with_written(cache: ja.PagedKVCache, arrays: Sequence[Array]) -> ja.PagedKVCache:
    """The cache whose `written` are these."""
    k, v, *scales = arrays
    own = ja.KVScales(*scales) if scales else cache.scales
    return dataclasses.replace(cache, data=(k, v), scales=own)


def _int32(x: np.ndarray) -> Array:
    return jnp.asarray(x.astype(np.int32))


def _indptr(lens: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)


def _pages(kv_lens: tuple[int, ...], page_size: int | None, rng: np.random.Generator) -> Pages:
    counts = np.array([-(-n // (page_size or 1)) for n in kv_lens])
    last = (np.array(kv_lens) - (counts - 1) * (page_size or 1)).astype(np.int32)
    total = int(counts.sum())
    indices = (rng.permutation(total) if page_size else np.arange(total)).astype(np.int32)
    indptr = _indptr(tuple(counts))
    table = ja.PageTable(_int32(indptr), _int32(indices), _int32(last))
    return Pages(table, indptr, indices, last)
