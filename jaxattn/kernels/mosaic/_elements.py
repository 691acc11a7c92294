"""How a tile lies in a warpgroup's registers, and what each thread does with its own elements there.

A thread holds, of two rows, two columns of every eight: 8 j + own and the next one, own = 2 (thread mod 4).

Axes: r = 64 rows, k keys of a tile.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from jaxattn.kernels.mosaic import _warpgroup as wg

ROWS = 64  # of a warpgroup's product
COLUMNS = 8  # from one pair of a thread to its next
TILE = plgpu.Layout.WGMMA  # [r, k] and [r, d]
ROW = TILE.reduce(1)  # [r]
KEY = TILE.reduce(0)  # [k]


def own_sums(x: jax.Array, parts: jax.Array | None = None) -> jax.Array:
    """float32 [r, 8], TILE: sums over every eighth column of x float32 [r, k], TILE: each thread's of its own elements.

    Sums over these 8 columns are x's, and only they need other threads. parts float32 [k], KEY: x's columns count so
    much each.
    """
    result = plgpu.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32, layout=TILE)
    more = () if parts is None else (parts,)

    @plgpu.inline_mgpu(arg_types=(TILE, *[KEY] * len(more)), return_type=result)
    def add(ctx, x, *more):
        parts = [part.broadcast_in_dim(x.shape, (1,), x.layout).registers for part in more]
        total = np.empty_like(x.registers[:, :1])
        for row in np.ndindex(total.shape):
            for j in range(x.registers.shape[1]):
                at = row[0], j, *row[2:]
                terms = [x.registers[at], *(part[at] for part in parts)]
                if j == 0:
                    total[row] = functools.reduce(arith.mulf, terms)
                elif parts:
                    total[row] = llvm.intr_fma(*terms, total[row])
                else:
                    total[row] = arith.addf(total[row], *terms)
        return mgpu.FragmentedArray(_registers=total, _layout=x.layout, _is_signed=None)

    return add(x, *more)


def hide(s: jax.Array, begin: jax.Array | None, end: jax.Array | None) -> jax.Array:
    """Scores s float32 [r, k], TILE, -inf in columns outside of begin .. end - 1, int32 [r], ROW; None: no bound.

    A thread's bounds less `own` are compared with constants.
    """
    bounds = [x for x in (begin, end) if x is not None]
    result = plgpu.ShapeDtypeStruct(s.shape, jnp.float32, layout=TILE)

    @plgpu.inline_mgpu(arg_types=(TILE, *[ROW] * len(bounds)), return_type=result)
    def compare(ctx, s, *bounds):
        own = arith.muli(arith.remui(wg._thread(), wg._i32(4)), wg._i32(2))
        of_rows = [x.broadcast_in_dim(s.shape, (0,), s.layout).registers for x in bounds]
        infinite = utils.c(-np.inf, ir.F32Type.get())
        registers = s.registers.copy()
        for row in np.ndindex(registers[:, :1].shape):
            own_bounds = [arith.subi(wg._element(x[row]), own) for x in of_rows]
            if len(bounds) == 2:
                first, last = own_bounds
                width = arith.maxsi(arith.subi(last, first), wg._i32(0))
            for j in range(registers.shape[1]):
                at = row[0], j, *row[2:]
                elements = []
                for i in range(2):
                    column = wg._i32(COLUMNS * j + i)
                    if len(bounds) == 2:
                        # Below 0 is, without a sign, above all.
                        seen = wg._compare("ult", arith.subi(column, first), width)
                    else:
                        seen = wg._compare("sge" if end is None else "slt", column, own_bounds[0])
                    elements.append(arith.select(seen, wg._element(registers[at], i), infinite))
                registers[at] = vector.from_elements(registers[at].type, elements)
        return mgpu.FragmentedArray(_registers=registers, _layout=s.layout, _is_signed=None)

    return compare(s, *bounds)


def any_of_warp(x: jax.Array) -> jax.Array:
    """Whether any of x bool [r], ROW, holds among the rows of a warp: of each warp its own, a scalar."""
    result = plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(()))

    @plgpu.inline_mgpu(arg_types=(ROW,), return_type=result)
    def vote(ctx, x):
        first, *others = (wg._element(register) for register in x.registers.flat)
        for other in others:
            first = arith.ori(first, other)
        found = utils.inline_ptx(
            "{ .reg .pred p; setp.ne.s32 p, $1, 0; vote.sync.any.pred p, p, 0xffffffff; selp.s32 $0, 1, 0, p; }",
            first,
            result_types=ir.IntegerType.get_signless(32),
            has_side_effects=True,
        )
        return mgpu.FragmentedArray.splat(found, (), is_signed=True)

    return vote(jnp.where(x, 1, 0)) != 0
