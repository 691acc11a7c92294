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
4. `_finish`, one program a row: searches what was gathered, some pivots at once. To draw, the kept masses of all chunks
   find one chunk, and a scan of it the token: the first whose running sum exceeds a random share of the kept mass.

A row that keeps by count is gathered from its bracket upwards, all that top_p then has to look at: it is slow for a
top_k of many thousands. A row that keeps all is not searched. So a row is read four times, or two where all rows keep
all, from memory once and then from L2, as long as the batch fits there. One kernel would have to wait for all programs
of a row four times, and nothing says that they all run; a launch costs less than a pass. Each kernel sums up for itself
what the last one left of each chunk.

Grid: (b, chunks), and (b) to finish.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxattn.kernels.triton._gathered import Gathered, Inside
from jaxattn.kernels.triton._launch import Out, launch
from jaxattn.kernels.triton._rows import load, pow2, store
from jaxattn.kernels.triton._token_rows import (
    Bracket,
    Chunks,
    Config,
    Pass,
    Row,
    Rows,
    bracket_of,
    middle,
)
from jaxattn.token_mass import (
    Limits,
    Mass,
    digits_of,
    key_of,
    nothing,
    share,
    weight_of,
)

LARGEST = 2**31 - 1
BELOW_ONE = 1 - 2.0**-24  # the largest float32 that is


def default_config(rows: int, vocab: int) -> Config:
    """Chunks small enough that few rows still make some hundred programs. The numbers were reasoned out, not swept."""
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
        levels=8,
        gathered=2048,
        ways=4,
        scanned=4096,
        finish_warps=8,
    )


def _measure(rows: Rows, *, chunks: Chunks):
    """The peak, the least and the total of a chunk."""
    row, chunk = pl.program_id(0), pl.program_id(1)
    block, logits = rows.config.block, rows.logits
    none = nothing(logits)
    rate = rows.limit(rows.limits.rate, row, jnp.float32(1))

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
    low, high = bracket_of(rows, facts, last, row)

    @pl.when(chunk == 0)
    def _():
        this.bracket.low[row] = low
        this.bracket.high[row] = high

    pivot = [facts.pivot(low, high, jnp.int32(i), pivots) for i in range(pivots)]
    by_count = facts.by_count

    def add(values, *above):
        key = rows.key(values)
        weight = jnp.where(by_count, 1.0, facts.weight(values))
        # The sum chosen, not the summand: an addition with a predicate.
        return tuple(jnp.where(key > p, a + weight, a) for a, p in zip(above, pivot))

    init = (jnp.zeros(block, jnp.float32),) * pivots
    done = middle(low, high) == low
    for i, above in enumerate(rows.over_chunk(row, chunk, add, init, unless=done)):
        this.above[row, i, chunk] = jnp.sum(above)


