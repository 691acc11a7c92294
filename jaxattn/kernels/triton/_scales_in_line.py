"""The scales of tokens, which lie page by page in a cache, side by side for each KV head.

Each program of decode reads the keys of one KV head. A token's scales lie in a sector of memory that it shares with the
token's other heads alone, so where pages hold few tokens its programs would ask for as many lines of memory for scales
as for keys, for each of the heads again. One pass before reads each sector once.

Axes: w work items, kh KV heads, c tokens that the page table has room for.
Grid: (PROGRAMS, w): several programs share the tokens of a work item, tile by tile.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxattn.kernels.triton._keys import is_page, line_of
from jaxattn.kernels.triton._launch import Out, launch
from jaxattn.kernels.triton._rows import divmod_by, load, pow2, store
from jaxattn.kv_cache import RowStrides
from jaxattn.kv_scales import KVScales
from jaxattn.plan import AttentionPlan
from jaxattn.work_list import KV_BLOCK, WorkItem

# Tokens of a page, from which on a decode's programs read scales where they are. With this pass decode was 1.13x to
# 1.17x as fast at 1, and 0.95x at 16 (`benchmarks/results/h200_sweeps_fp8.txt`).
FEW_TOKENS = 4
BLOCK = 128  # tokens of a tile
PROGRAMS = 16  # that share a work item


def _kernel(
    scale_refs,  # KVScales of float32 [num_rows]
    items_ref,  # int32 [w, 10]
    indices_ref,  # int32 [capacity]
    lines_ref,  # float32 [2 * (kh * c + KV_BLOCK)]
    *,
    strides: RowStrides,
    page_size: int,
    num_pages: int,
    num_kv_heads: int,
):
    part, work = pl.program_id(0), pl.program_id(1)
    item = WorkItem.read(items_ref, work)
    head = jnp.arange(pow2(num_kv_heads), dtype=jnp.int32)
    is_head = (head < num_kv_heads)[None, :]
    line = line_of(head, indices_ref.shape[0], page_size)[None, :]
    begin = item.kv_begin + part * BLOCK

    def tile(i, _):
        position = begin + i * (PROGRAMS * BLOCK) + jnp.arange(BLOCK, dtype=jnp.int32)
        there = position < item.kv_end
        page, slot = divmod_by(position, page_size)
        page_id = load(indices_ref, item.page_start + page, there, -1)
        known = is_page(page_id, num_pages)
        # Scales have pages of their own, also where K and V share theirs: as `_keys.scale_row`, without its division.
        row = page_id * (strides.value or strides.page) + slot * strides.slot
        row = row[:, None] + head[None, :] * strides.head
        place = line + (item.page_start * page_size + position)[:, None]
        for half, ref in enumerate((scale_refs.k, scale_refs.v)):
            # Whatever an absent token has, its score is masked.
            scale = load(ref, row, known[:, None] & is_head, 1.0)
            at = place + half * (lines_ref.shape[0] // 2)
            store(lines_ref, at, there[:, None] & is_head, scale)

    span = item.kv_end - begin
    jax.lax.fori_loop(0, (span + PROGRAMS * BLOCK - 1) // (PROGRAMS * BLOCK), tile, None)


def scales_in_line(
    scales: KVScales | None,
    plan: AttentionPlan,
    strides: RowStrides,
    num_pages: int | None,
    *,
    name: str,
    interpret: bool,
) -> jax.Array | None:
    """float32 [2 * (kh * c + KV_BLOCK)]: k's and v's scales, each head's in the order of the page table's entries.

    Those of tokens that no work item sees are whatever memory holds, as is the end, which the last tile may read.

    None where this pass does not pay; and where the table has room for more than twice the cache's pages, so that lines
    take at most twice the memory of the scales themselves.
    """
    few = plan.is_decode and plan.page_size < FEW_TOKENS
    if scales is None or not scales.per_token or not few or num_pages is None:
        return None
    assert plan.page_indices is not None
    if plan.page_indices.shape[0] > 2 * num_pages:
        return None
    capacity = plan.page_indices.shape[0] * plan.page_size
    return launch(
        functools.partial(
            _kernel,
            strides=strides,
            page_size=plan.page_size,
            num_pages=num_pages,
            num_kv_heads=plan.num_kv_heads,
        ),
        dict(
            scale_refs=jax.tree.map(lambda x: x.reshape(-1), scales),
            items_ref=plan.items,
            indices_ref=plan.page_indices,
        ),
        dict(lines_ref=Out((2 * (plan.num_kv_heads * capacity + KV_BLOCK),), jnp.float32)),
        name=f"{name}_scales",
        grid=(PROGRAMS, plan.items.shape[0]),
        num_warps=4,
        num_stages=1,
        interpret=interpret,
    )["lines_ref"]
