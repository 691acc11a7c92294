"""Writing new keys and values to the pages of a KV cache, in place, in the cache's dtype.

Token i goes to position `positions[i]` of request `batch_indices[i]`: to slot `position % p` of
page `indices[indptr[request] + position // p]`. A token whose request, position or page does not
exist is dropped: padding tokens carry request -1.

Axes: t new tokens, b requests, kh KV heads, d head dim, p page size.
Grid: (t * kh / block_rows): a program copies `block_rows` rows of d, a row for each token and head.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxattn.kernels._launch import launch
from jaxattn.kernels._paged_tile import divmod_by
from jaxattn.kv_cache import PagedKVCache, PageTable, RowStrides


@dataclasses.dataclass(frozen=True)
class Config:
    block_rows: int  # rows of a tile, a power of two
    num_warps: int = 4


def default_config(head_dim: int) -> Config:
    """The tile for rows of head_dim elements."""
    # 16 elements each of K and V a thread: small appends still spread over many programs.
    return Config(block_rows=max(1, 2048 >> (head_dim - 1).bit_length()))


def _append_kernel(
    key_ref,  # [t * kh, d]
    value_ref,  # [t * kh, d]
    batch_ref,  # int32 [t]
    positions_ref,  # int32 [t]
    indptr_ref,  # int32 [b + 1]
    indices_ref,  # int32 [capacity]
    *cache_refs,  # the cache's one or two arrays, [num_rows, d]; then the same memory as outputs
    num_heads: int,
    num_pages: int,
    page_size: int,
    strides: RowStrides,
    block_rows: int,
):
    *_, k_ref, v_ref = (cache_refs[1:] * 2) if len(cache_refs) == 2 else cache_refs
    num_rows, d = key_ref.shape
    row = pl.program_id(0) * block_rows + jnp.arange(block_rows, dtype=jnp.int32)
    token, head = divmod_by(row, num_heads)

    def load(ref, at, mask):
        return plgpu.load(ref.at[at], mask=mask, other=0)

    # 1. The page of each row.
    valid = row < num_rows
    batch = load(batch_ref, token, valid)
    position = load(positions_ref, token, valid)
    valid &= (batch >= 0) & (batch < indptr_ref.shape[0] - 1) & (position >= 0)
    page_of_request, slot = divmod_by(position, page_size)
    entry = load(indptr_ref, batch, valid) + page_of_request
    valid &= (entry < load(indptr_ref, batch + 1, valid)) & (entry < indices_ref.shape[0])
    page = load(indices_ref, entry, valid)
    valid &= (page >= 0) & (page < num_pages)

    # 2. The copy. Interpreted, a masked store writes back what it read: the rows that stay out of
    # the cache all lie past its end, lest one undoes another's write.
    out_row = page * strides.page + slot * strides.slot + head * strides.head
    cols = jnp.arange(1 << (d - 1).bit_length(), dtype=jnp.int32)[None, :]
    mask = valid[:, None] & (cols < d)
    for x_ref, out_ref, offset in ((key_ref, k_ref, 0), (value_ref, v_ref, strides.value)):
        x = plgpu.load(x_ref.at[row[:, None], cols], mask=mask, other=0.0)
        at = jnp.where(valid, out_row + offset, out_ref.shape[0])[:, None], cols
        plgpu.store(out_ref.at[at], x.astype(out_ref.dtype), mask=mask)


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
    """The cache with key and value [t, kh, d] written to it; its arrays are aliased."""
    t, num_heads, d = key.shape
    config = default_config(d)
    rows = [x.reshape(-1, d) for x in cache.arrays]
    written = launch(
        functools.partial(
            _append_kernel,
            num_heads=num_heads,
            num_pages=cache.num_pages,
            page_size=cache.page_size,
            strides=cache.row_strides,
            block_rows=config.block_rows,
        ),
        key.reshape(-1, d),
        value.reshape(-1, d),
        batch_indices,
        positions,
        table.indptr,
        table.indices,
        *rows,
        name="jaxattn_append_paged_kv_cache",
        grid=(pl.cdiv(t * num_heads, config.block_rows),),
        out_shape=[(x.shape, x.dtype) for x in rows],
        num_warps=config.num_warps,
        num_stages=1,
        interpret=interpret,
        aliases={6 + i: i for i in range(len(rows))},
    )
    k, *v = (x.reshape(old.shape) for x, old in zip(written, cache.arrays))
    return PagedKVCache((k, v[0]) if v else k, cache.layout)
