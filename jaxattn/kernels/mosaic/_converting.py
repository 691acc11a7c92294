"""Rows of float8 numbers, from any address in device memory, to a tile of float16 ones in shared memory.

No copy engine converts, and tensor cores multiply numbers of one type. So each thread of a warpgroup brings pieces of
16 bytes of a row to a place of its own in shared memory, by asynchronous copies, and from there converts them through
its registers to two 16-byte chunks of the tile. What a thread reads it has copied itself: it waits for its own copies
and for no other thread. Its places are one fewer than a tile's pieces, a ring: where one was read, the piece comes
that is as many pieces further on.

Every number of float8 is one of float16: NaN and infinities stay what they are.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from jaxattn.kernels.mosaic import _warpgroup as wg

PIECE = 4  # words of 32 bits
# Of PTX, by the names of dtypes.
FP8 = dict(float8_e4m3fn="e4m3", float8_e5m2="e5m2")
SLOT_BYTES = wg.THREADS * PIECE * 4


def staging(d: int) -> tuple[int, int]:
    """The shape of a warpgroup's ring of pieces, int32, for tiles of 128 rows and d columns."""
    return d // 16 - 1, wg.THREADS * PIECE


def begin(ring: Any, shape: tuple[int, int], src: jax.Ref, index: jax.Array) -> None:
    """Begins to copy the pieces of src[index], the first tile, of this shape [r, d], but for the last one.

    ring: shared memory, as `staging`. src: float8 [n, d], in device memory. index int32 [128], EACH: of
    `row_of_thread(r)`; zeros come where it is negative.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), wg.EACH))
    def copy(ctx, ring, src, index):
        index, place = wg._own(index), _place(ring)
        for j, piece in enumerate(list(_pieces(shape))[:-1]):
            _copy(arith.addi(place, wg._i32(j * SLOT_BYTES)), src, index, piece, shape)

    copy(ring, src, index)


def convert(
    ring: Any, n: jax.Array, dst: Any, src: jax.Ref, index: jax.Array, coming: jax.Array
) -> None:
    """dst float16 [r, d] (shared memory, TILED) = src[index], the n-th tile; begins to copy src[coming], the next.

    index, coming: as in `begin`, which has begun this tile, or the call before this one has.
    """
    shape, dtype = dst.shape[-2:], src.dtype
    slots = ring.shape[-2]
    start = jax.lax.rem(n, slots)  # a tile has one piece more than there are places

    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.RefType(),
            wg.EACH,
            plgpu.RefType(wg.TILED),
            plgpu.RefType(),
            wg.EACH,
            wg.EACH,
        )
    )
    def through(ctx, ring, start, dst, src, index, coming):
        base, own = wg._shared_address(dst), _place(ring)
        start, index, coming = wg._own(start), wg._own(index), wg._own(coming)
        pieces = list(_pieces(shape))
        # The pieces' places, from `start` on around the ring.
        places = []
        for j in range(slots):
            slot = arith.addi(start, wg._i32(j))
            over = wg._compare("sge", slot, slots)
            slot = arith.select(over, arith.subi(slot, wg._i32(slots)), slot)
            places.append(arith.addi(own, arith.muli(slot, wg._i32(SLOT_BYTES))))
        places.append(places[0])
        words = _read(places[0], slots - 1)
        for j, piece in enumerate(pieces):
            following = _read(places[j + 1], slots - 2) if j + 1 < len(pieces) else None
            _store(words, arith.addi(base, piece.place), dtype)
            if j == 0:
                _copy(places[0], src, index, pieces[-1], shape)
            else:
                _copy(places[j], src, coming, pieces[j - 1], shape)
            words = following

    through(ring, start, dst, src, index, coming)


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


def _place(ring):
    """The address of this thread's first place in a ring."""
    return arith.addi(wg._shared_address(ring), arith.muli(wg._thread(), wg._i32(4 * PIECE)))


def _copy(place, src, index, piece, shape):
    """Begins to copy a piece, a group of its own to wait for."""
    row = wg._shuffle(index, piece.lane)
    size = arith.select(wg._compare("slt", row, 0), wg._i32(0), wg._i32(16))
    address = wg._row_address(
        src, arith.maxsi(row, wg._i32(0)), shape[1], piece.column, element_bytes=1
    )
    wg._asm(
        "cp.async.cg.shared.global.L2::128B [$0], [$1], 16, $2; cp.async.commit_group;",
        "r,l,r",
        place,
        address,
        size,
    )


def _read(place, under_way):
    """The words of the piece at a place, when no more than so many later ones are under way."""
    return utils.inline_ptx(
        f"cp.async.wait_group {under_way}; ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$4];",
        place,
        result_types=[ir.IntegerType.get_signless(32)] * PIECE,
        has_side_effects=True,
    )


def _store(words, address, dtype):
    """The 16 numbers of a piece, converted, to its two chunks: the second one's address differs in one bit."""
    kind = FP8[jnp.dtype(dtype).name]
    code = "{ .reg .b16 l, h; .reg .b32 a, x<8>; xor.b32 a, $0, 16;"
    for i in range(PIECE):
        code += f" mov.b32 {{l, h}}, ${i + 1};"
        code += f" cvt.rn.f16x2.{kind}x2 x{2 * i}, l; cvt.rn.f16x2.{kind}x2 x{2 * i + 1}, h;"
    code += " st.shared.v4.b32 [$0], {x0, x1, x2, x3}; st.shared.v4.b32 [a], {x4, x5, x6, x7}; }"
    wg._asm(code, "r,r,r,r,r", address, *words)
