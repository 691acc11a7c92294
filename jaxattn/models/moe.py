"""The feed-forward of a mixture of experts: each token goes through a few of many gated networks.

    chosen = the k experts of the largest router(x);  p = softmax(router(x)), over all experts or over the chosen
    y = sum over chosen e of p[e] * down_proj[e](gated(gate_up_proj[e](x)))

(Shazeer et al. 2017, "Outrageously large neural networks"). A token is k rows, the rows of an expert are a group, and
`grouped_matmul` reads the experts that have any.

Axes: t tokens, k experts of a token, e experts.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxattn.grouped_matmul import Groups, grouped_matmul
from jaxattn.models.feed_forward import ACTIVATIONS
from jaxattn.models.linear import Linear, matmul


class ExpertWeights(NamedTuple):
    """Weights of a mixture of experts."""

    router: Linear  # [e, hidden]
    gate_up_proj: Linear  # [e, 2 * intermediate, hidden], gates first; bias [e, 2 * intermediate]
    down_proj: Linear  # [e, hidden, intermediate]; bias [e, hidden]


@dataclasses.dataclass(frozen=True)
class ClampedSwiglu:
    """`gate * sigmoid(alpha * gate) * (up + 1)`, of gates up to `limit` and ups within it: gpt-oss's."""

    alpha: float = 1.702
    limit: float = 7.0

    def __call__(self, gate: Array, up: Array) -> Array:
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        return gate * jax.nn.sigmoid(self.alpha * gate) * (up + 1)


class Routing(NamedTuple):
    """Which experts the tokens go to."""

    experts: Array  # int32 [t, k]
    weights: Array  # float32 [t, k]


@dataclasses.dataclass(frozen=True)
class MixtureOfExperts:
    """A `FeedForward`, all but where its weights lie in a checkpoint.

    Attributes:
      num_experts: e.
      experts_per_token: k.
      intermediate_size: of each expert's gate and up.
      normalized: the weights of a token's k experts add up to 1.
      activation: one of `ACTIVATIONS`, or what makes one of gate and up.

    Raises:
      ValueError: more experts for a token than there are.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    normalized: bool = True
    activation: str | ClampedSwiglu = "silu"

    def __post_init__(self) -> None:
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                "experts_per_token must be at least 1 and at most num_experts; got "
                f"experts_per_token={self.experts_per_token}, num_experts={self.num_experts}"
            )

    def __call__(
        self, x: Array, weights: ExpertWeights, *, is_token: Array, backend: str | None = None
    ) -> Array:
        """[t, hidden] -> [t, hidden]; of rows that are no token, no expert is read and the result is 0."""
        t, k = x.shape[0], self.experts_per_token
        routing = self.route(x, weights.router)
        # Rows that are no token go to none of the experts.
        expert = jnp.where(is_token[:, None], routing.experts, self.num_experts).reshape(t * k)
        groups = Groups.of(expert, self.num_experts)

        def linear(x: Array, linear: Linear) -> Array:
            """[t, in] or [t * k, in] -> [t * k, out]: row i * k + j is token i's, through its expert j."""
            y = grouped_matmul(x, linear.weight, groups, backend=backend)
            if linear.bias is None:
                return y
            return y + linear.bias.at[expert].get(mode="clip").astype(jnp.float32)

        gated = self._gated(linear(x, weights.gate_up_proj)).astype(x.dtype)
        rows = linear(gated, weights.down_proj)
        y = jnp.sum(rows.reshape(t, k, -1) * routing.weights[:, :, None], axis=1)
        return jnp.where(is_token[:, None], y, 0).astype(x.dtype)

    def route(self, x: Array, router: Linear) -> Routing:
        """The experts of each token and their weights; of equal logits the first expert's is the larger."""
        logits = matmul(x, router.weight, jnp.float32)
        if router.bias is not None:
            logits = logits + router.bias.astype(jnp.float32)[None, :]
        # A softmax keeps the order, so the largest logits are the largest weights.
        top, experts = jax.lax.top_k(logits, self.experts_per_token)
        if self.normalized:
            return Routing(experts, jax.nn.softmax(top, axis=1))
        total = jax.nn.logsumexp(logits, axis=1, keepdims=True)
        return Routing(experts, jnp.exp(top - total))

    def _gated(self, gate_up: Array) -> Array:
        if isinstance(self.activation, str):
            # XLA's, which takes the bias before it and the rounding after it into the same kernel.
            return ACTIVATIONS[self.activation](gate_up, backend="xla")
        return self.activation(*jnp.split(gate_up, 2, axis=1))
