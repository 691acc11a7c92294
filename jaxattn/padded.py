"""Padded batches [b, t] as ragged query tokens, without moving any.

Each row of the batch holds one run of real tokens, wherever padding lies. The runs are requests, and so is the padding
before each of them, a request without keys. What follows the last run belongs to no request. Either gives zeros.

Axes: b rows of the batch, t tokens of a row.
"""

import jax.numpy as jnp
from jax import Array


def row_indptr(num_rows: int, num_tokens: int) -> Array:
    """int32 [num_rows + 1]: where rows of num_tokens begin, and the last of them ends."""
    return jnp.arange(num_rows + 1, dtype=jnp.int32) * num_tokens


def run_indptr(begin: Array, end: Array, num_tokens: int) -> Array:
    """`qo_indptr` int32 [2 b + 1]: padding, run, padding, run; row i's run is its tokens begin[i] .. end[i] - 1."""
    first = row_indptr(begin.shape[0], num_tokens)[:-1]
    bounds = jnp.stack([first + begin, first + end], axis=1).reshape(-1)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), bounds])


def of_runs(x: Array) -> Array:
    """x [b] of the runs, and 0 of the padding: [2 b]."""
    return jnp.stack([jnp.zeros_like(x), x], axis=1).reshape(-1)
