"""The weights of a decoder: a tree, where each comes from in a Hugging Face checkpoint, and reading them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxattn.checks import FLOAT_DTYPES
from jaxattn.models.checkpoint import Checkpoint, read_json
from jaxattn.models.config import DecoderConfig
from jaxattn.models.entries import TOKEN_IDS, Entries, token_ids
from jaxattn.models.linear import Linear, Source, stacked, tensor
from jaxattn.models.multimodal import takes_images, text_name

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # in a checkpoint


class Layer(NamedTuple):
    """Weights of one layer; None: the model has none such."""

    input_norm: Any  # [hidden]
    qkv_proj: Linear  # q, k and v stacked: out = (h + 2 kh) * d
    q_norm: Any  # [d]
    k_norm: Any
    sinks: Any  # float32 [h]
    o_proj: Linear
    attention_out_norm: Any  # [hidden]
    feed_forward_norm: Any  # [hidden]
    feed_forward: Any  # as the layer's FeedForward arranges them
    feed_forward_out_norm: Any  # [hidden]


class Params(NamedTuple):
    """Weights of a decoder, a pytree."""

    embed_tokens: Any  # [vocab, hidden]
    layers: tuple[Layer, ...]
    norm: Any  # [hidden]
    lm_head: Any  # [vocab, hidden], or None: the embedding's


def sources(config: DecoderConfig) -> Params:
    """The tree of weights with a `Source` for each: a checkpoint's tensor names and shapes."""
    hidden, d = config.hidden_size, config.head_dim
    q_out, kv_out = config.num_qo_heads * d, config.num_kv_heads * d

    def norm(name: str, size: int = hidden) -> Source:
        stored = tensor(f"{name}.weight", size)
        if not config.unit_offset:
            return stored
        # Rounded to 16 bits, 1 + w would lose w's last ones.
        return dataclasses.replace(stored, build=_one_plus, dtype="float32")

    def layer(i: int) -> Layer:
        prefix = f"model.layers.{i}."
        attention = prefix + "self_attn."
        qkv = {"q_proj": q_out, "k_proj": kv_out, "v_proj": kv_out}
        if config.fused_qkv:
            qkv = {"qkv_proj": q_out + 2 * kv_out}
        before, after = "post_attention_layernorm", None
        if config.norm_after:
            before, after = "pre_feedforward_layernorm", "post_attention_layernorm"
        return Layer(
            input_norm=norm(prefix + "input_layernorm"),
            qkv_proj=stacked(attention, qkv, hidden, config.qkv_bias),
            q_norm=norm(attention + "q_norm", d) if config.qk_norm else None,
            k_norm=norm(attention + "k_norm", d) if config.qk_norm else None,
            sinks=_sinks(attention, config.num_qo_heads) if config.sinks else None,
            o_proj=stacked(attention, {"o_proj": hidden}, q_out, config.o_bias),
            attention_out_norm=norm(prefix + after) if after else None,
            feed_forward_norm=norm(prefix + before),
            feed_forward=config.layers[i].feed_forward.sources(prefix, hidden),
            feed_forward_out_norm=norm(prefix + "post_feedforward_layernorm") if after else None,
        )

    vocab = (config.vocab_size, hidden)
    return Params(
        embed_tokens=tensor(EMBEDDING, *vocab),
        layers=tuple(layer(i) for i in range(config.num_layers)),
        norm=norm("model.norm"),
        lm_head=None if config.tie_word_embeddings else tensor(HEAD, *vocab),
    )


def _one_plus(weight: np.ndarray) -> np.ndarray:
    return 1 + weight.astype(np.float32)


def _sinks(prefix: str, heads: int) -> Source:
    return dataclasses.replace(tensor(prefix + "sinks", heads), dtype="float32")


def read_config(path: str | Path) -> DecoderConfig:
    """The config of a Hugging Face checkpoint in a local folder, without its weights.

    Returns:
      The config that `load` returns.

    Raises:
      As `load`, for what is wrong with the JSON files or with the names of the tensors.
    """
    return _open(path)[0]


def _open(path: str | Path) -> tuple[DecoderConfig, Checkpoint]:
    """A checkpoint and its config, which account for each other's tensors; none is read."""
    raw = read_json(path, "config.json")
    checkpoint = Checkpoint(path, text_name if takes_images(raw) else None)
    config = DecoderConfig.from_hf(raw, checkpoint.names)
    if (Path(path) / "generation_config.json").exists():
        generation = Entries(read_json(path, "generation_config.json"), "generation_config.json")
        eos = token_ids(generation.get("eos_token_id", TOKEN_IDS))
        config = dataclasses.replace(config, eos_token_ids=eos or config.eos_token_ids)
    # Of a small vocabulary, that of transformers' default may be none of its tokens: then none ends a request.
    eos = tuple(token for token in config.eos_token_ids if token < config.vocab_size)
    config = dataclasses.replace(config, eos_token_ids=eos)
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
) -> tuple[DecoderConfig, Params]:
    """Reads a Hugging Face checkpoint (config.json and safetensors) onto JAX's default device.

    Every tensor of the checkpoint is used, or known to change nothing: the rotary frequencies, and a head that is tied
    to the embedding and equal to it. Of a model that takes images too (Gemma 3), the text model is read.

    Args:
      path: a local folder.
      dtype: float16, bfloat16 or float32 for all weights; default: the embedding's, as stored. Sinks, and the norms
        of a `DecoderConfig.unit_offset`, are float32 whatever it is.
      progress: called with (weights read, weights in all) after each weight. Weights are read one
        at a time, so that host memory never holds the model.

    Returns:
      (config, params); config.eos_token_ids are those of generation_config.json where it names any, and those alone
      that the vocabulary has.

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
        parts = [checkpoint.read(name, shape, source.stored) for name, shape in source.tensors]
        # The embedding is the tree's first leaf, so `dtype` holds from the first weight on.
        dtype = parts[0].dtype if dtype is None else dtype
        weights.append(jnp.asarray(source.weight(parts, dtype)))
        if progress:
            progress(len(weights), len(wanted))
    return config, jax.tree.unflatten(tree, weights)
