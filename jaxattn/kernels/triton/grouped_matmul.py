"""Rows that lie in groups, each group times a matrix of its own: the feed-forward of a mixture of experts.

    out[i] = x[i] @ weights[g].T        for the rows i of group g, summed in float32

A program takes some rows of one group and some columns. `Tiles` cuts the groups into tiles of rows, from their sizes
alone, so a matrix whose group is empty is never read, and one of few rows is read once. That is what a decode step
waits for: it has few rows of many experts.

Axes: m rows, k inner dim, n columns, e matrices.
Grid: (some tiles of rows, columns / block_cols, the tiles beyond), so that programs that run at once share their reads.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxattn.device import has_wgmma
from jaxattn.kernels.triton._launch import Out, launch
from jaxattn.kernels.triton._rows import Rows, load, pow2

# Tiles of rows in a column of programs that are neighbours in time.
NEIGHBOURS = 8


@dataclasses.dataclass(frozen=True)
class Config:
    block_rows: int
    block_cols: int
    block_k: int
    num_warps: int
    num_stages: int


def default_config(m: int, num_groups: int, dtype: jax.typing.DTypeLike) -> Config:
    """A tile that holds the rows of an average group, as far as the tensor cores take them. None was measured.

    Few rows wait for memory: what counts is how many bytes of the matrices are under way, some 20 KB a program. Many
    rows wait for tensor cores, and two programs fit on a multiprocessor.
    """
    if jnp.dtype(dtype) == jnp.float32:
        rows = min(max(pow2(m // num_groups), 16), 64)
        return Config(rows, 64, 32, 4, 3)
    rows = min(max(pow2(m // num_groups), 16), 128)
    if rows == 128:
        return Config(128, 128, 64, 4 if has_wgmma() else 8, 3)
    return Config(rows, 128 if rows == 64 else 64, 64, 4, 4)


class Tiles(NamedTuple):
    """Runs of rows of one group each, all int32 [tiles]; the last ones are empty where the groups need fewer."""

    group: jax.Array
    begin: jax.Array  # first row
    end: jax.Array  # past the last row; at most block_rows from the first

    @classmethod
    def of(cls, group_sizes: jax.Array, m: int, block_rows: int) -> "Tiles":
        """Of groups that follow each other in m rows."""
        # A group of s rows has at most (s - 1) // block_rows + 1 tiles.
        filled = min(group_sizes.shape[0], m)
        most = filled + (m - filled) // block_rows
        ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
        tiles = (group_sizes + block_rows - 1) // block_rows
        tile_ends = jnp.cumsum(tiles, dtype=jnp.int32)
        i = jnp.arange(-(-most // NEIGHBOURS) * NEIGHBOURS, dtype=jnp.int32)
        group = jnp.sum(tile_ends[None, :] <= i[:, None], axis=1, dtype=jnp.int32)
        at = jnp.minimum(group, group_sizes.shape[0] - 1)
        begin = (ends - group_sizes)[at] + (i - (tile_ends - tiles)[at]) * block_rows
        end = jnp.minimum(begin + block_rows, ends[at])
        return cls(at, begin, jnp.where(group == at, end, begin))


def _grouped_matmul_kernel(
    x_ref,  # [m, k]
    weight_ref,  # [e * n, k]
    tiles,  # Tiles of refs
    out_ref,  # [m, n]
    *,
    config: Config,
    interpret: bool,
):
    k, n = x_ref.shape[1], out_ref.shape[1]
    tile = pl.program_id(2) * NEIGHBOURS + pl.program_id(0)
    begin, end = load(tiles.begin, tile, None), load(tiles.end, tile, None)
    first_col = pl.program_id(1) * config.block_cols

    @pl.when(begin < end)
    def _():
        col = first_col + jnp.arange(config.block_cols, dtype=jnp.int32)
        row = begin + jnp.arange(config.block_rows, dtype=jnp.int32)
        rows = Rows(row, row < end)
        # Columns past the last one are the last one's, and not stored: no mask on what takes long to load.
        weights = Rows(load(tiles.group, tile, None) * n + jnp.minimum(col, n - 1))
        x_columns = functools.partial(_columns, rows, x_ref)
        weight_columns = functools.partial(_columns, weights, weight_ref)

        def step(i, acc):
            at = i * config.block_k, config.block_k
            return acc + _dot(x_columns(*at), weight_columns(*at), interpret)

        acc = jnp.zeros((config.block_rows, config.block_cols), jnp.float32)
        acc = jax.lax.fori_loop(0, k // config.block_k, step, acc)
        if rest := k % config.block_k:
            at = k - rest, rest
            acc += _dot(x_columns(*at), weight_columns(*at), interpret)
        inside = (row < end)[:, None] & (col < n)[None, :]
        # Interpreted, a masked store writes back what it read: those that are not stored lie past the end.
        to = jnp.where(inside, row[:, None], out_ref.shape[0])
        plgpu.store(
            out_ref.at[to, jnp.broadcast_to(col[None, :], to.shape)],
            acc.astype(out_ref.dtype),
            mask=inside,
        )


def _columns(rows: Rows, ref: jax.Ref, begin: jax.Array | int, size: int) -> jax.Array:
    """Columns of some rows, [rows, pow2(size)], zeros past `size`."""
    column = jnp.arange(max(pow2(size), 16), dtype=jnp.int32)
    mask = None if rows.exist is None else rows.exist[:, None]
    if column.size > size:
        inside = (column < size)[None, :]
        mask = inside if mask is None else mask & inside
    shape = (rows.index.shape[0], column.size)
    at = jnp.broadcast_to(rows.index[:, None], shape), jnp.broadcast_to(begin + column, shape)
    return load(ref, at, None if mask is None else jnp.broadcast_to(mask, shape))


def _dot(x: jax.Array, weights: jax.Array, interpret: bool) -> jax.Array:
    """x @ weights.T in float32; float32 inputs as three products of TensorFloat-32."""
    precision = None
    if x.dtype == jnp.float32:
        x3 = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        precision = jax.lax.Precision.HIGHEST if interpret else x3
    return plgpu.dot(x, weights, trans_b=True, precision=precision)


def grouped_matmul(
    x: jax.Array, weights: jax.Array, group_sizes: jax.Array, *, interpret: bool
) -> jax.Array:
    """x [m, k], weights [e, n, k], group_sizes int32 [e] -> float32 [m, n]; rows past the groups are not written."""
    (m, k), (e, n, _) = x.shape, weights.shape
    config = default_config(m, e, x.dtype)
    tiles = Tiles.of(group_sizes, m, config.block_rows)
    out = launch(
        functools.partial(_grouped_matmul_kernel, config=config, interpret=interpret),
        dict(x_ref=x, weight_ref=weights.reshape(e * n, k), tiles=tiles),
        dict(out_ref=Out((m, n), jnp.float32)),
        name="jaxattn_grouped_matmul",
        grid=(NEIGHBOURS, -(-n // config.block_cols), tiles.group.size // NEIGHBOURS),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )
    return out["out_ref"]
