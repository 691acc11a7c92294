"""FlashAttention over a work list on Hopper: prefill, append and chunks, warp-specialised (FlashAttention-3's scheme).

    x_ij = logit(<q_i, k_j>),   o_i = sum_j softmax_j(x_ij) v_j,   lse_i = log sum_j exp(x_ij)

over the keys j that query i sees. Two warpgroups of a block compute, 64 packed rows (query token x query head of one KV
group) of one work item's tile each; the third loads its queries and keys (`_loading`), ahead of them also from one item
to the next; where they come row by row, a fourth one loads values. While the tensor cores multiply one warpgroup's
scores and values, the other warpgroup takes its softmax: they take turns. Within a warpgroup the products Q K_i^T and
P_{i-1} V_{i-1} are under way together (FlashAttention-3, Shah et al. 2024, algorithm 2).

Over keys of 8 bits products are of float16: `_loading` converts keys and values, a computing warpgroup its queries
(`_queries`); scales of each token are `_token_scales`'.

Which work a block does is `_units`', what a row sees `_rows`', what is done to a score `spec.Score`'s, where keys lie
`_keys`'; the softmax is `_online_softmax`'s, split tiles are `_splits`'; here they meet.

Axes: t query tokens, h query heads, kh KV heads, g = h // kh, d head dim, w work items, r = 64 rows, k keys of a tile.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxattn.device import num_sms
from jaxattn.kernels._float16 import HEADROOM
from jaxattn.kernels.mosaic import _queries
from jaxattn.kernels.mosaic import _warpgroup as wg
from jaxattn.kernels.mosaic._converting import staging
from jaxattn.kernels.mosaic._keys import Keys, KeySource
from jaxattn.kernels.mosaic._launch import launch
from jaxattn.kernels.mosaic._loading import (
    Queries,
    Stages,
    loaders,
)
from jaxattn.kernels.mosaic._online_softmax import (
    KEY,
    ROW,
    ROWS,
    OnlineSoftmax,
    State,
    along_keys,
    along_rows,
    times,
)
from jaxattn.kernels.mosaic._rows import Rows
from jaxattn.kernels.mosaic._splits import Partials
from jaxattn.kernels.mosaic._token_scales import TokenScales
from jaxattn.kernels.mosaic._units import FIELDS, RING, Schedule, Statics
from jaxattn.kernels.mosaic.tiles import Config, default_config
from jaxattn.kv_cache import PagedKVCache
from jaxattn.kv_scales import FP8_DTYPES, SMALLEST, KVScales
from jaxattn.plan import AttentionPlan
from jaxattn.spec import Score

COMPUTING = 2  # warpgroups
# Units, for each multiprocessor, up to which each is a block's own. So few gain nothing by being shared: 1 x 512 and
# 512 on 32768 in benchmarks/results/h100_sweeps_mosaic.txt. Where to draw the line was not measured.
UNITS_UNDRAWN = 2


def _attention_kernel(
    q_ref,  # [t * h, d]
    k_ref,  # as `KeySource.arrays` says
    v_ref,
    items_ref,  # int32 [w, 10]
    num_items_ref,  # int32 [1]
    indices_ref,  # int32 [capacity]; None for contiguous keys
    page_range_ref,  # int32 [2], as in the plan; likewise
    sinks_ref,  # float32 [h] or None
    k_scale_ref,  # float32 [1] or [kh], what keys are multiplied by, or of tokens, as `TokenScales`; or None
    v_scale_ref,  # likewise
    counts_ref,  # int32, zeros: the arrivals of `Partials`, then what `Schedule` counts; None where neither is needed
    o_ref,  # [t * h, d]
    lse_ref,  # float32 [t * h]
    o_partial_ref,
    lse_partial_ref,
    q_smem,  # [buffers, 2, r, d]
    q_full,
    q_empty,
    k_smem,  # [stages, k, d]
    k_full,
    k_empty,
    v_smem,
    v_full,
    v_empty,
    rings_smem,  # of `_converting`, for K and V; None where they are not converted
    scales_smem,  # of `TokenScales`, or None
    scales_empty,
    turn,
    row_smem,  # float32 [2, 128]: a number a row, between layouts
    absent_smem,  # float32 [2, 128]: -inf for the keys of a tile that are not in the cache, 0 for others; or None
    numbers_smem,  # int32 [1 + 2, 1]: `Schedule`'s number, and `Partials`' of each computing warpgroup
    units_smem,  # int32 [RING, FIELDS]
    told,
    *,
    static: Statics,
):
    warpgroup = lax.axis_index("warpgroup")
    schedule = Schedule(
        static,
        items_ref,
        num_items_ref,
        page_range_ref,
        counts_ref,
        numbers_smem.at[0],
        units_smem,
        told,
    )
    queries = Queries(q_smem, q_full, q_empty)
    keys = Stages(k_smem, k_full, k_empty)
    values = Stages(v_smem, v_full, v_empty)
    scales = None
    if static.source.scales_per_token:
        scales = TokenScales(scales_smem, None, scales_empty, k_scale_ref, v_scale_ref)
        k_scale_ref = v_scale_ref = None

    first, *second = loaders(
        static.source, static.config.loaders, k_ref, v_ref, keys, values, rings_smem, scales
    )

    @pl.when(warpgroup == COMPUTING)
    def _():
        _load(static, schedule, queries, first, q_ref, indices_ref)

    if second:
        pl.when(warpgroup == COMPUTING + 1)(lambda: _follow(static, schedule, *second, indices_ref))

    @pl.when(warpgroup < COMPUTING)
    def _():
        absent = None if absent_smem is None else absent_smem.at[warpgroup]
        partials = None
        if o_partial_ref is not None:
            partials = dict(o_ref=o_partial_ref, lse_ref=lse_partial_ref, arrivals_ref=counts_ref)
        computing = Computing(
            static,
            warpgroup,
            schedule,
            queries,
            keys,
            values,
            scales,
            turn,
            row_smem.at[warpgroup],
            numbers_smem.at[1 + warpgroup],
            absent,
            indices_ref,
            sinks_ref,
            k_scale_ref,
            v_scale_ref,
            o_ref,
            lse_ref,
            partials,
        )
        computing.run()


def _load(static, schedule, queries, loader, q_ref, indices_ref):
    """The loading warpgroup: draws the units, and loads their queries and what this loader does."""
    source = static.source
    plgpu.set_max_registers(static.config.registers[1], action="decrease")

    def keys_of(unit):
        return Keys(source, unit.span, indices_ref, unit.head)

    def load_queries(r):
        row, unit = wg.row_of_thread(ROWS), schedule.look(r)
        index = [Rows.of(static, unit, i).q_rows(row) for i in range(COMPUTING)]
        pl.when(unit.exists)(lambda: queries.load(r, q_ref, index))

    def end_queries(r):
        pl.when(schedule.look(r).exists)(lambda: queries.end_load(r, wait=source.in_boxes))

    def a_unit(state):
        """The unit of round r, whose queries and first keys are under way; n tiles were loaded before it."""
        r, n, begun, _ = state
        begun = loader.unit(keys_of(schedule.look(r)), n, keys_of(schedule.look(r + 1)), begun)
        # Drawn earlier, blocks would not share the last units fairly.
        schedule.begin_draw()
        load_queries(r + 1)
        schedule.tell(r + 2, schedule.unit(schedule.end_draw()))
        end_queries(r + 1)
        n += schedule.look(r).span.tiles
        return r + 1, n, begun, schedule.look(r + 1).exists

    zero, one = jnp.int32(0), jnp.int32(1)
    schedule.tell(zero, schedule.unit(schedule.first()))
    begun = loader.begin(keys_of(schedule.look(zero)))
    schedule.begin_draw()
    load_queries(zero)
    end_queries(zero)
    schedule.tell(one, schedule.unit(schedule.end_draw()))
    exists = schedule.look(zero).exists
    lax.while_loop(lambda state: state[3], a_unit, (zero, zero, begun, exists))
    loader.end()


def _follow(static, schedule, loader, indices_ref):
    """A second loading warpgroup: what this loader loads of the units that the first one tells."""
    plgpu.set_max_registers(static.config.registers[1], action="decrease")

    def keys_of(r):
        unit = schedule.look(r)
        return Keys(static.source, unit.span, indices_ref, unit.head)

    def a_unit(state):
        r, n, begun, _ = state
        exists = schedule.wait(r + 1)
        begun = loader.unit(keys_of(r), n, keys_of(r + 1), begun)
        return r + 1, n + keys_of(r).span.tiles, begun, exists

    zero = jnp.int32(0)
    exists = schedule.wait(zero)
    lax.while_loop(
        lambda state: state[3], a_unit, (zero, zero, loader.begin(keys_of(zero)), exists)
    )
    loader.end()


@dataclasses.dataclass(frozen=True)
class Computing:
    """A computing warpgroup; refs as in `_attention_kernel`, of this warpgroup alone where they have an axis for it."""

    static: Statics
    warpgroup: jax.Array
    schedule: Schedule
    queries: Queries
    keys: Stages
    values: Stages
    scales: TokenScales | None
    turn: Any
    row_smem: Any
    seen_smem: Any
    absent_smem: Any
    indices_ref: Any
    sinks_ref: Any
    k_scale_ref: Any
    v_scale_ref: Any
    o_ref: Any
    lse_ref: Any
    partial_refs: Any  # those of `Partials`; None where no tile is split

    def run(self) -> None:
        config = self.static.config
        plgpu.set_max_registers(config.registers[0], action="increase")
        first = self.warpgroup == 0
        if config.turns:
            pl.when(first)(lambda: plgpu.barrier_arrive(self.turn.at[0]))

        def a_unit(state):
            """The unit of round r; n tiles were loaded before it."""
            r, n, _ = state
            q_tile = self.queries.tiles.at[self.queries.stage(r), self.warpgroup]
            self.wait_full(self.queries, r)
            o, state = self.attend(self.rows(r), q_tile, n)
            rows = self.rows(r)
            self.finish(rows, o, state, q_tile)
            release(self.queries, r)
            return r + 1, n + rows.unit.span.tiles, self.schedule.wait(r + 1)

        zero = jnp.int32(0)
        lax.while_loop(lambda state: state[2], a_unit, (zero, zero, self.schedule.wait(zero)))
        if config.turns:
            pl.when(first)(lambda: plgpu.barrier_wait(self.turn.at[0]))

    def rows(self, r: jax.Array) -> Rows:
        return Rows.of(self.static, self.schedule.look(r), self.warpgroup)

    def attend(self, rows: Rows, q_tile: Any, n: jax.Array) -> tuple[jax.Array, State]:
        """The unit's tiles, the n-th loaded and so on: (sums float32 [r, d], state)."""
        source, dtype, score = self.static.source, q_tile.dtype, self.static.score
        factor, headroom = self.scale(self.k_scale_ref, rows), 0
        if source.narrow:
            headroom = HEADROOM
            if dtype != self.o_ref.dtype:
                power = _queries.in_float16(q_tile, self.o_ref.dtype)
                factor = power if factor is None else jnp.maximum(power * factor, SMALLEST)
        # A cap comes between the scores' factor and the exponent.
        before = factor if score.soft_cap else None
        after = None if score.soft_cap else factor
        softmax = OnlineSoftmax(score.exponent_scale, after, headroom)
        tiles = rows.unit.span.tiles
        phases = rows.unit.phases

        def wait_plain_values(i):
            """Of a tile without a mask: while the tensor cores are at work already."""
            pl.when((i >= phases.plain) & (i < phases.low))(
                lambda: self.wait_full(self.values, n + i)
            )

        def wait_masked_values(i):
            """At once, and zeros go where no key of the request is: a weight of 0 times NaN is NaN.

            Rows come without them, boxes with what lies before and behind the request's keys.
            """
            self.wait_full(self.values, n + i)
            if source.in_boxes:
                first = rows.first_key(i)
                begin, end = -first, rows.unit.span.own_end - first

                @pl.when((begin > 0) | (end < source.block))
                def _():
                    wg.clear_rows(self.values.tiles.at[self.values.stage(n + i)], begin, end)
                    plgpu.commit_smem()

        def scores(keys):
            return plgpu.ACC((ROWS, keys), jnp.float32)

        def first_of(stages, i, count):
            """The first rows of the i-th tile."""
            return stages.tiles.at[stages.stage(n + i), pl.ds(0, count)]

        def multiply_keys(s_acc, i):
            tile = first_of(self.keys, i, s_acc.shape[1])
            plgpu.wgmma(s_acc, q_tile, tile.transpose((1, 0)))

        def multiply_values(o_acc, p, i):
            plgpu.wgmma(o_acc, p, first_of(self.values, i, p.shape[1]))

        def weigh(s, state, i, masked):
            of = None
            if self.scales is not None:
                of = self.scales.columns(n + i, s.shape[1])
                s = s * along_rows(of.k, ROWS)
            s = score(s if before is None else times(s, before))
            if of is not None:
                s = softmax.exponents(s, of.log_v)
            if masked:
                s = self.mask(s, rows, i)
            taken = softmax.update(state, s, masked=masked, parts=None if of is None else of.per_v)
            if self.scales is not None:
                release(self.scales, n + i)
            return taken

        def first(s_acc):
            self.wait_full(self.keys, n)
            self.take_turn()
            multiply_keys(s_acc, 0)
            self.pass_turn()
            s = s_acc[...]
            release(self.keys, n)
            state, w = weigh(s, softmax.init(), 0, True)
            wait_masked_values(0)
            return *state, w.p.astype(dtype)

        def step(i, carry, o_acc, masked):
            *state, p = carry

            def inner(s_acc):
                self.wait_full(self.keys, n + i)
                self.take_turn()
                multiply_keys(s_acc, i)
                wait_plain_values(i - 1)
                multiply_values(o_acc, p, i - 1)
                self.pass_turn()
                s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                release(self.keys, n + i)
                (m, l), w = weigh(s, State(*state), i, masked)
                coming, alpha, m, l = lax.optimization_barrier((w.p, w.alpha, m, l))
                o = plgpu.wgmma_accumulator_load(o_acc, wait_n=0)
                release(self.values, n + i - 1)
                # Rounded before, the weights would make every product wait for the one before.
                o, coming = lax.optimization_barrier((o, coming))
                o_acc[...] = o * along_keys(alpha, o)
                if masked:
                    wait_masked_values(i)
                return m, l, coming.astype(dtype)

            return pl.run_scoped(inner, scores(source.block))

        def over_tiles(o_acc):
            masked, plain = (
                functools.partial(step, o_acc=o_acc, masked=masked) for masked in (True, False)
            )

            def whole():
                return pl.run_scoped(first, scores(source.block))

            def short():
                return masked(1, pl.run_scoped(first, scores(short_kv)))

            short_kv = self.static.config.short_kv
            carry = lax.cond(phases.short != 0, short, whole) if short_kv else whole()
            carry = lax.fori_loop(1 + phases.short, phases.plain, masked, carry)
            carry = lax.fori_loop(phases.plain, phases.low, plain, carry)
            if self.static.spec.visible.window_left is not None or not source.paged:
                carry = lax.fori_loop(phases.low, tiles, masked, carry)
            m, l, p = carry
            wait_plain_values(tiles - 1)
            multiply_values(o_acc, p, tiles - 1)
            o = o_acc[...]
            release(self.values, n + tiles - 1)
            return o, State(m, l)

        return pl.run_scoped(over_tiles, plgpu.ACC((ROWS, q_tile.shape[-1]), jnp.float32))

    def mask(self, s: jax.Array, rows: Rows, i: jax.Array) -> jax.Array:
        """Scores s [r, k] of the unit's i-th tile from the last, -inf where a row sees no key."""
        source, span = self.static.source, rows.unit.span
        s = rows.mask(s, rows.first_key(i))
        if self.absent_smem is None:
            return s

        def hide_absent(s):
            """-inf for keys that are not in the cache, in whose place there are zeros, with finite scores."""
            wg.sync()
            keys = Keys(source, span, self.indices_ref, rows.unit.head)
            self.absent_smem[...] = keys.absent(span.tiles - 1 - i)
            wg.sync()
            block = self.absent_smem.at[pl.ds(0, s.shape[1])]
            return s + along_rows(plgpu.load(block, layout=KEY, optimized=False), ROWS)

        return lax.cond(span.absent != 0, hide_absent, lambda s: s, s)

    def finish(self, rows: Rows, o: jax.Array, state: State, o_tile: Any) -> None:
        """Stores what the sums o come to, or leaves it to be merged; o_tile: shared memory for it."""
        item = rows.unit.item
        thread = wg.thread_number()

        def store(o, lse):
            _queries.put(o_tile, o.astype(self.o_ref.dtype))
            self.row_smem[pl.ds(0, ROWS)] = lse
            wg.sync()
            wg.scatter_rows(o_tile, self.o_ref, rows.q_rows(wg.row_of_thread(ROWS)))
            wg.store_each(
                self.lse_ref, rows.q_rows(thread), plgpu.load(self.row_smem, layout=wg.EACH)
            )

        sink = None
        if self.sinks_ref is not None:
            self.row_smem[...] = wg.load_each(self.sinks_ref, rows.query_heads(thread))
            wg.sync()
            sink = plgpu.load(self.row_smem.at[pl.ds(0, ROWS)], layout=ROW, optimized=False)
            sink += jnp.where(item.split == 0, 0.0, -jnp.inf)
            wg.sync()
        softmax = OnlineSoftmax(self.static.score.exponent_scale)
        o, lse = softmax.finalize(state, o, sink, self.scale(self.v_scale_ref, rows))
        pl.when(item.num_splits == 1)(lambda: store(o, lse))
        if self.partial_refs is not None:
            partials = Partials(
                **self.partial_refs,
                column=rows.unit.head * COMPUTING + self.warpgroup,
                columns=self.static.spec.num_kv_heads * COMPUTING,
                seen=self.seen_smem,
            )
            pl.when(item.num_splits > 1)(lambda: partials.merge(item, o, lse, store))

    def scale(self, ref: Any, rows: Rows) -> jax.Array | None:
        """What keys or values are multiplied by, where there is something."""
        if ref is None:
            return None
        return jnp.maximum(ref[rows.unit.head if ref.shape[0] > 1 else 0], SMALLEST)

    def take_turn(self) -> None:
        if self.static.config.turns:
            plgpu.barrier_wait(self.turn.at[self.warpgroup])

    def pass_turn(self) -> None:
        if self.static.config.turns:
            plgpu.barrier_arrive(self.turn.at[1 - self.warpgroup])

    def wait_full(self, stages: Stages, n: jax.Array) -> None:
        plgpu.barrier_wait(stages.full.at[stages.stage(n)])
        if not self.static.source.in_boxes:
            wg.fence()


