"""Llama, Mistral, Qwen2 and Qwen3 decoders on jaxattn's ops: pure functions over a tree of weights.

    x = embed(tokens)
    each layer:  x += o_proj(attention(rope(qkv_proj(norm(x)))))
                 x += down_proj(silu(gate) * up),  [gate, up] = gate_up_proj(norm(x))
    logits = lm_head(norm(x))

A sum and the norm that follows it are one op, so the code carries pairs (normed, residual) and a
layer ends with the next layer's norm. Prefill and decode are one `forward` over ragged tokens; the
plan says which attention runs.

Axes: t tokens, b requests, h query heads, kh KV heads, d head dim.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxattn.append import rope_append_paged_kv_cache
from jaxattn.attention import paged_decode, paged_prefill
from jaxattn.checks import FLOAT_DTYPES, check_positive
from jaxattn.kv_cache import PagedKVCache, PageTable
from jaxattn.kv_scales import FP8_DTYPES
from jaxattn.models.checkpoint import Checkpoint, read_json
from jaxattn.models.config import LlamaConfig
from jaxattn.models.config import RopeConfig as RopeConfig
from jaxattn.models.entries import TOKEN_IDS, Entries, token_ids
from jaxattn.norm import fused_add_rmsnorm, rmsnorm
from jaxattn.plan import AttentionPlan
from jaxattn.rope import precompute_freqs_cis

Caches = tuple[PagedKVCache, ...]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # in a checkpoint


class Linear(NamedTuple):
    """`x @ weight.T + bias`."""

    weight: Any  # [out, in]
    bias: Any = None  # [out]


class Layer(NamedTuple):
    """Weights of one layer."""

    input_norm: Any  # [hidden]
    qkv_proj: Linear  # q, k and v stacked: out = (h + 2 kh) * d
    q_norm: Any  # [d], or None
    k_norm: Any
    o_proj: Linear
    post_norm: Any  # [hidden]
    gate_up_proj: Linear  # gate and up stacked: out = 2 * intermediate
    down_proj: Linear


class Params(NamedTuple):
    """Weights of a decoder, a pytree."""

    embed_tokens: Any  # [vocab, hidden]
    layers: tuple[Layer, ...]
    norm: Any  # [hidden]
    lm_head: Any  # [vocab, hidden], or None: the embedding's


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a weight comes from: a checkpoint's tensors, stacked along their first axis."""

    tensors: tuple[tuple[str, tuple[int, ...]], ...]  # (name, shape) of each


def sources(config: LlamaConfig) -> Params:
    """The tree of weights with a `Source` for each: a checkpoint's tensor names and shapes."""
    hidden, inner, d = config.hidden_size, config.intermediate_size, config.head_dim
    q_out, kv_out = config.num_qo_heads * d, config.num_kv_heads * d

    def one(name: str, *shape: int) -> Source:
        return Source(((name, shape),))

    def linear(prefix: str, outs: dict[str, int], size: int, bias: bool) -> Linear:
        weights = Source(tuple((f"{prefix}{x}.weight", (out, size)) for x, out in outs.items()))
        biases = Source(tuple((f"{prefix}{x}.bias", (out,)) for x, out in outs.items()))
        return Linear(weights, biases if bias else None)

    def layer(i: int) -> Layer:
        prefix = f"model.layers.{i}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        qkv = {"q_proj": q_out, "k_proj": kv_out, "v_proj": kv_out}
        return Layer(
            input_norm=one(prefix + "input_layernorm.weight", hidden),
            qkv_proj=linear(attention, qkv, hidden, config.qkv_bias),
            q_norm=one(attention + "q_norm.weight", d) if config.qk_norm else None,
            k_norm=one(attention + "k_norm.weight", d) if config.qk_norm else None,
            o_proj=linear(attention, {"o_proj": hidden}, q_out, config.o_bias),
            post_norm=one(prefix + "post_attention_layernorm.weight", hidden),
            gate_up_proj=linear(
                mlp, {"gate_proj": inner, "up_proj": inner}, hidden, config.mlp_bias
            ),
            down_proj=linear(mlp, {"down_proj": hidden}, inner, config.mlp_bias),
        )

    vocab = (config.vocab_size, hidden)
    return Params(
        embed_tokens=one(EMBEDDING, *vocab),
        layers=tuple(layer(i) for i in range(config.num_layers)),
        norm=one("model.norm.weight", hidden),
        lm_head=None if config.tie_word_embeddings else one(HEAD, *vocab),
    )


