"""Tiles of an array seen as rows `[num_rows, d]`: any of its rows, and a run of their columns.

A tile's sizes are powers of two: what lies past the rows or the columns is masked. Masks are None
where nothing does.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

Mask = jax.Array | None  # bool; None: all


def pow2(x: int) -> int:
    """The least power of two that is not below x: the size of a tile that covers x elements."""
    return 1 << (x - 1).bit_length()


def divmod_by(x: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """x // n and x % n of non-negative x, without the sign handling of Python's."""
    if n & (n - 1) == 0:
        return x >> (n.bit_length() - 1), x & (n - 1)
    divisor = jnp.full_like(x, n)
    return jax.lax.div(x, divisor), jax.lax.rem(x, divisor)


def both(a: Mask, b: Mask) -> Mask:
    """a & b."""
    return b if a is None else a if b is None else a & b


def load(ref: jax.Ref, index: Any, exist: Mask, other: float = 0) -> jax.Array:
    """ref[index], an array or a tuple of them; `other` where there is no such element."""
    return plgpu.load(ref.at[index], mask=exist, other=None if exist is None else other)


def store(ref: jax.Ref, index: jax.Array, exist: Mask, x: jax.Array) -> None:
    """ref[index] = x, of a ref of one axis, where there is such an element."""
    if exist is not None:
        index = jnp.where(exist, index, ref.shape[0])  # as in `Rows.store`
    plgpu.store(ref.at[index], x, mask=exist)


def block_of(block: jax.Array, size: int, end: int) -> tuple[jax.Array, Mask]:
    """Elements int32 [size] of a block, and which of them are below `end`; a scalar where size is 1.

    What hangs on a vector of one element, Triton would load again for each layout it takes part in.
    """
    i = block if size == 1 else block * size + jnp.arange(size, dtype=jnp.int32)
    return i, None if end % size == 0 else i < end


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some rows of an array."""

    index: jax.Array  # int32 [...]
    exist: Mask = None  # [...]

    def load(self, ref: jax.Ref, columns: range, other: float = 0) -> jax.Array:
        """ref[rows, columns], [..., pow2(len(columns))]; `other` where there is no such element."""
        at, mask = _tile(self.index, self.exist, columns)
        return plgpu.load(ref.at[at], mask=mask, other=None if mask is None else other)

    def store(self, ref: jax.Ref, columns: range, x: jax.Array) -> None:
        """ref[rows, columns] = x, rounded to ref's dtype."""
        index = self.index
        if self.exist is not None:
            # Interpreted, a masked store writes back what it read: the rows that do not exist all
            # lie past the array's end, lest one undoes another's write.
            index = jnp.where(self.exist, index, ref.shape[0])
        at, mask = _tile(index, self.exist, columns)
        plgpu.store(ref.at[at], x.astype(ref.dtype), mask=mask)


def _tile(
    index: jax.Array, exist: Mask, columns: range
) -> tuple[tuple[jax.Array, jax.Array], Mask]:
    """What a tile's elements are indexed by, and which of them exist."""
    size = pow2(len(columns))
    column = (columns.start + jnp.arange(size, dtype=jnp.int32)).reshape(*[1] * index.ndim, size)
    mask = both(
        None if exist is None else exist[..., None],
        None if size == len(columns) else column < columns.stop,
    )
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*index.shape, size))
    return (index[..., None], column), mask
