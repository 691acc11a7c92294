"""What a Hugging Face `config.json` says of a decoder: each entry is understood, known to change nothing, or refused.

`FAMILIES` has what is a family's own: transformers' defaults, which layers slide, fields that others do not have. The
rest is read once, for all. Entries of transformers 4 and 5 are both read.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from jaxattn.models import layer_types
from jaxattn.models.entries import (
    BOOL,
    OBJECT,
    POSITIVE,
    POSITIVE_INT,
    TEXT,
    TEXTS,
    TOKEN_IDS,
    Entries,
    token_ids,
)
from jaxattn.models.feed_forward import ACTIVATIONS, FeedForward, Gated
from jaxattn.models.known_entries import HARMLESS, NEUTRAL
from jaxattn.models.layer_spec import LayerSpec
from jaxattn.models.layer_types import FULL, SLIDING, LayerTypes, read_layer_types
from jaxattn.models.multimodal import ARCHITECTURE, takes_images, text_config
from jaxattn.models.rope_scaling import RopeConfig

Tensors = Collection[str]  # names of a checkpoint's


def gated(entries: Entries, tensors: Tensors, num_layers: int) -> list[FeedForward]:
    """The feed-forward of each layer."""
    bias = entries.get("mlp_bias", BOOL, _held(tensors, "gate", "up", "down"))
    inner = entries.need("intermediate_size", POSITIVE_INT)
    return [Gated(inner, read_activation(entries), bias)] * num_layers


def read_activation(entries: Entries) -> str:
    """The activation of a feed-forward, by transformers' name."""
    given = {
        name: value
        for name in ("hidden_activation", "hidden_act")
        if (value := entries.get(name, TEXT))
    }
    if len(set(given.values())) > 1:
        raise ValueError(f"hidden_activation and hidden_act must be the same; got {given}")
    for name, value in given.items():
        if value not in ACTIVATIONS:
            supported = ", ".join(map(repr, ACTIVATIONS))
            raise NotImplementedError(f"{name}={value!r} is not built; supported: {supported}")
        return value
    raise ValueError("config.json has no 'hidden_act', the activation of its feed-forward")


@dataclasses.dataclass(frozen=True)
class Family:
    """What the configs of one model_type have of their own.

    Attributes:
      architecture: the one name that `architectures` may hold.
      defaults: transformers' values of entries that a file may leave out. One that is null stays null.
      layer_types: which layers slide, where the entry of that name does not say it.
      feed_forwards: the feed-forward of each layer.
      fields: further fields of `DecoderConfig`.
      qkv_bias: whether q, k and v have biases where no entry says it.
      o_bias_too: whether attention_bias means o_proj's as well.
      theta: base of the rotary embedding, where no entry says it.
      local_theta: that of the sliding layers, where they have one of their own.
    """

    architecture: str
    defaults: Mapping[str, Any]
    layer_types: LayerTypes
    feed_forwards: Callable[[Entries, Tensors, int], list[FeedForward]] = gated
    fields: Callable[[Entries], dict[str, Any]] = lambda entries: {}
    qkv_bias: bool = False
    o_bias_too: bool = False
    theta: float = 1e4
    local_theta: float | None = None


def _qwen3(entries: Entries) -> dict[str, Any]:
    return dict(qk_norm=True)


def _gemma(entries: Entries) -> dict[str, Any]:
    return dict(
        norm_after=True,
        unit_offset=True,
        sm_scale=float(entries.need("query_pre_attn_scalar", POSITIVE)) ** -0.5,
        embedding_scale=float(entries.need("hidden_size", POSITIVE_INT)) ** 0.5,
        logits_soft_cap=entries.get("final_logit_softcapping", POSITIVE),
    )


def _gemma2(entries: Entries) -> dict[str, Any]:
    cap = entries.get("attn_logit_softcapping", POSITIVE)
    return _gemma(entries) | dict(attention_soft_cap=cap)


