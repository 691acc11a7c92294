"""Plans: from lengths and page tables to a work list for the attention kernel, in jnp, so also inside jit.

Attention work is a list of tiles, each up to `block_rows` packed rows (query token x query head of one KV group)
of one request. A tile whose keys exceed a fair share of the batch's total is split along its keys, so that any mix
of lengths fills the GPU (FlashDecoding; Stream-K's fair share). With `fill` work items needed to fill it,

    share = total keys / fill (at least a block, or several),   splits of a tile = its keys / share, rounded, at least 1

never makes more than `num_tiles + fill` items, of which at most `4 / 3 * fill` belong to split tiles. These bounds come
from shapes alone, so the contents of the index arrays are free: other lengths never recompile. Nothing is read on the
host.

Axes: b requests, t query tokens, w work items.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxattn.checks import check_heads, check_index, check_positive
from jaxattn.device import num_sms as default_num_sms
from jaxattn.kv_cache import PageTable

KV_BLOCK = 128  # keys; splits that are not fixed are cut at multiples of it, which every kernel tile divides
# Of a tile; 16 is the least that mma.sync takes, 64 the least that wgmma does.
MIN_ROWS, MID_ROWS, MAX_ROWS = 16, 64, 128
MAX_FEW_ROWS = 32  # tiles up to here only wait for memory
SEES_ALL = 2**30  # a causal offset beyond all keys
# The least share of tall tiles: a split writes and merges rows that cost more than the keys it saves. H200, prefill of
# 1 x 512: 21.4 us; a block 25.3, two 25.7; 1 x 16 on 4096: 18.5 us, 8 blocks 22.7. Tiles of few rows gain to the last
# block: decode of 1 x 1024 8.1 us, 2 blocks 9.2, 4 blocks 11.5; 1 x 8192 15.2, 15.3, 16.6; within 3% at more keys.
MIN_TALL_BLOCKS = 4
# Of this many tiles, running sums are sums over all pairs: one kernel, where XLA's are two each. H200, plan_decode of
# 128 requests: 8.3 us, 10.6; 512: 11.7, 13.5; but 1024: 19.0, 14.9.
MAX_PAIRWISE = 512


class WorkItem(NamedTuple):
    """A share of a tile: what a program does for each KV head. All int32.

    Packed row r stands for query token r // g and query head `kv_head * g + r % g`.
    """

    row_begin: Array  # the tile's rows are row_begin .. row_end - 1, at most block_rows of them
    row_end: Array
    causal_offset: Array  # of prefill: query token i sees the keys j < i + it; SEES_ALL: all
    page_start: Array  # the request's first entry in page_indices; its first contiguous key
    kv_begin: Array  # the item's keys are kv_begin .. kv_end - 1
    kv_end: Array
    split: Array  # which of the tile's splits it is
    num_splits: Array  # of the tile; with 1 it writes the output
    slot: Array  # where the tile's num_splits partial attention states begin


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """What `paged_decode` reads: lengths, pages and a work list. A pytree; one plan serves all layers of a step.

    Attributes:
      page_indices: int32 [capacity], page ids of all requests.
      page_start: int32 [b], each request's first entry in page_indices.
      kv_len: int32 [b], keys of each request.
      items: int32 [w, 9], a `WorkItem` a row.
    """

    page_indices: Array
    page_start: Array
    kv_len: Array
    items: Array
    page_size: int = dataclasses.field(metadata=dict(static=True))
    num_qo_heads: int = dataclasses.field(metadata=dict(static=True))
    num_kv_heads: int = dataclasses.field(metadata=dict(static=True))
    block_rows: int = dataclasses.field(metadata=dict(static=True))
    programs_per_sm: int = dataclasses.field(metadata=dict(static=True))  # meant to run at once
    num_slots: int = dataclasses.field(metadata=dict(static=True))  # capacity for partial states
    causal: bool = dataclasses.field(default=False, metadata=dict(static=True))

    @property
    def batch_size(self) -> int:
        return self.kv_len.shape[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillPlan:
    """What `paged_prefill` and `ragged_prefill` read, as `DecodePlan`.

    Attributes:
      qo_indptr: int32 [b + 1], query tokens of request i are `qo_indptr[i]:qo_indptr[i + 1]`.
      page_indices: int32 [capacity]; None for contiguous keys.
      page_start: int32 [b], each request's first entry in page_indices, or its first row of contiguous keys.
      kv_len, items: as in `DecodePlan`.
    """

    qo_indptr: Array
    page_indices: Array | None
    page_start: Array
    kv_len: Array
    items: Array
    page_size: int = dataclasses.field(metadata=dict(static=True))
    num_qo_tokens: int = dataclasses.field(metadata=dict(static=True))
    num_qo_heads: int = dataclasses.field(metadata=dict(static=True))
    num_kv_heads: int = dataclasses.field(metadata=dict(static=True))
    block_rows: int = dataclasses.field(metadata=dict(static=True))
    programs_per_sm: int = dataclasses.field(metadata=dict(static=True))  # meant to run at once
    num_slots: int = dataclasses.field(metadata=dict(static=True))  # capacity for partial states
    causal: bool = dataclasses.field(metadata=dict(static=True))

    @property
    def batch_size(self) -> int:
        return self.kv_len.shape[0]


def plan_decode(
    page_table: PageTable,
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    page_size: int | None = None,
    fixed_split_size: int | None = None,
    disable_split_kv: bool = False,
    num_sms: int | None = None,
) -> DecodePlan:
    """Plans one decode step: each request attends with one query token to all its keys.

    Args:
      page_table: the pages of b requests; shapes fix capacities, contents are free.
      page_size: tokens a page; default: the table's.
      num_qo_heads, num_kv_heads: heads of q and of the cache (of one shard, under shard_map).
      fixed_split_size: cut the keys of every request into splits of so many pages. A request's output is then
        bitwise the same whatever the batch around it; without it, splits depend on the batch's lengths.
      disable_split_kv: never split. A request's output does not depend on the batch around it then either.
      num_sms: multiprocessors to fill; default: the device's.

    Returns:
      A DecodePlan, valid for every layer whose cache uses this page table.

    Raises:
      ValueError, TypeError: shapes, dtypes or head counts that do not fit.
    """
    page_table, page_size = _checked(page_table, page_size)
    check_heads(num_qo_heads, num_kv_heads)
    _check_split(fixed_split_size, disable_split_kv)
    group = num_qo_heads // num_kv_heads
    block_rows = min(max(MIN_ROWS, 1 << (group - 1).bit_length()), MID_ROWS)
    kv_len = page_table.kv_len(page_size)
    page_start = page_table.indptr[:-1]
    # A request is one tile, or several where its group is larger than a tile.
    first = jnp.arange(page_table.batch_size, dtype=jnp.int32)[:, None] * group
    row = (first + jnp.arange(0, group, block_rows, dtype=jnp.int32)[None, :]).ravel()
    request = row // group
    row_end = jnp.minimum(row + block_rows, (request + 1) * group)
    tile = _Tile(row, row_end, jnp.zeros_like(row), page_start[request], kv_len[request])
    tiles_per_request = row.size // page_table.batch_size
    num_sms = num_sms or default_num_sms()
    adaptive = fixed_split_size is None and not disable_split_kv
    programs_per_sm = _programs_per_sm(
        block_rows, group, row.size * num_kv_heads, num_sms, adaptive
    )
    items, num_slots = _work_list(
        tile,
        -(-programs_per_sm * num_sms // num_kv_heads),
        0 if disable_split_kv else fixed_split_size and fixed_split_size * page_size,
        # A full split takes as many pages of the table; each tile has at most one that is not full.
        row.size + tiles_per_request * (page_table.indices.size // (fixed_split_size or 1)),
        tall=block_rows > MAX_FEW_ROWS,
    )
    return DecodePlan(
        page_table.indices,
        page_start,
        kv_len,
        items,
        page_size=page_size,
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        block_rows=block_rows,
        programs_per_sm=programs_per_sm,
        num_slots=num_slots,
    )


def plan_prefill(
    qo_indptr: Array,
    page_table: PageTable,
    *,
    num_qo_tokens: int,
    num_qo_heads: int,
    num_kv_heads: int,
    page_size: int | None = None,
    causal: bool = True,
    fixed_split_size: int | None = None,
    disable_split_kv: bool = False,
    num_sms: int | None = None,
) -> PrefillPlan:
    """Plans a prefill or append: ragged query tokens against paged keys that already hold these tokens.

    Args:
      qo_indptr: int32 [b + 1], starts at 0; query tokens of request i are `qo_indptr[i]:qo_indptr[i + 1]`.
      page_table: the pages of b requests.
      page_size: tokens a page; default: the table's.
      num_qo_tokens: rows of q; those from qo_indptr[b] on give 0 and lse -inf.
      num_qo_heads, num_kv_heads: heads of q and of the cache (of one shard, under shard_map).
      causal: query i of a request sees keys 0 .. kv_len - qo_len + i; otherwise all kv_len keys.
      fixed_split_size, disable_split_kv: as for `plan_decode`. Fixed splits take memory: the plan must hold every
        tile of `num_qo_tokens` in a request that has all pages of the table.
      num_sms: multiprocessors to fill; default: the device's.

    Returns:
      A PrefillPlan, valid for every layer whose cache uses this page table.

    Raises:
      ValueError, TypeError: shapes, dtypes or head counts that do not fit.
    """
    page_table, page_size = _checked(page_table, page_size)
    check_index("qo_indptr", qo_indptr, page_table.batch_size + 1)
    return _plan_prefill(
        jnp.asarray(qo_indptr),
        page_table.indices,
        page_table.indptr[:-1],
        page_table.kv_len(page_size),
        page_size,
        num_qo_tokens,
        num_qo_heads,
        num_kv_heads,
        causal,
        fixed_split_size,
        disable_split_kv,
        num_sms,
    )


def plan_ragged_prefill(
    qo_indptr: Array,
    kv_indptr: Array,
    *,
    num_qo_tokens: int,
    num_qo_heads: int,
    num_kv_heads: int,
    causal: bool = True,
    disable_split_kv: bool = False,
    num_sms: int | None = None,
) -> PrefillPlan:
    """As `plan_prefill`, against contiguous keys: those of request i are rows `kv_indptr[i]:kv_indptr[i + 1]`.

    Args:
      qo_indptr, kv_indptr: int32 [b + 1], both start at 0.
    """
    check_index("kv_indptr", kv_indptr, "b + 1")
    check_index("qo_indptr", qo_indptr, kv_indptr.shape[0])
    check_positive(batch_size=kv_indptr.shape[0] - 1)
    qo_indptr, kv_indptr = jnp.asarray(qo_indptr), jnp.asarray(kv_indptr)
    return _plan_prefill(
        qo_indptr,
        None,
        kv_indptr[:-1],
        kv_indptr[1:] - kv_indptr[:-1],
        1,
        num_qo_tokens,
        num_qo_heads,
        num_kv_heads,
        causal,
        None,
        disable_split_kv,
        num_sms,
    )


def _plan_prefill(
    qo_indptr: Array,
    page_indices: Array | None,
    page_start: Array,
    kv_len: Array,
    page_size: int,
    num_qo_tokens: int,
    num_qo_heads: int,
    num_kv_heads: int,
    causal: bool,
    fixed_split_size: int | None,
    disable_split_kv: bool,
    num_sms: int | None,
) -> PrefillPlan:
    check_heads(num_qo_heads, num_kv_heads)
    _check_split(fixed_split_size, disable_split_kv)
    if num_qo_tokens != 0:
        check_positive(num_qo_tokens=num_qo_tokens)
    batch = kv_len.shape[0]
    group = num_qo_heads // num_kv_heads
    adaptive = fixed_split_size is None and not disable_split_kv
    num_sms = num_sms or default_num_sms()
    block_rows = MAX_ROWS
    if adaptive:
        block_rows = _rows_of_tile(num_qo_tokens * group, batch, num_kv_heads, num_sms)
    # Query rows that no request owns are one more request, without keys: they come out as 0 and -inf.
    bounds = jnp.minimum(qo_indptr, num_qo_tokens)
    begin, end = bounds, jnp.append(bounds[1:], jnp.int32(num_qo_tokens))
    keys = jnp.append(kv_len, jnp.int32(0))
    start = jnp.append(page_start, jnp.int32(0))

    tiles = -(-(end - begin) * group // block_rows)
    capacity = num_qo_tokens * group // block_rows + batch + 1
    request, nth, used = _expand(tiles, capacity)
    row_begin = begin[request] * group + nth * block_rows
    row_end = jnp.where(used, jnp.minimum(row_begin + block_rows, end[request] * group), row_begin)
    # The last query of a request sees all its keys, also where q ends before it; without a mask every query does.
    causal_offset = keys[request] - jnp.append(qo_indptr[1:], jnp.int32(0))[request] + 1
    if not causal:
        causal_offset = jnp.full_like(causal_offset, SEES_ALL)
    last_token = (row_end - 1) // group
    kv_end = jnp.where(used, jnp.clip(last_token + causal_offset, 0, keys[request]), 0)
    tile = _Tile(row_begin, row_end, causal_offset, start[request], kv_end)
    programs_per_sm = _programs_per_sm(block_rows, group, batch * num_kv_heads, num_sms, adaptive)
    items, num_slots = _work_list(
        tile,
        -(-programs_per_sm * num_sms // num_kv_heads),
        0 if disable_split_kv else fixed_split_size and fixed_split_size * page_size,
        # Any tile may be of the one request that has all pages.
        0 if page_indices is None else capacity * -(-page_indices.size // (fixed_split_size or 1)),
        tall=block_rows > MAX_FEW_ROWS,
    )
    return PrefillPlan(
        qo_indptr,
        page_indices,
        page_start,
        kv_len,
        items,
        page_size=page_size,
        num_qo_tokens=num_qo_tokens,
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        block_rows=block_rows,
        programs_per_sm=programs_per_sm,
        num_slots=num_slots,
        causal=causal,
    )


def _check_split(fixed_split_size: int | None, disable_split_kv: bool) -> None:
    if fixed_split_size is not None:
        check_positive(fixed_split_size=fixed_split_size)
        if disable_split_kv:
            raise ValueError(
                f"{fixed_split_size=} asks for splits and {disable_split_kv=} for none: choose one"
            )


def _checked(page_table: PageTable, page_size: int | None) -> tuple[PageTable, int]:
    """The table on the device, with at least one entry: kernels take no array without elements; its page size."""
    page_table.check()
    page_table = page_table.with_page_size(page_size)
    check_positive(batch_size=page_table.batch_size)
    page_table = page_table.padded()
    assert page_table.page_size is not None
    return page_table, page_table.page_size


def _rows_of_tile(rows: int, batch: int, num_kv_heads: int, num_sms: int) -> int:
    """The rows of a prefill's tile, for so many rows of so many requests together.

    As many as a request has, on average; but 64 instead of 128 where those were too few programs, and 64 instead of 16
    where programs are many. H200, tiles of 64 and 128 rows:
    32 x 16 on 8192, of 64 rows each, 252 and 333 us; 32 x 24, of 96, 349 and 332. One request of few programs: 32 on
    32768 59 and 88, 256 on 4096 52 and 59, but 128 on 65536 353 and 337; of 128 programs, 512 on 32768 640 and 587.
    Tiles of 16 and 64 rows: 8 x 4 on 4096, of 16 rows each, 37.5 and 41.6; 32 x 4 129.1 and 127.5, and of a group of
    one, 4 rows each, 281 and 247.
    """
    if rows <= MIN_ROWS * batch and batch * num_kv_heads <= num_sms:
        return MIN_ROWS
    # Programs, were they to take MAX_ROWS each.
    tallest = batch * -(-rows // (MAX_ROWS * batch)) * num_kv_heads
    return MID_ROWS if rows <= MID_ROWS * batch or tallest <= num_sms // 2 else MAX_ROWS


def _programs_per_sm(
    block_rows: int, group: int, whole_programs: int, num_sms: int, adaptive: bool
) -> int:
    """How many programs to run on a multiprocessor at once.

    Two that load two tiles of keys at a time; or, for tiles of few rows, four that load one, unless the programs of
    whole tiles are too few to fill the GPU. Where a request must not see the batch around it, they always have four.

    H200, decode, two and four: 8 x 4096 37.1 and 38.3 us, 16 x 4096 66.4 and 69.0; 12 x 3000, where the rule errs, 42.4
    and 41.1. A group of one, whose tiles are smaller, always has four: 4 x 4096 of 32/32 heads, 71.0 and 69.4.
    """
    if block_rows > MAX_FEW_ROWS or adaptive and group > 1 and whole_programs <= num_sms:
        return 2
    return 4


def _expand(counts: Array, capacity: int, backwards: bool = False) -> tuple[Array, Array, Array]:
    """Lists `counts[i]` entries for each i: (i, its number among them, whether the entry is used), [capacity].

    Those that are used come first, `backwards` in descending order.
    """
    ends = _running_sum(counts)
    entry = jnp.arange(capacity, dtype=jnp.int32)
    used = entry < ends[-1]
    entry = jnp.where(used, ends[-1] - 1 - entry if backwards else entry, 0)
    # Unrolled, the search is one kernel with the gathers that follow it.
    owner = jnp.searchsorted(ends, entry, side="right", method="scan_unrolled").astype(jnp.int32)
    owner = jnp.where(used, owner, 0)
    return owner, entry - (ends - counts)[owner], used


def _running_sum(x: Array) -> Array:
    """x[0], x[0] + x[1], ..."""
    if x.size > MAX_PAIRWISE:
        return jnp.cumsum(x, dtype=jnp.int32)
    i = jnp.arange(x.size, dtype=jnp.int32)
    return jnp.where(i[None, :] <= i[:, None], x[None, :], 0).sum(axis=1, dtype=jnp.int32)


class _Tile(NamedTuple):
    """A tile before it is split; fields as in `WorkItem`."""

    row_begin: Array
    row_end: Array
    causal_offset: Array
    page_start: Array
    kv_end: Array


def _fair_splits(kv_end: Array, fill: int, min_blocks: int) -> tuple[Array, Array]:
    """The splits of each tile, and the keys of a split, where `fill` items share the keys fairly."""
    blocks = -(-kv_end // KV_BLOCK)
    share = jnp.maximum(-(-blocks.sum(dtype=jnp.int32) // fill), min_blocks)
    # Rounded: a second split for the little that exceeds a share would cost more than it saves.
    splits = jnp.maximum((2 * blocks + share) // (2 * share), 1)
    # Even pieces; rounding them to whole blocks may need one fewer.
    piece = jnp.maximum(-(-blocks // splits), 1)
    return jnp.maximum(-(-blocks // piece), 1), piece * KV_BLOCK


def _work_list(
    tile: _Tile, fill: int, split_size: int | None, max_splits: int, *, tall: bool
) -> tuple[Array, int]:
    """The items int32 [w, 9] of some tiles, and the capacity for partial states that they need.

    Args:
      tile: the tiles; int32 [any] each.
      fill: items that fill the GPU, where `split_size` is None.
      split_size: keys of a split, fixed; 0: tiles stay whole.
      max_splits: splits of all tiles together, at most, where the size is fixed.
      tall: the tiles have more than MAX_FEW_ROWS rows.
    """
    num_tiles = tile.kv_end.size
    if split_size is None:
        splits, piece = _fair_splits(tile.kv_end, fill, MIN_TALL_BLOCKS if tall else 1)
        capacity, num_slots = num_tiles + fill, -(-4 * fill // 3)
    elif split_size:
        splits = jnp.maximum(-(-tile.kv_end // split_size), 1)
        piece = jnp.full_like(splits, split_size)
        capacity = num_slots = max_splits
    else:
        splits, piece = jnp.ones_like(tile.kv_end), tile.kv_end
        capacity, num_slots = num_tiles, 0

    # A prompt's last rows see the most keys: begun first, they are not what the GPU waits for in the end.
    owner, nth, used = _expand(splits, capacity, backwards=tall)
    partials = jnp.where(splits > 1, splits, 0)
    slot = _running_sum(partials) - partials
    item = WorkItem(
        row_begin=tile.row_begin[owner],
        row_end=tile.row_end[owner],
        causal_offset=tile.causal_offset[owner],
        page_start=tile.page_start[owner],
        kv_begin=nth * piece[owner],
        kv_end=jnp.minimum((nth + 1) * piece[owner], tile.kv_end[owner]),
        split=nth,
        num_splits=splits[owner],
        slot=slot[owner],
    )
    # An unused item owns no rows and no keys, so that its program does nothing.
    nothing = WorkItem(*(jnp.int32(x) for x in (0, 0, 0, 0, 0, 0, 0, 1, 0)))
    item = jax.tree.map(lambda field, empty: jnp.where(used, field, empty), item, nothing)
    return jnp.stack(item, axis=1), num_slots
