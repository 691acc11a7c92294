"""Plans: from lengths and page tables to a work list for the attention kernel, in jnp, so also inside jit.

Attention work is a list of tiles, each up to `block_rows` packed rows (query token x query head of one KV group)
of one request. A tile whose keys exceed a fair share of the batch's total is split along its keys, so that any mix
of lengths fills the GPU (FlashDecoding; Stream-K's fair share). With `fill` work items needed to fill it,

    share = ceil(total keys / fill),   splits of a tile = ceil(its keys / share)

never makes more than `num_tiles + fill` items, of which fewer than `2 * fill` belong to split tiles and fewer than
`fill` tiles are split. These bounds come from shapes alone, so the contents of the index arrays are free: other
lengths never recompile. Nothing is read on the host.

Axes: b requests, t query tokens, w work items, m merges.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxattn.checks import check_heads, check_index, check_positive
from jaxattn.device import num_sms as default_num_sms
from jaxattn.kv_cache import PageTable

KV_BLOCK = 128  # keys; splits are cut at multiples of it, which every kernel tile divides
MIN_ROWS, MAX_ROWS = 16, 64  # of a tile; 16 is the least that tensor cores take
# Work items that fill a streaming multiprocessor. H200, 64 x 64 tiles: 2 programs fit at once. 16-row tiles
# (decode): 4 was best; 2 lost 9% on 32 x 4096, 6 lost 10-20% to a second, partial wave.
ITEMS_PER_SM = {16: 4, 32: 2, 64: 2}


class WorkItem(NamedTuple):
    """One program's share of a tile, for every KV head. All int32.

    Packed row r stands for query token r // g and query head `kv_head * g + r % g`.
    """

    row_begin: Array  # the tile's rows are row_begin .. row_end - 1, at most block_rows of them
    row_end: Array
    causal_offset: Array  # where the plan is causal, query token i sees the keys j < i + it
    page_start: Array  # the request's first entry in page_indices; its first contiguous key
    kv_begin: Array  # the item's keys are kv_begin .. kv_end - 1
    kv_end: Array
    slot: Array  # of its partial attention state; -1: it is a whole tile and writes the output


class Merge(NamedTuple):
    """A split tile, whose partial states merge into the output. All int32."""

    row_begin: Array
    row_end: Array
    slot: Array  # of the first of the tile's partial states
    num_states: Array  # partial states of the tile; 0 in unused entries


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """What `paged_decode` reads: lengths, pages and a work list. A pytree; one plan serves all layers of a step.

    Attributes:
      page_indices: int32 [capacity], page ids of all requests.
      page_start: int32 [b], each request's first entry in page_indices.
      kv_len: int32 [b], keys of each request.
      items: int32 [w, 7], a `WorkItem` a row.
      merges: int32 [m, 4], a `Merge` a row.
    """

    page_indices: Array
    page_start: Array
    kv_len: Array
    items: Array
    merges: Array
    page_size: int = dataclasses.field(metadata=dict(static=True))
    num_qo_heads: int = dataclasses.field(metadata=dict(static=True))
    num_kv_heads: int = dataclasses.field(metadata=dict(static=True))
    block_rows: int = dataclasses.field(metadata=dict(static=True))
    causal: bool = dataclasses.field(default=False, metadata=dict(static=True))

    @property
    def batch_size(self) -> int:
        return self.kv_len.shape[0]

    @property
    def num_slots(self) -> int:
        """Capacity for partial states."""
        return 2 * self.merges.shape[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillPlan:
    """What `paged_prefill` and `ragged_prefill` read, as `DecodePlan`.

    Attributes:
      qo_indptr: int32 [b + 1], query tokens of request i are `qo_indptr[i]:qo_indptr[i + 1]`.
      page_indices: int32 [capacity]; None for contiguous keys.
      page_start: int32 [b], each request's first entry in page_indices, or its first row of contiguous keys.
      kv_len, items, merges: as in `DecodePlan`.
    """

    qo_indptr: Array
    page_indices: Array | None
    page_start: Array
    kv_len: Array
    items: Array
    merges: Array
    page_size: int = dataclasses.field(metadata=dict(static=True))
    num_qo_tokens: int = dataclasses.field(metadata=dict(static=True))
    num_qo_heads: int = dataclasses.field(metadata=dict(static=True))
    num_kv_heads: int = dataclasses.field(metadata=dict(static=True))
    block_rows: int = dataclasses.field(metadata=dict(static=True))
    causal: bool = dataclasses.field(metadata=dict(static=True))

    @property
    def batch_size(self) -> int:
        return self.kv_len.shape[0]

    @property
    def num_slots(self) -> int:
        """Capacity for partial states."""
        return 2 * self.merges.shape[0]


def plan_decode(
    page_table: PageTable,
    *,
    page_size: int,
    num_qo_heads: int,
    num_kv_heads: int,
    num_sms: int | None = None,
) -> DecodePlan:
    """Plans one decode step: each request attends with one query token to all its keys.

    Args:
      page_table: the pages of b requests; shapes fix capacities, contents are free.
      page_size: tokens a page.
      num_qo_heads, num_kv_heads: heads of q and of the cache (of one shard, under shard_map).
      num_sms: multiprocessors to fill; default: the device's.

    Returns:
      A DecodePlan, valid for every layer whose cache uses this page table.

    Raises:
      ValueError, TypeError: shapes, dtypes or head counts that do not fit.
    """
    page_table.check()
    check_positive(page_size=page_size)
    check_heads(num_qo_heads, num_kv_heads)
    page_table = _with_pages(page_table)
    group = num_qo_heads // num_kv_heads
    block_rows = min(max(MIN_ROWS, 1 << (group - 1).bit_length()), MAX_ROWS)
    kv_len = page_table.kv_len(page_size)
    page_start = page_table.indptr[:-1]
    # A request is one tile, or several where its group is larger than a tile.
    first = jnp.arange(page_table.batch_size, dtype=jnp.int32)[:, None] * group
    row = (first + jnp.arange(0, group, block_rows, dtype=jnp.int32)[None, :]).ravel()
    request = row // group
    row_end = jnp.minimum(row + block_rows, (request + 1) * group)
    zeros = jnp.zeros_like(row)
    tile = WorkItem(row, row_end, zeros, page_start[request], zeros, kv_len[request], zeros)
    items, merges = _split(tile, _fill(block_rows, num_kv_heads, num_sms))
    return DecodePlan(
        page_table.indices,
        page_start,
        kv_len,
        items,
        merges,
        page_size=page_size,
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        block_rows=block_rows,
    )


def plan_prefill(
    qo_indptr: Array,
    page_table: PageTable,
    *,
    page_size: int,
    num_qo_tokens: int,
    num_qo_heads: int,
    num_kv_heads: int,
    causal: bool = True,
    num_sms: int | None = None,
) -> PrefillPlan:
    """Plans a prefill or append: ragged query tokens against paged keys that already hold these tokens.

    Args:
      qo_indptr: int32 [b + 1], starts at 0; query tokens of request i are `qo_indptr[i]:qo_indptr[i + 1]`.
      page_table: the pages of b requests.
      page_size: tokens a page.
      num_qo_tokens: rows of q; those from qo_indptr[b] on give 0 and lse -inf.
      num_qo_heads, num_kv_heads: heads of q and of the cache (of one shard, under shard_map).
      causal: query i of a request sees keys 0 .. kv_len - qo_len + i; otherwise all kv_len keys.
      num_sms: multiprocessors to fill; default: the device's.

    Returns:
      A PrefillPlan, valid for every layer whose cache uses this page table.

    Raises:
      ValueError, TypeError: shapes, dtypes or head counts that do not fit.
    """
    page_table.check()
    check_index("qo_indptr", qo_indptr, page_table.batch_size + 1)
    check_positive(page_size=page_size)
    page_table = _with_pages(page_table)
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
    num_sms: int | None,
) -> PrefillPlan:
    check_heads(num_qo_heads, num_kv_heads)
    if num_qo_tokens != 0:
        check_positive(num_qo_tokens=num_qo_tokens)
    batch = kv_len.shape[0]
    group = num_qo_heads // num_kv_heads
    block_rows = MIN_ROWS if num_qo_tokens * group <= MIN_ROWS * batch else MAX_ROWS
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
    # The last query of a request sees all its keys, also where q ends before it.
    causal_offset = keys[request] - jnp.append(qo_indptr[1:], jnp.int32(0))[request] + 1
    kv_end = keys[request]
    if causal:
        last_token = (row_end - 1) // group
        kv_end = jnp.clip(last_token + causal_offset, 0, kv_end)
    kv_end = jnp.where(used, kv_end, 0)
    tile = WorkItem(
        row_begin, row_end, causal_offset, start[request], jnp.zeros_like(kv_end), kv_end, row_begin
    )
    items, merges = _split(tile, _fill(block_rows, num_kv_heads, num_sms))
    return PrefillPlan(
        qo_indptr,
        page_indices,
        page_start,
        kv_len,
        items,
        merges,
        page_size=page_size,
        num_qo_tokens=num_qo_tokens,
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        block_rows=block_rows,
        causal=causal,
    )


def _with_pages(page_table: PageTable) -> PageTable:
    """The table on the device, with at least one entry: kernels take no array without elements."""
    check_positive(batch_size=page_table.batch_size)
    page_table = jax.tree.map(jnp.asarray, page_table)
    if page_table.indices.size:
        return page_table
    return dataclasses.replace(page_table, indices=jnp.zeros(1, jnp.int32))


def _fill(block_rows: int, num_kv_heads: int, num_sms: int | None) -> int:
    """Work items (each a program a KV head) that fill the GPU."""
    programs = ITEMS_PER_SM[block_rows] * (num_sms or default_num_sms())
    return -(-programs // num_kv_heads)


def _expand(counts: Array, capacity: int) -> tuple[Array, Array, Array]:
    """Lists `counts[i]` entries for each i: (i, its number among them, whether the entry is used), [capacity]."""
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    entry = jnp.arange(capacity, dtype=jnp.int32)
    owner = jnp.repeat(
        jnp.arange(counts.size, dtype=jnp.int32), counts, total_repeat_length=capacity
    )
    return owner, entry - (ends - counts)[owner], entry < ends[-1]


def _split(tile: WorkItem, fill: int) -> tuple[Array, Array]:
    """Splits tiles, whole ones in `tile`, along their keys: (items [w, 7], merges [m, 4])."""
    num_tiles = tile.kv_end.size
    blocks = -(-tile.kv_end // KV_BLOCK)
    share = jnp.maximum(-(-blocks.sum(dtype=jnp.int32) // fill), 1)
    splits = jnp.maximum(-(-blocks // share), 1)
    # Even pieces; rounding them to whole blocks may need one fewer.
    piece = jnp.maximum(-(-blocks // splits), 1)
    splits = jnp.maximum(-(-blocks // piece), 1)

    owner, nth, used = _expand(splits, num_tiles + fill)
    split = splits > 1
    partials = jnp.where(split, splits, 0)
    first_slot = jnp.cumsum(partials, dtype=jnp.int32) - partials
    kv_begin = nth * (piece * KV_BLOCK)[owner]
    item = WorkItem(*(field[owner] for field in tile))._replace(
        kv_begin=kv_begin,
        kv_end=jnp.minimum(kv_begin + (piece * KV_BLOCK)[owner], tile.kv_end[owner]),
        slot=jnp.where(split[owner], first_slot[owner] + nth, -1),
    )
    # An unused item owns no rows and no keys, so that its program does nothing.
    nothing = WorkItem(*(jnp.int32(x) for x in (0, 0, 0, 0, 0, 0, -1)))
    item = jax.tree.map(lambda field, empty: jnp.where(used, field, empty), item, nothing)

    which = jnp.nonzero(split, size=fill, fill_value=num_tiles)[0]
    merge = Merge(tile.row_begin, tile.row_end, first_slot, partials)
    merge = Merge(*(field.at[which].get(mode="fill", fill_value=0) for field in merge))
    return jnp.stack(item, axis=1), jnp.stack(merge, axis=1)
