"""The paged KV cache and its page table, as arrays.

A cache is a pool of `num_pages` pages of `page_size` token slots. A page table in CSR form says which pages a
request owns: request i owns pages `indices[indptr[i]:indptr[i + 1]]` in order, any page ids, shared pages allowed,
and has `last_page_len[i]` tokens in the last of them (1 <= last_page_len <= page_size; 0 for a request without
pages). Slots that no request owns may hold anything, NaN included.

Axes: b requests, t tokens, kh KV heads, d head dim, n pages, p page size, w pages of a block-table row.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxattn.checks import (
    FLOAT_DTYPES,
    check_choice,
    check_float,
    check_host_lengths,
    check_index,
    check_int32,
    check_positive,
    check_shape,
    copied_from_host,
)
from jaxattn.kv_scales import FP8_DTYPES, KVScales

LAYOUTS = ("NHD", "HND")
CACHE_DTYPES = (*FLOAT_DTYPES, *FP8_DTYPES)


class RowStrides(NamedTuple):
    """Where a token's vector lies in a cache seen as rows `[num_rows, d]`:

    `row = page * strides.page + slot * strides.slot + head * strides.head`, plus `strides.value` for V
    where one array holds both K and V.
    """

    page: int
    slot: int
    head: int
    value: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """K and V pages of one layer, a pytree.

    Attributes:
      data: `(k, v)`, each [n, p, kh, d] for layout "NHD" and [n, kh, p, d] for "HND", V's d its own; or one array
        that holds both, [n, 2, p, kh, d] or [n, 2, kh, p, d]. float16, bfloat16, float32, float8_e4m3fn or
        float8_e5m2.
      layout: "NHD" or "HND" (static).
      scales: what the numbers in `data` are multiplied by; None: they are the keys and values themselves.
    """

    data: tuple[Array, Array] | Array
    layout: str = dataclasses.field(default="NHD", metadata=dict(static=True))
    scales: KVScales | None = None

    @classmethod
    def zeros(
        cls,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        *,
        layout: str = "NHD",
        combined: bool = False,
        head_dim_v: int | None = None,
        scales: KVScales | str | None = None,
    ) -> "PagedKVCache":
        """A cache of zeros.

        Args:
          num_pages, page_size, num_kv_heads, head_dim: the shape.
          dtype: float16, bfloat16, float32, float8_e4m3fn or float8_e5m2.
          layout: "NHD" or "HND".
          combined: K and V are one 5-D array.
          head_dim_v: V's, default head_dim.
          scales: given ones; or "token", with a float8 dtype: pages of them, of which an append writes those of its
            tokens, by each token's own largest magnitude in a head.

        Raises:
          ValueError, TypeError: sizes, a dtype, a layout or scales that no cache can have.
        """
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        check_positive(
            num_pages=num_pages, page_size=page_size, num_kv_heads=num_kv_heads, head_dim=head_dim
        )
        check_positive(head_dim_v=head_dim_v)
        check_choice("layout", layout, LAYOUTS)
        page = (page_size, num_kv_heads) if layout == "NHD" else (num_kv_heads, page_size)
        if combined and head_dim_v != head_dim:
            raise ValueError(
                f"one array holds K and V of one head_dim; got {head_dim=}, {head_dim_v=}: "
                "leave combined=False"
            )
        if isinstance(scales, str):
            check_choice("scales", scales, ("token",))
            scales = KVScales(*(jnp.ones((num_pages, *page), jnp.float32) for _ in "kv"))
        data: tuple[Array, Array] | Array
        if combined:
            data = jnp.zeros((num_pages, 2, *page, head_dim), dtype)
        else:
            k, v = (jnp.zeros((num_pages, *page, d), dtype) for d in (head_dim, head_dim_v))
            data = k, v
        cache = cls(data, layout, scales)
        cache.check()
        return cache

    @classmethod
    def from_flashinfer(
        cls, paged_kv_cache: tuple[Array, Array] | Array, kv_layout: str = "NHD"
    ) -> "PagedKVCache":
        """A cache from what FlashInfer takes: a tuple of 4-D arrays or one 5-D array.

        With page_size 1 the page axis may be missing (3-D arrays or one 4-D array).

        Raises:
          KeyError: unknown kv_layout, or the cache is a list.
          ValueError: the arrays have another number of axes.
        """
        if kv_layout not in LAYOUTS:
            raise KeyError(f"kv_layout must be 'NHD' or 'HND'; got {kv_layout!r}")
        if isinstance(paged_kv_cache, list):
            raise KeyError(
                "paged_kv_cache must be a tuple (k, v) or one array; got a list: use tuple(...)"
            )
        page_axis = -3 if kv_layout == "NHD" else -2
        if isinstance(paged_kv_cache, tuple):
            if len(paged_kv_cache) != 2:
                raise ValueError(f"paged_kv_cache must be (k, v); got {len(paged_kv_cache)} arrays")
            k, v = (jnp.expand_dims(x, page_axis) if x.ndim == 3 else x for x in paged_kv_cache)
            cache = cls((k, v), kv_layout)
        else:
            kv = paged_kv_cache
            cache = cls(jnp.expand_dims(kv, page_axis) if kv.ndim == 4 else kv, kv_layout)
        cache.check()
        return cache

    @classmethod
    def from_dense(cls, k: Array, v: Array, page_size: int) -> "PagedKVCache":
        """A dense cache as pages, by a reshape: those of request i are page i * w to i * w + w - 1, w = s / page_size.

        `PageTable.contiguous` is its table; `to_dense` is the way back.

        Args:
          k, v: [b, s, kh, d], V's d its own.
          page_size: tokens a page; a divisor of s.

        Raises:
          ValueError: shapes that do not fit, a page size that does not divide s.
        """
        check_positive(page_size=page_size)
        check_shape("k", k, ("b", "s", "kh", "d"))
        check_shape("v", v, (*k.shape[:3], "head_dim of v"))
        b, s = k.shape[:2]
        if s % page_size:
            raise ValueError(
                f"page_size must divide the {s} tokens of the dense cache; got {page_size}: "
                f"take a divisor, or make the cache {s + -s % page_size} tokens long"
            )
        pages = (b * (s // page_size), page_size)
        return cls((k.reshape(*pages, *k.shape[2:]), v.reshape(*pages, *v.shape[2:])))

    def to_dense(self, batch_size: int) -> tuple[Array, Array]:
        """(k, v) [b, s, kh, d] of a cache whose pages are those of `from_dense`, by a reshape.

        Raises:
          ValueError: layout "HND", or one array for K and V, whose tokens do not lie side by side; scales; pages that
            the requests cannot share equally.
        """
        self.check()
        if self.layout != "NHD" or self.combined:
            raise ValueError(
                "to_dense needs layout 'NHD' and K and V in arrays of their own; got "
                f"layout={self.layout!r}, combined={self.combined}"
            )
        if self.scales is not None:
            raise ValueError("to_dense must be of a cache without scales: a dense one has none")
        check_positive(batch_size=batch_size)
        if self.num_pages % batch_size:
            raise ValueError(
                f"batch_size must divide the cache's {self.num_pages} pages; got {batch_size}"
            )
        tokens = self.num_pages // batch_size * self.page_size
        k, v = (x.reshape(batch_size, tokens, *x.shape[2:]) for x in (self.k, self.v))
        return k, v

    def check(self) -> None:
        """Raises ValueError or TypeError, with the reason, unless the arrays form a cache."""
        check_choice("layout", self.layout, LAYOUTS)
        if isinstance(self.data, tuple):
            if len(self.data) != 2:
                raise ValueError(f"a cache must be (k, v); got {len(self.data)} arrays")
            k, v = self.data
            check_shape(
                "k pages",
                k,
                ("n", "p", "kh", "d") if self.layout == "NHD" else ("n", "kh", "p", "d"),
            )
            check_shape("v pages", v, (*k.shape[:-1], "head_dim of v"))
            if k.dtype != v.dtype:
                raise TypeError(f"k and v pages must have one dtype; got {k.dtype} and {v.dtype}")
            check_float("k pages", k, CACHE_DTYPES)
        else:
            axes = ("p", "kh") if self.layout == "NHD" else ("kh", "p")
            check_shape("a combined cache", self.data, ("n", 2, *axes, "d"))
            check_float("a combined cache", self.data, CACHE_DTYPES)
        if self.scales is None:
            return
        if not isinstance(self.scales, KVScales):
            raise TypeError(
                f"scales must be KVScales or None; got {type(self.scales).__name__}: "
                "use KVScales.of(k_scale, v_scale)"
            )
        p, heads = self.page_size, self.num_kv_heads
        page = (p, heads) if self.layout == "NHD" else (heads, p)
        self.scales.check((self.num_pages, *page), heads)
        if self.scales.per_token and not self.is_fp8:
            raise TypeError(
                f"scales per token are those of a float8 cache; got {self.dtype}: leave them out, "
                "as 16 bits hold keys and values as they are"
            )

    @property
    def combined(self) -> bool:
        """Whether one array holds both K and V."""
        return not isinstance(self.data, tuple)

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays that hold the cache: (k, v), or the one that holds both."""
        return self.data if isinstance(self.data, tuple) else (self.data,)

    @property
    def k(self) -> Array:
        """K pages [n, p, kh, d] (NHD) or [n, kh, p, d] (HND), as they are stored."""
        return self.data[0] if isinstance(self.data, tuple) else self.data[:, 0]

    @property
    def v(self) -> Array:
        """V pages, shaped as K pages, but for a head_dim of their own."""
        return self.data[1] if isinstance(self.data, tuple) else self.data[:, 1]

    @property
    def num_pages(self) -> int:
        return self.arrays[0].shape[0]

    @property
    def page_size(self) -> int:
        return self.arrays[0].shape[-3 if self.layout == "NHD" else -2]

    @property
    def num_kv_heads(self) -> int:
        return self.arrays[0].shape[-2 if self.layout == "NHD" else -3]

    @property
    def head_dim(self) -> int:
        return self.arrays[0].shape[-1]

    @property
    def head_dim_v(self) -> int:
        """V's head_dim, which may differ from K's where each has an array of its own."""
        return self.arrays[-1].shape[-1]

    @property
    def dtype(self) -> jnp.dtype:
        return self.arrays[0].dtype

    @property
    def is_fp8(self) -> bool:
        return self.dtype.name in FP8_DTYPES

    @property
    def k_scale(self) -> Array | None:
        """What stored keys are multiplied by, float32: [], [kh], or pages without the last axis; None: 1."""
        return None if self.scales is None else self.scales.k

    @property
    def v_scale(self) -> Array | None:
        """Likewise of values."""
        return None if self.scales is None else self.scales.v

    @property
    def row_strides(self) -> RowStrides:
        """The cache's arrangement, seen as rows of head_dim elements."""
        heads, page_size = self.num_kv_heads, self.page_size
        rows = heads * page_size
        slot, head = (heads, 1) if self.layout == "NHD" else (1, page_size)
        if self.combined:
            return RowStrides(page=2 * rows, slot=slot, head=head, value=rows)
        return RowStrides(page=rows, slot=slot, head=head, value=0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageTable:
    """Which pages each request owns, in CSR form; a pytree of int32 arrays.

    Whatever the arrays hold, no request reaches a page that its own row does not name. A length beyond a request's
    pages, an entry outside `indices` and a page id outside the cache stand for tokens that are absent: attention does
    not see them, appending drops them. Where the arrays are on the host (NumPy), such contents are errors instead.

    Attributes:
      indptr: [b + 1], starts at 0, does not decrease. Request i owns `indices[indptr[i]:indptr[i + 1]]`.
      indices: [capacity], page ids in [0, num_pages); entries from `indptr[b]` on are unused.
      last_page_len: [b], tokens in the last page: 1 .. page_size, 0 for a request without pages.
      page_size: tokens a page (static). None where the arrays came without it: then the plan is told.
    """

    indptr: Array
    indices: Array
    last_page_len: Array
    page_size: int | None = dataclasses.field(default=None, metadata=dict(static=True))

    @classmethod
    def from_block_table(cls, block_table: Array, kv_len: Array, page_size: int) -> "PageTable":
        """A table from dense rows.

        Args:
          block_table: int32 [b, w], page ids of request i in `block_table[i, :ceil(kv_len[i] / page_size)]`;
            the rest of a row is ignored.
          kv_len: int32 [b], tokens of each request, at most w * page_size; tokens beyond are absent.
          page_size: tokens a page.

        Raises:
          ValueError: shapes that do not fit; lengths on the host that are negative or exceed a row's pages.
          TypeError: arrays that are not int32.
        """
        check_shape("block_table", block_table, ("b", "w"))
        check_int32("block_table", block_table)
        check_index("kv_len", kv_len, block_table.shape[0])
        check_positive(page_size=page_size)
        width = block_table.shape[1]
        if isinstance(kv_len, np.ndarray):
            check_host_lengths("kv_len", kv_len, width * page_size, f"{width} pages of {page_size}")
        kv_len = copied_from_host(kv_len)
        num_pages = jnp.clip(-(-kv_len // page_size), 0, width)
        indptr = jnp.pad(jnp.cumsum(num_pages, dtype=jnp.int32), (1, 0))
        column = jnp.arange(width, dtype=jnp.int32)[None, :]
        entry = jnp.where(column < num_pages[:, None], indptr[:-1, None] + column, block_table.size)
        indices = jnp.zeros(block_table.size, jnp.int32).at[entry].set(block_table, mode="drop")
        # Tokens beyond the row's pages still count: they say at which positions the last tokens stand.
        last_page_len = jnp.where(num_pages > 0, kv_len - (num_pages - 1) * page_size, 0)
        return cls(indptr, indices, last_page_len, page_size)

    @classmethod
    def contiguous(cls, kv_len: Array, max_len: int, page_size: int) -> "PageTable":
        """The table where request i owns pages i * w to i * w + w - 1, w = ceil(max_len / page_size).

        Args:
          kv_len: int32 [b], tokens of each request, at most w * page_size; tokens beyond are absent.
          max_len: tokens that a request may have.
          page_size: tokens a page.

        Raises: as `from_block_table`.
        """
        check_positive(max_len=max_len, page_size=page_size)
        check_index("kv_len", kv_len, "b")
        width = -(-max_len // page_size)
        pages = jnp.arange(kv_len.shape[0] * width, dtype=jnp.int32)
        return cls.from_block_table(pages.reshape(-1, width), kv_len, page_size)

    def to_block_table(self, max_pages: int) -> Array:
        """Dense rows int32 [b, max_pages]; entries past a request's pages are -1."""
        check_positive(max_pages=max_pages)
        column = jnp.arange(max_pages, dtype=jnp.int32)[None, :]
        first, count = self.rows()
        entry = first[:, None] + column
        owned = column < count[:, None]
        return jnp.where(owned, jnp.asarray(self.indices).at[entry].get(mode="clip"), -1)

    def check(self) -> None:
        """Raises ValueError or TypeError, with the reason, unless the arrays form a table.

        Contents are checked where they are on the host; those of device arrays are never read.
        """
        check_index("kv_indices", self.indices, "capacity")
        check_index("kv_last_page_len", self.last_page_len, "b")
        check_index("kv_indptr", self.indptr, self.batch_size + 1)
        if self.page_size is not None:
            check_positive(page_size=self.page_size)

    def with_page_size(self, page_size: int | None) -> "PageTable":
        """This table with its page size, from what the table or the argument says.

        Raises:
          ValueError: neither says it, or they differ.
        """
        if page_size is not None:
            check_positive(page_size=page_size)
        known = {x for x in (self.page_size, page_size) if x is not None}
        if len(known) != 1:
            raise ValueError(
                f"page_size must be that of the page table, {self.page_size}; got {page_size}"
                if known
                else "page_size must be given: this PageTable was made without it. Make it by "
                "PageTable.from_block_table or PageTable(indptr, indices, last_page_len, page_size)"
            )
        return dataclasses.replace(self, page_size=known.pop())

    def padded(self) -> "PageTable":
        """This table on the device, with at least one entry: kernels take no array without elements."""
        table = jax.tree.map(copied_from_host, self)
        if table.indices.size:
            return table
        return dataclasses.replace(table, indices=jnp.zeros(1, jnp.int32), indptr=table.indptr * 0)

    def rows(self) -> tuple[Array, Array]:
        """(first, count) int32 [b]: the entries of `indices` that each request owns, none outside of it."""
        indptr = jnp.clip(self.indptr, 0, self.indices.size)
        return indptr[:-1], jnp.maximum(indptr[1:] - indptr[:-1], 0)

    def kv_len(self, page_size: int | None = None) -> Array:
        """int32 [b]: tokens of each request, absent ones included; `rows` bounds those that have a page."""
        page_size = self.with_page_size(page_size).page_size
        assert page_size is not None
        _, count = self.rows()
        return jnp.where(count > 0, jnp.maximum((count - 1) * page_size + self.last_page_len, 0), 0)

    @property
    def batch_size(self) -> int:
        return self.last_page_len.shape[0]


def as_pool(paged_kv_cache: Any) -> tuple[PagedKVCache, Callable[[PagedKVCache], Any]]:
    """A cache in one of the forms that models keep it in, as a `PagedKVCache`; and the way back to that form.

    Args:
      paged_kv_cache: a `PagedKVCache`, or a tuple (k, v) of its arrays in layout "NHD". Where these begin with the
        batch, [b, w, p, kh, d] ("HND": [b, w, kh, p, d]), the pool is its b * w pages.

    Raises:
      TypeError: neither of them.
    """
    if isinstance(paged_kv_cache, PagedKVCache):
        cache, is_tuple = paged_kv_cache, False
    elif isinstance(paged_kv_cache, tuple) and len(paged_kv_cache) == 2:
        cache, is_tuple = PagedKVCache(paged_kv_cache), True
    else:
        raise TypeError(
            "paged_kv_cache must be a PagedKVCache or a tuple (k, v) of arrays [n, p, kh, d] or [b, w, p, kh, d]; "
            f"got {type(paged_kv_cache).__name__}"
        )
    by_batch = not cache.combined and all(jnp.ndim(x) == 5 for x in cache.arrays)
    given = cache
    if by_batch:
        k, v = (x.reshape(-1, *x.shape[2:]) for x in cache.data)
        scales = cache.scales
        if scales is not None and scales.per_token:
            scales = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), scales)
        cache = PagedKVCache((k, v), cache.layout, scales)

    def back(cache: PagedKVCache) -> Any:
        if by_batch:
            cache = jax.tree.map(lambda new, old: new.reshape(jnp.shape(old)), cache, given)
        return cache.data if is_tuple else cache

    return cache, back


def get_seq_lens(kv_indptr: Array, kv_last_page_len: Array, page_size: int) -> Array:
    """Tokens of each request: `(pages - 1) * page_size + last_page_len`, 0 for a request without pages.

    Args:
      kv_indptr: int32 [b + 1].
      kv_last_page_len: int32 [b].
      page_size: tokens a page.

    Returns:
      int32 [b].
    """
    check_positive(page_size=page_size)
    num_pages = kv_indptr[1:] - kv_indptr[:-1]
    return jnp.where(num_pages > 0, (num_pages - 1) * page_size + kv_last_page_len, 0)


def get_batch_indices_positions(
    append_indptr: Array, seq_lens: Array, nnz: int
) -> tuple[Array, Array]:
    """For each appended token: its request, and its position in that request.

    The appended tokens are the last ones of their requests.

    Args:
      append_indptr: int32 [b + 1]; request i appends tokens `append_indptr[i]:append_indptr[i + 1]`.
      seq_lens: int32 [b], lengths after the append.
      nnz: capacity of the result; rows from `append_indptr[b]` on are padding.

    Returns:
      (batch_indices int32 [nnz], positions int32 [nnz]); a padding row has batch index -1 and position 0.
    """
    check_index("seq_lens", seq_lens, "b")
    check_index("append_indptr", append_indptr, seq_lens.shape[0] + 1)
    append_indptr, seq_lens = copied_from_host(append_indptr), copied_from_host(seq_lens)
    row = jnp.arange(nnz, dtype=jnp.int32)
    batch = jnp.searchsorted(append_indptr[1:], row, side="right").astype(jnp.int32)
    used = row < append_indptr[-1]
    position = row + (seq_lens - append_indptr[1:]).at[batch].get(mode="clip")
    return jnp.where(used, batch, -1), jnp.where(used, position, 0)
