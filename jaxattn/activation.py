"""Gated activations of feed-forward layers (Shazeer 2020, GLU variants): FlashInfer's names and meaning."""

from jax import Array

from jaxattn import reference
from jaxattn.checks import check_float
from jaxattn.dispatch import dispatch
from jaxattn.kernels.triton import activation as kernels


def silu_and_mul(input: Array, *, backend: str | None = None) -> Array:
    """`silu(input[..., :d]) * input[..., d:]`, in float32, rounded once; silu(x) = x / (1 + exp(-x)).

    Args:
      input: [..., 2 d], float16, bfloat16 or float32.
      backend: "triton", "xla", "interpret", or None: Triton on an NVIDIA GPU, XLA elsewhere.

    Returns:
      [..., d], input's dtype.

    Raises:
      ValueError: an odd last axis; a backend that cannot run here.
      TypeError: an unsupported dtype.
    """
    return _activated(input, "silu", backend)


def gelu_and_mul(input: Array, *, backend: str | None = None) -> Array:
    """`silu_and_mul` with gelu(x) = x Phi(x), Phi the normal distribution's (Hendrycks and Gimpel 2016)."""
    return _activated(input, "gelu", backend)


def gelu_tanh_and_mul(input: Array, *, backend: str | None = None) -> Array:
    """`silu_and_mul` with gelu's approximation, x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    return _activated(input, "gelu_tanh", backend)


def _activated(input: Array, activation: str, backend: str | None) -> Array:
    check_float("input", input)
    if input.ndim < 1 or input.shape[-1] % 2:
        raise ValueError(
            f"input must have shape [..., 2 d], a gate and what it gates; got {list(input.shape)}"
        )

    def kernel(input: Array, *, interpret: bool) -> Array:
        return kernels.activate_and_multiply(input, activation=activation, interpret=interpret)

    def plain(input: Array) -> Array:
        return reference.activate_and_multiply(input, activation)

    return dispatch("xla" if input.size == 0 else backend, kernel, plain, input)
