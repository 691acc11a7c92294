"""Which tokens of each row are likely enough, and one of them drawn; no sort.

A row is a request's logits or probabilities. Its kept tokens are those whose key is at least a threshold: the least
key t above which little enough lies,

    by count:  |{i : key_i > t}| < top_k        by mass:  sum of mass_i over {i : key_i > t}  <  top_p * total

so ties with the last kept token are kept. Rows are cut into chunks, a program each, and the search narrows a bracket
low < t <= high:

1. `_measure`: the peak, the least value and the total weight of each chunk.
2. `_narrow`, twice: what lies above each of `pivots` keys between low and high. The next kernel takes the narrowest
   bracket that these sums, in float32, leave no doubt about: a 289th of the range after two passes of 16 pivots.
3. `_gather`: the keys inside the bracket, some hundred of a row, and the exact mass above it.
4. `_finish`, one program a row: bisects what was gathered. To draw, the kept masses of all chunks find one chunk, and a
   scan of it the token: the first whose running sum exceeds a random share of the kept mass.

A row that keeps by count is gathered from its bracket upwards, all that top_p then has to look at: it is slow for a
top_k of many thousands. A row that keeps all is not searched. So a row is read four times, or two where all rows keep
all, from memory once and then from L2, as long as the batch fits there. One kernel would have to wait for all programs
of a row four times, and nothing says that they all run; a launch costs less than a pass. Each kernel sums up for itself
what the last one left of each chunk.

Grid: (b, chunks), and (b) to finish.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxattn.kernels.triton._launch import Out, launch
from jaxattn.kernels.triton._rows import load, pow2, store
from jaxattn.token_mass import (
    Limits,
    Mass,
    cleaned,
    digits_of,
    key_of,
    mass_of,
    nothing,
    scale_of,
    share,
    value_of,
    value_with_weight,
    weight_of,
)

LARGEST = 2**31 - 1
# Float32 sums of positive numbers in whatever order, a thread's run and then a tree, err by less.
DOUBT = 2e-5
BELOW_ONE = 1 - 2.0**-24  # the largest float32 that is
FAR = 1e38  # pivots between infinite logits: halves the distance


@dataclasses.dataclass(frozen=True)
class Config:
    chunk: int  # elements, a power of two
    block: int  # elements of a load, a power of two: 4 or more for each lane
    loads: int  # loads under way together
    num_warps: int  # one: sums over a warp need no barrier
    pivots: int  # of a pass
    passes: int
    gathered: int  # elements of a row's gathered keys that are looked at together
    scanned: int  # elements of the chosen chunk, likewise
    finish_warps: int


def default_config(rows: int, vocab: int) -> Config:
    """Chunks small enough that few rows still make some hundred programs."""
    chunk = 4096
    while chunk > 1024 and rows * pl.cdiv(vocab, chunk) < 512:
        chunk //= 2
    return Config(
        chunk=min(chunk, max(128, pow2(vocab))),
        block=128,
        loads=4,
        num_warps=1,
        pivots=16,
        passes=2,
        gathered=2048,
        scanned=1024,
        finish_warps=4,
    )


class Chunks(NamedTuple):
    """What the first kernel says of each chunk, float32 [b, chunks]."""

    peak: jax.Array
    least: jax.Array  # of the tokens that can be drawn; inf where there is none
    total: jax.Array


class Gathered(NamedTuple):
    """What `_gather` leaves."""

    keys: jax.Array  # int32 [b * chunks * chunk], of each chunk from its beginning on
    count: jax.Array  # int32 [b, chunks], how many
    total: Mass  # int32 [b, chunks] each, of all tokens
    above: Mass  # of those above the bracket


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

    def over_chunk(self, row, chunk, block, init, unless: Any = False):
        """Folds block(values, *carry) over a chunk's values, unless there is no need."""
        size, loads = (
            self.config.block,
            min(self.config.loads, self.config.chunk // self.config.block),
        )
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
        rate = jnp.float32(1) if limits.rate is None else limits.rate[row]
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
            jnp.int32(rows.vocab) if limits.top_k is None else limits.top_k[row],
            jnp.float32(1) if limits.top_p is None else limits.top_p[row],
            None if limits.min_p is None else limits.min_p[row],
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

    low: jax.Array
    high: jax.Array


class Pass(NamedTuple):
    """What a `_narrow` leaves."""

    bracket: Bracket  # that it searched
    above: jax.Array  # float32 [b, pivots, chunks], what lies above its pivots


def _bracket(rows: Rows, row_facts: Row, last: Pass | None, row):
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


def _measure(rows: Rows, *, chunks: Chunks):
    """The peak, the least and the total of a chunk."""
    row, chunk = pl.program_id(0), pl.program_id(1)
    block, logits = rows.config.block, rows.logits
    none = nothing(logits)
    rate = jnp.float32(1) if rows.limits.rate is None else rows.limits.rate[row]

    def add(values, peak, least, total):
        least = jnp.minimum(least, jnp.where(values > none, values, jnp.inf))
        higher = jnp.maximum(peak, values)
        if logits:  # relative to the peak so far, of each lane
            total = total * weight_of(peak, higher, rate, True)
        return higher, least, total + weight_of(values, higher, rate, logits)

    init = jnp.full(block, none), jnp.full(block, jnp.inf), jnp.zeros(block, jnp.float32)
    peaks, least, total = rows.over_chunk(row, chunk, add, init)
    peak = jnp.max(peaks)
    if logits:
        total = total * weight_of(peaks, peak, rate, True)
    chunks.peak[row, chunk] = peak
    chunks.least[row, chunk] = jnp.min(least)
    chunks.total[row, chunk] = jnp.sum(total)


def _narrow(rows: Rows, *, chunks: Chunks, last: Pass | None, this: Pass):
    """What lies above each pivot, in a chunk."""
    row, chunk = pl.program_id(0), pl.program_id(1)
    pivots, block = rows.config.pivots, rows.config.block
    facts = Row.of(rows, chunks, row)
    low, high = _bracket(rows, facts, last, row)

    @pl.when(chunk == 0)
    def _():
        this.bracket.low[row] = low
        this.bracket.high[row] = high

    pivot = [facts.pivot(low, high, jnp.int32(i), pivots) for i in range(pivots)]
    by_count = facts.by_count

    def add(values, *above):
        key = key_of(values)
        weight = jnp.where(by_count, 1.0, facts.weight(values))
        # The sum chosen, not the summand: an addition with a predicate.
        return tuple(jnp.where(key > p, a + weight, a) for a, p in zip(above, pivot))

    init = (jnp.zeros(block, jnp.float32),) * pivots
    done = middle(low, high) == low
    for i, above in enumerate(rows.over_chunk(row, chunk, add, init, unless=done)):
        this.above[row, i, chunk] = jnp.sum(above)


def _gather(rows: Rows, *, chunks: Chunks, last: Pass | None, bracket: Bracket, gathered: Gathered):
    """The keys of a chunk inside the bracket, and the masses of the chunk and above the bracket."""
    row, chunk = pl.program_id(0), pl.program_id(1)
    facts = Row.of(rows, chunks, row)
    low, high = _bracket(rows, facts, last, row)

    @pl.when(chunk == 0)
    def _():
        bracket.low[row] = low
        bracket.high[row] = high

    # By count, also what is above: top_p looks at all of it.
    top = jnp.where(facts.by_count, LARGEST, high) if rows.limits.top_k is not None else high
    begin = (row * rows.chunks + chunk) * rows.config.chunk

    def add(values, count, total, above):
        key, mass = key_of(values), facts.mass(values)
        is_above = key > top
        if rows.limits.searched:
            inside = (key > low) & ~is_above
            place = count + jnp.cumsum(inside.astype(jnp.int32)) - 1
            store(gathered.keys, begin + place, inside, key)
            count += jnp.sum(inside.astype(jnp.int32))
        return (
            count,
            Mass(*(a + b for a, b in zip(total, mass))),
            Mass(*(a + jnp.where(is_above, b, 0) for a, b in zip(above, mass))),
        )

    zeros = Mass(*(jnp.zeros(rows.config.block, jnp.int32),) * 2)
    count, *masses = rows.over_chunk(row, chunk, add, (jnp.int32(0), zeros, zeros))
    gathered.count[row, chunk] = count
    for refs, parts in zip((gathered.total, gathered.above), masses, strict=True):
        mass = Mass(*map(jnp.sum, parts)).carried()
        refs.high[row, chunk] = mass.high
        refs.low[row, chunk] = mass.low


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
        return self.rows.of_chunks(self.gathered.count, self.row)

    def fold(self, tile, init):
        """Folds tile(keys [chunks * some], carry) over the keys; where there is none, the key is less than any.

        One axis, as a sum over two is two sums, each with a barrier.
        """
        rows, chunks = self.rows, pow2(self.rows.chunks)
        some = max(1, rows.config.gathered // chunks)
        element = jnp.arange(chunks * some, dtype=jnp.int32)
        chunk, place = element // some, element % some
        there = None if chunks == rows.chunks else chunk < rows.chunks
        count = load(self.gathered.count, (self.row, chunk), there)
        first = (self.row * rows.chunks + chunk) * rows.config.chunk + place

        def step(i, carry):
            exist = i * some + place < count
            keys = load(self.gathered.keys, first + i * some, exist, -LARGEST - 1)
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


def middle(low, high):
    """The key half way from low to high; low itself where there is none between."""
    return (low & high) + ((low ^ high) >> 1)


def _finish(
    rows: Rows,
    *,
    chunks: Chunks,
    bracket: Bracket,
    gathered: Gathered,
    digits_ref,  # int32 [b, 3]; None: nothing is drawn
    threshold_ref,  # int32 [b], the least key that is kept
    kept_ref,  # float32 [b], the weight that is kept
    token_ref,  # int32 [b]; -1 of a row without mass
    joint: bool,
):
    row = pl.program_id(0)
    limits = rows.limits
    facts = Row.of(rows, chunks, row)
    chunk, _ = rows.each_chunk()

    def masses(refs: Mass) -> Mass:
        return Mass(*(rows.of_chunks(ref, row) for ref in refs))

    def summed(parts: Mass) -> Mass:
        return Mass(*map(jnp.sum, parts)).carried()

    above = masses(gathered.above)
    inside = Inside(rows, facts, gathered, row, summed(above))
    low, high = bracket.low[row], bracket.high[row]
    threshold, at_least = low + 1, jnp.sum(inside.count)
    total = summed(masses(gathered.total))
    if limits.top_k is not None:
        high_k = jnp.where(facts.by_count, high, low)
        above_high, _ = inside.above_key(high_k, mass=False)
        threshold = inside.search(
            low, high_k, at_least, above_high, lambda count, _: count < facts.top_k, mass=False
        )
        if limits.top_p is not None:
            at_least, of_k = inside.above_key(threshold - 1, mass=True)
            if not joint:
                total = Mass(*(jnp.where(facts.by_count, a, b) for a, b in zip(of_k, total)))
            high = jnp.where(facts.by_count, key_of(facts.peak), high)
    if limits.top_p is not None:
        asked, left_out = share(total, digits_of(jnp.minimum(facts.top_p, BELOW_ONE)))
        asked = asked.plus(Mass(jnp.int32(0), left_out.astype(jnp.int32)))
        low = threshold - 1
        high = jnp.where(facts.top_p < 1, high, low)
        threshold = inside.search(
            low, high, at_least, jnp.int32(0), lambda _, mass: mass.less_than(asked), mass=True
        )
    if limits.min_p is not None:
        threshold = jnp.maximum(threshold, facts.floor)
    threshold_ref[row] = threshold

    kept = above.plus(inside.at_least(threshold)) if limits.searched else above
    all_kept = summed(kept)
    kept_ref[row] = all_kept.weight(facts.scale)
    if digits_ref is None:
        return

    # The chunk, and then the token, whose running sum is the first to exceed the drawn one.
    drawn, _ = share(all_kept, [digits_ref[row, i] for i in range(digits_ref.shape[1])])
    running = Mass(*(jnp.cumsum(part) for part in kept)).carried()
    before = ~drawn.less_than(running)
    chosen = jnp.minimum(jnp.sum(before.astype(jnp.int32)), rows.chunks - 1)
    passed = summed(Mass(*(jnp.where(chunk < chosen, part, 0) for part in kept)))
    begin, size = chosen * rows.config.chunk, min(rows.config.scanned, rows.config.chunk)

    def scan(i, carry):
        token, passed = carry
        values = rows.values(row, begin + i * size, size)
        mass = facts.mass(values)
        mass = Mass(*(jnp.where(key_of(values) >= threshold, part, 0) for part in mass))
        running = Mass(*(jnp.cumsum(part) for part in mass))
        before = ~drawn.less_than(passed.plus(running))
        return token + jnp.sum(before.astype(jnp.int32)), passed.plus(summed(mass))

    token, _ = jax.lax.fori_loop(0, rows.config.chunk // size, scan, (begin, passed))
    token_ref[row] = jnp.where((all_kept.high | all_kept.low) > 0, token, -1)


def select(
    x: jax.Array,
    limits: Limits,
    digits: jax.Array | None,
    *,
    logits: bool,
    joint: bool,
    interpret: bool,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """What each row of x [b, vocab] keeps, and one of these tokens.

    Args:
      limits: arrays [b].
      digits: int32 [b, 3] random digits; None: nothing is drawn.
      logits: of x; else probabilities.
      joint: top_p is a share of all of the row's mass, not of what top_k keeps.

    Returns:
      (the least key kept int32 [b], the weight kept float32 [b], tokens int32 [b] or None).
    """
    b, vocab = x.shape
    config = config or default_config(b, vocab)
    chunks = pl.cdiv(vocab, config.chunk)

    def run(kernel, grid, inputs, outputs, **static):
        def body(*, x_ref, limits, **refs):
            kernel(Rows(x_ref, limits, logits, config), **refs, **static)

        finishes = kernel is _finish
        return launch(
            body,
            dict(x_ref=x, limits=limits, **inputs),
            outputs,
            name=f"jaxattn_sampling{kernel.__name__}",
            grid=grid,
            num_warps=config.finish_warps if finishes else config.num_warps,
            num_stages=1,
            interpret=interpret,
        )

    by_chunk, by_row = (b, chunks), (b,)
    f32, i32 = jnp.float32, jnp.int32
    facts = Chunks(*(Out(by_chunk, f32),) * 3)
    facts = run(_measure, by_chunk, {}, dict(chunks=facts))["chunks"]
    bracket, last = Bracket(*(Out(by_row, i32),) * 2), None
    for _ in range(config.passes if limits.searched else 0):
        this = Pass(bracket, Out((b, config.pivots, chunks), f32))
        inputs = dict(chunks=facts, last=last)
        last = run(_narrow, by_chunk, inputs, dict(this=this))["this"]
    mass = Mass(*(Out(by_chunk, i32),) * 2)
    gathered = Gathered(Out((b * chunks * config.chunk,), i32), Out(by_chunk, i32), mass, mass)
    left = run(
        _gather,
        by_chunk,
        dict(chunks=facts, last=last),
        dict(bracket=bracket, gathered=gathered),
    )
    outputs = dict(
        threshold_ref=Out(by_row, i32),
        kept_ref=Out(by_row, f32),
        token_ref=None if digits is None else Out(by_row, i32),
    )
    inputs = dict(chunks=facts, **left, digits_ref=digits)
    made = run(_finish, by_row, inputs, outputs, joint=joint)
    return made["threshold_ref"], made["kept_ref"], made["token_ref"]
