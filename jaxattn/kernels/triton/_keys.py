"""Where keys and values lie: tiles of `block` consecutive tokens of one request, on its pages or side by side.

Caches are rows `[num_rows, d]`; `RowStrides` says which row holds a (page, slot, head). A token without a page in the
cache is absent: it is not read, whatever its table says. Contiguous keys are one page that holds every token.

Keys and values of 8 bits become `KeySource.dtype` on their way from shared memory to the tensor cores. They stay as
they are stored: a scale for each token comes along, for the scores and the weights; one for each head is for the row.

Axes: k tokens of a tile, d head dim of K, dv of V (padded to a power of two with zeros).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from jaxattn.kernels.triton._float16 import unpaired
from jaxattn.kernels.triton._rows import both, divmod_by, pow2
from jaxattn.kv_cache import RowStrides
from jaxattn.kv_scales import SMALLEST


@dataclasses.dataclass(frozen=True)
class KeySource:
    """What does not change from program to program: how a cache is laid out, and in what tiles it is read."""

    strides: RowStrides
    page_size: int
    num_pages: int | None  # of the cache; None: keys are contiguous
    block: int  # tokens of a tile
    # Look up one page for a tile that lies in one. Its address alone moves from tile to tile. H200, prefill of
    # 4 x 4096, page size 64: 1162 -> 1135 us; but tiles of few rows, decode of 32 x 4096: 127.7 -> 132.6. Keys
    # of 8 bits always: decode of 64 x 8192 263.7 -> 251.7.
    page_at_once: bool
    dtype: jnp.dtype  # what products are computed in
    scales_per_token: bool
    scales_in_line: bool  # as `_scales_in_line` leaves them
    # The dtype of V's elements where a row holds pairs of them as int16, the even one in the low half; else None. V's
    # tile goes to mma.sync transposed, and in 8 bits it could only be read from shared memory byte by byte.
    v_pairs: jnp.dtype | None
    interpret: bool

    @property
    def paged(self) -> bool:
        return self.num_pages is not None


class KeyTile(NamedTuple):
    """The keys and values of consecutive tokens, as they are stored."""

    k: jax.Array  # [k, d]
    v: tuple[jax.Array, ...]  # [k, dv], or its even and its odd columns
    # float32 [k], what they are to be multiplied by; None: all of a head by the same.
    k_scale: jax.Array | None
    v_scale: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys and values of one request and one KV head."""

    source: KeySource
    k_ref: jax.Ref  # [num_rows, d]
    v_ref: jax.Ref  # [num_rows, dv]; the same array as k_ref where one holds both
    # KVScales of refs, float32 [num_rows] per token, else [1] or [kh]; or one ref, of `_scales_in_line`; or None.
    scale_refs: Any
    indices_ref: jax.Ref | None  # int32 [capacity]; None for contiguous keys
    start: jax.Array  # the request's first entry in indices; its first row of contiguous keys
    head: jax.Array
    spare_page: jax.Array | int  # a page of the cache whose first slot some request owns

    def tokens(self, position: jax.Array) -> jax.Array:
        """Positions int32 [k] of a tile's tokens in their request."""
        return position + jnp.arange(self.source.block, dtype=jnp.int32)

    def row_scales(self) -> tuple[jax.Array | None, jax.Array | None]:
        """What all of this head's keys and values are to be multiplied by, k's and v's; None: nothing."""
        if self.scale_refs is None or self.source.scales_per_token:
            return None, None
        k, v = (
            jnp.maximum(ref[self.head if ref.shape[0] > 1 else 0], SMALLEST)
            for ref in (self.scale_refs.k, self.scale_refs.v)
        )
        return k, v

    def load(self, position: jax.Array, begin: jax.Array | None, end: jax.Array) -> KeyTile:
        """The tokens from `position` on.

        Tokens that are not there have something finite for a value, which a product with a weight of 0 needs: zeros
        outside of begin .. end - 1, and on a page that is not in the cache what lies in `spare_page`'s first slot.
        Keys are whatever lies there; their scores are for the caller to mask.

        Where pages divide `block`, position is a page's first token; where blocks divide the page size, a block's.
        """
        strides = self.source.strides
        exist = self._between(position, begin, end)
        if self.indices_ref is None:
            rows = (self.start + jnp.minimum(self.tokens(position), end - 1)) * strides.slot
        else:
            page_id, slot, known = self._pages(position, end)
            rows = page_id * strides.page + slot * strides.slot
            rows = jnp.where(known, rows, self.spare_page * strides.page)
        rows += self.head * strides.head
        k = load_whole_rows(self.k_ref, rows, None)
        v = load_whole_rows(self.v_ref, rows + strides.value, exist[:, None])
        k_scale = v_scale = None
        if self.scale_refs is not None and self.source.scales_per_token:
            # A mask would be carried along from here to their use, in registers that a fourth program needs. What is
            # absent may have any scales: its score is masked after they came into it.
            k_scale, v_scale = (plgpu.load(at) for at in self._scales_at(rows, position))
        dtype, pairs = self.source.dtype, self.source.v_pairs
        parts = (v,) if pairs is None else unpaired(v, pairs, interpret=self.source.interpret)
        return KeyTile(k.astype(dtype), tuple(x.astype(dtype) for x in parts), k_scale, v_scale)

    def exist(self, position: jax.Array, begin: jax.Array | None, end: jax.Array) -> jax.Array:
        """bool [k]: which tokens from `position` on lie in begin .. end - 1 (None: before end) and have a page.

        It looks their pages up again: an id that is used by more than addresses is not loaded ahead.
        """
        exist = self._between(position, begin, end)
        if self.indices_ref is None:
            return exist
        if not self.source.scales_per_token:
            return exist & self._pages(position, end)[2]
        # Written as those of the ids that are loaded ahead, these addresses would be computed there and carried along,
        # in registers that a fourth program needs.
        page, last = (self.start + self._page_of(x) for x in (self.tokens(position), end - 1))
        return exist & self._known(plgpu.load(self.indices_ref.at[jnp.minimum(page, last)]))

    def _scales_at(self, rows: jax.Array, position: jax.Array) -> tuple[Any, Any]:
        """k's and v's of the tokens from `position` on, whose rows of K these are."""
        if not self.source.scales_in_line:
            at = scale_row(rows, self.source.strides)
            return self.scale_refs.k.at[at], self.scale_refs.v.at[at]
        assert self.indices_ref is not None
        page_size = self.source.page_size
        line = line_of(self.head, self.indices_ref.shape[0], page_size) + self.start * page_size
        at = line + self.tokens(position)
        lines = self.scale_refs
        return lines.at[at], lines.at[at + lines.shape[0] // 2]

    def _between(self, position, begin, end):
        tokens = self.tokens(position)
        return tokens < end if begin is None else (tokens < end) & (tokens >= begin)

    def _pages(self, position: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of the tokens from `position` on: page ids, slots, and whether the page is one of the cache."""
        page, slot = self._page_and_slot(position)
        assert self.indices_ref is not None
        entry = jnp.minimum(page, self._page_of(end - 1))
        page_id = plgpu.load(self.indices_ref.at[self.start + entry])
        return page_id, slot, self._known(page_id)

    def _page_of(self, position: jax.Array) -> jax.Array:
        return divmod_by(position, self.source.page_size)[0]

    def _known(self, page_id: jax.Array) -> jax.Array:
        """Whether a page is one of the cache."""
        assert self.source.num_pages is not None
        return is_page(page_id, self.source.num_pages)

    def _page_and_slot(self, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Which page of its request and which slot of the page, int32 [k], hold the tile's tokens.

        The page is a scalar where all lie in one and `page_at_once`.
        """
        block, page_size = self.source.block, self.source.page_size
        offset = jnp.arange(block, dtype=jnp.int32)
        if self.source.page_at_once and page_size % block == 0:
            page, slot = divmod_by(position, page_size)
            return page, slot + offset
        if block % page_size == 0 and not self.source.scales_per_token:
            # The tile starts with a page: only the first page's number changes from tile to tile. The rest
            # stays in registers, for which scales of tokens leave no room.
            page, slot = divmod_by(offset, page_size)
            return divmod_by(position, page_size)[0] + page, slot
        return divmod_by(position + offset, page_size)


def is_page(page_id: jax.Array, num_pages: int) -> jax.Array:
    """Whether a page is one of a cache's."""
    # Unsigned, a negative id is a large one.
    return page_id.astype(jnp.uint32) < jnp.uint32(num_pages)


def line_of(head: jax.Array, capacity: int, page_size: int) -> jax.Array:
    """Where a head's line of `_scales_in_line` begins: it has a place for each slot of each entry of the page table."""
    return head * (capacity * page_size)


def scale_row(row: jax.Array, strides: RowStrides) -> jax.Array:
    """Where a token's scales lie, from its row of K: they have pages of their own, also where K and V share theirs."""
    if not strides.value:
        return row
    page, rest = divmod_by(row, strides.page)
    return page * strides.value + rest


def load_rows(ref: jax.Ref, rows: jax.Array, cols: jax.Array, mask: jax.Array | None) -> jax.Array:
    """ref[rows, cols] as a tile [rows, cols]; 0 where masked."""
    return plgpu.load(
        ref.at[rows[:, None], cols[None, :]],
        mask=mask,
        other=None if mask is None else jnp.zeros((), ref.dtype),
    )


def load_whole_rows(ref: jax.Ref, rows: jax.Array, exist: jax.Array | None) -> jax.Array:
    """All columns of some rows, [rows, pow2(columns)]; 0 beyond the columns, and where not exist [rows, 1]."""
    cols = jnp.arange(pow2(ref.shape[1]), dtype=jnp.int32)
    inside = None if cols.size == ref.shape[1] else (cols < ref.shape[1])[None, :]
    return load_rows(ref, rows, cols, both(exist, inside))