def read_config(path: str | Path) -> LlamaConfig:
    """The config of a Hugging Face checkpoint in a local folder, without its weights.

    Returns:
      The config that `load` returns.

    Raises:
      As `load`, for what is wrong with the JSON files or with the names of the tensors.
    """
    return _open(path)[0]


def _open(path: str | Path) -> tuple[LlamaConfig, Checkpoint]:
    """A checkpoint and its config, which account for each other's tensors; none is read."""
    raw = read_json(path, "config.json")
    checkpoint = Checkpoint(path)
    config = LlamaConfig.from_hf(raw, checkpoint.names)
    if (Path(path) / "generation_config.json").exists():
        generation = Entries(read_json(path, "generation_config.json"), "generation_config.json")
        eos = token_ids(generation.get("eos_token_id", TOKEN_IDS))
        config = dataclasses.replace(config, eos_token_ids=eos or config.eos_token_ids)
    used = {name for source in jax.tree.leaves(sources(config)) for name, _ in source.tensors}
    missing = sorted(used - checkpoint.names)
    if missing:
        raise ValueError(f"the checkpoint {str(path)!r} lacks tensors: {_listed(missing)}")
    unused = sorted(
        name
        for name in checkpoint.names - used
        # The rotary frequencies follow from the config; whether a tied head is one, `load` sees.
        if not name.endswith("rotary_emb.inv_freq")
        if not (config.tie_word_embeddings and name == HEAD)
    )
    if unused:
        raise ValueError(
            f"the checkpoint {str(path)!r} holds tensors that the model of its config.json does "
            f"not use: {_listed(unused)}. A model without them gives other tokens"
        )
    return config, checkpoint


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def load(
    path: str | Path,
    dtype: jax.typing.DTypeLike | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[LlamaConfig, Params]:
    """Reads a Hugging Face checkpoint (config.json and safetensors) onto JAX's default device.

    Every tensor of the checkpoint is used, or known to change nothing: the rotary frequencies, and a head that is tied
    to the embedding and equal to it.

    Args:
      path: a local folder.
      dtype: float16, bfloat16 or float32 for all weights; default: the embedding's, as stored.
      progress: called with (weights read, weights in all) after each weight. Weights are read one
        at a time, so that host memory never holds the model.

    Returns:
      (config, params); config.eos_token_ids are those of generation_config.json where it names any.

    Raises:
      FileNotFoundError: no such folder, no config.json, no weights, or a shard is missing.
      ValueError: an unknown architecture; a missing tensor, one whose shape is not config.json's, or one that the
        model does not have; a config.json that is incomplete or at odds with itself; a broken file.
      TypeError: a tensor, or dtype, that is not float16, bfloat16 or float32.
      NotImplementedError: an entry of config.json that is not understood; the message names it.
      ImportError: safetensors is not installed.
    """
    if dtype is not None and jnp.dtype(dtype).name not in FLOAT_DTYPES:
        raise TypeError(
            f"dtype must be one of {', '.join(FLOAT_DTYPES)}; got {jnp.dtype(dtype).name}"
        )
    config, checkpoint = _open(path)
    if config.tie_word_embeddings and HEAD in checkpoint.names:
        shape = (config.vocab_size, config.hidden_size)
        if not np.array_equal(checkpoint.read(HEAD, shape), checkpoint.read(EMBEDDING, shape)):
            raise ValueError(
                f"config.json in {str(path)!r} ties {HEAD!r} to {EMBEDDING!r}, and the checkpoint "
                "holds both, which differ: set tie_word_embeddings to false to use both"
            )
    wanted, tree = jax.tree.flatten(sources(config))
    weights: list[Array] = []
    for source in wanted:
        parts = [checkpoint.read(name, shape) for name, shape in source.tensors]
        # The embedding is the tree's first leaf, so `dtype` holds from the first weight on.
        dtype = parts[0].dtype if dtype is None else dtype
        weights.append(jnp.asarray(np.concatenate([part.astype(dtype) for part in parts])))
        if progress:
            progress(len(weights), len(wanted))
    return config, jax.tree.unflatten(tree, weights)


def empty_caches(
    config: LlamaConfig, num_pages: int, page_size: int, dtype: jax.typing.DTypeLike
) -> Caches:
    """One empty cache per layer; `dtype` is the weights', or a float8, then with a scale for each token and head."""
    scales = "token" if jnp.dtype(dtype).name in FP8_DTYPES else None
    shape = (num_pages, page_size, config.num_kv_heads, config.head_dim)
    return tuple(PagedKVCache.zeros(*shape, dtype, scales=scales) for _ in range(config.num_layers))


def longest_context(config: LlamaConfig) -> int:
    """The longest context, in tokens, that `check_context` accepts."""
    return min(config.max_position_embeddings, config.sliding_window or sys.maxsize)


def check_context(config: LlamaConfig, max_context: int) -> None:
    """Raises unless the model can serve requests of up to `max_context` tokens.

    Raises:
      ValueError: the model was not made for so long a context.
      NotImplementedError: the context exceeds the model's sliding window.
    """
    check_positive(max_context=max_context)
    if max_context > config.max_position_embeddings:
        raise ValueError(
            f"a context of {max_context} tokens exceeds {config.max_position_embeddings=}: "
            "shorten the prompt or generate fewer tokens"
        )
    if config.sliding_window is not None and max_context > config.sliding_window:
        raise NotImplementedError(
            f"sliding-window attention is not built: a context of {max_context} tokens exceeds "
            f"{config.sliding_window=}"
        )


def rope_table(config: LlamaConfig, max_context: int) -> Array:
    """The cos/sin table float32 [max_context, d] for positions 0 .. max_context - 1.

    Raises:
      ValueError, NotImplementedError: as `check_context`.
    """
    check_context(config, max_context)
    return precompute_freqs_cis(config.head_dim, max_context, **dataclasses.asdict(config.rope))


class Batch(NamedTuple):
    """What one call of the model works on: ragged tokens, and the pages they belong to."""

    tokens: Array  # int32 [t]
    positions: Array  # int32 [t], each token's position in its request
    batch_indices: Array  # int32 [t], each token's request; -1 for padding, which is not appended
    page_table: PageTable  # of b requests, these tokens already counted
    plan: AttentionPlan  # of this page table; for decode's, token i is request i's only one


def forward(
    params: Params,
    config: LlamaConfig,
    batch: Batch,
    caches: Caches,
    cos_sin_cache: Array,
    rows: Array,
    *,
    backend: str | None = None,
) -> tuple[Array, Caches]:
    """Appends a batch's tokens to the caches and computes the logits that follow some of them.

    Args:
      params, config: from `load`.
      batch: t tokens of b requests.
      caches: one per layer, from `empty_caches`; updated in place where donated.
      cos_sin_cache: from `rope_table`.
      rows: int32 [r], the tokens whose logits are wanted.
      backend: "triton", "xla", "interpret" or None, for every op.

    Returns:
      (logits float32 [r, vocab], caches).
    """
    residual = params.embed_tokens[batch.tokens]
    x = rmsnorm(residual, params.layers[0].input_norm, config.rms_norm_eps, backend=backend)
    next_norms = [layer.input_norm for layer in params.layers[1:]] + [params.norm]
    updated = []
    for layer, next_norm, cache in zip(params.layers, next_norms, caches, strict=True):
        x, residual, cache = _layer(
            layer, next_norm, x, residual, batch, cache, cos_sin_cache, config, backend
        )
        updated.append(cache)
    head = params.embed_tokens if params.lm_head is None else params.lm_head
    return _matmul(x[rows], head, jnp.float32), tuple(updated)


def prefill(
    params: Params,
    config: LlamaConfig,
    batch: Batch,
    caches: Caches,
    cos_sin_cache: Array,
    *,
    backend: str | None = None,
) -> tuple[Array, Caches]:
    """`forward` over prompts, or chunks of them.

    Returns:
      (logits float32 [b, vocab] after each request's last token, caches); a request without tokens
      in the batch gets logits of no meaning.
    """
    if batch.plan.is_decode:
        raise TypeError("prefill needs a plan from plan_prefill; got one of plan_decode")
    last = jnp.maximum(batch.plan.query_bounds()[1:] - 1, 0)
    return forward(params, config, batch, caches, cos_sin_cache, last, backend=backend)


def decode_step(
    params: Params,
    config: LlamaConfig,
    batch: Batch,
    caches: Caches,
    cos_sin_cache: Array,
    *,
    backend: str | None = None,
) -> tuple[Array, Caches]:
    """`forward` over one token of each request: logits float32 [b, vocab] after it."""
    if not batch.plan.is_decode:
        raise TypeError("decode_step needs a plan from plan_decode; got one of plan_prefill")
    every = jnp.arange(batch.tokens.shape[0], dtype=jnp.int32)
    return forward(params, config, batch, caches, cos_sin_cache, every, backend=backend)


# A jit of its own, so that a model's layers are traced and lowered once, not once each.
@functools.partial(jax.jit, static_argnames=("config", "backend"))
def _layer(
    layer: Layer,
    next_norm: Array,
    x: Array,
    residual: Array,
    batch: Batch,
    cache: PagedKVCache,
    cos_sin_cache: Array,
    config: LlamaConfig,
    backend: str | None,
) -> tuple[Array, Array, PagedKVCache]:
    """One layer: (normed x, residual, cache) to the next layer's."""
    t, eps = x.shape[0], config.rms_norm_eps
    q, cache = rope_append_paged_kv_cache(
        _linear(x, layer.qkv_proj),
        batch.batch_indices,
        batch.positions,
        cos_sin_cache,
        cache,
        batch.page_table,
        q_norm_weight=layer.q_norm,
        k_norm_weight=layer.k_norm,
        eps=eps,
        backend=backend,
    )
    if batch.plan.is_decode:
        o = paged_decode(q, cache, batch.plan, backend=backend)
    else:
        o = paged_prefill(q, cache, batch.plan, backend=backend)
    o = _linear(o.reshape(t, -1), layer.o_proj)
    x, residual = fused_add_rmsnorm(o, residual, layer.post_norm, eps, backend=backend)

    gate, up = jnp.split(_linear(x, layer.gate_up_proj), 2, axis=1)
    gated = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    down = _linear(gated.astype(x.dtype), layer.down_proj)
    x, residual = fused_add_rmsnorm(down, residual, next_norm, eps, backend=backend)
    return x, residual, cache


def _linear(x: Array, linear: Linear) -> Array:
    if linear.bias is None:
        return _matmul(x, linear.weight, x.dtype)
    y = _matmul(x, linear.weight, jnp.float32) + linear.bias.astype(jnp.float32)[None, :]
    return y.astype(x.dtype)


def _matmul(x: Array, weight: Array, dtype: jax.typing.DTypeLike) -> Array:
    """`x @ weight.T`, accumulated in float32; float32 inputs are not rounded to TensorFloat-32.

    cuBLAS rounds to `dtype` as it stores; after a float32 output, a kernel of XLA's would.
    """
    return jnp.einsum(
        "ti,oi->to",
        x,
        weight,
        precision="highest" if x.dtype == jnp.float32 else None,
        preferred_element_type=dtype,
    )