def _gather(
    rows: Rows,
    *,
    chunks: Chunks,
    last: Pass | None,
    bracket: Bracket,
    gathered: Gathered,
    lists_ref,  # int32 [b * chunks * chunk]; None: no row is searched
):
    """The keys of a chunk inside the bracket, and the masses of the chunk and above the bracket.

    Each lane lists what it finds, as a place among all would be a sum over lanes at each load: of the chunk's part of
    `lists_ref`, [chunk / lanes, lanes], a lane fills its column. At last the lists are packed.
    """
    row, chunk = pl.program_id(0), pl.program_id(1)
    facts = Row.of(rows, chunks, row)
    low, high = bracket_of(rows, facts, last, row)

    @pl.when(chunk == 0)
    def _():
        bracket.low[row] = low
        bracket.high[row] = high

    # By count, also what is above: top_p looks at all of it.
    top = jnp.where(facts.by_count, LARGEST, high) if rows.limits.top_k is not None else high
    begin, lanes = (row * rows.chunks + chunk) * rows.config.chunk, rows.lanes
    column = begin + jnp.arange(lanes, dtype=jnp.int32)

    def add(values, end, total, above):
        key, mass = rows.key(values), facts.mass(values)
        is_above = key > top
        if rows.limits.searched:
            inside = (key > low) & ~is_above
            # Of each lane another element: what is not stored would not undo another's.
            plgpu.store(lists_ref.at[end], key, mask=inside)
            end = jnp.where(inside, end + lanes, end)
        return (
            end,
            Mass(*(a + b for a, b in zip(total, mass))),
            Mass(*(jnp.where(is_above, a + b, a) for a, b in zip(above, mass))),
        )

    none = jnp.zeros(lanes, jnp.int32)
    init = column, Mass(none, none), Mass(none, none)
    end, *masses = rows.over_chunk(row, chunk, add, init, size=lanes)
    count = (end - column) // lanes
    gathered.counts[row, chunk] = jnp.sum(count)
    for refs, parts in zip((gathered.total, gathered.above), masses, strict=True):
        mass = Mass(*map(jnp.sum, parts)).carried()
        refs.high[row, chunk] = mass.high
        refs.low[row, chunk] = mass.low
    if not rows.limits.searched:
        return

    first, levels = begin + jnp.cumsum(count) - count, rows.config.levels

    def pack(i, _):
        level = [i * levels + j for j in range(levels)]
        keys = [load(lists_ref, column + n * lanes, n < count) for n in level]
        for n, key in zip(level, keys):
            store(gathered.keys, first + n, n < count, key)

    jax.lax.fori_loop(0, (jnp.max(count) + levels - 1) // levels, pack, None)


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
    inside = Inside.of(rows, facts, gathered, row)
    low, high = bracket.low[row], bracket.high[row]
    above_high, total = summed(above), summed(masses(gathered.total))
    threshold = low + 1
    if limits.top_k is not None:
        high_k = jnp.where(facts.by_count, high, low)
        threshold = inside.with_count(low, high_k, facts.top_k)
        if limits.top_p is not None:
            of_k = summed(above.plus(inside.at_least(threshold)))
            if not joint:
                total = Mass(*(jnp.where(facts.by_count, a, b) for a, b in zip(of_k, total)))
            high = jnp.where(facts.by_count, key_of(facts.peak), high)
    if limits.top_p is not None:
        asked, left_out = share(total, digits_of(jnp.minimum(facts.top_p, BELOW_ONE)))
        asked = asked.plus(Mass(jnp.int32(0), left_out.astype(jnp.int32)))
        low = threshold - 1
        high = jnp.where(facts.top_p < 1, high, low)
        threshold = inside.with_mass(low, high, total, above_high, asked)
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
        mass = Mass(*(jnp.where(rows.key(values) >= threshold, part, 0) for part in mass))
        running = Mass(*(jnp.cumsum(part) for part in mass))
        before = ~drawn.less_than(passed.plus(running))
        return token + jnp.sum(before.astype(jnp.int32)), passed.plus(summed(mass))

    token, _ = jax.lax.fori_loop(0, rows.config.chunk // size, scan, (begin, passed))
    token_ref[row] = jnp.where((all_kept.high | all_kept.low) > 0, token, -1)


def _of_rows(*, kernel, x_ref, limits, logits, config, **refs_and_statics):
    kernel(Rows(x_ref, limits, logits, config), **refs_and_statics)


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
        finishes = kernel is _finish
        return launch(
            functools.partial(_of_rows, kernel=kernel, logits=logits, config=config, **static),
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
    parts: Any = (Out(by_chunk, i32),) * 2
    mass = Mass(*parts)
    all_keys = Out((b * chunks * config.chunk,), i32)
    gathered = Gathered(all_keys, Out(by_chunk, i32), mass, mass)
    lists = all_keys if limits.searched else None
    left = run(
        _gather,
        by_chunk,
        dict(chunks=facts, last=last),
        dict(bracket=bracket, gathered=gathered, lists_ref=lists),
    )
    del left["lists_ref"]
    outputs = dict(
        threshold_ref=Out(by_row, i32),
        kept_ref=Out(by_row, f32),
        token_ref=None if digits is None else Out(by_row, i32),
    )
    inputs = dict(chunks=facts, **left, digits_ref=digits)
    made = run(_finish, by_row, inputs, outputs, joint=joint)
    return made["threshold_ref"], made["kept_ref"], made["token_ref"]
