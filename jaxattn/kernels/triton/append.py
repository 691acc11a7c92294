"""Writing new keys and values to the pages of a KV cache, in place, in the cache's dtype and by its scales.

`_page_slots` says where a token goes and how it is stored; a token without a slot is dropped.

Axes: t new tokens, b requests, kh KV heads, d head dim, dv that of V, p page size.
Grid: (t * kh / block_rows): a program copies `block_rows` rows of d, a row for each token and head.
"""

import dataclasses
import functools

import jax
from jax.experimental import pallas as pl

from jaxattn.device import check_fp8
from jaxattn.kernels.triton._launch import launch, like
from jaxattn.kernels.triton._page_slots import Pages, PageSlots, given_scales, rows_of, with_rows
from jaxattn.kernels.triton._rows import Rows, block_of, divmod_by, load, pow2
from jaxattn.kv_cache import PagedKVCache
from jaxattn.kv_scales import FP8_DTYPES
from jaxattn.page_table import PageTable


@dataclasses.dataclass(frozen=True)
class Config:
    block_rows: int  # rows of a tile, a power of two
    num_warps: int = 4


def default_config(head_dim: int, *, fp8: bool = False) -> Config:
    """The tile for rows of head_dim elements, of a cache in float8 or not."""
    # 8 elements each of K and V a thread, the widest access. On an H200, 8 KV heads of 128, us: 1 token
    # 1.66, 256 tokens 2.53, 16384 tokens 35.7; twice as large, 1.8, 2.6 and 35.5; by 1 warp 1.82, 2.56
    # and 35.2.
    # Into float8, half the bytes are written, and what a program waits for to find a token's page weighs more: with 32
    # elements a thread, many loads are under way. 16384 tokens 27.6 us, by 4 warps 30.1; each with its own scale, 27.7
    # and 31.2.
    return Config(max(1, 1024 // pow2(head_dim)), num_warps=1 if fp8 else 4)


def _append_kernel(
    key_ref,  # [t * kh, d]
    value_ref,  # [t * kh, dv]
    batch_ref,  # int32 [t]
    positions_ref,  # int32 [t]
    indptr_ref,  # int32 [b + 1]
    indices_ref,  # int32 [capacity]
    scale_refs,  # scales that are given, or None
    cache_refs,  # the memory of written_refs
    written_refs,  # what `rows_of` lists
    *,
    num_heads: int,
    slots: PageSlots,
    block_rows: int,
):
    pages = Pages(slots, written_refs, scale_refs)
    num_rows = key_ref.shape[0]
    row, exist = block_of(pl.program_id(0), block_rows, num_rows)
    token, head = divmod_by(row, num_heads)

    # The first use of a load waits for it and holds up the loads behind: the rows, which wait for
    # nothing, go before the way through the page table.
    batch, position = load(batch_ref, token, exist), load(positions_ref, token, exist)
    key, value = (Rows(row, exist).load(ref, range(ref.shape[1])) for ref in (key_ref, value_ref))
    slot_row, has_slot = slots.rows(indptr_ref, indices_ref, batch, position, exist)
    to = Rows(slot_row + head * slots.strides.head, has_slot)
    pages.store_k(to, head, [(range(key_ref.shape[1]), key)])
    pages.store_v(to, head, [(range(value_ref.shape[1]), value)])


def append(
    key: jax.Array,
    value: jax.Array,
    batch_indices: jax.Array,
    positions: jax.Array,
    cache: PagedKVCache,
    table: PageTable,
    *,
    interpret: bool,
) -> PagedKVCache:
    """The cache with key [t, kh, d] and value [t, kh, dv] written to it; its arrays are aliased."""
    t, num_heads, d = key.shape
    check_fp8(cache.dtype)
    config = default_config(d, fp8=cache.dtype.name in FP8_DTYPES)
    rows = rows_of(cache)
    written = launch(
        functools.partial(
            _append_kernel,
            num_heads=num_heads,
            slots=PageSlots.of(cache, interpret=interpret),
            block_rows=config.block_rows,
        ),
        dict(
            key_ref=key.reshape(-1, d),
            value_ref=value.reshape(-1, value.shape[-1]),
            batch_ref=batch_indices,
            positions_ref=positions,
            indptr_ref=table.indptr,
            indices_ref=table.indices,
            scale_refs=given_scales(cache),
            cache_refs=rows,
        ),
        dict(written_refs=like(rows)),
        name="jaxattn_append_paged_kv_cache",
        grid=(pl.cdiv(t * num_heads, config.block_rows),),
        num_warps=config.num_warps,
        num_stages=1,
        interpret=interpret,
        aliases=dict(cache_refs="written_refs"),
    )
    return with_rows(cache, written["written_refs"])
