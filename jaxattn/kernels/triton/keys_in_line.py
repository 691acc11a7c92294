"""Keys and values in the order of the page table's entries, one token after the other, in a dtype of 16 bits.

Where many tiles of queries read each key, it pays to gather and convert all keys once: on Hopper the copy engine then
moves them in boxes, as it does neighbouring rows that stay as they are. `kernels.mosaic._in_line` says when.

Axes: c tokens of a line, kh KV heads, d head dim.
Grid: (kh, blocks of tokens): neighbouring programs read a token's heads.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxattn.kernels.triton._keys import is_page, load_whole_rows, scale_row
from jaxattn.kernels.triton._launch import Out, launch
from jaxattn.kernels.triton._rows import Rows, divmod_by, load, store
from jaxattn.kv_cache import PagedKVCache, RowStrides
from jaxattn.kv_scales import FP8_DTYPES, columns
from jaxattn.plan import AttentionPlan
from jaxattn.work_list import WorkItem

BLOCK = 128  # tokens of a program


def _kernel(
    k_ref,  # [num_rows, d]
    v_ref,
    scale_refs,  # KVScales of float32 [num_rows], or None
    indices_ref,  # int32 [entries]
    ends_ref,  # int32 [2]: begin, negated, and end of the line's tokens that are needed
    k_line_ref,  # [c * kh, d]
    v_line_ref,
    scales_line_ref,  # float32 [3 * kh * c], `kv_scales.columns` of scales of tokens; or None
    *,
    strides: RowStrides,
    page_size: int,
    num_pages: int,
    num_kv_heads: int,
):
    head, first = pl.program_id(0), pl.program_id(1) * BLOCK

    @pl.when((first + BLOCK > -ends_ref[0]) & (first < ends_ref[1]))
    def _():
        token = first + jnp.arange(BLOCK, dtype=jnp.int32)
        entry, slot = divmod_by(token, page_size)
        page = load(indices_ref, entry, entry < indices_ref.shape[0], -1)
        known = is_page(page, num_pages)
        row = page * strides.page + slot * strides.slot + head * strides.head
        if scale_refs is not None:
            at = scale_row(jnp.where(known, row, 0), strides)
            k_scale, v_scale = (load(x, at, known, 1.0) for x in (scale_refs.k, scale_refs.v))
            room = scales_line_ref.shape[0] // (3 * num_kv_heads)
            for i, column in enumerate(columns(k_scale, v_scale, known)):
                store(scales_line_ref, (i * num_kv_heads + head) * room + token, None, column)
        lines = (k_ref, k_line_ref, 0), (v_ref, v_line_ref, strides.value)
        for ref, line_ref, shift in lines:
            x = load_whole_rows(ref, row + shift, known[:, None])
            # The compiler's conversion from 8 bits to bfloat16 makes numbers of e5m2's infinities and NaN.
            x = x.astype(jnp.float16) if x.dtype.name in FP8_DTYPES else x
            Rows(token * num_kv_heads + head).store(line_ref, range(ref.shape[1]), x)


class Lines(NamedTuple):
    """Tokens outside of what the plan's items read are whatever memory holds."""

    k: jax.Array  # [c, kh, d]; zeros where a token has no page in the cache
    v: jax.Array
    scales: jax.Array | None  # float32 [3, kh, c], `kv_scales.columns` of scales of tokens


def keys_in_line(
    cache: PagedKVCache,
    plan: AttentionPlan,
    dtype: jax.typing.DTypeLike,
    *,
    name: str,
    interpret: bool = False,
) -> Lines:
    """A cache's keys and values in `dtype`, which holds each of their numbers, and their scales of tokens.

    c is the tokens that the page table has room for, up to a multiple of BLOCK.
    """
    assert plan.page_indices is not None and plan.num_items is not None
    scales = cache.scales if cache.scales is not None and cache.scales.per_token else None
    p, heads = cache.page_size, cache.num_kv_heads
    blocks = -(-plan.page_indices.shape[0] * p // BLOCK)
    room = blocks * BLOCK
    # Of the items, those without keys included, which read a tile all the same: a tile begins up to 7 tokens before its
    # item's keys, and ends less than a tile behind them, and there must be numbers too.
    item = WorkItem(*plan.items.T)
    start = item.page_start * p
    ends = jnp.stack(
        [8 - start - item.kv_begin, start + jnp.maximum(item.kv_end, item.kv_begin) + BLOCK]
    )
    # One reduction, and so one kernel of XLA's, for both.
    used = jnp.arange(plan.items.shape[0], dtype=jnp.int32) < plan.num_items
    ends = jnp.where(used, ends, -(2**31) + 1).max(axis=1)

    def rows(x: jax.Array) -> jax.Array:
        return x.reshape(-1, x.shape[-1])

    k, v = rows(cache.arrays[0]), rows(cache.arrays[-1])
    out = launch(
        functools.partial(
            _kernel,
            strides=cache.row_strides,
            page_size=p,
            num_pages=cache.num_pages,
            num_kv_heads=heads,
        ),
        dict(
            k_ref=k,
            v_ref=v,
            scale_refs=jax.tree.map(lambda x: x.reshape(-1), scales),
            indices_ref=plan.page_indices,
            ends_ref=ends,
        ),
        dict(
            k_line_ref=Out((room * heads, k.shape[1]), dtype),
            v_line_ref=Out((room * heads, v.shape[1]), dtype),
            scales_line_ref=None if scales is None else Out((3 * heads * room,), jnp.float32),
        ),
        name=f"{name}_line",
        grid=(heads, blocks),
        num_warps=4,
        num_stages=1,
        interpret=interpret,
    )
    k, v, of_tokens = out.values()
    of_tokens = None if of_tokens is None else of_tokens.reshape(3, heads, room)
    return Lines(k.reshape(room, heads, -1), v.reshape(room, heads, -1), of_tokens)