def _gemma3(entries: Entries) -> dict[str, Any]:
    return _gemma(entries) | dict(qk_norm=True)


_LLAMA = dict(hidden_act="silu", rms_norm_eps=1e-6, tie_word_embeddings=False)
_QWEN = _LLAMA | dict(
    max_position_embeddings=32768, num_key_value_heads=32, sliding_window=4096, max_window_layers=28
)
_GEMMA = dict(
    hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
    num_key_value_heads=4, head_dim=256, rms_norm_eps=1e-6, query_pre_attn_scalar=256,
    hidden_activation="gelu_pytorch_tanh", sliding_window=4096, tie_word_embeddings=True,
    eos_token_id=1,
)  # fmt: skip

FAMILIES = {  # by model_type
    "llama": Family(
        "LlamaForCausalLM",
        _LLAMA | dict(max_position_embeddings=2048, eos_token_id=2),
        layer_types.llama,
        o_bias_too=True,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        _LLAMA
        | dict(max_position_embeddings=131072, num_key_value_heads=8, sliding_window=4096)
        | dict(eos_token_id=2),
        layer_types.mistral,
    ),
    "qwen2": Family("Qwen2ForCausalLM", _QWEN, layer_types.qwen, qkv_bias=True),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _QWEN | dict(head_dim=128),
        layer_types.qwen,
        fields=_qwen3,
        o_bias_too=True,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _GEMMA
        | dict(vocab_size=256000, max_position_embeddings=8192)
        | dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
        layer_types.gemma2,
        fields=_gemma2,
        o_bias_too=True,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _GEMMA | dict(vocab_size=262208, max_position_embeddings=131072),
        layer_types.gemma3,
        fields=_gemma3,
        o_bias_too=True,
        theta=1e6,
        local_theta=1e4,
    ),
}


