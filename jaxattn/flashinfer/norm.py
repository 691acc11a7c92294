"""Root-mean-square norms, as FlashInfer's functions: what `jaxattn.norm` computes, returned."""

from jax import Array

from jaxattn import norm
from jaxattn.flashinfer.options import Unwritable, flashinfer_options

_RETURNED = Unwritable("use what is returned, which in_place=True aliases to input")


@flashinfer_options(out=_RETURNED, backend=None)
def rmsnorm(
    input: Array,
    weight: Array,
    eps: float = 1e-6,
    out: None = None,
    enable_pdl: bool | None = None,
    *,
    in_place: bool = False,
    backend: str | None = None,
) -> Array:
    """`input / sqrt(mean(input^2) + eps) * weight` over the last axis, in float32, rounded once.

    Args:
      input: [..., hidden], any hidden size; float16, bfloat16 or float32.
      weight: [hidden], input's dtype or float32.
      eps: added to the mean of squares; a Python float.
      in_place: alias the result to `input`, which then needs no second buffer where it is donated.
      backend: "triton", "xla", "interpret", or None: Triton on an NVIDIA GPU, XLA elsewhere.

    Returns:
      The norm, shaped and typed as `input`.

    Raises: as `jaxattn.norm.rmsnorm`.
    """
    return norm.rmsnorm(input, weight, eps, in_place=in_place, backend=backend)


@flashinfer_options(out=_RETURNED, backend=None)
def gemma_rmsnorm(
    input: Array,
    weight: Array,
    eps: float = 1e-6,
    out: None = None,
    enable_pdl: bool | None = None,
    *,
    in_place: bool = False,
    backend: str | None = None,
) -> Array:
    """`rmsnorm` with Gemma's `1 + weight` in place of `weight`."""
    return norm.gemma_rmsnorm(input, weight, eps, in_place=in_place, backend=backend)


@flashinfer_options(backend=None)
def fused_add_rmsnorm(
    input: Array,
    residual: Array,
    weight: Array,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
    *,
    backend: str | None = None,
) -> tuple[Array, Array]:
    """`residual + input`, and its `rmsnorm`, taken of the float32 sum before that is rounded.

    FlashInfer writes the norm to `input` and the sum to `residual`, and returns nothing.

    Args:
      input: [..., hidden], any hidden size; float16, bfloat16 or float32.
      residual: shaped and typed as `input`.
      weight: [hidden], input's dtype or float32.
      eps: added to the mean of squares; a Python float.
      backend: "triton", "xla", "interpret", or None: Triton on an NVIDIA GPU, XLA elsewhere.

    Returns:
      (the norm, the sum), aliased to `input` and `residual`: in place where those are donated.

    Raises: as `jaxattn.norm.fused_add_rmsnorm`.
    """
    return norm.fused_add_rmsnorm(input, residual, weight, eps, backend=backend)


@flashinfer_options(backend=None)
def gemma_fused_add_rmsnorm(
    input: Array,
    residual: Array,
    weight: Array,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
    *,
    backend: str | None = None,
) -> tuple[Array, Array]:
    """`fused_add_rmsnorm` with Gemma's `1 + weight` in place of `weight`."""
    return norm.gemma_fused_add_rmsnorm(input, residual, weight, eps, backend=backend)
