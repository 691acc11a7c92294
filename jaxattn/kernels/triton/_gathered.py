"""The keys inside a row's bracket, gathered from its chunks, and the search among them."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxattn.kernels.triton._rows import load, pow2
from jaxattn.kernels.triton._token_rows import Row, Rows, middle
from jaxattn.token_mass import (
    Mass,
    value_of,
)

LEAST = -(2**31)  # below all keys


class Gathered(NamedTuple):
    """What `_gather` leaves."""

    keys: Any  # int32 [b * chunks * chunk], of each chunk from its beginning on
    counts: Any  # int32 [b, chunks], how many
    total: Any  # Mass of int32 [b, chunks], of all tokens
    above: Any  # Mass likewise, of those above the bracket


@dataclasses.dataclass(frozen=True)
class Inside:
    """A row's gathered keys, looked at some of each chunk together."""

    rows: Rows
    facts: Row
    gathered: Gathered  # refs
    row: Any
    above: Mass  # of the tokens above the bracket

    @property
    def count(self):
        """int32 [chunks]"""
        return self.rows.of_chunks(self.gathered.counts, self.row)

    def fold(self, tile, init):
        """Folds tile(keys [chunks * some], carry) over the keys; where there is none, the key is less than any.

        One axis, as a sum over two is two sums, each with a barrier.
        """
        rows, chunks = self.rows, pow2(self.rows.chunks)
        some = max(1, rows.config.gathered // chunks)
        element = jnp.arange(chunks * some, dtype=jnp.int32)
        chunk, place = element // some, element % some
        there = None if chunks == rows.chunks else chunk < rows.chunks
        count = load(self.gathered.counts, (self.row, chunk), there)
        first = (self.row * rows.chunks + chunk) * rows.config.chunk + place

        def step(i, carry):
            exist = i * some + place < count
            keys = load(self.gathered.keys, first + i * some, exist, LEAST)
            return tile(keys, carry)

        steps = (jnp.max(self.count) + some - 1) // some
        return jax.lax.fori_loop(
            0, steps, step, jax.tree.map(lambda x: jnp.full(element.size, x, jnp.int32), init)
        )

    def above_key(self, t, *, mass: bool) -> tuple[Any, Mass]:
        """How many gathered keys are above t; and the mass of all tokens above it, if asked for."""

        def add(keys, carry):
            count, parts = carry
            chosen = keys > t
            each = self.facts.mass(value_of(keys)) if mass else ()
            parts = tuple(a + jnp.where(chosen, b, 0) for a, b in zip(parts, each))
            return count + chosen.astype(jnp.int32), parts

        count, parts = self.fold(add, (0, (0, 0) if mass else ()))
        above = self.above.plus(Mass(*map(jnp.sum, parts)).carried()) if mass else self.above
        return jnp.sum(count), above

    def at_least(self, t) -> Mass:
        """The mass, by chunk, of the gathered keys from t on."""

        def add(keys, parts):
            each = self.facts.mass(value_of(keys))
            return tuple(a + jnp.where(keys >= t, b, 0) for a, b in zip(parts, each))

        shape = pow2(self.rows.chunks), -1
        parts = self.fold(add, (0, 0))
        return Mass(*(jnp.sum(part.reshape(shape), axis=1) for part in parts)).carried()

    def search(self, low, high, above_low, above_high, enough, *, mass: bool):
        """The least key t in (low, high] for which enough(*above_key(t)), where that is so at high.

        above_low, above_high: how many gathered keys are above low, and above high.
        """

        def unsettled(state):
            low, high, above_low, above_high = state
            return (middle(low, high) != low) & (above_low - above_high > 1)

        def halve(state):
            low, high, above_low, above_high = state
            t = middle(low, high)
            count, above = self.above_key(t, mass=mass)
            yes = enough(count, above)
            return (
                jnp.where(yes, low, t),
                jnp.where(yes, t, high),
                jnp.where(yes, above_low, count),
                jnp.where(yes, count, above_high),
            )

        state = low, high, above_low, above_high
        low, high, *_ = jax.lax.while_loop(unsettled, halve, state)

        def largest(keys, found):
            return jnp.maximum(found, jnp.where(keys <= high, keys, found))

        # The one key that is left, if there is one.
        return jnp.max(self.fold(largest, low + 1))
