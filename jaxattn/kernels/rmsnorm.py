"""Root-mean-square norm, alone and with a residual addition before it:

    y = x / sqrt(mean(x^2) + eps) * (weight_offset + weight)

in float32, rounded once. The fused form first adds, x := x + residual, writes that sum rounded,
and normalises it unrounded. A row is cut into tiles of `block` columns. They stay in registers
from the sum of squares to the output; of a row that has too many, the first ones are read twice.

Grid: (rows / block_rows).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxattn.kernels._launch import launch
from jaxattn.kernels._rows import pow2

THREADS_A_WARP = 32


@dataclasses.dataclass(frozen=True)
class Config:
    block_rows: int  # rows of a tile, a power of two
    block: int  # columns of a tile, a power of two
    kept_tiles: int  # tiles of a row that stay in registers, at most
    num_warps: int


def default_config(num_rows: int, hidden: int, num_inputs: int) -> Config:
    """The tiles for rows of `hidden` elements of one input, or of two to be added.

    Microseconds on an H200, in bf16.
    """
    # Short rows (the heads of a q or k norm) share a program.
    block_rows = max(1, 1024 // pow2(hidden))
    kept_tiles = 12
    if num_rows * pow2(hidden) <= (2**21 if num_inputs == 1 else 2**23):
        # Few rows: 16 elements a thread. 1 x 4096: 8 warps 1.70, 4 warps 1.86, 2 warps 2.15; 128 x
        # 4096: 2.2 by 4 to 16 warps; of two inputs as well (1.8; 2.5 to 2.7). 2048 x 2560: 7.9 and, a
        # warp a row, 6.8; of two inputs 11.8 and 13.0.
        num_warps = max(1, min(16, block_rows * pow2(hidden) // 512))
        # 64 elements a thread of the widest rows. 4096 x 20480 by 8 warps: 99.4, with all 80 in registers 129.8.
        kept_tiles = 8
    elif hidden <= 3072:
        # A row fits a warp, which sums it without a barrier. 16384 x 2560: 42.4, 2 warps 44.1, 8 warps
        # 47.7; 163840 x 128: 21.4, 2 warps 22.1, half as many rows 26.2; 262144 x 111: 37.0, 42.2, 41.8.
        # 16384 x 3072: 50.6, 4 warps 51.4; of two inputs 98.1 and 101.5.
        num_warps = 1
    elif hidden < 4096:
        # 16384 x 3584: 60.8 (another run 60.4), 8 warps 60.8, one 66.1; of two inputs 119.2, 117.3, 115.8.
        num_warps = 4
    elif hidden <= 8192:
        # 16384 x 4096: 8 warps 69.1, 4 warps 70.6, 16 warps 74.0. Two inputs, 8192 x 8192: 16 warps 137.7,
        # 8 warps 140.3; 16384 x 4096: 133.9 and 135.2.
        num_warps = 8 if num_inputs == 1 else 16
    else:
        # Registers for few tiles let two programs run. 16384 x 16384: 281.6, 3 tiles 298.5, all of them by 8
        # warps 302.8; two inputs, 8192 x 12288, 3 tiles 205.6, 2 tiles 211.5, 8 warps 210.7; 4096 x 20480,
        # 2 tiles 182.1, 3 tiles 222.3, 8 warps 195.6.
        num_warps = 16
        kept_tiles = 2 if num_inputs == 1 or hidden > 16384 else 3
    # 8 elements a thread and tile: 16 bytes, the widest access.
    block = min(pow2(hidden), num_warps * THREADS_A_WARP * 8)
    return Config(block_rows, block, kept_tiles, num_warps)


class Tile(NamedTuple):
    at: tuple[jax.Array, jax.Array]  # rows and columns
    mask: jax.Array | None
    x: jax.Array  # float32 [block_rows, block], the sum of the inputs
    weight: jax.Array  # [1, block]


def _rmsnorm_kernel(
    *refs,  # num_inputs [n, hidden]; weight [hidden]; then y and, if fused, the sum: as the inputs
    num_inputs: int,
    eps: float,
    weight_offset: float,
    block_rows: int,
    block: int,
    kept_tiles: int,
):
    in_refs, weight_ref = refs[:num_inputs], refs[num_inputs]
    y_ref, *sum_refs = refs[num_inputs + 1 :]
    num_rows, hidden = y_ref.shape
    row = (pl.program_id(0) * block_rows + jnp.arange(block_rows, dtype=jnp.int32))[:, None]
    tiles = pl.cdiv(hidden, block)
    again = max(0, tiles - kept_tiles)  # tiles that are read twice

    def load(i) -> Tile:
        column = (i * block + jnp.arange(block, dtype=jnp.int32))[None, :]
        mask = (row < num_rows) & (column < hidden)
        weight = plgpu.load(weight_ref.at[column], mask=column < hidden, other=0)
        x = [plgpu.load(ref.at[row, column], mask=mask, other=0) for ref in in_refs]
        x = [x.astype(jnp.float32) for x in x]
        return Tile((row, column), mask, sum(x[1:], x[0]), weight)

    def write_sum(tile: Tile):
        for ref in sum_refs:
            plgpu.store(ref.at[tile.at], tile.x.astype(ref.dtype), mask=tile.mask)

    def write(tile: Tile):
        y = tile.x * scale * (tile.weight.astype(jnp.float32) + weight_offset)
        plgpu.store(y_ref.at[tile.at], y.astype(y_ref.dtype), mask=tile.mask)

    # The first use of a load waits for it, and holds up those behind: all of them come first.
    kept = [load(i) for i in range(again, tiles)]
    for tile in kept:
        write_sum(tile)
    squares = sum(tile.x * tile.x for tile in kept)

    def add_squares(i, squares):
        x = load(i).x
        return squares + x * x

    squares = jax.lax.fori_loop(0, again, add_squares, squares)
    scale = jax.lax.rsqrt(jnp.sum(squares, axis=1, keepdims=True) / hidden + eps)
    for tile in kept:
        write(tile)

    def write_again(i, _):
        tile = load(i)
        write_sum(tile)
        write(tile)

    jax.lax.fori_loop(0, again, write_again, None)


def rmsnorm(
    inputs: Sequence[jax.Array],
    weight: jax.Array,
    *,
    eps: float,
    weight_offset: float,
    in_place: bool,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """inputs (x,) or (x, residual), [..., hidden]; weight [hidden] -> (y,) or (y, x + residual).

    In place, output i aliases input i.
    """
    *_, hidden = shape = inputs[0].shape
    rows = [x.reshape(-1, hidden) for x in inputs]
    config = default_config(rows[0].shape[0], hidden, len(inputs))
    outputs = launch(
        functools.partial(
            _rmsnorm_kernel,
            num_inputs=len(inputs),
            eps=eps,
            weight_offset=weight_offset,
            block_rows=config.block_rows,
            block=config.block,
            kept_tiles=config.kept_tiles,
        ),
        *rows,
        weight,
        name="jaxattn_fused_add_rmsnorm" if len(inputs) > 1 else "jaxattn_rmsnorm",
        grid=(pl.cdiv(rows[0].shape[0], config.block_rows),),
        out_shape=[(x.shape, x.dtype) for x in rows],
        num_warps=config.num_warps,
        num_stages=1,
        interpret=interpret,
        aliases={i: i for i in range(len(inputs))} if in_place else None,
    )
    return tuple(y.reshape(shape) for y in outputs)
