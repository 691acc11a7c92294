"""Rotary position embedding of queries and keys in one launch (RoFormer, eq. 34):

    y1 = x1 cos - x2 sin,   y2 = x2 cos + x1 sin

for the pairs (x1, x2) of the first rotary_dim dims of every head, in float32, with the token's row
of a table of cosines and sines. The other dims are copied, or left alone in place.

Axes: t tokens, h query heads, kh KV heads, d head dim, r = rotary_dim / 2 pairs.
Grid: (t * blocks): a program rotates a block of the query heads or of the KV heads of one token;
the blocks of a token, queries first, are neighbours and share its row of the table.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxattn.kernels._launch import launch
from jaxattn.kernels._paged_tile import divmod_by


def _pow2(x: int) -> int:
    """The least power of two that is not below x: the size of a tile that covers x elements."""
    return 1 << (x - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class Config:
    block_heads: int  # heads a program rotates, at most; a power of two
    num_warps: int


def default_config(num_heads: int, head_dim: int) -> Config:
    """The tile for `num_heads` query heads."""
    # H200, 16384 tokens: 32 heads of 128 a program, 4 warps, 3.85 TB/s. That is 32 elements a
    # thread; larger heads come in smaller blocks.
    block_heads = min(_pow2(num_heads), max(1, 4096 // _pow2(head_dim)))
    return Config(block_heads, num_warps=max(1, min(4, block_heads * _pow2(head_dim) // 1024)))


def _rope_kernel(
    q_ref,  # [t * h, d]
    k_ref,  # [t * kh, d]
    positions_ref,  # int32 [t]
    table_ref,  # float32 [max_position, 2 * r], cosines, then sines
    q_out_ref,  # as q_ref
    k_out_ref,  # as k_ref
    *,
    block_heads: int,
    interleave: bool,
    in_place: bool,
):
    num_tokens, d = positions_ref.shape[0], q_ref.shape[1]
    num_heads = [ref.shape[0] // num_tokens for ref in (q_ref, k_ref)]
    blocks = [pl.cdiv(n, block_heads) for n in num_heads]
    token, block = divmod_by(pl.program_id(0), sum(blocks))

    max_position, rotary_dim = table_ref.shape
    pairs = rotary_dim // 2
    pair = jnp.arange(_pow2(pairs), dtype=jnp.int32)
    position = positions_ref[token]
    # A position outside the table must not pass as another one.
    known = (pair < pairs) & (position >= 0) & (position < max_position)
    cos = plgpu.load(table_ref.at[position, pair], mask=known, other=jnp.nan)[None, :]
    sin = plgpu.load(table_ref.at[position, pairs + pair], mask=known, other=jnp.nan)[None, :]

    def rotate(x_ref, y_ref, num_heads, block):
        head = block * block_heads + jnp.arange(min(block_heads, _pow2(num_heads)), dtype=jnp.int32)
        row = token * num_heads + head

        def at(cols, end):
            mask = (head < num_heads)[:, None] & (cols < end)[None, :]
            return (row[:, None], cols[None, :]), mask

        def load(where):
            at, mask = where
            return plgpu.load(x_ref.at[at], mask=mask, other=0.0)

        def store(where, y):
            at, mask = where
            plgpu.store(y_ref.at[at], y.astype(y_ref.dtype), mask=mask)

        def turn(x1, x2):
            x1, x2 = x1.astype(jnp.float32), x2.astype(jnp.float32)
            return x1 * cos - x2 * sin, x2 * cos + x1 * sin

        if interleave:
            # Pairs are neighbours: they are loaded as one run and parted in registers.
            both = at(jnp.arange(2 * pair.size, dtype=jnp.int32), rotary_dim)
            x = load(both)
            y = turn(*jnp.unstack(x.reshape(-1, pair.size, 2), axis=-1))
            store(both, jnp.stack(y, axis=-1).reshape(x.shape))
        else:
            first, second = at(pair, pairs), at(pairs + pair, rotary_dim)
            y1, y2 = turn(load(first), load(second))
            store(first, y1)
            store(second, y2)
        if rotary_dim < d and not in_place:
            tail = at(rotary_dim + jnp.arange(_pow2(d - rotary_dim), dtype=jnp.int32), d)
            store(tail, load(tail))

    @pl.when(block < blocks[0])
    def _():
        rotate(q_ref, q_out_ref, num_heads[0], block)

    @pl.when(block >= blocks[0])
    def _():
        rotate(k_ref, k_out_ref, num_heads[1], block - blocks[0])


def rope(
    query: jax.Array,
    key: jax.Array,
    positions: jax.Array,
    cos_sin_cache: jax.Array,
    *,
    interleave: bool,
    in_place: bool,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """query [t, h, d], key [t, kh, d], positions int32 [t], cos_sin_cache float32 -> (query, key).

    In place, the outputs alias query and key.
    """
    t, num_heads, d = query.shape
    config = default_config(num_heads, d)
    blocks = sum(pl.cdiv(x.shape[1], config.block_heads) for x in (query, key))
    rows = [x.reshape(-1, d) for x in (query, key)]
    rotated = launch(
        functools.partial(
            _rope_kernel, block_heads=config.block_heads, interleave=interleave, in_place=in_place
        ),
        *rows,
        positions,
        cos_sin_cache,
        name="jaxattn_rope",
        grid=(t * blocks,),
        out_shape=[(x.shape, x.dtype) for x in rows],
        num_warps=config.num_warps,
        num_stages=1,
        interpret=interpret,
        aliases={0: 0, 1: 1} if in_place else None,
    )
    return rotated[0].reshape(query.shape), rotated[1].reshape(key.shape)
