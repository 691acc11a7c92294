"""Where new tokens go in a paged KV cache.

Token i goes to position `positions[i]` of request `batch_indices[i]`: to slot `position % p` of
page `indices[indptr[request] + position // p]`. A token whose request, position or page does not
exist has no slot: padding tokens carry request -1.

Axes: t tokens of a tile, b requests, p page size.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxattn.kernels.triton._keys import divmod_by
from jaxattn.kernels.triton._rows import Mask, load
from jaxattn.kv_cache import PagedKVCache, RowStrides


@dataclasses.dataclass(frozen=True)
class PageSlots:
    """A cache seen as rows [num_rows, d]."""

    num_pages: int
    page_size: int
    strides: RowStrides

    @classmethod
    def of(cls, cache: PagedKVCache) -> "PageSlots":
        return cls(cache.num_pages, cache.page_size, cache.row_strides)

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


def with_rows(cache: PagedKVCache, rows: Sequence[jax.Array]) -> PagedKVCache:
    """The cache whose arrays, seen as rows, are these."""
    k, *v = (new.reshape(old.shape) for new, old in zip(rows, cache.arrays))
    return PagedKVCache((k, v[0]) if v else k, cache.layout)
