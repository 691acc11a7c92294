"""Which blocks of keys a tile visits under mask bits: those with a bit set; and which of them need no masking.

A tile's blocks are listed once for all layers of a step. Clear ones are left out, so they are never read; of a block
whose bits are all set, the kernel looks up none.

Axes: b requests, x (tile, block) pairs, v visits, w work items.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxattn.operands import MaskBits
from jaxattn.spec import AttentionSpec
from jaxattn.work_list import KV_BLOCK, Keys, Tiles, expand, running_sum

MAX_TESTS = 2**24  # bits looked at in one go


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PlannedMask:
    """Mask bits, and what the kernel reads of them.

    Attributes:
      mask: as given.
      visits: int32 [v], `2 * block + (all its bits are set)`, block of KV_BLOCK keys; those of a tile in order.
      items: int32 [w, 4], a `MaskItem` for each work item.
    """

    mask: MaskBits
    visits: Array
    items: Array


class MaskItem(NamedTuple):
    """Of a work item. Token t of q and key j have the bit `origin + t * stride + j`. All int32."""

    origin: Array
    stride: Array
    first_visit: Array  # of its tile
    kv_end: Array  # keys from there on have no page


@dataclasses.dataclass(frozen=True)
class Visits:
    """The blocks that each of a plan's tiles visits; int32 [tiles] each unless they say otherwise."""

    mask: MaskBits
    blocks: Array  # int32 [v], as `PlannedMask.visits`
    first: Array  # each tile's first entry of blocks
    count: Array
    origin: Array  # as in `MaskItem`
    stride: Array
    kv_end: Array

    def over(self, tiles: Tiles) -> Tiles:
        """The tiles, their keys those that they visit, counted from 0."""
        keys = self.count * KV_BLOCK
        return tiles._replace(kv_begin=jnp.zeros_like(keys), kv_end=keys)

    def planned(self, owner: Array) -> PlannedMask:
        """For work items of the tiles `owner`, int32 [w]."""
        item = MaskItem(self.origin, self.stride, self.first, self.kv_end)
        return PlannedMask(self.mask, self.blocks, jnp.stack([x[owner] for x in item], axis=1))


def find_visits(
    mask: MaskBits,
    request: Array,
    tiles: Tiles,
    qo_indptr: Array,
    keys: Keys,
    spec: AttentionSpec,
    block_rows: int,
    limits: Array | None,
) -> Visits:
    """The blocks that each tile visits.

    Args:
      mask: the bits.
      request: int32 [tiles], the request of each tile; b where none owns its rows.
      tiles: their kv_begin and kv_end bound the keys that are looked at.
      qo_indptr, keys: of the b requests.
      spec, limits: what a query sees besides, as in `AttentionPlan`.
      block_rows: rows of a tile, at most.
    """
    mask.check(keys.kv_len.shape[0])
    mask = jax.tree.map(jnp.asarray, mask)
    if not mask.bits.size:  # a kernel takes no array without elements
        mask = MaskBits(jnp.zeros(1, jnp.uint8), mask.indptr)
    group, num_tiles = spec.group, request.size
    # Rows that no request owns have no keys, and so no bits to look up.
    own = jnp.minimum(request, keys.kv_len.shape[0] - 1)
    stride = keys.kv_len[own]
    origin = 8 * mask.indptr[own] - qo_indptr[own] * stride

    # A tile's tokens take a bit for each key, and one tile of a request may have few tokens.
    most = 8 * mask.bits.shape[0]
    capacity = -(-most * group // (block_rows * KV_BLOCK)) + 2 * num_tiles
    if keys.page_indices is not None:
        most = min(most, keys.page_indices.size * keys.page_size)
    capacity += most // KV_BLOCK

    begin = tiles.kv_begin // KV_BLOCK
    counts = jnp.where(tiles.kv_end > tiles.kv_begin, -(-tiles.kv_end // KV_BLOCK) - begin, 0)
    tile, nth, used = expand(counts, capacity)
    tokens = (block_rows + group - 2) // group + 1

    def look(pair: tuple[Array, Array]) -> tuple[Array, Array]:
        """Of some pairs, int32 [x] each: whether any bit is set, and whether all are."""
        tile, block = (a[:, None, None] for a in pair)
        token = tiles.row_begin[tile] // group + jnp.arange(tokens, dtype=jnp.int32)[None, :, None]
        own = token <= (tiles.row_end[tile] - 1) // group
        key = block * KV_BLOCK + jnp.arange(KV_BLOCK, dtype=jnp.int32)[None, None, :]
        if limits is None:
            position = token + tiles.q_position[tile]
            first = spec.visible.begin(position)
            end = spec.visible.end(position, tiles.kv_end[tile])
        else:
            seen = limits.at[token].get(mode="clip")
            first, end = seen[..., 0], seen[..., 1]
        bit = mask.seen(origin[tile] + token * stride[tile] + key)
        bit &= (key >= first) & (key < end) & (key < tiles.kv_end[tile])
        return (own & bit).any(axis=(1, 2)), (bit | ~own).all(axis=(1, 2))

    block = begin[tile] + nth
    some, every = _in_pieces(look, (tile, block), MAX_TESTS // (tokens * KV_BLOCK))
    visited = (some & used).astype(jnp.int32)
    before = jnp.pad(jnp.cumsum(visited, dtype=jnp.int32), (1, 0))
    at = jnp.where(visited == 1, before[:-1], capacity)
    blocks = jnp.zeros(capacity, jnp.int32)
    blocks = blocks.at[at].set(2 * block + every.astype(jnp.int32), mode="drop")
    ends = jnp.minimum(running_sum(counts), capacity)
    first = before[jnp.minimum(ends - counts, capacity)]
    return Visits(mask, blocks, first, before[ends] - first, origin, stride, tiles.kv_end)


def _in_pieces(
    look: Callable[[tuple[Array, Array]], tuple[Array, Array]],
    pairs: tuple[Array, Array],
    size: int,
) -> tuple[Array, Array]:
    """`look` of pairs int32 [x], so many at a time: memory stays bounded."""
    x, size = pairs[0].size, max(size, 1)
    if x <= size:
        return look(pairs)
    tile, block = (jnp.pad(a, (0, -x % size)).reshape(-1, size) for a in pairs)
    some, every = jax.lax.map(look, (tile, block))
    return some.reshape(-1)[:x], every.reshape(-1)[:x]
