"""Root-mean-square norm, alone and with a residual addition before it:

    y = x / sqrt(mean(x^2) + eps) * (weight_offset + weight)

in float32, rounded once. The fused form first adds, x := x + residual, writes that sum rounded,
and normalises it unrounded. A row longer than a tile is read twice: for its sum of squares, then
for its output; of a row that one tile holds, the second pass is empty.

Grid: (rows / block_rows).
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxattn.kernels._launch import launch


@dataclasses.dataclass(frozen=True)
class Config:
    block_rows: int  # rows of a tile, a power of two
    block: int  # columns of a tile, a power of two
    num_warps: int


def default_config(hidden: int, num_inputs: int) -> Config:
    """The tile for rows of `hidden` elements of one input, or of two to be added."""
    block = min(1 << (hidden - 1).bit_length(), 16384)
    # Short rows (the heads of a q or k norm) share a program: 1024 elements feed a warp or two.
    block_rows = max(1, 1024 // block)
    # H200, 16384 x 4096: 8 warps 3.96 TB/s for one input, 16 warps 4.02 TB/s for two. A row of
    # 16384 keeps 32 elements a thread with 16 warps.
    most = 16 if num_inputs > 1 or block > 8192 else 8
    num_warps = min(most, block_rows * block * num_inputs // 512)
    return Config(block_rows, block, num_warps)


def _rmsnorm_kernel(
    *refs,  # num_inputs [n, hidden]; weight [hidden]; then y and, if fused, the sum: as the inputs
    num_inputs: int,
    eps: float,
    weight_offset: float,
    block_rows: int,
    block: int,
):
    in_refs, weight_ref = refs[:num_inputs], refs[num_inputs]
    y_ref, *sum_refs = refs[num_inputs + 1 :]
    num_rows, hidden = y_ref.shape
    row = pl.program_id(0) * block_rows + jnp.arange(block_rows, dtype=jnp.int32)
    last = (hidden - 1) // block

    def load(i):
        cols = i * block + jnp.arange(block, dtype=jnp.int32)
        at = row[:, None], cols[None, :]
        mask = (row < num_rows)[:, None] & (cols < hidden)[None, :]
        weight = plgpu.load(weight_ref.at[cols], mask=cols < hidden, other=0.0)
        x, *residual = (
            plgpu.load(ref.at[at], mask=mask, other=0.0).astype(jnp.float32) for ref in in_refs
        )
        return at, mask, x + residual[0] if residual else x, weight

    def squares(x):
        return jnp.sum(x * x, axis=1)

    def write(at, mask, x, weight):
        weight = weight.astype(jnp.float32) + weight_offset
        y = x * scale[:, None] * weight[None, :]
        plgpu.store(y_ref.at[at], y.astype(y_ref.dtype), mask=mask)
        for sum_ref in sum_refs:
            plgpu.store(sum_ref.at[at], x.astype(sum_ref.dtype), mask=mask)

    # The last tile stays in registers; its weight is loaded before the sum, which waits for x.
    kept = load(last)
    total = jax.lax.fori_loop(
        0, last, lambda i, total: total + squares(load(i)[2]), squares(kept[2])
    )
    scale = jax.lax.rsqrt(total / hidden + eps)
    write(*kept)
    jax.lax.fori_loop(0, last, lambda i, _: write(*load(i)), None)


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
    config = default_config(hidden, len(inputs))
    outputs = launch(
        functools.partial(
            _rmsnorm_kernel,
            num_inputs=len(inputs),
            eps=eps,
            weight_offset=weight_offset,
            block_rows=config.block_rows,
            block=config.block,
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
