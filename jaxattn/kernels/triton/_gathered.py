"""The keys inside a row's bracket, gathered from its chunks, and the search among them."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxattn.kernels.triton._rows import load, pow2
from jaxattn.kernels.triton._token_rows import Row, Rows, between, middle
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

    chunks: int  # a power of two
    ways: int
    facts: Row
    count: Any  # int32 [chunks], of keys
    keys: Callable[
        [Any], Any
    ]  # the i-th some of each chunk [chunks * some]; where there is none, less than any
    first: Any  # the first of these, mostly all: read once
    mass: Mass  # of the first

    @classmethod
    def of(cls, rows: Rows, facts: Row, gathered: Gathered, row) -> "Inside":
        chunks = pow2(rows.chunks)
        some = max(1, rows.config.gathered // chunks)
        # One axis, as a sum over two is two sums, each with a barrier.
        element = jnp.arange(chunks * some, dtype=jnp.int32)
        chunk, place = element // some, element % some
        there = None if chunks == rows.chunks else chunk < rows.chunks
        count = load(gathered.counts, (row, chunk), there)
        begin = (row * rows.chunks + chunk) * rows.config.chunk + place

        def keys(i):
            return load(gathered.keys, begin + i * some, i * some + place < count, LEAST)

        first, ways = keys(0), rows.config.ways
        mass = facts.mass(value_of(first))
        return cls(chunks, ways, facts, rows.of_chunks(gathered.counts, row), keys, first, mass)

    def fold(self, tile, carry):
        """Folds tile(keys, mass, carry) over the keys."""

        def step(i, carry):
            keys = self.keys(i)
            return tile(keys, self.facts.mass(value_of(keys)), carry)

        some = self.first.size // self.chunks
        steps = (jnp.max(self.count) + some - 1) // some
        return jax.lax.fori_loop(1, steps, step, tile(self.first, self.mass, carry))

    def above(self, t) -> Mass:
        """The mass of the gathered keys above each of t [ways]."""

        def add(keys, mass, above):
            chosen = keys[None, :] > t[:, None]
            parts = (jnp.sum(jnp.where(chosen, part[None, :], 0), axis=1) for part in mass)
            return above.plus(Mass(*parts).carried())

        zero = jnp.zeros_like(t)
        return self.fold(add, Mass(zero, zero))

    def num_above(self, t):
        """int32 [ways], how many of the gathered keys are above each of t."""

        def add(keys, _, count):
            return count + jnp.sum((keys[None, :] > t[:, None]).astype(jnp.int32), axis=1)

        return self.fold(add, jnp.zeros_like(t))

    def at_least(self, t) -> Mass:
        """The mass, by chunk, of the gathered keys from t on."""

        def add(keys, mass, parts):
            return Mass(*(a + jnp.where(keys >= t, b, 0) for a, b in zip(parts, mass)))

        none = jnp.zeros_like(self.first)
        parts = self.fold(add, Mass(none, none))
        shape = self.chunks, -1
        return Mass(*(jnp.sum(part.reshape(shape), axis=1) for part in parts)).carried()

    def with_count(self, low, high, top_k):
        """The least gathered key t in (low, high] that less than top_k others exceed, where that is so at high."""
        return self._search(
            low,
            high,
            (jnp.sum(self.count),),
            (jnp.int32(0),),
            lambda t: (self.num_above(t),),
            lambda count: count < top_k,
            lambda _, above_low, above_high: above_low[0] - above_high[0] <= 1,
        )

    def with_mass(self, low, high, total: Mass, above_high: Mass, asked: Mass):
        """The least gathered key t in (low, high] above which less than `asked` lies, where that is so at high.

        total: at least what is above low. above_high: the mass above the bracket.
        """

        def one_is_left(low, above_low, above_high):
            # Two keys above low would weigh more than one and a half of the least that can be there.
            least = self.facts.mass(value_of(low + 1)).high
            return Mass(*above_low).less_than(
                Mass(*above_high).plus(Mass(least + (least >> 1), jnp.int32(0)))
            )

        return self._search(
            low,
            high,
            total,
            above_high,
            lambda t: tuple(above_high.plus(self.above(t))),
            lambda *above: Mass(*above).less_than(asked),
            one_is_left,
        )

    def _search(self, low, high, above_low, above_high, above, enough, settled):
        """The gathered key that is left in (low, high] when what is above each of some pivots has narrowed it.

        above_low, above_high: a tuple of int32, what is above low, at most, and above high, at least.
        above(t [ways]): that of pivots. enough(*above): whether a pivot is high enough.
        settled(low, above_low, above_high): whether one key at most is between.
        """

        def unsettled(state):
            low, high, *above = state
            return (middle(low, high) != low) & ~settled(low, *above)

        def narrow(state):
            low, high, above_low, above_high = state
            t = between(low, high, self.ways)
            there = above(t)
            yes = enough(*there)
            to_low = jnp.max(jnp.where(yes, low, t))
            to_high = jnp.min(jnp.where(yes, t, high))

            def above_key(key, old_key, old):
                found = (jnp.max(jnp.where(t == key, x, 0)) for x in there)
                return tuple(jnp.where(key == old_key, a, b) for a, b in zip(old, found))

            return (
                to_low,
                to_high,
                above_key(to_low, low, above_low),
                above_key(to_high, high, above_high),
            )

        state = low, high, tuple(above_low), tuple(above_high)
        low, high, *_ = jax.lax.while_loop(unsettled, narrow, state)

        def largest(keys, _, found):
            return jnp.maximum(found, jnp.max(jnp.where(keys <= high, keys, LEAST)))

        return self.fold(largest, low + 1)
