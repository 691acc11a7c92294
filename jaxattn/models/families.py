"""What a Hugging Face `config.json` says of a decoder: each entry is understood, known to change nothing, or refused.

`FAMILIES` has what is a family's own: transformers' defaults, which layers slide, fields that others do not have. The
rest is read once, for all. Entries of transformers 4 and 5 are both read.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxattn.models import feed_forward_entries, layer_types
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
from jaxattn.models.feed_forward_entries import FeedForwards, Tensors, holds_bias
from jaxattn.models.known_entries import HARMLESS, NEUTRAL
from jaxattn.models.layer_spec import LayerSpec
from jaxattn.models.layer_types import SLIDING, LayerTypes, read_layer_types
from jaxattn.models.multimodal import ARCHITECTURE, takes_images, text_config
from jaxattn.models.rope_entries import RopeRules, read_ropes


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
      ropes: what is its own of the rotary embedding.
    """

    architecture: str
    defaults: Mapping[str, Any]
    layer_types: LayerTypes
    feed_forwards: FeedForwards = feed_forward_entries.gated
    fields: Callable[[Entries], dict[str, Any]] = lambda entries: {}
    qkv_bias: bool = False
    o_bias_too: bool = False
    ropes: RopeRules = RopeRules()


def _qwen3(entries: Entries) -> dict[str, Any]:
    # Qwen3-Coder's files say it; there is no Qwen3 without.
    if not entries.get("use_qk_norm", BOOL, True):
        raise NotImplementedError("use_qk_norm=False is not built for a Qwen3; supported: True")
    return dict(qk_norm=True)


def _gpt_oss(entries: Entries) -> dict[str, Any]:
    return dict(sinks=True)


def _phi3(entries: Entries) -> dict[str, Any]:
    # Code that came with a checkpoint before transformers had it. Another's would be another model.
    for auto, name in entries.get("auto_map", OBJECT, {}).items():
        if auto.startswith(("AutoConfig", "AutoModel")) and "Phi3" not in str(name):
            raise NotImplementedError(f"auto_map to {name!r} is not built; supported: Phi-3's own")
    return dict(fused_qkv=True)


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
_GPT_OSS_YARN = dict(
    rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
    original_max_position_embeddings=4096,
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
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        _LLAMA
        | dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=24, vocab_size=151936)
        | dict(num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=32768)
        | dict(sliding_window=4096, moe_intermediate_size=768, num_experts_per_tok=8)
        | dict(decoder_sparse_step=1),
        layer_types.qwen_moe,
        feed_forward_entries.qwen3_moe,
        fields=_qwen3,
        o_bias_too=True,
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        _LLAMA
        | dict(hidden_size=2880, intermediate_size=2880, num_hidden_layers=36, vocab_size=201088)
        | dict(num_attention_heads=64, num_key_value_heads=8, head_dim=64, sliding_window=128)
        | dict(max_position_embeddings=131072, rms_norm_eps=1e-5)
        | dict(attention_bias=True, num_experts_per_tok=4, swiglu_alpha=1.702, swiglu_limit=7.0),
        layer_types.every_second,
        feed_forward_entries.gpt_oss,
        fields=_gpt_oss,
        o_bias_too=True,
        ropes=RopeRules(theta=1.5e5, default=_GPT_OSS_YARN),
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        _LLAMA
        | dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=32, vocab_size=32064)
        | dict(num_attention_heads=32, rms_norm_eps=1e-5, max_position_embeddings=4096)
        | dict(original_max_position_embeddings=4096, eos_token_id=32000),
        layer_types.all_slide,
        feed_forward_entries.fused,
        fields=_phi3,
        # The older names of one thing, "yarn" among them.
        ropes=RopeRules(
            scalings=dict(default="default", longrope="longrope", su="longrope", yarn="longrope"),
            partial=True,
            original_apart=True,
        ),
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _GEMMA
        | dict(vocab_size=256000, max_position_embeddings=8192)
        | dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
        layer_types.every_second,
        fields=_gemma2,
        o_bias_too=True,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _GEMMA | dict(vocab_size=262208, max_position_embeddings=131072),
        layer_types.gemma3,
        fields=_gemma3,
        o_bias_too=True,
        ropes=RopeRules(theta=1e6, local_theta=1e4),
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
    head_dim = entries.get("head_dim", POSITIVE_INT) or _head_dim(hidden, heads)
    kinds, window = read_layer_types(entries, num_layers, family.layer_types)
    ropes = read_ropes(entries, family.ropes, kinds, head_dim)
    feed_forwards = family.feed_forwards(entries, tensors, num_layers)
    fields = dict(
        vocab_size=entries.need("vocab_size", POSITIVE_INT),
        hidden_size=hidden,
        num_qo_heads=heads,
        num_kv_heads=entries.get("num_key_value_heads", POSITIVE_INT, heads),
        head_dim=head_dim,
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
        qkv_bias=(family.qkv_bias or holds_bias(tensors, "q", "k", "v"))
        if asked is None
        else asked,
        o_bias=holds_bias(tensors, "o") if asked_of_o is None else asked_of_o,
    )
