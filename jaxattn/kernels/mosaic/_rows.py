"""The packed rows (query token x query head of a KV head's group) of a unit, and what they see of its keys.

What a row sees is `spec.Visible`'s; here it becomes a mask.
"""

import dataclasses
import enum
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxattn.kernels.mosaic import _warpgroup as wg
from jaxattn.kernels.mosaic._elements import ROW, ROWS, hide
from jaxattn.kernels.mosaic._units import Statics, Unit
from jaxattn.spec import FAR


class Mask(enum.Enum):
    """What a tile has that some rows do not see."""

    BOTH_ENDS = enum.auto()  # keys before a row's first or behind its last
    BEGINNING = enum.auto()  # keys before a row's first, alone


@dataclasses.dataclass(frozen=True)
class Rows:
    """The 64 packed rows of a warpgroup in a unit, and what they see."""

    static: Statics
    unit: Unit
    first: jax.Array  # packed row

    @classmethod
    def of(cls, static: Statics, unit: Unit, warpgroup: jax.Array | int) -> "Rows":
        return cls(static, unit, unit.item.row_begin + warpgroup * ROWS)

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
        if group == 1:
            # A remainder by 1 is a constant, which Mosaic does not lower in a sum with the head.
            return plgpu.layout_cast(jnp.broadcast_to(self.unit.head, row.shape), wg.EACH)
        return self.unit.head * group + lax.rem(self.first + row, group)

    def _position(self, packed: Any) -> Any:
        return lax.div(packed, self.static.spec.group) + self.unit.item.q_position

    def mask(self, s: jax.Array, first_key: jax.Array, mask: Mask) -> jax.Array:
        """Scores s [r, k] of the keys from first_key on, -inf where a row does not see the key."""
        visible, span = self.static.spec.visible, self.unit.span
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW)
        position = self._position(self.first + row)
        begin = end = None
        if visible.window_left is not None or self.static.source.may_begin_early:
            left = FAR if visible.window_left is None else visible.window_left
            begin = jnp.maximum(position - left, span.begin) - first_key
        if mask is Mask.BOTH_ENDS:
            right = FAR if visible.window_right is None else visible.window_right
            end = jnp.minimum(position + (right + 1), span.end) - first_key
        return hide(s, begin, end)
