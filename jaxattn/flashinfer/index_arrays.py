"""Index arrays as users bring them: lists, NumPy arrays and JAX arrays."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxattn.checks import check_index

Indices = Array | np.ndarray | Sequence[int]


def index_array(name: str, x: Any, size: int | str) -> Any:
    """A checked index array, where it is; Python integers become int32 on the host."""
    if not isinstance(x, jax.Array | np.ndarray):
        x = np.asarray(x)
        if x.dtype.kind == "i" or not x.size:
            x = x.astype(np.int32)
    check_index(name, x, size)
    return x


def last(indptr: Any) -> int | None:
    """The last element of an indptr on the host."""
    return int(indptr[-1]) if isinstance(indptr, np.ndarray) else None


def power_of_two(n: int) -> int:
    """The next power of two, at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def pad(x: Any, size: int, mode: str = "constant") -> Any:
    """x with its first axis padded, on the host or on the device, where it is."""
    if x.shape[0] == size:
        return x
    widths = [(0, size - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
    return (jnp if isinstance(x, jax.Array) else np).pad(x, widths, mode=mode)
