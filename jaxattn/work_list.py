"""Work lists: from tiles of query rows and the keys they see to a list of equal shares of work.

A tile whose keys exceed a fair share of the batch's total is split along its keys, so that any mix of lengths fills
the GPU (FlashDecoding; Stream-K's fair share). With `fill` work items needed to fill it,

    share = total keys / fill (at least a block, or several),   splits of a tile = its keys / share, rounded, at least 1

never makes more than `num_tiles + fill` items, of which at most `4 / 3 * fill` belong to split tiles. These bounds come
from shapes alone, so the contents of the index arrays are free: other lengths never recompile.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxattn.page_table import PageTable

KV_BLOCK = 128  # keys; splits that are not fixed are cut at multiples of it, which every kernel tile divides
# The least share of tall tiles: a split writes and merges rows that cost more than the keys it saves. H200, prefill of
# 1 x 512: 21.4 us; a block 25.3, two 25.7; 1 x 16 on 4096: 18.5 us, 8 blocks 22.7. Tiles of few rows gain to the last
# block: decode of 1 x 1024 8.1 us, 2 blocks 9.2, 4 blocks 11.5; 1 x 8192 15.2, 15.3, 16.6; within 3% at more keys.
MIN_TALL_BLOCKS = 4
# Of this many tiles, running sums are sums over all pairs: one kernel, where XLA's are two each. H200, XLA's plan of a
# decode step of 128 requests: 8.3 us, 10.6; 512: 11.7, 13.5; but 1024: 19.0, 14.9.
MAX_PAIRWISE = 512


class WorkItem(NamedTuple):
    """A share of a tile: what a program does for each KV head. All int32.

    Packed row r stands for query token r // g and query head `kv_head * g + r % g`.
    """

    row_begin: Array  # the tile's rows are row_begin .. row_end - 1, at most block_rows of them
    row_end: Array
    q_position: Array  # query token i stands at position i + it of its request
    page_start: Array  # the request's first entry in page_indices; its first contiguous key
    kv_begin: Array  # the item's keys are kv_begin .. kv_end - 1; with mask bits, of those that the tile visits
    kv_end: Array
    split: Array  # which of the tile's splits it is
    num_splits: Array  # of the tile; with 1 it writes the output
    slot: Array  # where the tile's num_splits partial attention states begin
    own_end: Array  # the request's keys end there: what lies behind, in a page or a row, may hold anything

    @classmethod
    def read(cls, items: Any, n: Any) -> "WorkItem":
        """The n-th of a plan's items, an array or a kernel's ref."""
        return cls(*(items[n, i] for i in range(len(cls._fields))))


class Tiles(NamedTuple):
    """Tiles before they are split; int32 [any] each, fields as in `WorkItem`."""

    row_begin: Array
    row_end: Array
    q_position: Array
    page_start: Array
    kv_begin: Array
    kv_end: Array
    own_end: Array


@dataclasses.dataclass(frozen=True)
class Keys:
    """Where the keys of b requests lie; fields as in `AttentionPlan`."""

    page_indices: Array | None
    page_start: Array
    kv_len: Array
    kv_end: Array
    page_size: int
    num_entries: Array | int = 0  # of page_indices that a request owns
    most: int | None = None  # keys that a request may have, where shapes bound them

    @classmethod
    def of(cls, table: PageTable, page_size: int) -> "Keys":
        """The keys of a page table's requests."""
        (start, num_pages), kv_len = table.rows(), table.kv_len(page_size)
        kv_end = jnp.minimum(kv_len, num_pages * page_size)
        end = jnp.clip(table.indptr[-1], 0, table.indices.size)
        most = table.indices.size * page_size
        return cls(table.indices, start, kv_len, kv_end, page_size, end, most)

    def as_function(self) -> tuple[Callable[..., "Keys"], tuple[Array, ...]]:
        """(function, lengths): function(*lengths) are these keys; other lengths have theirs."""

        def keys_of(page_start: Array, kv_len: Array, kv_end: Array) -> "Keys":
            return dataclasses.replace(self, page_start=page_start, kv_len=kv_len, kv_end=kv_end)

        return keys_of, (self.page_start, self.kv_len, self.kv_end)

    def page_range(self, begin: int | Array) -> Array | None:
        """As `AttentionPlan.page_range`, of the keys from position begin [b] on."""
        if self.page_indices is None:
            return None
        entry = jnp.arange(self.page_indices.size, dtype=jnp.int32)
        used = entry < self.num_entries
        if not isinstance(begin, int):
            request = jnp.searchsorted(self.page_start, entry, side="right") - 1
            first = self.page_start + begin // self.page_size
            used &= entry >= first[jnp.maximum(request, 0)]
        most = jnp.int32(2**31 - 1)
        page = jnp.where(self.page_indices < 0, most, self.page_indices)
        # The lowest is the highest of the negated: one reduction, and so one kernel of XLA's, for both.
        ends = jnp.stack([-jnp.where(used, page, most), jnp.where(used, page, 0)]).max(axis=1)
        return ends * jnp.asarray([-1, 1], jnp.int32)


