"""Rows of 8-bit numbers, from any address in device memory, to a tile of 16-bit ones in shared memory.

No copy engine converts, and tensor cores multiply numbers of one type: so bytes come through the registers of the
warpgroup that loads. Each thread takes pieces of 16 bytes of a row, which become two 16-byte chunks of the tile. A
tile's pieces in registers are its words, int32 [r * d / 4]; while one tile's words are converted, the next tile's
take their place, register by register, so that always about a tile is on its way.

Every number of float8 is one of float16, and of bfloat16 by way of it: NaN and infinities stay what they are.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from jaxattn.kernels.mosaic import _warpgroup as wg

PIECE = 4  # words
# Of PTX, by the names of dtypes.
FP8 = dict(float8_e4m3fn="e4m3", float8_e5m2="e5m2")


def load(src: jax.Ref, shape: tuple[int, int], index: jax.Array) -> jax.Array:
    """Begins to load the words of src[index], of a tile of this shape [r, d]; zeros where index < 0.

    src: float8 [n, d], in device memory. index int32 [128], EACH: of `row_of_thread(r)`.
    """
    words = _words(shape)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), wg.EACH), return_type=words)
    def begin(ctx, src, index):
        index = wg._own(index)
        return _array(words, [_load(src, index, x, shape) for x in _pieces(shape)])

    return begin(src, index)


def convert(words: jax.Array, dst: Any, dtype: jax.typing.DTypeLike) -> None:
    """dst [r, d] (shared memory, TILED) = the numbers of this float8 dtype in words."""
    shape, into = dst.shape[-2:], dst.dtype

    @plgpu.inline_mgpu(arg_types=(_words(shape).layout, plgpu.RefType(wg.TILED)))
    def store(ctx, words, dst):
        base = wg._shared_address(dst)
        for piece, register in zip(_pieces(shape), words.registers.flat, strict=True):
            _store(register, arith.addi(base, piece.place), dtype, into)

    store(words, dst)


def convert_and_load(words: jax.Array, dst: Any, src: jax.Ref, index: jax.Array) -> jax.Array:
    """`convert` of src's dtype, and `load` of src[index], piece after piece in the same registers."""
    shape, dtype, into = dst.shape[-2:], src.dtype, dst.dtype
    types = _words(shape)

    @plgpu.inline_mgpu(
        arg_types=(types.layout, plgpu.RefType(wg.TILED), plgpu.RefType(), wg.EACH),
        return_type=types,
    )
    def exchange(ctx, words, dst, src, index):
        base, index, coming = wg._shared_address(dst), wg._own(index), []
        for piece, register in zip(_pieces(shape), words.registers.flat, strict=True):
            _store(register, arith.addi(base, piece.place), dtype, into)
            coming.append(_load(src, index, piece, shape))
        return _array(types, coming)

    return exchange(words, dst, src, index)


class _Piece(NamedTuple):
    """16 numbers of a row, for each thread its own."""

    lane: Any  # of this warp, that names the row
    column: Any  # the piece's number in its row
    place: Any  # in a tile of 16 bits, of the first of its two chunks, in bytes


def _pieces(shape: tuple[int, int]) -> Iterator[_Piece]:
    """Those of a tile [r, d] that a thread takes; a warp has r // 4 rows, as in `gather_rows`.

    Eight lanes that store together have four neighbouring pieces of two rows: no two of their chunks are in one bank.
    """
    rows, d = shape
    columns = d // 64
    lanes = 32 // columns  # that share 64 columns, four to a row
    rows_at_once = lanes // 4
    lane, warp = arith.remui(wg._thread(), wg._i32(32)), wg._warp()
    column, lane = arith.divui(lane, wg._i32(lanes)), arith.remui(lane, wg._i32(lanes))
    row, quarter = arith.divui(lane, wg._i32(4)), arith.remui(lane, wg._i32(4))
    start = arith.muli(warp, wg._i32(rows // wg.WARPS // 8 * columns * wg.BLOCK_BYTES))
    start = arith.addi(start, arith.muli(column, wg._i32(wg.BLOCK_BYTES)))
    start = arith.addi(start, arith.muli(row, wg._i32(128)))
    swizzled = arith.xori(arith.muli(quarter, wg._i32(2)), row)
    # Rows 8 apart are swizzled alike.
    chunk = {
        k: arith.addi(start, arith.muli(arith.xori(swizzled, wg._i32(k)), wg._i32(16)))
        for k in range(0, 8, rows_at_once)
    }
    piece = arith.addi(arith.muli(column, wg._i32(4)), quarter)
    for first in range(0, rows // wg.WARPS, rows_at_once):
        down = first // 8 * columns * wg.BLOCK_BYTES + first % 8 * 128
        yield _Piece(
            arith.addi(row, wg._i32(first)), piece, arith.addi(chunk[first % 8], wg._i32(down))
        )


def _load(src, index, piece, shape):
    """The four words of a piece, as a vector."""
    i32 = ir.IntegerType.get_signless(32)
    row = wg._shuffle(index, piece.lane)
    address = wg._row_address(src, row, shape[1], piece.column, element_bytes=1)
    words = utils.inline_ptx(
        "{ .reg .pred p; setp.ge.s32 p, $5, 0;"
        " mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;"
        " @p ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {$0, $1, $2, $3}, [$4]; }",
        address,
        row,
        result_types=[i32] * PIECE,
        has_side_effects=True,
    )
    return vector.from_elements(ir.VectorType.get((PIECE,), i32), list(words))


def _store(register, address, dtype, into):
    """The 16 numbers of a piece, converted, to its two chunks: the second one's address differs in one bit."""
    kind = FP8[jnp.dtype(dtype).name]
    code = "{ .reg .b16 l, h; .reg .f32 f, g; .reg .b32 a, x<8>; xor.b32 a, $0, 16;"
    for i in range(PIECE):
        code += f" mov.b32 {{l, h}}, ${i + 1};"
        code += f" cvt.rn.f16x2.{kind}x2 x{2 * i}, l; cvt.rn.f16x2.{kind}x2 x{2 * i + 1}, h;"
    if into == jnp.bfloat16:
        for x in (f"x{n}" for n in range(2 * PIECE)):
            code += f" mov.b32 {{l, h}}, {x}; cvt.f32.f16 f, l; cvt.f32.f16 g, h;"
            code += f" cvt.rn.bf16x2.f32 {x}, g, f;"
    code += " st.shared.v4.b32 [$0], {x0, x1, x2, x3}; st.shared.v4.b32 [a], {x4, x5, x6, x7}; }"
    words = [
        vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))
        for i in range(PIECE)
    ]
    wg._asm(code, "r,r,r,r,r", address, *words)


def _words(shape: tuple[int, int]) -> Any:
    """The type of a tile's words."""
    number = shape[0] * shape[1] // 4
    layout = plgpu.Layout.WG_STRIDED((number,), vec_size=PIECE)
    return plgpu.ShapeDtypeStruct((number,), jnp.int32, layout=layout)


def _array(type_, registers):
    return mgpu.FragmentedArray(
        _registers=np.array([*registers], dtype=object),
        _layout=type_.layout.to_mgpu(),
        _is_signed=True,
    )
