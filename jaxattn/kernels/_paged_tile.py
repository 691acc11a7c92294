"""A tile of keys and values: `block` consecutive tokens of one request, wherever their pages lie.

Caches are rows `[num_rows, d]`; `RowStrides` says which row holds a (page, slot, head). Contiguous keys are one
page that holds every token.

Axes: k tokens of a tile, d head dim (padded to a power of two with zeros).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

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

    def pages(self, position: jax.Array, end: jax.Array | None = None) -> jax.Array:
        """Page ids int32 [k] of the tokens from `position` on. Loading them a tile ahead hides their latency."""
        tokens = position + jnp.arange(self.block, dtype=jnp.int32)
        if self.indices_ref is None:
            return jnp.zeros_like(tokens)
        inside = None if end is None else tokens < end
        return plgpu.load(
            self.indices_ref.at[self.start + tokens // self.page_size],
            mask=inside,
            other=None if end is None else 0,
        )

    def load(
        self, pages: jax.Array, position: jax.Array, end: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """K and V [k, d] of the tokens from `position` on; tokens from `end` on are zeros, and not read."""
        tokens = position + jnp.arange(self.block, dtype=jnp.int32)
        if self.indices_ref is None:
            rows = (self.start + tokens) * self.strides.slot
        else:
            rows = pages * self.strides.page + tokens % self.page_size * self.strides.slot
        rows += self.head * self.strides.head
        cols = jnp.arange(_padded(self.head_dim), dtype=jnp.int32)
        mask = None
        if end is not None:
            mask = (tokens < end)[:, None]
        if cols.size != self.head_dim:
            inside = (cols < self.head_dim)[None, :]
            mask = inside if mask is None else mask & inside
        return load_rows(self.k_ref, rows, cols, mask), load_rows(
            self.v_ref, rows + self.strides.value, cols, mask
        )


def load_rows(ref: jax.Ref, rows: jax.Array, cols: jax.Array, mask: jax.Array | None) -> jax.Array:
    """ref[rows, cols] as a tile [rows, cols]; 0 where masked."""
    return plgpu.load(
        ref.at[rows[:, None], cols[None, :]],
        mask=mask,
        other=None if mask is None else jnp.zeros((), ref.dtype),
    )


def _padded(head_dim: int) -> int:
    return 1 << (head_dim - 1).bit_length()
