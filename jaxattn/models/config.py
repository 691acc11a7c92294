"""What a Hugging Face `config.json` says of a decoder: an entry is understood, harmless, or refused by name.

None is ignored. A decoder here computes one thing; an entry that asks for another (a soft cap, experts, a scale) and is
not obeyed gives wrong tokens without a word. Which entries do so nobody can list, for each new model brings its own. So
an entry passes if the code below reads it, if it is null, or if it is in `HARMLESS` or at its value in `NEUTRAL`.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from jaxattn.checks import check_heads, check_rotary_dim
from jaxattn.models.entries import (
    BOOL,
    COUNT,
    OBJECT,
    POSITIVE,
    POSITIVE_INT,
    TEXT,
    TEXTS,
    TOKEN_IDS,
    Entries,
    token_ids,
)

ARCHITECTURES = {  # by model_type
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
FULL, SLIDING = "full_attention", "sliding_attention"

# Entries that change no logit of these decoders, whatever they say.
HARMLESS = frozenset(
    # Where the file comes from, and how its weights were stored.
    "_name_or_path name_or_path _commit_hash transformers_version unsloth_fixed unsloth_version "
    "dtype torch_dtype tokenizer_class "
    # How PyTorch runs the model and what it returns. Pretraining's tensor parallelism and chunks of a feed-forward
    # cut the same sums.
    "use_cache use_bfloat16 torchscript return_dict output_attentions output_hidden_states "
    "gradient_checkpointing _attn_implementation _attn_implementation_autoset attn_implementation "
    "_flash_attn_2_enabled pretraining_tp chunk_size_feed_forward tf_legacy_loss is_decoder "
    # Training: first weights and dropout.
    "initializer_range attention_dropout hidden_dropout embd_pdrop resid_pdrop "
    # Tokens that the caller adds, and how tokens are drawn: options of transformers' generate().
    "bos_token_id pad_token_id sep_token_id decoder_start_token_id prefix max_length min_length "
    "max_sequence_length max_new_tokens do_sample early_stopping num_beams num_beam_groups "
    "diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences "
    "output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
    # Classification heads, which a decoder that predicts tokens does not have.
    "id2label label2id num_labels problem_type finetuning_task task_specific_params".split()
)

# Entries that change logits, and the value at which they do not.
NEUTRAL = {
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "rope_traditional": False,
    "use_mrope": False,
    "is_causal": True,
    "use_qk_norm": False,
    "qkv_bias": False,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "num_experts": 0,
    "no_rope_layers": [],
    "pruned_heads": {},
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Arguments of `precompute_freqs_cis`; the last three are set for Llama-3.1 scaling."""

    rope_theta: float = 10000.0
    rope_scale: float = 1.0
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    old_context_len: int | None = None


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and options of a decoder; hashable, so static under jit."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig = RopeConfig()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each query and key head (Qwen3)
    sliding_window: int | None = None  # keys a token may see; contexts beyond it are refused
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], tensors: Collection[str] = ()) -> "LlamaConfig":
        """The config that a Hugging Face `config.json` describes.

        Args:
          raw: the JSON object.
          tensors: names of the checkpoint's tensors. A bias that the entries neither ask for nor rule out is there
            if its tensors are.

        Raises:
          ValueError: an unknown architecture; an entry that is missing, of another type, or at odds with another.
          NotImplementedError: entries that are not understood; the message names them.
        """
        entries = Entries(raw, "config.json")
        architecture = _architecture(entries)
        hidden = entries.need("hidden_size", POSITIVE_INT)
        num_layers = entries.need("num_hidden_layers", POSITIVE_INT)
        heads = entries.need("num_attention_heads", POSITIVE_INT)
        kinds, window = _layers(entries, architecture, num_layers)
        config = cls(
            vocab_size=entries.need("vocab_size", POSITIVE_INT),
            hidden_size=hidden,
            intermediate_size=entries.need("intermediate_size", POSITIVE_INT),
            num_layers=num_layers,
            num_qo_heads=heads,
            num_kv_heads=entries.get("num_key_value_heads", POSITIVE_INT, heads),
            head_dim=entries.get("head_dim", POSITIVE_INT) or _head_dim(hidden, heads),
            rms_norm_eps=float(entries.need("rms_norm_eps", POSITIVE)),
            max_position_embeddings=entries.need("max_position_embeddings", POSITIVE_INT),
            rope=_rope(entries, kinds),
            tie_word_embeddings=entries.get("tie_word_embeddings", BOOL, False),
            **_biases(entries, architecture, tensors),
            qk_norm=architecture == "Qwen3ForCausalLM",
            sliding_window=window if SLIDING in kinds else None,
            eos_token_ids=token_ids(entries.get("eos_token_id", TOKEN_IDS)),
        )
        entries.refuse_the_rest(HARMLESS, NEUTRAL)
        check_heads(config.num_qo_heads, config.num_kv_heads)
        check_rotary_dim(config.head_dim, config.head_dim)
        return config


