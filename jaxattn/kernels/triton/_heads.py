"""Heads of a block of tokens: how programs share them, where their rows lie, and their rotation
(RoFormer, eq. 34)

    y1 = x1 cos - x2 sin,   y2 = x2 cos + x1 sin

for the pairs (x1, x2) of the first rotary_dim dims, in float32; the other dims stay as they are.

Axes: t tokens and h heads of a tile (of a single token, there is no axis t), r = rotary_dim / 2 pairs
(padded to a power of two).
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxattn.kernels.triton._rows import Mask, Rows, both, pow2


@dataclasses.dataclass(frozen=True)
class Config:
    block_tokens: int  # tokens of a program, a power of two
    head_blocks: int  # programs that share the heads of a token, a power of two
    num_warps: int


def default_config(num_tokens: int, num_heads: Sequence[int], head_dim: int) -> Config:
    """The tiles for heads of q, of k and, where it comes along, of v.

    Microseconds on an H200, of rope unless they say rope_append; heads h/kh d head_dim.
    """
    token = pow2(sum(pow2(heads) for heads in num_heads)) * pow2(head_dim)
    if num_tokens * token <= 2**21:
        # Few tokens: spread, 1024 elements of q a program. 32/8 d128, against one program a token:
        # 1 token 1.60 to 2.27, 128 tokens 2.43 to 3.04; rope_append 32 tokens 2.34 to 2.88, with
        # norms 256 tokens 3.46 to 3.94; but by 512 elements 5.09. 8/1 d128, rope_append of 64 tokens:
        # 2.14, two a program 2.40.
        return Config(1, max(1, token // 2048), num_warps=4)
    if token <= 2048:
        # Few heads: several tokens a program. 4096 tokens 8/1 d128: 6.37, a token a program 7.10 to
        # 7.26; rope_append with norms 8.35 to 8.99; with 4 warps 7.78 and 9.25.
        return Config(8192 // token, 1, num_warps=2)
    head_blocks = max(1, token // 8192)
    if num_tokens * token <= 2**23 and token > 4096:
        # 32/8 d128, 512 tokens: 3.94, 4 warps 4.22, two programs a token 3.87; 1024 tokens 6.34, 6.56,
        # 6.94. rope_append was not measured here.
        return Config(1, head_blocks, num_warps=2)
    # 1024 elements of q a warp. 16384 tokens 32/8 d128: 86.5; 2 warps 92.4, 8 warps 96.5, two
    # programs of 2 warps 89.5; rope_append 103.9; 112.7, 106.1, 110.5. 4096 tokens 64/8 d128: 39.3,
    # one program of 4 warps 40.1; 32/8 d64: 12.1, 4 warps 13.6.
    return Config(1, head_blocks, num_warps=4 if token > 4096 else 2)


@dataclasses.dataclass(frozen=True)
class Heads:
    """One of `num_blocks` equal blocks of some heads."""

    index: jax.Array  # int32 [h]
    exist: Mask  # [h]

    @classmethod
    def of(cls, block: jax.Array, num_blocks: int, num_heads: int) -> "Heads":
        size = pow2(-(-num_heads // num_blocks))
        index = block * size + jnp.arange(size, dtype=jnp.int32)
        return cls(index, None if size * num_blocks == num_heads else index < num_heads)

    def rows(self, first: jax.Array, exist: Mask, stride: int = 1) -> Rows:
        """Rows [t, h], where a token's head 0 lies in row first [t], and the next in first + stride."""
        shape = (*first.shape, self.index.size)
        of_heads = (1,) * first.ndim + self.index.shape
        mask = both(
            None if exist is None else exist[..., None],
            None if self.exist is None else self.exist.reshape(of_heads),
        )
        index = first[..., None] + self.index.reshape(of_heads) * stride
        return Rows(index, None if mask is None else jnp.broadcast_to(mask, shape))


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Which dims of a head make a pair: those a half apart, or neighbours."""

    head_dim: int
    rotary_dim: int
    interleave: bool

    @property
    def columns(self) -> list[range]:
        """The runs of a head's dims that a program holds: those that rotate, then the others, if any.

        Halves come apart from memory; neighbours come as one run and are parted in registers.
        """
        half, end = self.rotary_dim // 2, self.rotary_dim
        turning = [range(end)] if self.interleave else [range(half), range(half, end)]
        return turning + ([range(end, self.head_dim)] if end < self.head_dim else [])

    def load_row(self, table_ref: jax.Ref, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines float32 [t, 1, r] of positions [t].

        NaN where the table has no such row: a position outside it must not pass as another one.
        """
        rows = Rows(position, (position >= 0) & (position < table_ref.shape[0]))
        half, end = self.rotary_dim // 2, self.rotary_dim
        cos = rows.load(table_ref, range(half), other=jnp.nan)
        sin = rows.load(table_ref, range(half, end), other=jnp.nan)
        return cos[..., None, :], sin[..., None, :]

    def turn(self, x: Sequence[jax.Array], cos: jax.Array, sin: jax.Array) -> list[jax.Array]:
        """Tiles [t, h, ...] of heads, rotated; one for each of `columns`, float32 where they rotate."""
        if self.interleave:
            run, *rest = x
            pairs = run.astype(jnp.float32).reshape(*run.shape[:-1], -1, 2)
            x1, x2 = jnp.unstack(pairs, axis=-1)
        else:
            x1, x2, *rest = x
            x1, x2 = x1.astype(jnp.float32), x2.astype(jnp.float32)
        y = x1 * cos - x2 * sin, x2 * cos + x1 * sin
        if self.interleave:
            return [jnp.stack(y, axis=-1).reshape(run.shape), *rest]
        return [*y, *rest]
