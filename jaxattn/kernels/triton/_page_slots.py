"""Where new tokens go in a paged KV cache, and writing them there.

Token i goes to position `positions[i]` of request `batch_indices[i]`: to slot `position % p` of
page `indices[indptr[request] + position // p]`. A token whose request, position or page does not
exist has no slot: padding tokens carry request -1.

Axes: t tokens of a tile, b requests, p page size.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxattn.kernels.triton._keys import scale_row
from jaxattn.kernels.triton._rows import Mask, Rows, divmod_by, load, store
from jaxattn.kv_cache import PagedKVCache, RowStrides
from jaxattn.kv_scales import KVScales, largest, own_scale, stored


@dataclasses.dataclass(frozen=True)
class PageSlots:
    """A cache seen as rows [num_rows, d]."""

    num_pages: int
    page_size: int
    strides: RowStrides
    scales_per_token: bool
    saturating: bool  # a conversion to the cache's dtype does it by itself

    @classmethod
    def of(cls, cache: PagedKVCache, *, interpret: bool) -> "PageSlots":
        per_token = cache.scales is not None and cache.scales.per_token
        # As every GPU does that has the instruction, `cvt.rn.satfinite.e4m3x2.f32`.
        saturating = cache.dtype == jnp.float8_e4m3fn and not interpret
        return cls(cache.num_pages, cache.page_size, cache.row_strides, per_token, saturating)

    def rows(
        self,
        indptr_ref: jax.Ref,  # int32 [b + 1]
        indices_ref: jax.Ref,  # int32 [capacity]
        batch: jax.Array,  # int32 [t]
        position: jax.Array,  # int32 [t]
        exist: Mask,  # [t]
    ) -> tuple[jax.Array, jax.Array]:
        """The row of each token's K, head 0, int32 [t]; and whether it has a slot, bool [t]."""
        page_of_request, slot = divmod_by(position, self.page_size)
        known = (batch >= 0) & (batch < indptr_ref.shape[0] - 1) & (position >= 0)
        known = known if exist is None else exist & known
        begin, end = (
            jnp.clip(load(indptr_ref, row, known), 0, indices_ref.shape[0])
            for row in (batch, batch + 1)
        )
        known &= page_of_request < end - begin
        page = load(indices_ref, begin + page_of_request, known)
        known &= (page >= 0) & (page < self.num_pages)
        return page * self.strides.page + slot * self.strides.slot, known


@dataclasses.dataclass(frozen=True)
class Pages:
    """The pages that a kernel writes to."""

    slots: PageSlots
    written_refs: Sequence[jax.Ref]  # as `rows_of` the cache
    scale_refs: Any  # as `given_scales` of the cache

    def store_k(self, rows: Rows, head: jax.Array, runs: Sequence[tuple[range, jax.Array]]) -> None:
        """Writes key vectors to their rows [...], of KV heads int32 that broadcast; runs of columns, [..., columns].

        Each is divided by its scale, and a scale that is the token's own is written beside it.
        """
        self._store(0, rows, rows, head, runs)

    def store_v(self, rows: Rows, head: jax.Array, runs: Sequence[tuple[range, jax.Array]]) -> None:
        """Writes value vectors; rows are those of their keys."""
        to = Rows(rows.index + self.slots.strides.value, rows.exist)
        self._store(1, rows, to, head, runs)

    def _store(
        self,
        which: int,
        k_rows: Rows,
        rows: Rows,
        head: jax.Array,
        runs: Sequence[tuple[range, jax.Array]],
    ) -> None:
        strides = self.slots.strides
        ref = self.written_refs[0 if strides.value else which]
        scale = None
        if self.slots.scales_per_token:
            scale = own_scale(
                functools.reduce(jnp.maximum, (largest(x) for _, x in runs)), ref.dtype
            )
            at = scale_row(k_rows.index, strides)
            store(self.written_refs[which - 2], at, k_rows.exist, scale)
        elif self.scale_refs is not None:
            scale_ref = self.scale_refs[which]
            last = scale_ref.shape[0] - 1
            given = load(scale_ref, jnp.minimum(head, last), None) if last else scale_ref[0]
            scale = jnp.broadcast_to(given, rows.index.shape)
        scale = None if scale is None else scale[..., None]
        for columns, x in runs:
            y = stored(x, scale, ref.dtype, saturating=self.slots.saturating)
            rows.store(ref, columns, y)


def rows_of(cache: PagedKVCache) -> list[jax.Array]:
    """What an append writes: K's and V's rows [num_rows, d], or those of both; and scales per token [num_rows]."""
    rows = [x.reshape(-1, x.shape[-1]) for x in cache.arrays]
    if cache.scales is not None and cache.scales.per_token:
        rows += [x.reshape(-1) for x in (cache.scales.k, cache.scales.v)]
    return rows


def given_scales(cache: PagedKVCache) -> tuple[jax.Array, jax.Array] | None:
    """The scales that an append does not write, k's and v's: float32 [1] for all, or [kh]."""
    if cache.scales is None or cache.scales.per_token:
        return None
    return cache.scales.k.reshape(-1), cache.scales.v.reshape(-1)


def with_rows(cache: PagedKVCache, rows: Sequence[jax.Array]) -> PagedKVCache:
    """The cache whose arrays, seen as `rows_of` it, are these."""
    leaves = [new.reshape(old.shape) for new, old in zip(rows, cache.arrays)]
    scales = cache.scales
    if scales is not None and scales.per_token:
        k, v = rows[len(leaves) :]
        scales = KVScales(k.reshape(scales.k.shape), v.reshape(scales.v.shape))
    data = leaves[0] if cache.combined else (leaves[0], leaves[1])
    return dataclasses.replace(cache, data=data, scales=scales)
