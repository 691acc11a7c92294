"""Rows that lie in groups, each group times a matrix of its own."""

from jax import Array

from jaxattn import reference
from jaxattn.checks import check_float, check_index, check_same_dtype, check_shape
from jaxattn.dispatch import dispatch
from jaxattn.kernels.triton import grouped_matmul as kernels


def grouped_matmul(
    x: Array, weights: Array, group_sizes: Array, *, backend: str | None = None
) -> Array:
    """`out[i] = x[i] @ weights[g].T` for the rows i of group g: `jax.lax.ragged_dot`, reading what it uses.

    On a GPU a matrix whose group is empty is not read, and time grows with the rows; XLA's program for `ragged_dot`
    there is one product with all matrices, of which most of the result is thrown away.

    Args:
      x: [m, k], group after group; float16, bfloat16 or float32.
      weights: [e, n, k], the groups' matrices, of x's dtype.
      group_sizes: int32 [e], rows of each group; their sum is at most m.
      backend: "triton", "xla" (`ragged_dot`), "interpret", or None: Triton on an NVIDIA GPU, XLA elsewhere.

    Returns:
      float32 [m, n], summed in float32; rows past the last group hold anything.

    Raises:
      ValueError: shapes that do not fit; a backend that cannot run here.
      TypeError: an unsupported dtype, or dtypes that differ.
    """
    check_float("x", x)
    check_shape("x", x, ("m", "k"))
    check_shape("weights", weights, ("e", "n", x.shape[1]))
    check_same_dtype(x=x, weights=weights)
    check_index("group_sizes", group_sizes, weights.shape[0])
    empty = 0 in (*x.shape, *weights.shape)
    return dispatch(
        "xla" if empty else backend,
        kernels.grouped_matmul,
        reference.grouped_matmul,
        x,
        weights,
        group_sizes,
    )
