"""A row of tokens that a sampling kernel reads: its chunks, what is asked of it, and the bracket of its threshold."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxattn.kernels.triton._rows import load, pow2
from jaxattn.token_mass import (
    Limits,
    Mass,
    cleaned,
    key_of,
    mass_of,
    nothing,
    scale_of,
    value_of,
    value_with_weight,
    weight_of,
)

# Float32 sums of positive numbers in whatever order, a thread's run and then a tree, err by less.
DOUBT = 2e-5
FAR = 1e38  # pivots between infinite logits: halves the distance


@dataclasses.dataclass(frozen=True)
class Config:
    chunk: int  # elements, a power of two
    block: int  # elements of a load, a power of two: 4 or more for each lane
    loads: int  # loads under way together
    num_warps: int  # one: sums over a warp need no barrier
    pivots: int  # of a pass
    passes: int
    levels: int  # keys of a lane that are packed together
    gathered: int  # elements of a row's gathered keys that are looked at together
    ways: int  # pivots of a step of the search among these, a power of two
    scanned: int  # elements of the chosen chunk, likewise
    finish_warps: int


class Chunks(NamedTuple):
    """What the first kernel says of each chunk, float32 [b, chunks]."""

    peak: Any
    least: Any  # of the tokens that can be drawn; inf where there is none
    total: Any


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a call, static but for refs: what every kernel reads."""

    x_ref: Any  # [b, vocab]
    limits: Limits  # refs
    logits: bool
    config: Config

    @property
    def vocab(self) -> int:
        return self.x_ref.shape[1]

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.vocab, self.config.chunk)

    def values(self, row, begin, size):
        """Cleaned values of the tokens from `begin` on; beyond the vocabulary, of none that is drawn."""
        index = begin + jnp.arange(size, dtype=jnp.int32)
        exist = None if self.vocab % self.config.chunk == 0 else index < self.vocab
        x = load(self.x_ref, (row, index), exist, nothing(self.logits))
        return cleaned(x, self.logits)

    def key(self, values):
        """Keys of cleaned values; a probability's bits are its key."""
        return key_of(values, signed=self.logits)

    def limit(self, ref, row, unlimited):
        """A row's own, or that of all rows."""
        if ref is None:
            return unlimited
        return ref[row if ref.shape[0] > 1 else 0]

    @property
    def lanes(self) -> int:
        """Elements of a load of one for each thread."""
        return min(32 * self.config.num_warps, self.config.block)

    def over_chunk(self, row, chunk, block, init, *, size: int | None = None, unless: Any = False):
        """Folds block(values [size], *carry) over a chunk's values, unless there is no need."""
        config = self.config
        size = size or config.block
        loads = min(config.loads * config.block, config.chunk) // size
        begin = chunk * self.config.chunk
        end = jnp.where(unless, begin, jnp.minimum(begin + self.config.chunk, self.vocab))

        def step(i, carry):
            at = begin + i * (size * loads)
            for values in [self.values(row, at + j * size, size) for j in range(loads)]:
                carry = block(values, *carry)
            return carry

        return jax.lax.fori_loop(0, (end - begin + size * loads - 1) // (size * loads), step, init)

    def each_chunk(self):
        """The numbers of a row's chunks, and which of them exist."""
        chunk = jnp.arange(pow2(self.chunks), dtype=jnp.int32)
        return chunk, None if pow2(self.chunks) == self.chunks else chunk < self.chunks

    def of_chunks(self, ref, row, other=0):
        """ref[row], padded by `other`."""
        chunk, exist = self.each_chunk()
        return load(ref, (row, chunk), exist, other)


@dataclasses.dataclass(frozen=True)
class Row:
    """What is known of a row from its chunks, and what is asked of it: scalars."""

    logits: bool
    vocab: int
    peak: Any
    least: Any
    total: Any
    rate: Any
    top_k: Any
    top_p: Any
    min_p: Any

    @classmethod
    def of(cls, rows: Rows, chunks: Chunks, row) -> "Row":
        limits, logits = rows.limits, rows.logits
        peaks = rows.of_chunks(chunks.peak, row, nothing(logits))
        peak = jnp.max(peaks)
        rate = rows.limit(limits.rate, row, jnp.float32(1))
        totals = rows.of_chunks(chunks.total, row)
        if logits:  # each relative to its chunk's peak
            totals = totals * weight_of(peaks, peak, rate, logits)
        return cls(
            logits,
            rows.vocab,
            peak,
            jnp.min(rows.of_chunks(chunks.least, row, jnp.inf)),
            jnp.sum(totals),
            rate,
            rows.limit(limits.top_k, row, jnp.int32(rows.vocab)),
            rows.limit(limits.top_p, row, jnp.float32(1)),
            rows.limit(limits.min_p, row, None),
        )

    @property
    def by_count(self):
        """Whether the bracket is that of top_k; else that of top_p."""
        return self.top_k < self.vocab

    @property
    def scale(self):
        return scale_of(self.total)

    def weight(self, value):
        return weight_of(value, self.peak, self.rate, self.logits)

    def mass(self, value) -> Mass:
        return mass_of(self.weight(value), self.scale)

    def key_with_weight(self, weight):
        return key_of(value_with_weight(weight, self.peak, self.rate, self.logits))

    @property
    def floor(self):
        """The least key that min_p keeps."""
        peak_weight = jnp.float32(1) if self.logits else self.peak
        return self.key_with_weight(self.min_p * peak_weight)

    def first_bracket(self):
        """low < t <= high; where all is kept, no key is between."""
        peak = key_of(self.peak)
        low = jnp.minimum(key_of(self.least), peak) - 1
        # What top_p leaves out weighs at most (1 - top_p) * total: its tokens' mean weight is not above t's.
        light = self.key_with_weight(0.99 * (1 - self.top_p) * self.total / self.vocab)
        by_mass = jnp.maximum(low, jnp.minimum(light, peak) - 1)
        if self.min_p is not None:
            by_mass = jnp.maximum(by_mass, self.floor - 1)
        low = jnp.where(self.by_count, low, by_mass)
        searched = self.by_count | (self.top_p < 1)
        return low, jnp.where(searched, jnp.maximum(low, peak), low)

    def pivot(self, low, high, i, pivots: int):
        """The i-th of some keys between low and high, evenly spaced in the logarithm of the probability."""
        part = (i + 1).astype(jnp.float32) / (pivots + 1)
        if self.logits:
            a, b = (jnp.clip(value_of(key), -FAR, FAR) for key in (low, high))
            key = key_of(cleaned(a + (b - a) * part, True))
        else:
            key = low + ((high - low).astype(jnp.float32) * part).astype(jnp.int32)
        return jnp.clip(key, low, high)

    def narrower(self, low, high, above, pivots: int):
        """The bracket, when `above` [pivots] lies above the pivots."""
        count, mass = self.top_k.astype(jnp.float32), self.top_p * self.total
        pivot = self.pivot(low, high, jnp.arange(pivots, dtype=jnp.int32), pivots)
        too_low = above >= jnp.where(self.by_count, count, mass * (1 + DOUBT))
        enough = above < jnp.where(self.by_count, count, mass * (1 - DOUBT))
        return (
            jnp.maximum(low, jnp.max(jnp.where(too_low, pivot, low))),
            jnp.minimum(high, jnp.min(jnp.where(enough, pivot, high))),
        )


class Bracket(NamedTuple):
    """Keys int32 [b]: low < threshold <= high; the same where all above is kept."""

    low: Any
    high: Any


class Pass(NamedTuple):
    """What a `_narrow` leaves."""

    bracket: Any  # the Bracket that it searched
    above: Any  # float32 [b, pivots, chunks], what lies above its pivots


def bracket_of(rows: Rows, row_facts: Row, last: Pass | None, row):
    """The bracket that the last pass leaves, or the first one."""
    if last is None:
        return row_facts.first_bracket()
    pivots = rows.config.pivots
    chunk, exist = rows.each_chunk()
    shape = pivots, chunk.size
    index = [
        jnp.full(shape, row, jnp.int32),
        jnp.broadcast_to(jnp.arange(pivots, dtype=jnp.int32)[:, None], shape),
        jnp.broadcast_to(chunk[None, :], shape),
    ]
    exist = None if exist is None else jnp.broadcast_to(exist[None, :], shape)
    above = jnp.sum(load(last.above, tuple(index), exist), axis=1)
    return row_facts.narrower(last.bracket.low[row], last.bracket.high[row], above, pivots)


def middle(low, high):
    """The key half way from low to high; low itself where there is none between."""
    return (low & high) + ((low ^ high) >> 1)


def between(low, high, ways: int):
    """Keys [ways] in (low, high], of which one at least is below high if there is any; ascending, evenly spaced."""
    i = jnp.arange(ways, dtype=jnp.uint32) + 1
    width = (high - low).astype(
        jnp.uint32
    )  # modulo 2^32, as the bracket may be wider than an int32
    step = jnp.maximum(width // (ways + 1), 1)
    return low + jnp.minimum(step * i, width).astype(jnp.int32)