def _architecture(entries: Entries) -> str:
    model_type = entries.get("model_type", TEXT)
    of_type = ARCHITECTURES.get(model_type)
    named = entries.get("architectures", TEXTS) or [of_type or model_type]
    if len(named) > 1 or named[0] not in ARCHITECTURES.values():
        raise ValueError(
            f"unknown architecture {', '.join(map(repr, named))}; supported: "
            f"{', '.join(ARCHITECTURES.values())}"
        )
    if model_type is not None and of_type != named[0]:
        raise ValueError(
            f"architectures and model_type in config.json must name the same model; got "
            f"{named[0]!r} and {model_type!r}"
        )
    return named[0]


def _head_dim(hidden_size: int, heads: int) -> int:
    if hidden_size % heads:
        raise ValueError(
            "config.json must have 'head_dim' where num_attention_heads does not divide "
            f"hidden_size; got {hidden_size=}, num_attention_heads={heads}"
        )
    return hidden_size // heads


def _biases(entries: Entries, architecture: str, tensors: Collection[str]) -> dict[str, bool]:
    """Which projections have biases: those that the entries or the architecture ask for, else those in the file.

    An entry that rules them out is obeyed; `load` then refuses a file that holds them.
    """

    def held(*projections: str) -> bool:
        ends = tuple(f".{name}_proj.bias" for name in projections)
        return any(name.endswith(ends) for name in tensors)

    attention, older = entries.get("attention_bias", BOOL), entries.get("bias", BOOL)
    if None not in (attention, older) and attention != older:
        raise ValueError(
            "attention_bias and the older bias in config.json must be the same; got "
            f"attention_bias={attention} and bias={older}"
        )
    asked = asked_of_o = older if attention is None else attention
    if asked and architecture not in ("LlamaForCausalLM", "Qwen3ForCausalLM"):
        asked_of_o = None  # elsewhere attention_bias does not say whether it means o_proj too
    is_qwen2 = architecture == "Qwen2ForCausalLM"
    return dict(
        qkv_bias=(is_qwen2 or held("q", "k", "v")) if asked is None else asked,
        o_bias=held("o") if asked_of_o is None else asked_of_o,
        mlp_bias=entries.get("mlp_bias", BOOL, held("gate", "up", "down")),
    )


