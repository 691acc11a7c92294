"""Scores q k^T on the tensor cores, from nothing: wgmma overwrites what its registers held.

An accumulator of Pallas holds zeros first, one for each of a thread's scores, and the tensor cores wait while they are
written: 0.3 to 10% of prefill (`benchmarks/results/h200_sweeps_mosaic.txt`, 16.).

Axes: r = 64 rows, k keys of a tile, d head dim.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from jaxattn.kernels.mosaic import _warpgroup as wg
from jaxattn.kernels.mosaic._elements import ROWS, TILE

STEP = 16  # columns of q and k that an instruction multiplies
# Of PTX, by the names of dtypes.
KINDS = dict(bfloat16="bf16", float16="f16")


def begin_scores(q: Any, k: Any) -> jax.Array:
    """Begins q k^T float32 [r, k], one group of wgmma's; `wait_scores` makes of what it returns what may be read.

    q [r, d] and k [k, d]: of one 16-bit dtype, in shared memory, TILED.
    """
    keys, d = k.shape[-2:]
    kind = KINDS[k.dtype.name]
    result = plgpu.ShapeDtypeStruct((ROWS, keys), jnp.float32, layout=TILE)
    tiled = plgpu.RefType(wg.TILED)

    @plgpu.inline_mgpu(arg_types=(tiled, tiled), return_type=result)
    def multiply(ctx, q, k):
        scores = _names(keys)
        q_at, k_at = (f"${len(scores) + i}" for i in range(2))
        # The upper word of a wgmma descriptor: 128-byte swizzle, and how far on the next 8 rows are.
        upper = (1 << 30) | _units(d // 64 * wg.BLOCK_BYTES)
        code = ["{ .reg .b64 q, k; .reg .b32 x; wgmma.fence.sync.aligned;"]
        for column in range(0, d, STEP):
            offset = _units(column // 64 * wg.BLOCK_BYTES + column % 64 * 2)
            for name, at in (("q", q_at), ("k", k_at)):
                code.append(f"add.u32 x, {at}, {offset}; mov.b64 {name}, {{x, {upper}}};")
            # Adds to what the step before it left, the first one to nothing.
            adds = int(column > 0)
            code.append(
                f"wgmma.mma_async.sync.aligned.m{ROWS}n{keys}k{STEP}.f32.{kind}.{kind}"
                f" {{{', '.join(scores)}}}, q, k, {adds}, 1, 1, 0, 0;"
            )
        code.append("wgmma.commit_group.sync.aligned; }")
        places = [arith.shrui(wg._shared_address(tile), wg._i32(4)) for tile in (q, k)]
        return _scores_of(" ".join(code), keys, "r,r", places)

    return multiply(q, k)


def wait_scores(scores: jax.Array, pending: int) -> jax.Array:
    """The scores that `begin_scores` began; `pending` groups of wgmma's begun since may still be under way."""
    keys = scores.shape[1]
    result = plgpu.ShapeDtypeStruct(scores.shape, jnp.float32, layout=TILE)

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=result)
    def wait(ctx, scores):
        registers = scores.to_layout(fragmented_array.WGMMA_LAYOUT_ACC_32BIT).registers
        # Each is an output and an input: no reader of the output comes before this.
        tied = ",".join(str(i) for i in range(registers.size))
        code = f"wgmma.wait_group.sync.aligned {pending};"
        return _scores_of(code, keys, tied, list(registers.flat))

    return wait(scores)


def _names(keys: int) -> list[str]:
    """Of a thread's scores, in the code of `_scores_of`."""
    return [f"${i}" for i in range(ROWS * keys // wg.THREADS)]


def _units(size: int) -> int:
    """Bytes, as descriptors count them."""
    return size >> 4


def _scores_of(code: str, keys: int, inputs: str, args: Sequence[Any]) -> mgpu.FragmentedArray:
    """float32 [r, k], TILE, whose registers PTX writes: `_names`, and args after them, of these constraints."""
    one = ir.VectorType.get((1,), ir.F32Type.get())
    count = len(_names(keys))
    results: Any = llvm.inline_asm(
        llvm.StructType.get_literal([one] * count),
        list(args),
        code,
        ",".join(["=f"] * count + [inputs]),
        has_side_effects=True,
    )
    layout = fragmented_array.WGMMA_LAYOUT_ACC_32BIT
    registers = np.fromiter((llvm.extractvalue(one, results, [i]) for i in range(count)), object)
    registers = registers.reshape(layout.registers_shape((ROWS, keys)))
    scores = mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
    return scores.to_layout(TILE.to_mgpu())
