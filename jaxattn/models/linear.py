"""A matrix product with its bias, and where a weight lies in a checkpoint."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxattn.checks import FLOAT_DTYPES


class Linear(NamedTuple):
    """`x @ weight.T + bias`."""

    weight: Any  # [out, in]
    bias: Any = None  # [out]

    def __call__(self, x: Array) -> Array:
        """[t, in] -> [t, out] in x's dtype, rounded once."""
        if self.bias is None:
            return matmul(x, self.weight, x.dtype)
        y = matmul(x, self.weight, jnp.float32) + self.bias.astype(jnp.float32)[None, :]
        return y.astype(x.dtype)


def matmul(x: Array, weight: Array, dtype: jax.typing.DTypeLike) -> Array:
    """`x @ weight.T`, accumulated in float32; float32 inputs are not rounded to TensorFloat-32.

    cuBLAS rounds to `dtype` as it stores; after a float32 output, a kernel of XLA's would.
    """
    return jnp.einsum(
        "ti,oi->to",
        x,
        weight,
        precision="highest" if x.dtype == jnp.float32 else None,
        preferred_element_type=dtype,
    )


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a weight comes from: a checkpoint's tensors, stacked along their first axis, or what `build` makes of them.

    Attributes:
      tensors: (name, shape) of each.
      build: from the stored arrays, NumPy's and in this order, to the weight: a transpose, a part, a dequantisation.
      built_shape: of what build returns, where that is not the stack's.
      dtype: of the weight; None: that of the model.
      stored: dtypes that the tensors may have.
    """

    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    build: Callable[..., np.ndarray] | None = None
    built_shape: tuple[int, ...] | None = None
    dtype: str | None = None
    stored: tuple[str, ...] = FLOAT_DTYPES

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        shapes = [shape for _, shape in self.tensors]
        return self.built_shape or (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def weight(self, stored: list[np.ndarray], dtype: jax.typing.DTypeLike) -> np.ndarray:
        """The weight, of the stored tensors; `dtype` is the model's."""
        dtype = self.dtype or dtype
        if self.build is None:
            return np.concatenate([x.astype(dtype) for x in stored])
        built = self.build(*stored)
        assert built.shape == self.shape, (self.tensors, built.shape, self.shape)
        return built.astype(dtype, copy=False)


def tensor(name: str, *shape: int) -> Source:
    """One tensor as it is stored."""
    return Source(((name, shape),))


def stacked(prefix: str, outs: Mapping[str, int], size: int, bias: bool) -> Linear:
    """One `Linear` of projections `prefix + name` [out, size] that a checkpoint stores each by itself."""
    weights = Source(tuple((f"{prefix}{x}.weight", (out, size)) for x, out in outs.items()))
    biases = Source(tuple((f"{prefix}{x}.bias", (out,)) for x, out in outs.items()))
    return Linear(weights, biases if bias else None)
