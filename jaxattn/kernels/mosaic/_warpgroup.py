"""What the 128 threads of a warpgroup do each for itself, which Pallas has no word for: rows at any address.

A tile's row may lie anywhere in device memory: a page of one token, a query head of a group. Bulk copies move boxes of
neighbouring rows; these functions move single ones, 16 bytes a thread. Values that differ from thread to thread are
arrays int32 or float32 [128] of layout EACH: element i is thread i's.

This file, `_converting`, `_elements`, `_products` and `_private` alone speak Mosaic's dialects; everything else is
Pallas.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

THREADS = 128
WARPS = 4
EACH = plgpu.Layout.WG_STRIDED((THREADS,), vec_size=1)
# How a tile [r, d] of 16-bit elements lies in shared memory, as bulk copies write it and wgmma reads it: blocks of
# 8 rows and 64 columns, the 16-byte chunks of a block's row exchanged by the row's number (128-byte swizzle).
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
BLOCK_BYTES = 8 * 128


def thread_number() -> jax.Array:
    """int32 [128], EACH."""
    return plgpu.broadcasted_iota(jnp.int32, (THREADS,), 0, layout=EACH)


def row_of_thread(rows: int) -> jax.Array:
    """int32 [128], EACH: which row of a tile a thread names to `gather_rows` and `scatter_rows`; several may one."""
    thread, per_warp = thread_number(), rows // WARPS
    return jax.lax.div(thread, 32) * per_warp + jax.lax.rem(thread, min(per_warp, 32))


def gather_rows(src: jax.Ref, dst: Any, index: jax.Array) -> None:
    """Begins to copy dst [r, d] (shared memory, TILED) = src[index] (device memory [n, d]), zeros where index < 0.

    index int32 [128], EACH: thread i gives the row of src for `row_of_thread(r)[i]` of dst. The copies are under way
    until `wait_copies`, or until a barrier completes that `_private.arrive_after_copies` was told of.
    """
    rows, d = dst.shape[-2:]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(TILED), EACH))
    def copy(ctx, src, dst, index):
        index = _own(index)
        for chunk in _chunks(rows, d, dst):
            row = _shuffle(index, chunk.lane)
            size = arith.select(_compare("slt", row, 0), _i32(0), _i32(16))
            address = _row_address(src, arith.maxsi(row, _i32(0)), d, chunk.column)
            _asm(
                "cp.async.cg.shared.global.L2::128B [$0], [$1], 16, $2;",
                "r,l,r",
                chunk.address,
                address,
                size,
            )

    copy(src, dst, index)


def scatter_rows(src: Any, dst: jax.Ref, index: jax.Array) -> None:
    """dst[index] = src, the reverse of `gather_rows`; rows with index < 0 are left out."""
    rows, d = src.shape[-2:]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(TILED), plgpu.RefType(), EACH))
    def copy(ctx, src, dst, index):
        index, i32 = _own(index), ir.IntegerType.get_signless(32)
        moves = []
        # All loads before the first store: their latencies pass together.
        for chunk in _chunks(rows, d, src):
            row = _shuffle(index, chunk.lane)
            words = utils.inline_ptx(
                "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];",
                chunk.address,
                result_types=[i32] * 4,
                has_side_effects=True,
            )
            moves.append((row, chunk.column, words))
        for row, column, words in moves:
            address = _row_address(dst, arith.maxsi(row, _i32(0)), d, column)
            _asm(
                "{ .reg .pred p; setp.ge.s32 p, $1, 0; @p st.global.v4.b32 [$0], {$2, $3, $4, $5}; }",
                "l,r,r,r,r,r",
                address,
                row,
                *words,
            )

    copy(src, dst, index)


def load_each(src: jax.Ref, index: jax.Array) -> jax.Array:
    """src[index] [128], EACH, of a 1-D array in device memory; every index must exist."""
    result = plgpu.ShapeDtypeStruct((THREADS,), src.dtype, layout=EACH)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), EACH), return_type=result)
    def load(ctx, src, index):
        value = memref.load(src, [arith.index_cast(ir.IndexType.get(), _own(index))])
        one = vector.broadcast(ir.VectorType.get((1,), value.type), value)
        signed = True if isinstance(value.type, ir.IntegerType) else None
        return mgpu.FragmentedArray(
            _registers=np.array([one], dtype=object), _layout=EACH.to_mgpu(), _is_signed=signed
        )

    return load(src, index)


def store_each(dst: jax.Ref, index: jax.Array, value: jax.Array) -> None:
    """dst[index] = value float32 [128], EACH, where index >= 0; dst is a 1-D array in device memory."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), EACH, EACH))
    def store(ctx, dst, index, value):
        index = _own(index)
        address = _row_address(dst, arith.maxsi(index, _i32(0)), 1, None, element_bytes=4)
        _asm(
            "{ .reg .pred p; setp.ge.s32 p, $1, 0; @p st.global.f32 [$0], $2; }",
            "l,r,f",
            address,
            index,
            _own(value),
        )

    store(dst, index, value)


