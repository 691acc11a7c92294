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
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxattn.kernels.triton._launch import launch, like
from jaxattn.kernels.triton._rows import block_of, both, load, pow2

THREADS_A_WARP = 32
WIDEST = (
    8  # elements of 16 bits in the widest access; rows of a multiple of them can be accessed so
)

LoadWeight = Literal["first", "after the inputs", "before the sum", "last"]


@dataclasses.dataclass(frozen=True)
class Config:
    block_rows: int  # rows of a tile, a power of two
    block: int  # columns of a tile, a power of two
    kept_tiles: int  # tiles of a row that stay in registers, at most
    num_warps: int
    # When the weight of the kept tiles is loaded. The earlier, the shorter the wait for it; the later,
    # the fewer registers are held while a row is summed, and the more warps share a multiprocessor.
    load_weight: LoadWeight


def default_config(num_rows: int, hidden: int, num_inputs: int) -> Config:
    """The tiles for rows of `hidden` elements of one input, or of two to be added.

    Microseconds on an H200, in bf16, from benchmarks/results/h200_sweeps_rowwise.txt.
    """
    # Short rows (the heads of a q or k norm) share a program.
    block_rows = max(1, 1024 // pow2(hidden))
    size = num_rows * pow2(hidden)
    kept_tiles = 16
    load_weight: LoadWeight
    per_thread = WIDEST  # elements of a tile
    if size <= 2**21:
        # Few rows, all at once: the shortest wait. 16 elements a thread: 1 x 4096: 8 warps 1.70, 4 warps
        # 1.86, 2 warps 2.15; 128 x 4096: 2.2 by 4 to 16 warps. Two inputs, 512 x 4096: 5.1, a warp a row
        # 6.1; but 1024 x 4096: 9.8 and 9.0. 32 x 32768: 8 tiles 4.4, 4 tiles 5.6; two inputs 6.6 and 9.1.
        num_warps = max(1, min(16, block_rows * pow2(hidden) // 512))
        load_weight = "after the inputs"
        kept_tiles = 8
    elif hidden <= (3072 if num_inputs == 1 or hidden % WIDEST else 4096):
        # A row fits a warp, which sums it without a barrier. 16384 x 2560: 42.4, 2 warps 44.1, 8 warps
        # 47.7; 163840 x 128: 21.4, 2 warps 22.1, half as many rows 26.2; 262144 x 111: 37.0, 42.2, 41.8.
        # Two inputs, 16384 x 4096: 129.2, 2 warps 138.0, 8 warps 133.0, 16 warps 132.5; weight after the
        # inputs 131.3, last 134.1; 4095 would spill. One input: 16384 x 3584: 63.3, 4 warps 59.2, 8 warps
        # 60.2; 2048 x 2560: 7.9, and 6.9 while 16 such warps fitted a multiprocessor instead of 13.
        num_warps = 1
        load_weight = "after the inputs" if num_inputs == 1 else "before the sum"
    elif hidden <= (10240 if num_inputs == 1 else 7168):
        # 8 bytes an access leave registers for more programs. 8192 x 5120: 43.6, 16 bytes 44.5, weight last
        # 45.1; two inputs, 16 warps 84.0, 16 bytes 85.5, 8 warps 83.8, but 8192 x 6144 99.8 and 101.5.
        # 16384 x 4096: 67.6, 16 bytes 68.8. 8192 x 8192: 70.1, 16 warps of 16 bytes, weight last, 69.6;
        # 8192 x 10240: 88.3 and 88.7.
        num_warps = 8 if num_inputs == 1 else 16
        load_weight = "before the sum"
        per_thread = 4
    elif num_inputs == 1 or (hidden <= 8192 and size <= 2**23):
        # Of a row of 16384, 3 tiles of 4 leave registers for 3 programs: 72.2, 2 tiles 72.7, all of them
        # 74.6, weight first 76.2. 8192 x 12288: 104.7, weight before the sum 110.0; 4096 x 32768: 3 tiles
        # 155.7, 5 tiles 150.2. Two inputs, 512 x 8192: 9.0, as below 10.0; 1024 x 8192: 17.5 and 18.5.
        num_warps = 16
        load_weight = "last"
        kept_tiles = 3 if hidden <= 16384 else 5
    elif hidden <= 16384:
        # All the threads a multiprocessor holds, at 32 registers each. 8192 x 8192: 133.2, 16 warps 134.0;
        # 8192 x 12288: 198.7 and 201.4, weight last 202.0; 4096 x 16384: weight last 134.8, before the sum
        # 135.6, after the inputs 165.6, 16 warps 135.8; 8192 x 14336: 234.3, weight before the sum 271.5.
        num_warps = 32
        load_weight = "before the sum" if hidden <= 12288 else "last"
        per_thread = 4
    else:
        # 4096 x 20480: 172.7, 4 tiles 175.5, weight before the sum 200.8, 32 warps 186.5; 4096 x 24576: 2 tiles
        # 224.0, 5 tiles 242.0; 4096 x 32768: 356.5 and 341.9, weight first, by an earlier kernel, 315.0.
        num_warps = 16
        load_weight = "last"
        kept_tiles = 5 if hidden <= 20480 else 2
    block = min(pow2(hidden), num_warps * THREADS_A_WARP * per_thread)
    if block_rows > 1 and hidden % WIDEST:
        # 262144 x 111, rows masked though all exist: 36.7, two inputs 70.3. As above, and unmasked: 38.3 and
        # 81.9 (h200.json), with fewer registers, so fewer of the 2-byte loads under way.
        load_weight = "first"
    return Config(block_rows, block, kept_tiles, num_warps, load_weight)


def _rmsnorm_kernel(
    in_refs,  # x and, if fused, the residual: [n, hidden]
    weight_ref,  # [hidden]
    out_refs,  # y and, if fused, the sum: as the inputs
    *,
    eps: float,
    weight_offset: float,
    config: Config,
):
    y_ref, *sum_refs = out_refs
    num_rows, hidden = y_ref.shape
    block = config.block
    tiles = pl.cdiv(hidden, block)
    again = max(0, tiles - config.kept_tiles)  # tiles that are read twice
    kept = range(again, tiles)

    row, exist = block_of(pl.program_id(0), config.block_rows, num_rows)
    if config.block_rows > 1:
        exist = row < num_rows if hidden % WIDEST else exist  # see default_config
        row, exist = row[:, None], None if exist is None else exist[:, None]

    def columns(i):
        """Columns of tile i, and which of them there are."""
        column = i * block + jnp.arange(block, dtype=jnp.int32)
        column = column.reshape(*row.shape[1:], block)  # a program's one row is a scalar
        last = isinstance(i, int) and i == tiles - 1  # never of those that are read twice
        return column, column < hidden if last and hidden % block else None

    def at(i):
        """What the elements of tile i are indexed by, and which of them there are."""
        column, inside = columns(i)
        mask = both(exist, inside)
        if mask is not None:
            mask = jnp.broadcast_to(mask, jnp.broadcast_shapes(row.shape, column.shape))
        return (row, column), mask

    def load_inputs(i):
        return [load(ref, *at(i)) for ref in in_refs]

    def load_weight(i):
        return load(weight_ref, *columns(i))

    def add(inputs):
        x, *residual = (x.astype(jnp.float32) for x in inputs)
        return sum(residual, x)

    def store(ref, i, x):
        index, mask = at(i)
        plgpu.store(ref.at[index], x.astype(ref.dtype), mask=mask)

    def write_sum(i, x):
        for ref in sum_refs:
            store(ref, i, x)

    def write(i, x, weight):
        store(y_ref, i, x * scale * (weight.astype(jnp.float32) + weight_offset))

    # The first use of a load waits for it, and holds up those behind: all of them come first.
    weights = {i: load_weight(i) for i in kept if config.load_weight == "first"}
    inputs = {i: load_inputs(i) for i in kept}
    weights |= {i: load_weight(i) for i in kept if config.load_weight == "after the inputs"}
    xs = {i: add(x) for i, x in inputs.items()}
    for i, x in xs.items():
        write_sum(i, x)
    weights |= {i: load_weight(i) for i in kept if config.load_weight == "before the sum"}

    def add_squares(i, squares):
        x = add(load_inputs(i))
        return squares + x * x

    squares = jax.lax.fori_loop(0, again, add_squares, sum(x * x for x in xs.values()))
    scale = jax.lax.rsqrt(jnp.sum(squares, axis=-1, keepdims=row.ndim > 0) / hidden + eps)
    for i, x in xs.items():
        write(i, x, weights[i] if i in weights else load_weight(i))

    def write_again(i, _):
        x = add(load_inputs(i))
        write_sum(i, x)
        write(i, x, load_weight(i))

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
        functools.partial(_rmsnorm_kernel, eps=eps, weight_offset=weight_offset, config=config),
        dict(in_refs=rows, weight_ref=weight),
        dict(out_refs=like(rows)),
        name="jaxattn_fused_add_rmsnorm" if len(inputs) > 1 else "jaxattn_rmsnorm",
        grid=(pl.cdiv(rows[0].shape[0], config.block_rows),),
        num_warps=config.num_warps,
        num_stages=1,
        interpret=interpret,
        aliases=dict(in_refs="out_refs") if in_place else None,
    )
    return tuple(y.reshape(shape) for y in outputs["out_refs"])
