"""Plans of a decode step: each request attends with one query token, and is one tile of the work list.

Axes: b requests, w work items.
"""

import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array

from jaxattn.as_program import as_program
from jaxattn.dispatch import dispatch
from jaxattn.kernels.triton.one_program import in_one_program
from jaxattn.page_table import PageTable
from jaxattn.plan import (
    MID_ROWS,
    MIN_ROWS,
    AttentionPlan,
    Splits,
    checked_sms,
    checked_table,
    programs_per_sm_of,
)
from jaxattn.spec import AttentionSpec, Visible
from jaxattn.work_list import (
    ByComparison,
    Keys,
    Tiles,
    WorkItem,
    aligned,
    list_items,
    make_work_list,
)

# Requests, each of which every entry is compared with. H200, plan_decode with the kernel: 1 request 5.3 us, 128 8.7. Up
# to 512 it was not timed; the compiler finds registers for so many.
MAX_IN_ONE_PROGRAM = 512


def plan_decode(
    page_table: PageTable,
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    page_size: int | None = None,
    window_left: int | None = None,
    fixed_split_size: int | None = None,
    disable_split_kv: bool = False,
    num_sms: int | None = None,
) -> AttentionPlan:
    """Plans one decode step: each request attends with one query token, its last, to its keys.

    Args:
      page_table: the pages of b requests; shapes fix capacities, contents are free.
      num_qo_heads, num_kv_heads: heads of q and of the cache (of one shard, under shard_map).
      page_size: tokens a page; default: the table's.
      window_left: keys that a query sees before its own position, besides its own; None or -1: all. Pages behind the
        window are not read, and their entries in the table may hold anything.
      fixed_split_size: cut the keys of every request into splits of so many pages. A request's output is then
        bitwise the same whatever the batch around it; without it, splits depend on the batch's lengths.
      disable_split_kv: never split. A request's output does not depend on the batch around it then either.
      num_sms: multiprocessors to fill; default: the device's.

    Returns:
      A plan for `paged_decode`, valid for every layer that shares this page table and window.

    Raises:
      ValueError, TypeError: shapes, dtypes, head counts or a window that do not fit.
    """
    page_table, page_size = checked_table(page_table, page_size)
    return _paged(
        page_table,
        page_size,
        AttentionSpec(num_qo_heads, num_kv_heads, Visible.of(False, window_left)),
        Splits(fixed_split_size, disable_split_kv, page_size),
        checked_sms(num_sms),
    )


@as_program("page_size", "spec", "splits", "num_sms")
def _paged(
    page_table: PageTable, page_size: int, spec: AttentionSpec, splits: Splits, num_sms: int
) -> AttentionPlan:
    return decode_plan(*Keys.of(page_table, page_size).as_function(), spec, splits, num_sms)


def decode_plan(
    keys_of: Callable[..., Keys],
    lengths: Sequence[Array],
    spec: AttentionSpec,
    splits: Splits,
    num_sms: int,
    backend: str | None = None,
) -> AttentionPlan:
    """`plan_decode` of keys wherever they lie: keys_of(*lengths), of int32 [b] each.

    On a GPU one kernel makes the work list, from the lengths as they come: XLA takes six.
    """
    keys = keys_of(*lengths)
    group, batch, page_size = spec.group, keys.kv_len.shape[0], keys.page_size
    block_rows = min(max(MIN_ROWS, 1 << (group - 1).bit_length()), MID_ROWS)
    parts = -(-group // block_rows)  # tiles of a request
    programs_per_sm = programs_per_sm_of(
        block_rows, group, batch * parts * spec.num_kv_heads, num_sms, splits.adaptive
    )
    # A full split takes as many pages of the table; each tile has at most one that is not full.
    most_pages = 0 if keys.page_indices is None else keys.page_indices.size
    most = parts * (batch + most_pages // (splits.fixed_size or 1))
    fill = -(-programs_per_sm * num_sms // spec.num_kv_heads)
    how = splits.splitting(fill, most, block_rows, keys.most)

    def tiles(keys: Keys) -> Tiles:
        return _decode_tiles(keys, spec, block_rows, batch)

    def by_xla(*lengths: Array) -> Array:
        return make_work_list(tiles(keys_of(*lengths)), how).items

    def some_items(entry: Array, *lengths: Array) -> WorkItem:
        return list_items(tiles(keys_of(*lengths)), how, entry, ByComparison())[0]

    by_kernel = functools.partial(
        in_one_program,
        some_items,
        num_entries=how.capacity(batch * parts),
        num_fields=len(WorkItem._fields),
        name="jaxattn_plan_decode",
    )
    if lengths and parts == 1 and batch <= MAX_IN_ONE_PROGRAM:
        items = dispatch(backend, by_kernel, by_xla, *lengths)
    else:
        items = by_xla(*lengths)
    return AttentionPlan(
        qo_indptr=None,
        page_indices=keys.page_indices,
        page_range=keys.page_range(spec.visible.begin(keys.kv_len - 1)),
        page_start=keys.page_start,
        kv_len=keys.kv_len,
        kv_end=keys.kv_end,
        items=items,
        num_items=None,
        limits=None,
        mask=None,
        spec=spec,
        page_size=page_size,
        num_qo_tokens=batch,
        block_rows=block_rows,
        programs_per_sm=programs_per_sm,
        num_slots=how.num_slots,
    )


def _decode_tiles(keys: Keys, spec: AttentionSpec, block_rows: int, batch: int) -> Tiles:
    """A request is one tile, or several where its group is larger than a tile; those of `batch` requests have rows."""
    group = spec.group
    parts = -(-group // block_rows)

    def of(x: Array) -> Array:
        return x if parts == 1 else jnp.repeat(x, parts)

    tile = jnp.arange(keys.kv_len.shape[0] * parts, dtype=jnp.int32)
    request = tile // parts
    row = request * group + tile % parts * block_rows
    end = jnp.minimum(row + block_rows, (request + 1) * group)
    position, kv_end = of(keys.kv_len) - 1, of(keys.kv_end)
    begin, stop = spec.visible.some(position, position, kv_end)
    return Tiles(
        row_begin=row,
        row_end=jnp.where(request < batch, end, row),
        q_position=position - request,
        page_start=of(keys.page_start),
        kv_begin=aligned(begin, keys.page_size, row.shape),
        kv_end=stop,
        own_end=kv_end,
    )