def release(stages: Stages, n: jax.Array) -> None:
    plgpu.barrier_arrive(stages.empty.at[stages.stage(n)])


def paged_attention(
    q: jax.Array,
    cache: PagedKVCache,
    plan: AttentionPlan,
    sinks: jax.Array | None,
    score_mods: tuple[()],
    *,
    score: Score,
    out_dtype: jax.typing.DTypeLike,
    name: str,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention over a cache, for what `serves.why_not_attention` has nothing against.

    Args:
      q: [t, h, d], float16 or bfloat16.
      cache: pages of K and V, of one head_dim, in q's dtype or float8.
      plan: of tiles of 128 rows, without mask bits and spans.
      sinks: float32 [h] or None.
      score_mods: none.
      score: what is done to scores.
      out_dtype: q's.
      name: the kernel's, in profiles.

    Returns:
      (o [t, h, d], lse float32 [t, h]).
    """
    d = q.shape[-1]
    source = KeySource.of_cache(cache, (config or default_config(d)).block_kv)
    config = config or default_config(d, rows=not source.in_boxes)
    arrays = source.arrays(cache.arrays[0], cache.arrays[-1])
    how: dict[str, Any] = dict(score=score, name=name, config=config)
    return _attention(q, arrays, source, cache.scales, plan, sinks, **how)


def contiguous_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_scales: KVScales | None,
    plan: AttentionPlan,
    sinks: jax.Array | None,
    score_mods: tuple[()],
    *,
    kv_layout: str,
    score: Score,
    out_dtype: jax.typing.DTypeLike,
    name: str,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention over contiguous k, v [tokens, kh, d] ("NHD") or [kh, tokens, d] ("HND"), as `paged_attention`."""
    d, narrow = q.shape[-1], k.dtype.name in FP8_DTYPES
    tokens, block = k.shape[0 if kv_layout == "NHD" else 1], (config or default_config(d)).block_kv
    source = KeySource.contiguous(tokens, plan.num_kv_heads, kv_layout, block, narrow)
    config = config or default_config(d, rows=not source.in_boxes)
    arrays = source.arrays(k, v)
    how: dict[str, Any] = dict(score=score, name=name, config=config)
    return _attention(q, arrays, source, kv_scales, plan, sinks, **how)


def _attention(
    q: jax.Array,
    arrays: tuple[jax.Array, jax.Array],
    source: KeySource,
    scales: KVScales | None,
    plan: AttentionPlan,
    sinks: jax.Array | None,
    *,
    score: Score,
    name: str,
    config: Config,
) -> tuple[jax.Array, jax.Array]:
    t, h, d = q.shape
    units = plan.items.shape[0] * plan.num_kv_heads
    # A block for each of few units: no draws.
    drawn = units > UNITS_UNDRAWN * num_sms()
    num_blocks = num_sms() if drawn else units
    columns = plan.num_slots * plan.num_kv_heads * COMPUTING
    o_partial = lse_partial = None
    if columns:
        o_partial = jax.ShapeDtypeStruct((columns * ROWS, d), jnp.float32)
        lse_partial = jax.ShapeDtypeStruct((columns * ROWS,), jnp.float32)
    counts = None
    if columns or drawn:
        counts = jax.ShapeDtypeStruct((columns + 1,), jnp.int32)

    # Queries come, and outputs leave, as q's bytes.
    dtype = jnp.float16 if source.narrow else q.dtype

    def shared(*shape):
        return plgpu.SMEM(shape, dtype, transforms=wg.TILED)

    def barriers(count, arrivals):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

    stages, keys, buffers = config.num_stages, config.block_kv, config.num_queries
    of_tokens = source.scales_per_token
    may_lack = source.paged and not of_tokens  # scales of tokens say which are not there
    out = launch(
        functools.partial(
            _attention_kernel,
            static=Statics(plan.spec, score, source, config, num_blocks, drawn),
        ),
        dict(
            q_ref=q.reshape(t * h, d),
            k_ref=arrays[0],
            v_ref=arrays[1],
            items_ref=plan.items,
            num_items_ref=plan.num_items,
            indices_ref=plan.page_indices,
            page_range_ref=plan.page_range,
            sinks_ref=sinks,
            k_scale_ref=None if scales is None else scales.k.reshape(-1),
            v_scale_ref=None if scales is None else scales.v.reshape(-1),
        ),
        dict(
            o_ref=jax.ShapeDtypeStruct((t * h, d), q.dtype),
            lse_ref=jax.ShapeDtypeStruct((t * h,), jnp.float32),
            o_partial_ref=o_partial,
            lse_partial_ref=lse_partial,
        ),
        dict(
            q_smem=shared(buffers, COMPUTING, ROWS, d),
            q_full=barriers(buffers, 1),
            q_empty=barriers(buffers, COMPUTING),
            k_smem=shared(stages, keys, d),
            k_full=barriers(stages, source.boxes),
            k_empty=barriers(stages, COMPUTING),
            v_smem=shared(stages, keys, d),
            v_full=barriers(stages, source.boxes),
            v_empty=barriers(stages, COMPUTING),
            rings_smem=plgpu.SMEM((2, *staging(d)), jnp.int32) if source.narrow else None,
            scales_smem=plgpu.SMEM((stages, 3, keys), jnp.float32) if of_tokens else None,
            scales_empty=barriers(stages, COMPUTING) if of_tokens else None,
            turn=barriers(COMPUTING, 1),
            row_smem=plgpu.SMEM((COMPUTING, wg.THREADS), jnp.float32),
            absent_smem=plgpu.SMEM((COMPUTING, wg.THREADS), jnp.float32) if may_lack else None,
            numbers_smem=plgpu.SMEM((1 + COMPUTING, 1), jnp.int32),
            units_smem=plgpu.SMEM((RING, FIELDS), jnp.int32),
            told=barriers(RING, 1),
        ),
        dict(counts_ref=counts),
        name=name,
        num_blocks=num_blocks,
        num_warpgroups=COMPUTING + config.loaders,
    )
    return out["o_ref"].reshape(t, h, d), out["lse_ref"].reshape(t, h)
