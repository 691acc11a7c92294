"""Which rows of q belong to a tile, which keys they see, and for which tiles of keys nothing need be masked.

A row sees the keys from its begin to its end: by its own position, or, with spans, by the plan's list. Of these, where
there are mask bits, those whose bit is set.

Axes: r rows of a tile, k keys.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from jaxattn.kernels.triton._rows import divmod_by, load
from jaxattn.spec import FAR, AttentionSpec, Visible
from jaxattn.visits import MaskItem
from jaxattn.work_list import KV_BLOCK


@dataclasses.dataclass(frozen=True)
class RowLimits:
    """Of each row, the keys that it sees, and of all rows together those that every one sees."""

    begin: jax.Array | None  # int32 [r]; None: from 0 on
    end: jax.Array | None  # int32 [r]; None: all
    first_begin: jax.Array | None  # no row sees a key before it; None: 0
    plain_begin: jax.Array | None  # every row sees the keys plain_begin .. plain_end - 1
    plain_end: jax.Array

    @classmethod
    def by_position(
        cls,
        visible: Visible,
        position: jax.Array,  # int32 [r]
        first: jax.Array,  # the first and the last row's
        last: jax.Array,
        kv_end: jax.Array,
        *,
        compare: bool,
    ) -> "RowLimits":
        """From what is visible at a row's position; with `compare`, ends are compared with although there is none."""
        begin = first_begin = plain_begin = end = None
        if visible.window_left is not None:
            begin = visible.begin(position)
            first_begin, plain_begin = visible.begin(first), visible.begin(last)
        plain_end = kv_end
        if visible.window_right is not None or compare:
            right = FAR if visible.window_right is None else visible.window_right
            end = position + (right + 1)
            plain_end = jnp.minimum(first + (right + 1), kv_end)
        return cls(begin, end, first_begin, plain_begin, plain_end)

    @classmethod
    def by_list(
        cls, limits_ref: jax.Ref, token: jax.Array, owned: jax.Array, kv_end: jax.Array
    ) -> "RowLimits":
        """From the plan's list, int32 [t, 2]."""
        column = jnp.zeros_like(token)
        begin = plgpu.load(limits_ref.at[token, column], mask=owned, other=0)
        end = plgpu.load(limits_ref.at[token, column + 1], mask=owned, other=FAR)
        first_begin = jnp.min(jnp.where(owned, begin, FAR))
        return cls(begin, end, first_begin, jnp.max(begin), jnp.minimum(jnp.min(end), kv_end))

    def all_see(self, position: jax.Array, block: int) -> jax.Array:
        """Whether every row sees every one of so many keys from `position` on."""
        seen = position + block <= self.plain_end
        return seen if self.plain_begin is None else seen & (position >= self.plain_begin)

    def seen(self, key: jax.Array) -> jax.Array | None:
        """bool [r, k]: whether a row sees a key; None: all."""
        seen = None
        if self.end is not None:
            seen = key[None, :] < self.end[:, None]
        if self.begin is not None:
            from_begin = key[None, :] >= self.begin[:, None]
            seen = from_begin if seen is None else seen & from_begin
        return seen


@dataclasses.dataclass(frozen=True)
class Bits:
    """A work item's mask bits, and the blocks of keys that its tile visits."""

    mask: Any  # MaskBits of refs
    visits_ref: Any  # int32 [v]
    item: MaskItem

    def visit(self, place: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of the tile's visited keys, the one at `place`: its position, and whether its block's bits are all set."""
        visit = plgpu.load(self.visits_ref.at[self.item.first_visit + place // KV_BLOCK])
        return (visit >> 1) * KV_BLOCK + place % KV_BLOCK, (visit & 1) == 1

    def seen(self, token: jax.Array, key: jax.Array) -> jax.Array:
        """bool [r, k]."""
        index = (self.item.origin + token * self.item.stride)[:, None] + key[None, :]
        return self.mask.seen(index, lambda byte, exists: load(self.mask.bits, byte, exists))


def token_and_row(
    spec: AttentionSpec, head: jax.Array, packed: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of packed rows for a KV head: their query token, and their row of q and o."""
    token, member = divmod_by(packed, spec.group)
    return token, (token * spec.num_kv_heads + head) * spec.group + member