def _layers(entries: Entries, architecture: str, num_layers: int) -> tuple[list[str], int | None]:
    """(the kind of attention of each layer, the window of the sliding ones).

    Raises:
      ValueError: the entries do not settle which layers slide, or how far they see.
    """
    window = entries.get("sliding_window", POSITIVE_INT)
    use = entries.get("use_sliding_window", BOOL)
    first = entries.get("max_window_layers", COUNT)
    kinds = entries.get("layer_types", TEXTS)
    if kinds is not None:
        if len(kinds) != num_layers:
            raise ValueError(
                f"layer_types in config.json must have {num_layers} items, num_hidden_layers; got "
                f"{len(kinds)}"
            )
        unknown = sorted(set(kinds) - {FULL, SLIDING})
        if unknown:
            raise NotImplementedError(
                f"layer_types {', '.join(map(repr, unknown))} are not built; supported: {FULL!r}, "
                f"{SLIDING!r}"
            )
        if use is False and SLIDING in kinds:
            raise ValueError(
                "use_sliding_window=false and layer_types in config.json contradict each other: "
                f"{kinds.count(SLIDING)} layers are {SLIDING!r}"
            )
    elif architecture == "MistralForCausalLM":
        if window is not None and (use is False or first):
            raise ValueError(
                "the sliding_window of a Mistral is that of every layer, which "
                f"use_sliding_window={use} and max_window_layers={first} in config.json contradict: "
                "say which layers slide by layer_types"
            )
        kinds = [SLIDING if window or use else FULL] * num_layers
    elif architecture.startswith("Qwen"):
        kinds = [FULL] * num_layers
        if use:
            full = entries.need("max_window_layers", COUNT)
            kinds = [FULL if i < full else SLIDING for i in range(num_layers)]
    elif use or (use is None and window is not None):
        raise ValueError(
            f"sliding_window={window} in the config.json of a Llama does not say which layers "
            "slide: add layer_types, or say use_sliding_window=false"
        )
    else:
        kinds = [FULL] * num_layers
    if SLIDING in kinds and window is None:
        raise ValueError(
            f"config.json has no 'sliding_window', which its {kinds.count(SLIDING)} sliding layers "
            "need"
        )
    return list(kinds), window


def _rope(entries: Entries, kinds: Collection[str]) -> RopeConfig:
    """From `rope_parameters` (transformers 5), or from `rope_theta` and `rope_scaling` (before)."""
    theta = entries.get("rope_theta", POSITIVE, 10000.0)
    given = {
        name: value
        for name in ("rope_parameters", "rope_scaling")
        if (value := entries.get(name, OBJECT))
    }
    if not given:
        return RopeConfig(float(theta))
    name, raw = next(iter(given.items()))
    if any(other != raw for other in given.values()):
        raise ValueError("rope_parameters and rope_scaling in config.json must not differ")
    if not any(isinstance(value, Mapping) for value in raw.values()):
        return _rope_of(Entries(raw, name), theta, needs_type=name == "rope_scaling")

    # Settings for each kind of layer.
    by_kind = Entries(raw, name)
    settings = {kind: by_kind.get(kind, OBJECT) for kind in (FULL, SLIDING)}
    by_kind.refuse_the_rest((), {})
    used = {}
    for kind in sorted(set(kinds)):
        if settings[kind] is None:
            raise ValueError(
                f"{name} in config.json has no settings for {kind!r}, which some layers are"
            )
        used[kind] = _rope_of(Entries(settings[kind], f"{name}.{kind}"), theta, needs_type=False)
    first, *others = used.values()
    if any(other != first for other in others):
        raise NotImplementedError(f"{name} that differ by layer type are not built; got {used}")
    return first


def _rope_of(rope: Entries, theta: float, needs_type: bool) -> RopeConfig:
    theta = float(rope.get("rope_theta", POSITIVE, theta))
    kind, older = rope.get("rope_type", TEXT), rope.get("type", TEXT)
    if kind and older and kind != older:
        raise ValueError(f"rope_type and the older type must be the same; got {kind!r}, {older!r}")
    kind = kind or older
    if kind is None:
        if needs_type:
            rope.need("rope_type", TEXT)
        kind = "default"
    if kind == "default":
        config = RopeConfig(theta)
    elif kind == "linear":
        config = RopeConfig(theta, float(rope.need("factor", POSITIVE)))
    elif kind == "llama3":
        factor = float(rope.need("factor", POSITIVE))
        low, high = (float(rope.need(f"{x}_freq_factor", POSITIVE)) for x in ("low", "high"))
        if low >= high:
            raise ValueError(
                f"low_freq_factor must be less than high_freq_factor; got {low}, {high}"
            )
        old_context_len = rope.need("original_max_position_embeddings", POSITIVE_INT)
        config = RopeConfig(theta, factor, low, high, old_context_len)
    else:
        raise NotImplementedError(
            f"rope_type={kind!r} is not built; supported: 'default', 'linear', 'llama3'"
        )
    rope.refuse_the_rest((), NEUTRAL)
    return config
