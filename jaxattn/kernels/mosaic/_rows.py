"""The packed rows (query token x query head of a KV head's group) of a unit, and what they see of its keys.

What a row sees is `spec.Visible`'s; here it becomes tiles that need no mask, and the mask of those that do.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxattn.kernels.mosaic._online_softmax import ROW, ROWS, TILE, along_keys
from jaxattn.kernels.mosaic._units import Statics, Unit
from jaxattn.spec import FAR


class Phases(NamedTuple):
    """The tiles of a unit, counted from the last: masked are 0 .. plain - 1 and those from `low` on."""

    plain: jax.Array  # at least 1: tile 0 is always masked
    low: jax.Array


@dataclasses.dataclass(frozen=True)
class Rows:
    """The 64 packed rows of a warpgroup in a unit, and what they see."""

    static: Statics
    unit: Unit
    first: jax.Array  # packed row
    tile_first: jax.Array  # the first row of the tile of both warpgroups

    @classmethod
    def of(cls, static: Statics, unit: Unit, warpgroup: jax.Array | int) -> "Rows":
        first = unit.item.row_begin
        return cls(static, unit, first + warpgroup * ROWS, first)

    def first_key(self, i: jax.Array | int) -> jax.Array:
        """The position of the first key of the unit's i-th tile, counted from the last."""
        span = self.unit.span
        return span.origin + (span.tiles - 1 - i) * self.static.source.block

    def q_rows(self, row: jax.Array) -> jax.Array:
        """Rows of q and o, -1 for those that the tile does not own; row int32, of the 64 rows here."""
        group, kv_heads = self.static.spec.group, self.static.spec.num_kv_heads
        packed = self.first + row
        token, member = lax.div(packed, group), lax.rem(packed, group)
        at = (token * kv_heads + self.unit.head) * group + member
        return jnp.where((row < ROWS) & (packed < self.unit.item.row_end), at, -1)

    def query_heads(self, row: jax.Array) -> jax.Array:
        group = self.static.spec.group
        return self.unit.head * group + lax.rem(self.first + row, group)

    def _position(self, packed: Any) -> Any:
        return lax.div(packed, self.static.spec.group) + self.unit.item.q_position

    def phases(self) -> Phases:
        """Which tiles every row of the whole tile sees in full."""
        span, block = self.unit.span, self.static.source.block
        first = self._position(self.tile_first)
        last = self._position(self.unit.item.row_end - 1)
        begin, end = self.static.spec.visible.all(first, last, span.end)
        below = jnp.clip(lax.div(jnp.maximum(end - span.origin, 0), block), 0, span.tiles)
        plain = jnp.maximum(span.tiles - below, 1)
        begin = jnp.maximum(begin, span.begin)
        low = span.tiles - lax.div(jnp.maximum(begin - span.origin, 0) + (block - 1), block)
        # Where a page in use is not in the cache, no tile goes unmasked.
        plain = jnp.where(span.absent != 0, span.tiles, plain)
        return Phases(plain, jnp.maximum(low, plain))

    def mask(self, s: jax.Array, first_key: jax.Array) -> jax.Array:
        """Scores s [r, k] of the keys from first_key on, -inf where a row does not see the key."""
        visible, span = self.static.spec.visible, self.unit.span
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW)
        position = self._position(self.first + row)
        key = first_key + plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=TILE)
        right = FAR if visible.window_right is None else visible.window_right
        end = jnp.minimum(position + (right + 1), span.end)
        seen = key < along_keys(end, s)
        if visible.window_left is not None:
            begin = jnp.maximum(position - visible.window_left, span.begin)
            seen &= key >= along_keys(begin, s)
        elif not self.static.source.paged:
            seen &= key >= span.begin
        return jnp.where(seen, s, -jnp.inf)