def read_fields(raw: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    """The fields of the `DecoderConfig` that a `config.json` describes; args and raises as its `from_hf`."""
    if takes_images(raw):
        raw = text_config(raw)
    family = _family(Entries(raw, "config.json"))
    entries = Entries({**family.defaults, **raw}, "config.json")
    hidden = entries.need("hidden_size", POSITIVE_INT)
    num_layers = entries.need("num_hidden_layers", POSITIVE_INT)
    heads = entries.need("num_attention_heads", POSITIVE_INT)
    kinds, window = read_layer_types(entries, num_layers, family.layer_types)
    ropes = _ropes(entries, family, kinds)
    feed_forwards = family.feed_forwards(entries, tensors, num_layers)
    fields = dict(
        vocab_size=entries.need("vocab_size", POSITIVE_INT),
        hidden_size=hidden,
        num_qo_heads=heads,
        num_kv_heads=entries.get("num_key_value_heads", POSITIVE_INT, heads),
        head_dim=entries.get("head_dim", POSITIVE_INT) or _head_dim(hidden, heads),
        rms_norm_eps=float(entries.need("rms_norm_eps", POSITIVE)),
        max_position_embeddings=entries.need("max_position_embeddings", POSITIVE_INT),
        layers=tuple(
            LayerSpec(feed_forward, ropes[kind], window if kind == SLIDING else None)
            for kind, feed_forward in zip(kinds, feed_forwards, strict=True)
        ),
        tie_word_embeddings=entries.get("tie_word_embeddings", BOOL, False),
        eos_token_ids=token_ids(entries.get("eos_token_id", TOKEN_IDS)),
        **_biases(entries, family, tensors),
        **family.fields(entries),
    )
    entries.refuse_the_rest(HARMLESS | {"model_type", "architectures"}, NEUTRAL)
    return fields


def _family(entries: Entries) -> Family:
    model_type = entries.get("model_type", TEXT)
    of_type = FAMILIES.get(model_type)
    expected = of_type.architecture if of_type else model_type
    named = entries.get("architectures", TEXTS) or [expected]
    by_name = {family.architecture: family for family in FAMILIES.values()}
    if len(named) > 1 or named[0] not in by_name:
        raise ValueError(
            f"unknown architecture {', '.join(map(repr, named))}; supported: "
            f"{', '.join([*by_name, ARCHITECTURE])}"
        )
    if model_type is not None and expected != named[0]:
        raise ValueError(
            f"architectures and model_type in config.json must name the same model; got "
            f"{named[0]!r} and {model_type!r}"
        )
    return by_name[named[0]]


def _head_dim(hidden_size: int, heads: int) -> int:
    if hidden_size % heads:
        raise ValueError(
            "config.json must have 'head_dim' where num_attention_heads does not divide "
            f"hidden_size; got {hidden_size=}, num_attention_heads={heads}"
        )
    return hidden_size // heads


def _held(tensors: Tensors, *projections: str) -> bool:
    """Whether the checkpoint has biases of some of these projections."""
    ends = tuple(f".{name}_proj.bias" for name in projections)
    return any(name.endswith(ends) for name in tensors)


def _biases(entries: Entries, family: Family, tensors: Tensors) -> dict[str, bool]:
    """Which of attention's projections have biases: those the entries or the family ask for, else those in the file.

    An entry that rules them out is obeyed; `load` then refuses a file that holds them.
    """
    attention, older = entries.get("attention_bias", BOOL), entries.get("bias", BOOL)
    if None not in (attention, older) and attention != older:
        raise ValueError(
            "attention_bias and the older bias in config.json must be the same; got "
            f"attention_bias={attention} and bias={older}"
        )
    asked = asked_of_o = older if attention is None else attention
    if asked and not family.o_bias_too:
        asked_of_o = None
    return dict(
        qkv_bias=(family.qkv_bias or _held(tensors, "q", "k", "v")) if asked is None else asked,
        o_bias=_held(tensors, "o") if asked_of_o is None else asked_of_o,
    )


def _ropes(entries: Entries, family: Family, kinds: Collection[str]) -> dict[str, RopeConfig]:
    """The rotary embedding of each kind of layer: from `rope_parameters` (transformers 5), or the entries before."""
    thetas = dict.fromkeys((FULL, SLIDING), entries.get("rope_theta", POSITIVE, family.theta))
    if family.local_theta is not None:
        thetas[SLIDING] = entries.get("rope_local_base_freq", POSITIVE, family.local_theta)
    given = {
        name: value
        for name in ("rope_parameters", "rope_scaling")
        if (value := entries.get(name, OBJECT))
    }
    if not given:
        return {kind: RopeConfig(float(theta)) for kind, theta in thetas.items()}
    name, raw = next(iter(given.items()))
    if any(other != raw for other in given.values()):
        raise ValueError("rope_parameters and rope_scaling in config.json must not differ")

    if not any(isinstance(value, Mapping) for value in raw.values()):
        if family.local_theta is not None and name == "rope_parameters":
            raise ValueError(
                f"rope_parameters of a {family.architecture} must be settings of {FULL!r} and of {SLIDING!r}; "
                f"got {dict(raw)}"
            )
        needs_type = name == "rope_scaling"
        ropes = {FULL: RopeConfig.read(Entries(raw, name), thetas[FULL], needs_type=needs_type)}
        # A base of their own comes without the scaling.
        own = family.local_theta is not None
        return ropes | {SLIDING: RopeConfig(float(thetas[SLIDING])) if own else ropes[FULL]}

    # Settings for each kind of layer.
    by_kind = Entries(raw, name)
    settings = {kind: by_kind.get(kind, OBJECT) for kind in (FULL, SLIDING)}
    by_kind.refuse_the_rest((), {})
    ropes = {}
    for kind in sorted(set(kinds)):
        if settings[kind] is None and family.local_theta is None:
            raise ValueError(
                f"{name} in config.json has no settings for {kind!r}, which some layers are"
            )
        of_kind = Entries(settings[kind] or {}, f"{name}.{kind}")
        ropes[kind] = RopeConfig.read(of_kind, thetas[kind], needs_type=False)
    return ropes
