"""A tile of keys and values: `block` consecutive tokens of one request, wherever their pages lie.

Caches are rows `[num_rows, d]`; `RowStrides` says which row holds a (page, slot, head). Contiguous keys are one
page that holds every token.

Axes: k tokens of a tile, d head dim (padded to a power of two with zeros).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from jaxattn.kernels._rows import pow2
from jaxattn.kv_cache import RowStrides


@dataclasses.dataclass(frozen=True)
class PagedTile:
    k_ref: jax.Ref  # [num_rows, d]
    v_ref: jax.Ref  # [num_rows, d]; the same array as k_ref where one holds both
    indices_ref: jax.Ref | None  # int32 [capacity]; None for contiguous keys
    start: jax.Array  # the request's first entry in indices; its first row of contiguous keys
    head: jax.Array
    strides: RowStrides
    page_size: int
    block: int
    head_dim: int
    page_at_once: bool  # look up one page for a tile that lies in one

    def tokens(self, position: jax.Array) -> jax.Array:
        """Positions int32 [k] of the tile's tokens in their request."""
        return position + jnp.arange(self.block, dtype=jnp.int32)

    def load(self, position: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
        """K and V [k, d] of the tokens from `position` on.

        Where pages divide `block` it is a page's first token, where blocks divide `page_size` a block's.
        From `end` on values are zeros, and keys are whatever lies there: their scores are for the caller to mask.
        """
        tokens = self.tokens(position)
        if self.indices_ref is None:
            rows = (self.start + jnp.minimum(tokens, end - 1)) * self.strides.slot
        else:
            page, slot = self._page_and_slot(position)
            last, _ = divmod_by(end - 1, self.page_size)
            page_id = plgpu.load(self.indices_ref.at[self.start + jnp.minimum(page, last)])
            rows = page_id * self.strides.page + slot * self.strides.slot
        rows += self.head * self.strides.head
        cols = jnp.arange(pow2(self.head_dim), dtype=jnp.int32)
        inside = None if cols.size == self.head_dim else (cols < self.head_dim)[None, :]
        # A product with a masked weight of 0 needs a finite value: a slot that no request owns may hold NaN.
        exist = (tokens < end)[:, None]
        return (
            load_rows(self.k_ref, rows, cols, inside),
            load_rows(
                self.v_ref,
                rows + self.strides.value,
                cols,
                exist if inside is None else exist & inside,
            ),
        )

    def _page_and_slot(self, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Which page of its request and which slot of the page, int32 [k], hold the tile's tokens.

        The page is a scalar where all lie in one and `page_at_once`.
        """
        offset = jnp.arange(self.block, dtype=jnp.int32)
        if self.page_at_once and self.page_size % self.block == 0:
            page, slot = divmod_by(position, self.page_size)
            return page, slot + offset
        if self.block % self.page_size == 0:
            # The tile starts with a page: only the first page's number changes from tile to tile.
            page, slot = divmod_by(offset, self.page_size)
            return divmod_by(position, self.page_size)[0] + page, slot
        return divmod_by(position + offset, self.page_size)


def divmod_by(x: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """x // n and x % n of non-negative x, without the sign handling of Python's."""
    if n & (n - 1) == 0:
        return x >> (n.bit_length() - 1), x & (n - 1)
    divisor = jnp.full_like(x, n)
    return jax.lax.div(x, divisor), jax.lax.rem(x, divisor)


def load_rows(ref: jax.Ref, rows: jax.Array, cols: jax.Array, mask: jax.Array | None) -> jax.Array:
    """ref[rows, cols] as a tile [rows, cols]; 0 where masked."""
    return plgpu.load(
        ref.at[rows[:, None], cols[None, :]],
        mask=mask,
        other=None if mask is None else jnp.zeros((), ref.dtype),
    )