def clear_rows(dst: Any, begin: jax.Array, end: jax.Array) -> None:
    """Zeros in all rows of dst [r, d] (shared memory, TILED) but begin .. end - 1."""
    rows, d = dst.shape[-2:]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(TILED), EACH, EACH))
    def clear(ctx, dst, begin, end):
        begin, end, thread = _own(begin), _own(end), _thread()
        parts = rows * (d // 64)
        for k in range(-(-parts // THREADS)):
            part = arith.addi(thread, _i32(k * THREADS))
            row, column = arith.remui(part, _i32(rows)), arith.divui(part, _i32(rows))
            outside = arith.ori(_compare("slt", row, begin), _compare("sge", row, end))
            if parts % THREADS:
                outside = arith.andi(outside, _compare("slt", part, parts))
            block = arith.addi(arith.muli(arith.divui(row, _i32(8)), _i32(d // 64)), column)
            address = arith.addi(_shared_address(dst), arith.muli(block, _i32(BLOCK_BYTES)))
            address = arith.addi(address, arith.muli(arith.remui(row, _i32(8)), _i32(128)))
            stores = "".join(
                f" @p st.shared.v4.b32 [$0 + {16 * i}], {{z, z, z, z}};" for i in range(8)
            )
            _asm(
                "{ .reg .pred p; .reg .b32 z; mov.b32 z, 0; setp.ne.s32 p, $1, 0;" + stores + " }",
                "r,r",
                address,
                arith.extui(ir.IntegerType.get_signless(32), outside),
            )

    clear(dst, begin, end)


def wait_copies() -> None:
    """Waits for this thread's copies of `gather_rows`."""

    @plgpu.inline_mgpu()
    def wait(ctx):
        _asm("cp.async.wait_all;", "")

    wait()


def fence() -> None:
    """What copies of this thread, or those that it knows of, wrote is there for wgmma to read."""

    @plgpu.inline_mgpu()
    def fence(ctx):
        _asm("fence.proxy.async.shared::cta;", "")

    fence()


def sync() -> None:
    """All threads of the warpgroup have come here."""

    @plgpu.inline_mgpu()
    def sync(ctx):
        utils.warpgroup_barrier()

    sync()


def count_arrival(counter: jax.Ref, at: jax.Array, seen: Any) -> None:
    """Counts this warpgroup at counter[at] (device memory); seen [1] int32 (shared) gets the count before it.

    What its threads have written to device memory before is there for whoever sees the count; and they see what those
    wrote that were counted before.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), EACH, plgpu.RefType()))
    def count(ctx, counter, at, seen):
        _asm("fence.acq_rel.gpu;", "")
        utils.warpgroup_barrier()
        _count(_row_address(counter, _own(at), 1, None, element_bytes=4), seen, "acq_rel")
        utils.warpgroup_barrier()
        _asm("fence.acq_rel.gpu;", "")

    count(counter, at, seen)


def take_number(counter: jax.Ref, at: int, dst: Any) -> None:
    """Begins dst [1] int32 (shared memory) = counter[at]++; after `sync` all threads of the warpgroup see it."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def take(ctx, counter, dst):
        _count(_row_address(counter, _i32(at), 1, None, element_bytes=4), dst, "relaxed")

    take(counter, dst)


def put_numbers(dst: Any, numbers: Sequence[jax.Array]) -> None:
    """dst (shared memory) = numbers, int32 scalars; after `sync` all threads of the warpgroup see them."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[EACH] * len(numbers)))
    def put(ctx, dst, *numbers):
        address = _shared_address(dst)
        for i, number in enumerate(numbers):
            _asm(
                "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p st.shared.b32 [$0], $1; }",
                "r,r,r",
                arith.addi(address, _i32(4 * i)),
                _own(number),
                _is_first(),
            )

    put(dst, *numbers)


class _Chunk(NamedTuple):
    """16 bytes of a tile, for each thread its own."""

    lane: Any  # of this warp, that names the chunk's row
    column: Any  # the chunk's number in its row
    address: Any  # in shared memory


def _chunks(rows: int, d: int, tile: Any) -> Iterator[_Chunk]:
    """The chunks of a TILED tile [rows, d] that a thread moves; a warp has rows // 4 rows, the lanes neighbours."""
    per_row, columns = d // 8, d // 64
    rows_at_once = 32 // per_row
    lane, warp = arith.remui(_thread(), _i32(32)), _warp()
    row, column = arith.divui(lane, _i32(per_row)), arith.remui(lane, _i32(per_row))
    base = _shared_address(tile)
    for offset in (
        arith.muli(warp, _i32(rows // WARPS // 8 * columns * BLOCK_BYTES)),
        arith.muli(arith.divui(column, _i32(8)), _i32(BLOCK_BYTES)),
        arith.muli(row, _i32(128)),
    ):
        base = arith.addi(base, offset)
    swizzled = arith.xori(arith.remui(column, _i32(8)), row)
    # Rows 8 apart are swizzled alike.
    place = {
        k: arith.addi(base, arith.muli(arith.xori(swizzled, _i32(k)), _i32(16)))
        for k in range(0, 8, rows_at_once)
    }
    for first in range(0, rows // WARPS, rows_at_once):
        down = first // 8 * columns * BLOCK_BYTES + first % 8 * 128
        yield _Chunk(arith.addi(row, _i32(first)), column, arith.addi(place[first % 8], _i32(down)))


def _row_address(ref, row, d, column, element_bytes=2):
    """The 64-bit address of a row of an array [n, d] in device memory, or of one 16-byte chunk of it."""
    i64 = ir.IntegerType.get_signless(64)
    base = llvm.ptrtoint(i64, utils.memref_ptr(ref))
    if column is not None:
        base = arith.addi(base, arith.extui(i64, arith.muli(column, _i32(16))))
    return utils.inline_ptx(
        "mad.wide.u32 $0, $1, $2, $3;", row, _i32(d * element_bytes), base, result_types=i64
    )


def _count(address, dst, order):
    """The first thread adds 1 at a 64-bit address, and puts what was there to dst in shared memory."""
    _asm(
        "{ .reg .pred p; .reg .b32 x; setp.ne.s32 p, $2, 0;"
        f" @p atom.{order}.gpu.global.add.u32 x, [$0], 1; @p st.shared.b32 [$1], x; }}",
        "l,r,r",
        address,
        _shared_address(dst),
        _is_first(),
    )


def _is_first():
    """1 in the warpgroup's first thread, 0 in the others."""
    return arith.extui(ir.IntegerType.get_signless(32), _compare("eq", _thread(), _i32(0)))


def _own(x):
    """This thread's element of an EACH array."""
    return _element(x.registers.flat[0])


def _element(register, i=0):
    """Of an array's register, which holds one element or a vector of some."""
    if not isinstance(register.type, ir.VectorType):
        return register
    return vector.extract(
        register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i])
    )


def _shuffle(x, lane):
    """x of another lane of the warp."""
    return utils.inline_ptx(
        "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;",
        x,
        lane,
        result_types=ir.IntegerType.get_signless(32),
        has_side_effects=True,
    )


def _thread():
    return arith.remui(utils.thread_idx(), _i32(THREADS))


def _warp():
    """The warp's number in the warpgroup; taken from its first lane, so that the compiler knows it as uniform."""
    return _shuffle(arith.divui(_thread(), _i32(32)), _i32(0))


def _shared_address(ref):
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(ref))


def _compare(how, a, b):
    predicate = getattr(arith.CmpIPredicate, how)
    return arith.cmpi(predicate, a, _i32(b) if isinstance(b, int) else b)


def _i32(x):
    return utils.c(x, ir.IntegerType.get_signless(32))


def _asm(code, constraints, *args):
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"), list(args), code, constraints, has_side_effects=True
    )
