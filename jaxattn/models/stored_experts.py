"""Experts as the checkpoints of each family hold them, and as its configs describe them."""

import dataclasses
from collections.abc import Collection

import jax.numpy as jnp
import numpy as np

from jaxattn.checks import FLOAT_DTYPES
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
from jaxattn.models.feed_forward import FeedForward, Gated
from jaxattn.models.linear import Linear, Source, tensor
from jaxattn.models.moe import ClampedSwiglu, ExpertWeights, MixtureOfExperts
from jaxattn.models.mxfp4 import BLOCK, BYTES, dequantize


@dataclasses.dataclass(frozen=True)
class Qwen3Experts(MixtureOfExperts):
    """One tensor for each projection of each expert."""

    def sources(self, prefix: str, hidden_size: int) -> ExpertWeights:
        mlp, e, inner = prefix + "mlp.", self.num_experts, self.intermediate_size

        def experts(out: int, size: int, *projections: str) -> Linear:
            shape = (out // len(projections), size)
            tensors = tuple(
                (f"{mlp}experts.{i}.{name}.weight", shape) for i in range(e) for name in projections
            )

            def build(*stored: np.ndarray) -> np.ndarray:
                return np.concatenate(stored).reshape(e, out, size)

            return Linear(Source(tensors, build, (e, out, size)))

        return ExpertWeights(
            Linear(tensor(mlp + "gate.weight", e, hidden_size)),
            experts(2 * inner, hidden_size, "gate_proj", "up_proj"),
            experts(hidden_size, inner, "down_proj"),
        )


@dataclasses.dataclass(frozen=True)
class GptOssExperts(MixtureOfExperts):
    """One tensor for each projection of all experts, gates and ups in turn, or two of MXFP4.

    Attributes:
      mxfp4: whether a checkpoint holds 4 bits a weight.
    """

    mxfp4: bool = False

    def sources(self, prefix: str, hidden_size: int) -> ExpertWeights:
        mlp, e, inner = prefix + "mlp.", self.num_experts, self.intermediate_size

        def experts(name: str, out: int, size: int, in_turn: bool) -> Linear:
            def build(*stored: np.ndarray) -> np.ndarray:
                if self.mxfp4:
                    blocks, scales = stored
                    weight = dequantize(blocks, scales, jnp.bfloat16)  # which rounds none
                else:
                    weight = stored[0].swapaxes(1, 2)
                return _gates_first(weight) if in_turn else weight

            name = f"{mlp}experts.{name}"
            tensors: tuple[tuple[str, tuple[int, ...]], ...] = ((name, (e, size, out)),)
            if self.mxfp4:
                blocks = (e, out, size // BLOCK)
                tensors = ((name + "_blocks", (*blocks, BYTES)), (name + "_scales", blocks))
            return Linear(
                Source(
                    tensors,
                    build,
                    (e, out, size),
                    stored=("uint8",) if self.mxfp4 else FLOAT_DTYPES,
                ),
                Source(((name + "_bias", (e, out)),), _gates_first if in_turn else None),
            )

        router = mlp + "router."
        return ExpertWeights(
            Linear(tensor(router + "weight", e, hidden_size), tensor(router + "bias", e)),
            experts("gate_up_proj", 2 * inner, hidden_size, in_turn=True),
            experts("down_proj", hidden_size, inner, in_turn=False),
        )


def _gates_first(x: np.ndarray) -> np.ndarray:
    """[e, gate 0, up 0, gate 1 .., ...] -> [e, gates, ups, ...]."""
    return np.concatenate([x[:, 0::2], x[:, 1::2]], axis=1)


def qwen3_moe(dense: Gated, entries: Entries, num_layers: int) -> list[FeedForward]:
    """The feed-forward of each layer; `dense` that of those without experts."""
    experts = Qwen3Experts(
        _num_experts(entries),
        entries.need("num_experts_per_tok", POSITIVE_INT),
        entries.need("moe_intermediate_size", POSITIVE_INT),
        entries.get("norm_topk_prob", BOOL, False),
        dense.activation,
    )
    step = entries.need("decoder_sparse_step", POSITIVE_INT)
    without = entries.get("mlp_only_layers", COUNTS, [])
    return [dense if i in without or (i + 1) % step else experts for i in range(num_layers)]


def gpt_oss(entries: Entries, tensors: Collection[str], num_layers: int) -> list[FeedForward]:
    """The feed-forward of each layer.

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


def _is_mxfp4(entries: Entries, tensors: Collection[str]) -> bool:
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
