"""Where keys and values lie, and how a tile of them comes into shared memory.

Keys are read in tiles of `block`, from the last one of a work item to its first. Two ways lead there:

    boxes   the bulk copy engine moves boxes of neighbouring tokens: of pages of 8 tokens and more, of contiguous keys,
            and of keys that were laid in a line. One thread starts a box; slots beyond the array are filled with zeros.
    rows    the threads of the loading warpgroups move one token's row each: pages of any size, and numbers of 8 bits,
            which they convert.

A token without a page in the cache is absent: it is not read, whatever its table says.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxattn.kernels.mosaic import _warpgroup as wg
from jaxattn.kv_cache import PagedKVCache, RowStrides
from jaxattn.work_list import WorkItem


@dataclasses.dataclass(frozen=True)
class KeySource:
    """What does not change from work item to work item: how K and V are laid out, and in what tiles they are read."""

    layout: str  # "NHD" or "HND"
    page_size: int  # of contiguous keys: all tokens
    num_pages: int | None  # None: contiguous keys, which are one page that holds all
    combined: bool  # K and V are pages 2 i and 2 i + 1 of one array
    strides: RowStrides  # of the rows [num_rows, d]
    block: int  # keys of a tile
    narrow: bool = False  # of 8 bits: a tile's are of 16
    scales_per_token: bool = False
    in_line: bool = False  # the pages' tokens one behind the other, as `keys_in_line` leaves them

    @classmethod
    def of_cache(cls, cache: PagedKVCache, block: int) -> "KeySource":
        return cls(
            cache.layout,
            cache.page_size,
            cache.num_pages,
            cache.combined,
            cache.row_strides,
            block,
            cache.is_fp8,
            cache.scales is not None and cache.scales.per_token,
        )

    @classmethod
    def contiguous(
        cls, num_tokens: int, num_kv_heads: int, layout: str, block: int, narrow: bool = False
    ) -> "KeySource":
        slot, head = (num_kv_heads, 1) if layout == "NHD" else (1, num_tokens)
        strides = RowStrides(page=0, slot=slot, head=head, value=0)
        return cls(layout, num_tokens, None, False, strides, block, narrow)

    def laid(self) -> "KeySource":
        """Of the same cache, its tokens in a line [1, c, kh, d], and scales of tokens in one of their own."""
        return dataclasses.replace(
            self,
            layout="NHD",
            combined=False,
            narrow=False,
            in_line=True,
        )

    @property
    def paged(self) -> bool:
        return self.num_pages is not None

    def has(self, page: jax.Array) -> jax.Array:
        """Whether a page is one of the cache."""
        assert self.num_pages is not None
        return (page >= 0) & (page < self.num_pages)

    @property
    def by_page(self) -> bool:
        """Whether tokens lie where the page table says; else those of a request lie one behind the other."""
        return self.paged and not self.in_line

    @property
    def may_begin_early(self) -> bool:
        """Whether a tile may hold tokens before its work item's: boxes begin with a block of 8 rows."""
        return not self.paged or self.in_line and self.page_size % 8 != 0

    @property
    def in_boxes(self) -> bool:
        """Whether the copy engine can move it: boxes begin and end with a block of 8 rows, and stay as they are."""
        if self.in_line:
            return True
        if self.narrow:
            return False
        if not self.paged:
            return self.page_size % 8 == 0 and self.page_size >= self.block
        return self.page_size % 8 == 0 and (
            self.block % self.page_size == 0 or self.page_size % self.block == 0
        )

    @property
    def box(self) -> int:
        """Tokens of a box."""
        return min(self.page_size, self.block) if self.by_page else self.block

    def first_row(self, page_start: jax.Array) -> jax.Array:
        """Of a request's keys that lie one behind the other."""
        return page_start * self.page_size if self.paged else page_start

    @property
    def boxes(self) -> int:
        """Of a tile of keys or of values; what a barrier of values counts."""
        return self.block // self.box if self.in_boxes else 1

    @property
    def boxes_with_keys(self) -> int:
        """What a barrier of keys counts: with a tile in a line comes a box of its scales of tokens."""
        return self.boxes + int(self.in_line and self.scales_per_token)

    def arrays(self, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        """K and V as the kernel's loader wants them: pages [n, p, kh, d] (HND: [n, kh, p, d]), or rows [num_rows, d].

        k, v: a cache's arrays (the same, where it is combined), or contiguous keys.
        """
        if not self.in_boxes:
            return k.reshape(-1, k.shape[-1]), v.reshape(-1, v.shape[-1])
        return k.reshape(-1, *k.shape[-3:]), v.reshape(-1, *v.shape[-3:])

    def span(
        self, item: WorkItem, first_seen: jax.Array, page_range: tuple[Any, Any] | None
    ) -> "Span":
        """The tiles of a work item, of whose rows none sees a key before first_seen."""
        origin, end, own_end = item.kv_begin, item.kv_end, item.own_end
        begin = jnp.maximum(origin, first_seen)
        if page_range is None:
            rows = self.page_size - item.page_start
            end, own_end = jnp.minimum(end, rows), jnp.minimum(own_end, rows)
            absent = jnp.int32(0)
        else:
            assert self.num_pages is not None
            lowest, highest = page_range
            end = jnp.where(lowest < self.num_pages, end, begin)
            absent = (highest >= self.num_pages).astype(jnp.int32)
        if self.in_boxes and self.may_begin_early:
            origin -= lax.rem(self.first_row(item.page_start) + origin, 8)
        # Rows without keys go through one tile that they see nothing of.
        tiles = lax.div(jnp.maximum(end - origin, 1) + (self.block - 1), self.block)
        return Span(begin, end, origin, tiles, absent, item.page_start, own_end)


class Span(NamedTuple):
    """The keys of a work item, and the tiles they are read in: tile j begins at position origin + j * block.

    int32 scalars.
    """

    begin: jax.Array  # the item's keys are begin .. end - 1
    end: jax.Array
    origin: jax.Array
    tiles: jax.Array
    absent: jax.Array  # not 0: some of them may have no page in the cache
    page_start: jax.Array
    own_end: jax.Array  # of the request's keys


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys of one work item and one KV head, for whoever loads them."""

    source: KeySource
    span: Span
    indices_ref: Any  # int32 [capacity]; None for contiguous keys
    head: jax.Array

    def pages(self, j: jax.Array, numbers: list[int]) -> tuple[Any, ...]:
        """What the table names for tile j's boxes with these numbers."""
        if not self.source.by_page:
            return (None,) * len(numbers)

        def page(number):
            position = self._position(jnp.maximum(j, 0), number)
            entry = self.span.page_start + lax.div(position, self.source.page_size)
            return self.indices_ref[jnp.clip(entry, 0, self.indices_ref.shape[0] - 1)]

        return tuple(page(number) for number in numbers)

    def _position(self, j: jax.Array, number: int) -> jax.Array:
        """Of a box's first token."""
        return self.span.origin + j * self.source.block + number * self.source.box

    def _row(self, position: jax.Array) -> jax.Array:
        """Where keys that lie one behind the other have this one."""
        return _times_8(self.source.first_row(self.span.page_start) + position)

    def tokens(self, j: jax.Array) -> Any:
        """Those of tile j, where keys lie one behind the other."""
        return pl.ds(self._row(self._position(j, 0)), self.source.block)

    def boxes(
        self, ref: Any, value: bool, j: jax.Array, numbers: list[int], pages: Any
    ) -> list[Any]:
        """(where a box lies in K or V, where it goes in a tile), for each of the boxes."""
        source = self.source
        found = []
        for number, page in zip(numbers, pages):
            position = self._position(j, number)
            if source.by_page:
                exists = source.has(page) & (position < self.span.end)
                # Entries of pages behind a window may name any page.
                exists &= position + source.box > self.span.begin
                # A page beyond the cache's last stands for one that is not there.
                page = jnp.where(exists, page, source.num_pages or 0)
                whole = source.page_size == source.box
                offset: Any = 0 if whole else _times_8(lax.rem(position, source.page_size))
            else:
                page, offset = jnp.int32(0), self._row(position)
            if source.combined:
                page = 2 * page + int(value)
            tokens = pl.ds(offset, source.box)
            at = (page, tokens, self.head) if source.layout == "NHD" else (page, self.head, tokens)
            found.append((ref.at[at], pl.ds(number * source.box, source.box)))
        return found

    def rows(self, j: jax.Array) -> jax.Array:
        """int32 [128], EACH: the row of each of tile j's keys, -1 where there is none; `row_of_thread` says whose."""
        source = self.source
        position = self.span.origin + j * source.block + wg.row_of_thread(source.block)
        exists = (position >= self.span.begin) & (position < self.span.end)
        position = jnp.maximum(position, 0)
        if source.paged:
            page, exists = self._page(position, exists)
            slot = lax.rem(position, source.page_size)
            row = page * source.strides.page + slot * source.strides.slot
        else:
            row = (self.span.page_start + position) * source.strides.slot
        row += self.head * source.strides.head
        return jnp.where(exists, row, -1)

    def scale_rows(self, rows: jax.Array) -> jax.Array:
        """Where tokens' scales lie, from their `rows` of K: on pages of their own, also where K and V share theirs."""
        strides = self.source.strides
        if not strides.value:
            return rows
        return rows - lax.div(rows, strides.page) * (strides.page - strides.value)

    def absent(self, j: jax.Array) -> jax.Array:
        """float32 [128], EACH: for the i-th key of tile j -inf where its page is not in the cache, else 0."""
        position = self.span.origin + j * self.source.block + wg.thread_number()
        _, exists = self._page(jnp.maximum(position, 0), position < self.span.end)
        return jnp.where(exists, 0.0, -jnp.inf)

    def _page(self, position: jax.Array, exists: jax.Array) -> tuple[jax.Array, jax.Array]:
        entry = self.span.page_start + lax.div(position, self.source.page_size)
        entry = jnp.clip(entry, 0, self.indices_ref.shape[0] - 1)
        page = wg.load_each(self.indices_ref, entry)
        return page, exists & self.source.has(page)


def _times_8(x: jax.Array) -> jax.Array:
    """x, a multiple of 8, so that the compiler sees it."""
    return lax.div(x, 8) * 8
