"""Rows in groups, each group times a matrix of its own: the feed-forward of a mixture of experts.

    out[i] = x[i / repeat] @ weights[g].T        for the rows i of group g, summed in float32

A program takes some columns and some rows of one group, a tile of rows after the other. A matrix whose group is empty
is never read, and one of few rows is read once. That is what a decode step waits for: it has few rows of many experts.
Rows are read and written where they lie; only their numbers are sorted.

Axes: m rows, k inner dim, n columns, e groups.
Grid: (a share of a group's tiles of rows, n / block_cols, e): programs that run at once share what they read.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxattn.device import has_wgmma
from jaxattn.kernels.triton._launch import Out, launch
from jaxattn.kernels.triton._rows import Rows, load, pow2


@dataclasses.dataclass(frozen=True)
class Config:
    block_rows: int
    block_cols: int
    block_k: int
    num_warps: int
    num_stages: int
    shares: int  # programs that the tiles of a group are dealt out to


def default_config(m: int, num_groups: int, dtype: jax.typing.DTypeLike) -> Config:
    """A tile that holds twice the rows of an average group, as far as that goes.

    A group that one tile holds reads its matrix once: its other tiles would find little of it left in L2. Few rows
    wait for memory, and what counts is how many bytes of the matrices are under way. H200, 32 tokens of gpt-oss's
    gates, tiles of 16 rows: 64 columns of 128 247.6 us, of 64 257; 128 columns of 128 250, 32 of them 252. Not
    measured: many rows, which wait for tensor cores, and where two programs fit on a multiprocessor.
    """
    float32 = jnp.dtype(dtype) == jnp.float32
    rows = min(max(pow2(2 * m // num_groups), 16), 64 if float32 else 128)
    shares = 1 if rows < 64 else min(2 * -(-m // (num_groups * rows)), 8)
    if float32:
        return Config(rows, 64, 32, 4, 3, shares)
    if rows == 128:
        return Config(rows, 128, 64, 4 if has_wgmma() else 8, 3, shares)
    return (
        Config(rows, 128, 64, 4, 4, shares) if rows == 64 else Config(rows, 64, 128, 4, 5, shares)
    )


def _grouped_matmul_kernel(
    x_ref,  # [m / repeat, k]
    weight_ref,  # [e * n, k]
    order_ref,  # int32 [m], the rows, group after group
    ends_ref,  # int32 [e], where in it each group ends
    out_ref,  # [m, n]
    *,
    config: Config,
    repeat: int,
    interpret: bool,
):
    k, n = x_ref.shape[1], out_ref.shape[1]
    share, group = pl.program_id(0), pl.program_id(2)
    end = load(ends_ref, group, None)
    begin = load(ends_ref, jnp.maximum(group - 1, 0), None) * (group > 0).astype(jnp.int32)
    col = pl.program_id(1) * config.block_cols + jnp.arange(config.block_cols, dtype=jnp.int32)
    # Columns past the last one are the last one's, and not stored: no mask on what takes long to load.
    weights = Rows(group * n + jnp.minimum(col, n - 1))

    def tile(i: jax.Array, _: None) -> None:
        place = begin + (i * config.shares + share) * config.block_rows
        place += jnp.arange(config.block_rows, dtype=jnp.int32)
        row = load(order_ref, place, place < end)
        rows = Rows(row // repeat, place < end)

        def product(first: jax.Array | int, size: int) -> jax.Array:
            x, w = (_columns(*of, first, size) for of in ((rows, x_ref), (weights, weight_ref)))
            return _dot(x, w, interpret)

        acc = jnp.zeros((config.block_rows, config.block_cols), jnp.float32)
        acc = jax.lax.fori_loop(
            0,
            k // config.block_k,
            lambda i, acc: acc + product(i * config.block_k, config.block_k),
            acc,
        )
        if rest := k % config.block_k:
            acc += product(k - rest, rest)
        inside = (place < end)[:, None] & (col < n)[None, :]
        # Interpreted, a masked store writes back what it read: those that are not stored lie past the end.
        to = jnp.where(inside, row[:, None], out_ref.shape[0])
        plgpu.store(
            out_ref.at[to, jnp.broadcast_to(col[None, :], to.shape)],
            acc.astype(out_ref.dtype),
            mask=inside,
        )

    tiles = (end - begin + config.block_rows - 1) // config.block_rows
    jax.lax.fori_loop(0, (tiles - share + config.shares - 1) // config.shares, tile, None)


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
    x: jax.Array, weights: jax.Array, order: jax.Array, ends: jax.Array, *, interpret: bool
) -> jax.Array:
    """x [t, k], weights [e, n, k], order int32 [m], ends int32 [e] -> float32 [m, n].

    m is a multiple of t. Rows that are in no group are not written.
    """
    (t, k), (e, n, _), m = x.shape, weights.shape, order.shape[0]
    config = default_config(m, e, x.dtype)
    out = launch(
        functools.partial(
            _grouped_matmul_kernel, config=config, repeat=m // t, interpret=interpret
        ),
        dict(x_ref=x, weight_ref=weights.reshape(e * n, k), order_ref=order, ends_ref=ends),
        dict(out_ref=Out((m, n), jnp.float32)),
        name="jaxattn_grouped_matmul",
        grid=(config.shares, -(-n // config.block_cols), e),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )
    return out["out_ref"]
