"""The feed-forward of each layer, from the entries of a config: a function for each way in which families say it."""

from collections.abc import Callable, Collection

from jaxattn.models.entries import (
    BOOL,
    COUNTS,
    OBJECT,
    POSITIVE,
    POSITIVE_INT,
    TEXT,
    TEXTS,
    Entries,
)
from jaxattn.models.feed_forward import ACTIVATIONS, FeedForward, Gated
from jaxattn.models.moe import ClampedSwiglu
from jaxattn.models.mxfp4 import BLOCK
from jaxattn.models.stored_experts import GptOssExperts, Qwen3Experts

Tensors = Collection[str]  # names of a checkpoint's
FeedForwards = Callable[[Entries, Tensors, int], list[FeedForward]]  # of so many layers


def gated(entries: Entries, tensors: Tensors, num_layers: int) -> list[FeedForward]:
    """The same in every layer."""
    bias = entries.get("mlp_bias", BOOL, holds_bias(tensors, "gate", "up", "down"))
    inner = entries.need("intermediate_size", POSITIVE_INT)
    return [Gated(inner, read_activation(entries), bias)] * num_layers


def fused(entries: Entries, tensors: Tensors, num_layers: int) -> list[FeedForward]:
    """The same in every layer, of checkpoints that hold gate and up as one."""
    inner = entries.need("intermediate_size", POSITIVE_INT)
    return [Gated(inner, read_activation(entries), fused=True)] * num_layers


def qwen3_moe(entries: Entries, tensors: Tensors, num_layers: int) -> list[FeedForward]:
    """Experts in every decoder_sparse_step-th layer, but for those of mlp_only_layers."""
    dense = Gated(entries.need("intermediate_size", POSITIVE_INT), read_activation(entries))
    experts = Qwen3Experts(
        _num_experts(entries),
        entries.need("num_experts_per_tok", POSITIVE_INT),
        entries.need("moe_intermediate_size", POSITIVE_INT),
        entries.get("norm_topk_prob", BOOL, False),
        dense.activation,
        stacked=any(name.endswith(".experts.gate_up_proj") for name in tensors),
    )
    step = entries.need("decoder_sparse_step", POSITIVE_INT)
    without = entries.get("mlp_only_layers", COUNTS, [])
    return [dense if i in without or (i + 1) % step else experts for i in range(num_layers)]


def gpt_oss(entries: Entries, tensors: Tensors, num_layers: int) -> list[FeedForward]:
    """Experts in every layer.

    Raises:
      NotImplementedError: another activation, or weights of another format than MXFP4.
      ValueError: MXFP4's blocks do not fit the sizes.
    """
    if (activation := entries.need("hidden_act", TEXT)) != "silu":
        raise NotImplementedError(f"hidden_act={activation!r} is not built; supported: 'silu'")
    alpha, limit = (float(entries.need(f"swiglu_{x}", POSITIVE)) for x in ("alpha", "limit"))
    chosen = entries.need("num_experts_per_tok", POSITIVE_INT)
    if (other := entries.get("experts_per_token", POSITIVE_INT, chosen)) != chosen:
        raise ValueError(
            "num_experts_per_tok and experts_per_token in config.json must be the same; got "
            f"{chosen} and {other}"
        )
    entries.get("initial_context_length", POSITIVE_INT)  # the rotary embedding's settings have it
    hidden, inner = (entries.need(f"{x}_size", POSITIVE_INT) for x in ("hidden", "intermediate"))
    mxfp4 = _is_mxfp4(entries, tensors)
    if mxfp4 and (hidden % BLOCK or inner % BLOCK):
        raise ValueError(
            f"hidden_size and intermediate_size must be multiples of {BLOCK} where weights are MXFP4; got {hidden} "
            f"and {inner}"
        )
    activation = ClampedSwiglu(alpha, limit)
    experts = GptOssExperts(
        _num_experts(entries), chosen, inner, activation=activation, mxfp4=mxfp4
    )
    return [experts] * num_layers


def _is_mxfp4(entries: Entries, tensors: Tensors) -> bool:
    """Whether the experts' weights are MXFP4: the tensors' names say it, or, without any, quantization_config."""
    given = entries.get("quantization_config", OBJECT)
    if given is not None:
        quantization = Entries(given, "quantization_config")
        method = quantization.need("quant_method", TEXT)
        if method != "mxfp4":
            raise NotImplementedError(
                f"quantization_config.quant_method={method!r} is not built; supported: 'mxfp4'"
            )
        # What is converted has tensors of other names, so these two say nothing more.
        quantization.get("modules_to_not_convert", TEXTS)
        quantization.get("dequantize", BOOL)
        quantization.refuse_the_rest((), {})
    if not tensors:
        return given is not None
    return any(name.endswith("_proj_blocks") for name in tensors)


def _num_experts(entries: Entries) -> int:
    """By either of transformers' names; its value where neither is there."""
    names = "num_experts", "num_local_experts"
    given = {name: n for name in names if (n := entries.get(name, POSITIVE_INT)) is not None}
    given = given or {names[0]: 128}
    if len(set(given.values())) != 1:
        raise ValueError(
            f"config.json must have one number of experts, {' or '.join(names)}; got {given}"
        )
    return next(iter(given.values()))


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


def holds_bias(tensors: Tensors, *projections: str) -> bool:
    """Whether a checkpoint has biases of some of these projections."""
    ends = tuple(f".{name}_proj.bias" for name in projections)
    return any(name.endswith(ends) for name in tensors)
