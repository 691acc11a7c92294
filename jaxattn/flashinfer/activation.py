"""Gated activations, as FlashInfer's functions: what `jaxattn.activation` computes, returned."""

from jax import Array

from jaxattn import activation
from jaxattn.flashinfer.options import flashinfer_options


@flashinfer_options(backend=None)
def silu_and_mul(
    input: Array,
    out: None = None,
    enable_pdl: bool | None = None,
    *,
    backend: str | None = None,
) -> Array:
    """As `jaxattn.activation.silu_and_mul`, of input [..., 2 d]."""
    return activation.silu_and_mul(input, backend=backend)


@flashinfer_options(backend=None)
def gelu_and_mul(
    input: Array,
    out: None = None,
    enable_pdl: bool | None = None,
    *,
    backend: str | None = None,
) -> Array:
    """As `jaxattn.activation.gelu_and_mul`, of input [..., 2 d]."""
    return activation.gelu_and_mul(input, backend=backend)


@flashinfer_options(backend=None)
def gelu_tanh_and_mul(
    input: Array,
    out: None = None,
    enable_pdl: bool | None = None,
    *,
    backend: str | None = None,
) -> Array:
    """As `jaxattn.activation.gelu_tanh_and_mul`, of input [..., 2 d]."""
    return activation.gelu_tanh_and_mul(input, backend=backend)
