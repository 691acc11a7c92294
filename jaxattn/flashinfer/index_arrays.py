"""Index arrays as users bring them: lists, NumPy arrays and JAX arrays."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxattn.checks import check_index
from jaxattn.page_table import PageTable

Indices = Array | np.ndarray | Sequence[int]


def index_array(name: str, x: Any, size: int | str) -> Any:
    """A checked int32 array, where it is.

    What is on the host is copied: plans are computed after `plan` has returned, XLA on a CPU reads
    NumPy's memory when it gets there, and whoever keeps a buffer refills it for the next step.
    """
    if isinstance(x, jax.Array):
        check_index(name, x, size)
        return x
    if not isinstance(x, np.ndarray):
        x = _int32(name, x)
    check_index(name, x, size)
    return x.copy()


def _int32(name: str, x: Any) -> np.ndarray:
    """A sequence of integers as NumPy's int32, none of them cut off."""
    try:
        array = np.asarray(x)
    except ValueError:  # rows of different lengths
        array = np.empty((), object)
    if array.ndim == 0 or array.size and array.dtype.kind not in "iu":
        raise TypeError(
            f"{name} must be an int32 array, or a list of integers that fit one; got {x!r}"
        )
    bounds = np.iinfo(np.int32)
    outside = (array < bounds.min) | (array > bounds.max)
    if outside.any():
        raise ValueError(f"{name} must fit int32; got {array[outside][0]}")
    return array.astype(np.int32)


def last(indptr: Any) -> int | None:
    """The last element of an indptr on the host."""
    return int(indptr[-1]) if isinstance(indptr, np.ndarray) else None


def host_kv_len(table: PageTable) -> np.ndarray | None:
    """int64 [b], tokens of each request, where the table's arrays are on the host."""
    indptr, last_page_len = table.indptr, table.last_page_len
    if not (isinstance(indptr, np.ndarray) and isinstance(last_page_len, np.ndarray)):
        return None
    assert table.page_size is not None
    num_pages = np.diff(indptr).astype(np.int64)
    return np.where(num_pages > 0, (num_pages - 1) * table.page_size + last_page_len, 0)


def power_of_two(n: int) -> int:
    """The next power of two, at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def pad(x: Any, size: int, mode: str = "constant") -> Any:
    """x with its first axis padded, on the host or on the device, where it is."""
    if x.shape[0] == size:
        return x
    widths = [(0, size - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
    return (jnp if isinstance(x, jax.Array) else np).pad(x, widths, mode=mode)