def aligned(begin: int | Array, page_size: int, shape: tuple[int, ...]) -> Array:
    """The first keys of tiles, where a kernel's may begin: at a page's first, or a block's within a page."""
    step = min(page_size & -page_size, KV_BLOCK)
    begin = jnp.broadcast_to(jnp.asarray(begin, jnp.int32), shape)
    return begin if step == 1 else begin - begin % step


class WorkList(NamedTuple):
    items: Array  # int32 [w, 10], a `WorkItem` a row
    owner: Array  # int32 [w], the tile of each
    num_items: Array  # int32 [1], how many of the items are used: the first ones
    num_slots: int  # capacity for partial states that they need


@dataclasses.dataclass(frozen=True)
class Splitting:
    """How the keys of tiles are cut.

    Attributes:
      fill: items that fill the GPU, where `split_size` is None.
      split_size: keys of a split, fixed; 0: tiles stay whole.
      max_splits: splits of all tiles together, at most, where the size is fixed.
      tall: the tiles wait for arithmetic, not for memory alone.
    """

    fill: int
    split_size: int | None
    max_splits: int
    tall: bool

    def capacity(self, num_tiles: int) -> int:
        """Items, at most."""
        if self.split_size is None:
            return num_tiles + self.fill
        return self.max_splits if self.split_size else num_tiles

    @property
    def num_slots(self) -> int:
        """Partial states, at most."""
        if self.split_size is None:
            return -(-4 * self.fill // 3)
        return self.max_splits if self.split_size else 0


def make_work_list(tiles: Tiles, how: Splitting) -> WorkList:
    num_tiles = tiles.kv_end.size
    entry = jnp.arange(how.capacity(num_tiles), dtype=jnp.int32)
    item, owner, num_items = list_items(tiles, how, entry, ByIndex())
    return WorkList(jnp.stack(item, axis=1), owner, num_items, how.num_slots)


class ByIndex:
    """Sums and look-ups of int32 [n] in XLA."""

    def running_sum(self, x: Array) -> tuple[Array, Array]:
        """(x[0], x[0] + x[1], ...; the whole sum [1])."""
        ends = running_sum(x)
        return ends, ends[-1:]

    def find(self, ends: Array, entry: Array) -> tuple[Array, Callable[[Array], Array]]:
        """(i with ends[i - 1] <= entry < ends[i], n for none; x [n] -> x[i])."""
        # Unrolled, the search is one kernel with the gathers that follow it.
        i = jnp.searchsorted(ends, entry, side="right", method="scan_unrolled").astype(jnp.int32)
        return i, lambda x: x[i]


class ByComparison:
    """The same where arrays lie in registers, which have no indices."""

    def running_sum(self, x: Array) -> tuple[Array, Array]:
        return jnp.cumsum(x, dtype=jnp.int32), x.sum(dtype=jnp.int32)[None]

    def find(self, ends: Array, entry: Array) -> tuple[Array, Callable[[Array], Array]]:
        i = (ends[None, :] <= entry[:, None]).sum(axis=1, dtype=jnp.int32)
        here = jnp.arange(ends.size, dtype=jnp.int32)[None, :] == i[:, None]
        return i, lambda x: jnp.where(here, x[None, :], 0).sum(axis=1, dtype=jnp.int32)


def list_items(
    tiles: Tiles, how: Splitting, entry: Array, sums: ByIndex | ByComparison
) -> tuple[WorkItem, Array, Array]:
    """The items with these numbers: (their fields [entries], their tiles [entries], how many items are used [1])."""
    keys = jnp.maximum(tiles.kv_end - tiles.kv_begin, 0)
    if how.split_size is None:
        splits, piece = _fair_splits(keys, how.fill, _least_share(how.tall))
    elif how.split_size:
        splits = jnp.maximum(-(-keys // how.split_size), 1)
        piece = jnp.full_like(splits, how.split_size)
    else:
        splits, piece = jnp.ones_like(keys), keys

    # Contents that cannot be, an indptr that decreases say, may ask for more slots than there are: tiles stay whole.
    splits = jnp.minimum(splits, how.num_slots + 1)
    partials = jnp.where(splits > 1, splits, 0)
    slot = sums.running_sum(partials)[0] - partials
    fits = slot + partials <= how.num_slots
    splits, piece = jnp.where(fits, splits, 1), jnp.where(fits, piece, keys)
    splits = jnp.where(tiles.row_begin < tiles.row_end, splits, 0)
    # A prompt's last rows see the most keys: begun first, they are not what the GPU waits for in the end.
    listed = _listed(splits, entry, sums, backwards=how.tall)
    of, nth = listed.of, listed.nth
    begin, piece = of(tiles.kv_begin), of(piece)
    item = WorkItem(
        row_begin=of(tiles.row_begin),
        row_end=of(tiles.row_end),
        q_position=of(tiles.q_position),
        page_start=of(tiles.page_start),
        kv_begin=begin + nth * piece,
        kv_end=jnp.minimum(begin + (nth + 1) * piece, of(tiles.kv_end)),
        split=nth,
        num_splits=of(splits),
        slot=of(slot),
        own_end=of(tiles.own_end),
    )
    # An unused item owns no rows and no keys, so that its program does nothing.
    nothing = dict.fromkeys(WorkItem._fields, 0) | dict(num_splits=1)
    item = WorkItem(*map(lambda x, empty: jnp.where(listed.used, x, empty), item, nothing.values()))
    return item, listed.owner, listed.total


def may_split(most_keys: int, tall: bool) -> bool:
    """Whether a tile of so many keys at most ever has more than one fair split, however many items fill the GPU."""
    return _shares(_blocks(most_keys), _least_share(tall)) > 1


def _least_share(tall: bool) -> int:
    return MIN_TALL_BLOCKS if tall else 1


def _blocks(keys: Any) -> Any:
    return -(-keys // KV_BLOCK)


def _shares(blocks: Any, share: Any) -> Any:
    """Rounded: a second split for the little that exceeds a share would cost more than it saves."""
    return (2 * blocks + share) // (2 * share)


def _fair_splits(keys: Array, fill: int, min_blocks: int) -> tuple[Array, Array]:
    """The splits of each tile, and the keys of a split, where `fill` items share the keys fairly."""
    blocks = _blocks(keys)
    # The sum over fill, rounded up, by quotients and remainders: the sum itself may exceed an int32.
    rest = (blocks % fill).sum(dtype=jnp.int32)
    share = (blocks // fill).sum(dtype=jnp.int32) - (-rest // fill)
    share = jnp.maximum(share, min_blocks)
    splits = jnp.maximum(_shares(blocks, share), 1)
    # Even pieces; rounding them to whole blocks may need one fewer.
    piece = jnp.maximum(-(-blocks // splits), 1)
    return jnp.maximum(-(-blocks // piece), 1), piece * KV_BLOCK


class _Listed(NamedTuple):
    owner: Array  # [entries] each
    nth: Array
    used: Array
    of: Callable[
        [Array], Array
    ]  # x [n] -> each entry's owner's; of meaning where the entry is used
    total: Array  # [1], the entries that are used


def _listed(
    counts: Array, entry: Array, sums: ByIndex | ByComparison, backwards: bool = False
) -> _Listed:
    ends, total = sums.running_sum(counts)
    used = entry < total
    entry = jnp.where(used, total - 1 - entry if backwards else entry, 0)
    owner, of = sums.find(ends, entry)
    return _Listed(jnp.where(used, owner, 0), entry - of(ends - counts), used, of, total)


def expand(counts: Array, capacity: int) -> tuple[Array, Array, Array]:
    """Lists `counts[i]` entries for each i: (i, its number among them, whether the entry is used), [capacity].

    Those that are used come first.
    """
    listed = _listed(counts, jnp.arange(capacity, dtype=jnp.int32), ByIndex())
    return listed.owner, listed.nth, listed.used


def running_sum(x: Array) -> Array:
    """x[0], x[0] + x[1], ..."""
    if x.size > MAX_PAIRWISE:
        return jnp.cumsum(x, dtype=jnp.int32)
    i = jnp.arange(x.size, dtype=jnp.int32)
    return jnp.where(i[None, :] <= i[:, None], x[None, :], 0).sum(axis=1, dtype=jnp.int32)
