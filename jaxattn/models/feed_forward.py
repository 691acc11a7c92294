"""The feed-forward networks of a layer: each a frozen value that names its weights and computes."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from jaxattn.models.linear import Linear, stacked

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {  # by transformers' names
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class FeedForward(Protocol):
    """What a layer does after its attention. Frozen and hashable, so static under jit."""

    def sources(self, prefix: str, hidden_size: int) -> Any:
        """The tree of its weights, a `Source` for each; `prefix` is the layer's, "model.layers.0." say."""

    def __call__(self, x: Array, weights: Any) -> Array:
        """[t, hidden] -> [t, hidden], both of the model's dtype; `weights` as `sources` arranges them."""


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
    """

    intermediate_size: int
    activation: str = "silu"
    bias: bool = False

    def sources(self, prefix: str, hidden_size: int) -> GatedWeights:
        mlp, inner = prefix + "mlp.", self.intermediate_size
        return GatedWeights(
            stacked(mlp, {"gate_proj": inner, "up_proj": inner}, hidden_size, self.bias),
            stacked(mlp, {"down_proj": hidden_size}, inner, self.bias),
        )

    def __call__(self, x: Array, weights: GatedWeights) -> Array:
        gate, up = jnp.split(weights.gate_up_proj(x), 2, axis=1)
        activation = ACTIVATIONS[self.activation]
        gated = activation(gate.astype(jnp.float32)) * up.astype(jnp.float32)
        return weights.down_proj(gated.astype(x.dtype))
