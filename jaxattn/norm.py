"""Root-mean-square norms (Zhang and Sennrich 2019), also Gemma's, also with a fused residual."""

from jax import Array

from jaxattn import reference
from jaxattn.checks import check_float, check_norm_weight, check_same_dtype, check_shape
from jaxattn.dispatch import dispatch
from jaxattn.kernels.triton import rmsnorm as kernels


def rmsnorm(
    input: Array,
    weight: Array,
    eps: float = 1e-6,
    *,
    in_place: bool = False,
    backend: str | None = None,
) -> Array:
    """`input / sqrt(mean(input^2) + eps) * weight` over the last axis, in float32, rounded once.

    Args:
      input: [..., hidden], any hidden size; float16, bfloat16 or float32.
      weight: [hidden], input's dtype or float32.
      eps: added to the mean of squares; a Python float.
      in_place: alias the result to `input`, so that no second buffer is needed where `input` is
        donated or not used again. Where it is used again, XLA first copies it.
      backend: "triton", "xla", "interpret", or None: Triton on an NVIDIA GPU, XLA elsewhere.

    Returns:
      The norm, shaped and typed as `input`.

    Raises:
      ValueError: weight is not [hidden]; a backend that cannot run here.
      TypeError: an unsupported dtype.
    """
    return _rmsnorm((input,), weight, eps, 0.0, in_place, backend)[0]


def gemma_rmsnorm(
    input: Array,
    weight: Array,
    eps: float = 1e-6,
    *,
    in_place: bool = False,
    backend: str | None = None,
) -> Array:
    """`rmsnorm` with Gemma's `1 + weight` in place of `weight`."""
    return _rmsnorm((input,), weight, eps, 1.0, in_place, backend)[0]


def fused_add_rmsnorm(
    input: Array, residual: Array, weight: Array, eps: float = 1e-6, *, backend: str | None = None
) -> tuple[Array, Array]:
    """`residual + input`, and its `rmsnorm`, taken of the float32 sum before that is rounded.

    Args:
      input: [..., hidden], any hidden size; float16, bfloat16 or float32.
      residual: shaped and typed as `input`.
      weight: [hidden], input's dtype or float32.
      eps: added to the mean of squares; a Python float.
      backend: "triton", "xla", "interpret", or None: Triton on an NVIDIA GPU, XLA elsewhere.

    Returns:
      (the norm, the sum rounded to residual's dtype). The norm is aliased to `input` and the sum
      to `residual`: they are updated in place where donated or not used again.

    Raises:
      ValueError: shapes that differ, or weight is not [hidden]; a backend that cannot run here.
      TypeError: an unsupported dtype, or dtypes that differ.
    """
    normed, total = _rmsnorm((input, residual), weight, eps, 0.0, True, backend)
    return normed, total


def gemma_fused_add_rmsnorm(
    input: Array, residual: Array, weight: Array, eps: float = 1e-6, *, backend: str | None = None
) -> tuple[Array, Array]:
    """`fused_add_rmsnorm` with Gemma's `1 + weight` in place of `weight`."""
    normed, total = _rmsnorm((input, residual), weight, eps, 1.0, True, backend)
    return normed, total


def _rmsnorm(
    inputs: tuple[Array, ...],
    weight: Array,
    eps: float,
    weight_offset: float,
    in_place: bool,
    backend: str | None,
) -> tuple[Array, ...]:
    """The norm of one input, or of the sum of two and that sum."""
    x, eps = inputs[0], float(eps)
    check_float("input", x)
    if x.ndim < 1:
        raise ValueError("input must have shape [..., hidden]; got a scalar")
    if len(inputs) > 1:
        check_shape("residual", inputs[1], x.shape)
        check_same_dtype(input=x, residual=inputs[1])
    check_norm_weight("weight", weight, x.shape[-1], x)

    def kernel(inputs, weight, *, interpret):
        return kernels.rmsnorm(
            inputs,
            weight,
            eps=eps,
            weight_offset=weight_offset,
            in_place=in_place,
            interpret=interpret,
        )

    def plain(inputs, weight):
        how = dict(eps=eps, weight_offset=weight_offset)
        if len(inputs) > 1:
            return reference.fused_add_rmsnorm(inputs[0], inputs[1], weight, **how)
        return (reference.rmsnorm(inputs[0], weight, **how),)

    return dispatch("xla" if x.size == 0 else backend, kernel, plain, inputs, weight)
