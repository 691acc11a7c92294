"""The feed-forward networks of a layer: each a frozen value that names its weights and computes."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from jax import Array

from jaxattn.activation import gelu_tanh_and_mul, silu_and_mul
from jaxattn.models.linear import Linear, stacked

ACTIVATIONS: dict[str, Callable[..., Array]] = {  # by transformers' names
    "silu": silu_and_mul,
    "gelu_pytorch_tanh": gelu_tanh_and_mul,
}
# Rows from which their kernels are faster than what XLA fuses, by 5%; up to 256 they are equal, and between the two
# nothing was measured: benchmarks/results/h200.json.
MANY_ROWS = 2048


class FeedForward(Protocol):
    """What a layer does after its attention. Frozen and hashable, so static under jit."""

    def sources(self, prefix: str, hidden_size: int) -> Any:
        """The tree of its weights, a `Source` for each; `prefix` is the layer's, "model.layers.0." say."""

    def __call__(
        self, x: Array, weights: Any, *, is_token: Array, backend: str | None = None
    ) -> Array:
        """[t, hidden] -> [t, hidden], both of the model's dtype.

        Args:
          x: rows; what comes of one depends on no other.
          weights: as `sources` arranges them.
          is_token: bool [t]; what comes of the other rows is never read, and need not be computed.
          backend: for ops that have kernels.
        """


class GatedWeights(NamedTuple):
    gate_up_proj: Linear  # gate and up stacked: out = 2 * intermediate
    down_proj: Linear


@dataclasses.dataclass(frozen=True)
class Gated:
    """`down_proj(activation(gate) * up)`, `[gate, up] = gate_up_proj(x)` (Shazeer 2020, "GLU variants").

    Attributes:
      intermediate_size: of gate and up.
      activation: one of `ACTIVATIONS`.
      bias: whether all three projections have one.
      fused: whether a checkpoint holds gate and up as one.
    """

    intermediate_size: int
    activation: str = "silu"
    bias: bool = False
    fused: bool = False

    def sources(self, prefix: str, hidden_size: int) -> GatedWeights:
        mlp, inner = prefix + "mlp.", self.intermediate_size
        gate_up = {"gate_proj": inner, "up_proj": inner}
        if self.fused:
            gate_up = {"gate_up_proj": 2 * inner}
        return GatedWeights(
            stacked(mlp, gate_up, hidden_size, self.bias),
            stacked(mlp, {"down_proj": hidden_size}, inner, self.bias),
        )

    def __call__(
        self, x: Array, weights: GatedWeights, *, is_token: Array, backend: str | None = None
    ) -> Array:
        activate = ACTIVATIONS[self.activation]
        gate_up = weights.gate_up_proj(x)
        gated = activate(gate_up, backend=backend if x.shape[0] >= MANY_ROWS else "xla")
        return weights.down_proj(gated)
