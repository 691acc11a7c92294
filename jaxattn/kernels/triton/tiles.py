"""The attention kernel's tiles: a table, read from the top; the first row that fits a shape is its tile.

Three regimes. A tile of few rows (decode) waits for memory: what counts is how many loads are under way. A tile of
many rows (prefill) waits for tensor cores: what counts is that registers hold its accumulator. One of 64 rows waits
for both. The figures behind each choice, and what lost against it, are in
`benchmarks/results/h200_sweeps_attention.txt`; `python -m benchmarks tune` measures others.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxattn.plan import MAX_FEW_ROWS, MID_ROWS, SHORT_WINDOW


@dataclasses.dataclass(frozen=True)
class Config:
    block_rows: int  # of a program; those of a plan's tile, or a part of them
    block_kv: int  # keys of a tile
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a tile is chosen by."""

    block_rows: int  # of the plan's tiles
    head_dim: int  # the larger one of K's and V's
    float32: bool
    group: int
    programs_per_sm: int  # meant to run at once
    paged: bool
    wgmma: bool
    bits: bool  # with mask bits, an address of which each score has
    fp8: bool  # keys of 8 bits, which become 16 on the way to the tensor cores
    short_window: bool

    @property
    def few(self) -> bool:
        return self.block_rows <= MAX_FEW_ROWS

    @property
    def mid(self) -> bool:
        return self.block_rows == MID_ROWS and self.wgmma


@dataclasses.dataclass(frozen=True)
class Row:
    fits: Callable[[Shape], bool]
    max_rows: int
    keys: int
    warps: int
    stages: int
    why: str


ALL = 2**30  # no bound on the rows

TABLE = (
    # float32: what shared memory and registers hold.
    Row(lambda s: s.float32 and s.head_dim > 256, 16, 16, 4, 2, "shared memory holds no more"),
    Row(lambda s: s.float32 and s.head_dim > 128, 32, 16, 4, 2, "shared memory holds no more"),
    Row(lambda s: s.float32, 64, 32, 4, 2, "registers; 8 warps wait for each other"),
    Row(lambda s: s.head_dim > 256, 32, 32, 4, 2, "shared memory holds no more"),
    Row(lambda s: s.bits and not s.few, 64, 32, 4, 3, "registers hold the addresses of the bits"),
    # 64 rows: many loads in flight, and wgmma's least tile.
    Row(lambda s: s.mid and s.head_dim > 128, ALL, 32, 4, 5, "one program at a time, deep"),
    Row(lambda s: s.mid and s.head_dim <= 64, ALL, 128, 4, 5, "short rows: more keys a load"),
    Row(lambda s: s.mid and s.paged, ALL, 64, 4, 5, "one stage is that of the page ids"),
    Row(lambda s: s.mid, ALL, 64, 4, 4, "two programs at once"),
    # Few rows of 8 bits: the loads of 16 bits in half the bytes, so twice as many tiles or keys under way. Measured for
    # heads of 128: `benchmarks/results/h200_sweeps_fp8.txt`, prefill `h100_sweeps_fp8.txt`; the others are guesses.
    Row(lambda s: s.fp8 and s.few and s.programs_per_sm == 2, ALL, 128, 4, 5, "as many bytes"),
    Row(lambda s: s.fp8 and s.few and s.head_dim > 128, ALL, 32, 2, 5, "two tiles of keys at once"),
    Row(
        lambda s: s.fp8 and s.few and s.head_dim <= 64, ALL, 128, 4, 5, "two tiles of keys at once"
    ),
    Row(lambda s: s.fp8 and s.few and s.group == 1, ALL, 64, 2, 5, "two tiles of keys at once"),
    Row(lambda s: s.fp8 and s.few, ALL, 64, 4, 5, "four programs of 128 registers"),
    # Few rows.
    Row(
        lambda s: s.few and s.programs_per_sm == 2 and s.head_dim > 128,
        ALL,
        64,
        4,
        4,
        "a fifth stage would leave shared memory for one of the two programs",
    ),
    Row(lambda s: s.few and s.programs_per_sm == 2, ALL, 64, 4, 5, "two tiles of keys at once"),
    Row(lambda s: s.few and s.head_dim > 128, ALL, 32, 2, 4, "as many bytes as 64 keys of 128"),
    Row(lambda s: s.few and s.head_dim <= 64, ALL, 128, 4, 3, "as many bytes as 64 keys of 128"),
    Row(lambda s: s.few and s.group == 1, ALL, 32, 2, 4, "one row: scores are cheap, tiles short"),
    Row(lambda s: s.few and not s.paged, ALL, 64, 4, 4, "contiguous keys take few registers"),
    Row(lambda s: s.few, ALL, 64, 2, 4, "two warps do for 16 rows, and four programs run"),
    # Many rows on keys of 8 bits, which go through registers.
    Row(
        lambda s: s.fp8 and not s.mid and s.wgmma and 64 < s.head_dim <= 128,
        ALL,
        64,
        4,
        3,
        "two programs, though they spill a little",
    ),
    Row(lambda s: s.fp8 and s.wgmma and s.head_dim <= 64, ALL, 64, 4, 3, "128 keys would spill"),
    # Many rows.
    Row(lambda s: s.head_dim > 128 and s.paged, ALL, 64, 8, 3, "registers hold it with 8 warps"),
    Row(lambda s: s.head_dim > 128, ALL, 64, 8, 2, "no stage for page ids"),
    Row(
        lambda s: s.head_dim > 64 and not s.wgmma,
        64,
        64,
        8,
        3,
        "mma.sync's operands fill registers",
    ),
    Row(
        lambda s: s.head_dim <= 64 and s.wgmma and not s.short_window,
        ALL,
        128,
        4,
        2,
        "one product at a time, but long",
    ),
    Row(lambda s: s.paged, ALL, 64, 4, 4, "one stage is that of the page ids"),
    Row(lambda s: True, ALL, 64, 4, 2, "two programs fit on a multiprocessor"),
)


def default_config(
    block_rows: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    *,
    group: int,
    programs_per_sm: int,
    paged: bool,
    wgmma: bool,
    bits: bool = False,
    fp8: bool = False,
    width: int | None = None,
) -> Config:
    """The tile for a shape; a pure function of it. width: `Visible.width`."""
    float32 = jnp.dtype(dtype) == jnp.float32
    shape = Shape(
        block_rows,
        head_dim,
        float32,
        group,
        programs_per_sm,
        paged,
        wgmma,
        bits,
        fp8,
        width is not None and width <= SHORT_WINDOW,
    )
    row = next(row for row in TABLE if row.fits(shape))
    # Page ids are loaded two stages before the keys of a tile of few rows; contiguous keys have none. Measured for
    # heads of 128, not for the other rows.
    stages = row.stages if paged or not shape.few else max(row.stages - 2, 2)
    return Config(min(block_rows, row.max_rows), row.keys, row.warps, stages)
