"""Rows in groups, each group times a matrix of its own: what a mixture of experts computes."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxattn import reference
from jaxattn.checks import check_float, check_index, check_same_dtype, check_shape
from jaxattn.dispatch import dispatch
from jaxattn.kernels.triton import grouped_matmul as kernels


class Groups(NamedTuple):
    """m rows in e groups."""

    order: Array  # int32 [m], the rows' numbers, group after group; last those that are in none
    ends: Array  # int32 [e], where in `order` each group ends

    @classmethod
    def of(cls, group: Array, num_groups: int) -> "Groups":
        """Of the group int32 [m] of each row; one that is `num_groups` or more is none."""
        every = jnp.arange(num_groups, dtype=jnp.int32)
        ends = jnp.sum(group[:, None] <= every[None, :], axis=0, dtype=jnp.int32)
        return cls(jnp.argsort(group).astype(jnp.int32), ends)


def grouped_matmul(
    x: Array, weights: Array, groups: Groups, *, backend: str | None = None
) -> Array:
    """`out[i] = x[i // repeat] @ weights[g].T` for the rows i of group g, of m = t * repeat rows.

    What `jax.lax.ragged_dot` computes of sorted rows. On a GPU a matrix whose group is empty is not read, and time
    grows with the rows; XLA's program for `ragged_dot` there is one product of all rows with all matrices, masked.

    Args:
      x: [t, k]; float16, bfloat16 or float32.
      weights: [e, n, k], the groups' matrices, of x's dtype.
      groups: of m rows, a multiple of t: a token that goes to several experts is several rows.
      backend: "triton", "xla" (`ragged_dot`), "interpret", or None: Triton on an NVIDIA GPU, XLA elsewhere.

    Returns:
      float32 [m, n], summed in float32; rows that are in no group hold anything.

    Raises:
      ValueError: shapes that do not fit; a backend that cannot run here.
      TypeError: an unsupported dtype, or dtypes that differ.
    """
    check_float("x", x)
    check_shape("x", x, ("t", "k"))
    check_shape("weights", weights, ("e", "n", x.shape[1]))
    check_same_dtype(x=x, weights=weights)
    check_index("groups.order", groups.order, "m")
    check_index("groups.ends", groups.ends, weights.shape[0])
    if groups.order.shape[0] % max(x.shape[0], 1):
        raise ValueError(
            f"groups must be of a multiple of x's rows; got {groups.order.shape[0]} rows, and {x.shape[0]} of x"
        )
    empty = 0 in (*x.shape, *weights.shape, *groups.order.shape)
    return dispatch(
        "xla" if empty else backend,
        kernels.grouped_matmul,
        reference.grouped_matmul,
        x,
        weights,
        groups.order,
        groups.ends,
    )
