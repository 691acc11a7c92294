"""Experts as the checkpoints of each family hold them."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jaxattn.checks import FLOAT_DTYPES
from jaxattn.models.linear import Linear, Source, tensor
from jaxattn.models.moe import ExpertWeights, MixtureOfExperts
from jaxattn.models.mxfp4 import BLOCK, BYTES, dequantize


@dataclasses.dataclass(frozen=True)
class Qwen3Experts(MixtureOfExperts):
    """One tensor for each projection of each expert.

    Attributes:
      stacked: whether they are stacked, gate and up too, as transformers 5 holds them and may save them.
    """

    stacked: bool = False

    def sources(self, prefix: str, hidden_size: int) -> ExpertWeights:
        mlp, e, inner = prefix + "mlp.", self.num_experts, self.intermediate_size

        def experts(name: str, out: int, size: int, *projections: str) -> Linear:
            if self.stacked:
                return Linear(tensor(f"{mlp}experts.{name}", e, out, size))
            shape = (out // len(projections), size)
            tensors = tuple(
                (f"{mlp}experts.{i}.{projection}.weight", shape)
                for i in range(e)
                for projection in projections
            )

            def build(*stored: np.ndarray) -> np.ndarray:
                return np.concatenate(stored).reshape(e, out, size)

            return Linear(Source(tensors, build, (e, out, size)))

        return ExpertWeights(
            Linear(tensor(mlp + "gate.weight", e, hidden_size)),
            experts("gate_up_proj", 2 * inner, hidden_size, "gate_proj", "up_proj"),
            experts("down_proj", hidden_size, inner, "down_proj"),
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
