"""FlashAttention over a work list on Hopper: prefill, append and chunks, warp-specialised (FlashAttention-3's scheme).

    x_ij = logit(<q_i, k_j>),   o_i = sum_j softmax_j(x_ij) v_j,   lse_i = log sum_j exp(x_ij)

over the keys j that query i sees. A block has three warpgroups. Two compute, 64 packed rows (query token x query head
of one KV group) of one work item's tile each; the third loads the item's keys (`_loading`). While the tensor cores
multiply one warpgroup's scores and values, the other warpgroup takes its softmax: they take turns. Within a warpgroup
the products Q K_i^T and P_{i-1} V_{i-1} are under way together (FlashAttention-3, Shah et al. 2024, algorithm 2).

What a row sees is `spec.Visible`'s, what is done to a score `spec.Score`'s, where keys lie `_keys`', the softmax is
`_online_softmax`'s, split tiles are `_splits`'; here they meet.

Axes: t query tokens, h query heads, kh KV heads, g = h // kh, d head dim, w work items, r = 64 rows, k keys of a tile.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxattn.device import num_sms
from jaxattn.kernels.mosaic import _warpgroup as wg
from jaxattn.kernels.mosaic._keys import Keys, KeySource, Span
from jaxattn.kernels.mosaic._launch import launch
from jaxattn.kernels.mosaic._loading import Stages, load_boxes, load_rows
from jaxattn.kernels.mosaic._online_softmax import (
    KEY,
    ROW,
    ROWS,
    TILE,
    OnlineSoftmax,
    State,
    along_keys,
    along_rows,
)
from jaxattn.kernels.mosaic._splits import Partials
from jaxattn.kernels.mosaic.tiles import Config, default_config
from jaxattn.kv_cache import PagedKVCache
from jaxattn.plan import AttentionPlan
from jaxattn.spec import FAR, AttentionSpec, Score
from jaxattn.work_list import WorkItem

COMPUTING = 2  # warpgroups
# Numbers of units in shared memory. The loading warpgroup is at most two tiles, so two units, ahead of the others, and
# draws one more.
RING = 4


@dataclasses.dataclass(frozen=True)
class Statics:
    """What the kernel is compiled for."""

    spec: AttentionSpec
    score: Score
    source: KeySource
    config: Config
    num_blocks: int


class Unit(NamedTuple):
    """What a block does at a time: a work item for one KV head."""

    item: WorkItem
    head: jax.Array
    span: Span


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which units a block takes: the next one that no block has taken. Units with many keys come first of a request's,
    so that the last ones are short. The loading warpgroup draws the numbers, one ahead, the computing ones read them.
    """

    static: Statics
    items_ref: Any
    num_items_ref: Any
    page_range_ref: Any
    counter_ref: Any  # int32 [1], device memory: units taken, but for each block's first
    numbers: Any  # int32 [RING, 1], shared memory
    drawn: Any  # barriers [RING]

    def first(self) -> jax.Array:
        return lax.axis_index("block").astype(jnp.int32)

    def begin_draw(self, r: jax.Array) -> None:
        """By the loading warpgroup: begins to draw the unit of its r-th round, r > 0."""
        wg.take_number(self.counter_ref, self.numbers.at[lax.rem(r, RING)])

    def end_draw(self, r: jax.Array) -> jax.Array:
        """Ends it, and tells the computing warpgroups."""
        slot = lax.rem(r, RING)
        wg.sync()
        plgpu.barrier_arrive(self.drawn.at[slot])
        return self._read(slot)

    def read(self, r: jax.Array) -> jax.Array:
        """By the computing ones: the unit of the r-th round."""
        slot = lax.rem(r, RING)
        plgpu.barrier_wait(self.drawn.at[slot])
        return self._read(slot)

    def _read(self, slot: jax.Array) -> jax.Array:
        return self.numbers[slot, 0] + self.static.num_blocks

    def exists(self, n: jax.Array) -> jax.Array:
        return n < self.num_items_ref[0] * self.static.spec.num_kv_heads

    def unit(self, n: jax.Array) -> Unit:
        heads = self.static.spec.num_kv_heads
        work, head = lax.div(n, heads), lax.rem(n, heads)
        item = WorkItem(*(self.items_ref[work, i] for i in range(len(WorkItem._fields))))
        pages = None
        if self.page_range_ref is not None:
            pages = self.page_range_ref[0], self.page_range_ref[1]
        spec = self.static.spec
        first_position = lax.div(item.row_begin, spec.group) + item.q_position
        first_seen = jnp.maximum(spec.visible.begin(first_position), 0)
        return Unit(item, head, self.static.source.span(item, first_seen, pages))


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
        plain = jnp.where(span.absent, span.tiles, plain)
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


def _attention_kernel(
    q_ref,  # [t * h, d]
    k_ref,  # as `KeySource.arrays` says
    v_ref,
    items_ref,  # int32 [w, 9]
    num_items_ref,  # int32 [1]
    indices_ref,  # int32 [capacity]; None for contiguous keys
    page_range_ref,  # int32 [2], as in the plan; likewise
    sinks_ref,  # float32 [h] or None
    counter_ref,  # int32 [1], zero
    arrivals_ref,  # as in `Partials`, zeros; or None where no tile is split
    o_ref,  # [t * h, d]
    lse_ref,  # float32 [t * h]
    o_partial_ref,
    lse_partial_ref,
    q_smem,  # [2, r, d]
    o_smem,  # [2, r, d]; None: q_smem's memory serves
    k_smem,  # [stages, k, d]
    v_smem,
    k_full,
    k_empty,
    v_full,
    v_empty,
    turn,
    row_smem,  # float32 [2, 128]: a number a row, between layouts
    absent_smem,  # float32 [2, 128]: -inf for the keys of a tile that are not in the cache, 0 for others
    seen_smem,  # int32 [2, 1]
    numbers_smem,  # int32 [RING, 1]
    drawn,
    *,
    static: Statics,
):
    spec, source, config = static.spec, static.source, static.config
    warpgroup = lax.axis_index("warpgroup")
    schedule = Schedule(
        static, items_ref, num_items_ref, page_range_ref, counter_ref, numbers_smem, drawn
    )
    keys_stages = Stages(k_smem, k_full, k_empty)
    values_stages = Stages(v_smem, v_full, v_empty)
    softmax = OnlineSoftmax(static.score.exponent_scale)

    @pl.when(warpgroup == COMPUTING)
    def _load():
        plgpu.set_max_registers(config.registers[1], action="decrease")

        load = load_boxes if source.in_boxes else load_rows

        def a_unit(state):
            r, number, n = state
            # Its latency hides behind the tiles; drawn earlier, blocks would not share the last units fairly.
            schedule.begin_draw(r + 1)
            unit = schedule.unit(number)
            keys = Keys(source, unit.span, indices_ref, unit.head)
            load(keys, n, (k_ref, v_ref), keys_stages, values_stages)
            return r + 1, schedule.end_draw(r + 1), n + unit.span.tiles

        lax.while_loop(
            lambda state: schedule.exists(state[1]),
            a_unit,
            (jnp.int32(0), schedule.first(), jnp.int32(0)),
        )

    @pl.when(warpgroup < COMPUTING)
    def _compute():
        plgpu.set_max_registers(config.registers[0], action="increase")
        q_tile = q_smem.at[warpgroup]
        o_tile = q_tile if o_smem is None else o_smem.at[warpgroup]
        dtype = q_ref.dtype

        def take_turn():
            if config.turns:
                plgpu.barrier_wait(turn.at[warpgroup])

        def pass_turn():
            if config.turns:
                plgpu.barrier_arrive(turn.at[1 - warpgroup])

        def wait_full(stages, n):
            plgpu.barrier_wait(stages.full.at[stages.stage(n)])
            if not source.in_boxes:
                wg.fence()

        def release(stages, n):
            plgpu.barrier_arrive(stages.empty.at[stages.stage(n)])

        def rows_of(unit):
            first = unit.item.row_begin
            return Rows(static, unit, first + warpgroup * ROWS, first)

        def load_q(rows):
            wg.gather_rows(q_ref, q_tile, rows.q_rows(wg.row_of_thread(ROWS)))

        def a_unit(state):
            """The unit of round r; n tiles were loaded before it."""
            r, number, n = state
            unit = schedule.unit(number)
            item, span = unit.item, unit.span
            rows = rows_of(unit)
            tiles = span.tiles
            phases = rows.phases()

            def finish(rows, o, state):
                row_ref = row_smem.at[warpgroup]

                def store(o, lse):
                    o_tile[...] = o.astype(dtype)
                    row_ref[pl.ds(0, ROWS)] = lse
                    plgpu.commit_smem()
                    wg.scatter_rows(o_tile, o_ref, rows.q_rows(wg.row_of_thread(ROWS)))
                    lse_of_thread = plgpu.load(row_ref, layout=wg.EACH)
                    wg.store_each(lse_ref, rows.q_rows(wg.thread_number()), lse_of_thread)

                sink = None
                if sinks_ref is not None:
                    heads = rows.query_heads(wg.thread_number())
                    row_ref[...] = wg.load_each(sinks_ref, heads)
                    wg.sync()
                    sink = plgpu.load(row_ref.at[pl.ds(0, ROWS)], layout=ROW, optimized=False)
                    sink += jnp.where(item.split == 0, 0.0, -jnp.inf)
                    wg.sync()
                o, lse = softmax.finalize(state, o, sink)
                pl.when(item.num_splits == 1)(lambda: store(o, lse))
                if arrivals_ref is None:
                    return
                partials = Partials(
                    o_partial_ref,
                    lse_partial_ref,
                    arrivals_ref,
                    column=unit.head * COMPUTING + warpgroup,
                    columns=spec.num_kv_heads * COMPUTING,
                    seen=seen_smem.at[warpgroup],
                )
                pl.when(item.num_splits > 1)(lambda: partials.merge(item, o, lse, store))

            if not prefetches:
                load_q(rows)
            wg.wait_copies()
            plgpu.commit_smem()

            def first_key(i):
                return span.origin + (tiles - 1 - i) * source.block

            def mask(s, i):
                s = rows.mask(s, first_key(i))
                if not source.paged:
                    return s

                @pl.when(span.absent)
                def _():
                    wg.sync()
                    keys = Keys(source, span, indices_ref, unit.head)
                    absent_smem[warpgroup, :] = keys.absent(tiles - 1 - i)
                    wg.sync()

                # An absent key's vector is zeros, its score finite.
                absent = plgpu.load(
                    absent_smem.at[warpgroup, pl.ds(0, source.block)], layout=KEY, optimized=False
                )
                return s + along_rows(absent, ROWS)

            def weigh(s, state, i, masked):
                s = static.score(s)
                if masked:
                    s = mask(s, i)
                return softmax.update(state, s, masked=masked)

            def wait_plain_values(i):
                """Of a tile without a mask: while the tensor cores are at work already."""
                pl.when((i >= phases.plain) & (i < phases.low))(
                    lambda: wait_full(values_stages, n + i)
                )

            def wait_masked_values(i):
                """At once, and zeros go where no key of the item is."""
                wait_full(values_stages, n + i)
                if source.in_boxes:
                    begin, end = span.begin - first_key(i), span.end - first_key(i)

                    @pl.when((begin > 0) | (end < source.block))
                    def _():
                        wg.clear_rows(v_smem.at[values_stages.stage(n + i)], begin, end)
                        plgpu.commit_smem()

            def multiply_keys(s_acc, i):
                stage = keys_stages.stage(n + i)
                plgpu.wgmma(s_acc, q_tile, k_smem.at[stage].transpose((1, 0)))

            def multiply_values(o_acc, p, i):
                plgpu.wgmma(o_acc, p, v_smem.at[values_stages.stage(n + i)])

            def over_keys(o_acc):
                def first(s_acc):
                    wait_full(keys_stages, n)
                    take_turn()
                    multiply_keys(s_acc, 0)
                    pass_turn()
                    s = s_acc[...]
                    release(keys_stages, n)
                    state, w = weigh(s, softmax.init(), 0, True)
                    wait_masked_values(0)
                    return *state, w.p.astype(dtype)

                def step(i, carry, masked):
                    *state, p = carry

                    def inner(s_acc):
                        wait_full(keys_stages, n + i)
                        take_turn()
                        multiply_keys(s_acc, i)
                        wait_plain_values(i - 1)
                        multiply_values(o_acc, p, i - 1)
                        pass_turn()
                        s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                        release(keys_stages, n + i)
                        (m, l), w = weigh(s, State(*state), i, masked)
                        coming, alpha, m, l = lax.optimization_barrier((w.p, w.alpha, m, l))
                        o = plgpu.wgmma_accumulator_load(o_acc, wait_n=0)
                        release(values_stages, n + i - 1)
                        # Rounded before, the weights would make every product wait for the one before.
                        o, coming = lax.optimization_barrier((o, coming))
                        o_acc[...] = o * along_keys(alpha, o)
                        if masked:
                            wait_masked_values(i)
                        return m, l, coming.astype(dtype)

                    return pl.run_scoped(inner, scores)

                carry = pl.run_scoped(first, scores)
                masked, plain = (functools.partial(step, masked=x) for x in (True, False))
                carry = lax.fori_loop(1, phases.plain, masked, carry)
                carry = lax.fori_loop(phases.plain, phases.low, plain, carry)
                if spec.visible.window_left is not None or not source.paged:
                    carry = lax.fori_loop(phases.low, tiles, masked, carry)
                m, l, p = carry
                wait_plain_values(tiles - 1)
                multiply_values(o_acc, p, tiles - 1)
                coming = schedule.read(r + 1)
                if prefetches:
                    wg.sync()
                    pl.when(schedule.exists(coming))(lambda: load_q(rows_of(schedule.unit(coming))))
                o = o_acc[...]
                release(values_stages, n + tiles - 1)
                return o, m, l, coming

            scores = plgpu.ACC((ROWS, source.block), jnp.float32)
            o, m, l, coming = pl.run_scoped(
                over_keys, plgpu.ACC((ROWS, q_ref.shape[1]), jnp.float32)
            )
            finish(rows, o, State(m, l))

            return r + 1, coming, n + tiles

        prefetches = o_smem is not None
        if source.paged:
            absent_smem[warpgroup, :] = jnp.zeros_like(wg.thread_number(), jnp.float32)
        if prefetches:
            load_q(rows_of(schedule.unit(schedule.first())))
        if config.turns:
            pl.when(warpgroup == 0)(lambda: plgpu.barrier_arrive(turn.at[0]))
        lax.while_loop(
            lambda state: schedule.exists(state[1]),
            a_unit,
            (jnp.int32(0), schedule.first(), jnp.int32(0)),
        )
        if config.turns:
            pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(turn.at[0]))


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
      q: [t, h, d], float16 or bfloat16, as the cache.
      cache: pages of K and V, of one head_dim.
      plan: of tiles of 128 rows, without mask bits and spans.
      sinks: float32 [h] or None.
      score_mods: none.
      score: what is done to scores.
      out_dtype: q's.
      name: the kernel's, in profiles.

    Returns:
      (o [t, h, d], lse float32 [t, h]).
    """
    config = config or default_config(q.shape[-1])
    source = KeySource.of_cache(cache, config.block_kv)
    arrays = source.arrays(cache.arrays[0], cache.arrays[-1])
    return _attention(q, arrays, source, plan, sinks, score=score, name=name, config=config)


def contiguous_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_scales: None,
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
    config = config or default_config(q.shape[-1])
    tokens = k.shape[0 if kv_layout == "NHD" else 1]
    source = KeySource.contiguous(tokens, plan.num_kv_heads, kv_layout, config.block_kv)
    arrays = source.arrays(k, v)
    return _attention(q, arrays, source, plan, sinks, score=score, name=name, config=config)


def _attention(
    q: jax.Array,
    arrays: tuple[jax.Array, jax.Array],
    source: KeySource,
    plan: AttentionPlan,
    sinks: jax.Array | None,
    *,
    score: Score,
    name: str,
    config: Config,
) -> tuple[jax.Array, jax.Array]:
    t, h, d = q.shape
    num_blocks = min(num_sms(), plan.items.shape[0] * plan.num_kv_heads)
    columns = plan.num_slots * plan.num_kv_heads * COMPUTING
    o_partial = lse_partial = arrivals = None
    if columns:
        o_partial = jax.ShapeDtypeStruct((columns * ROWS, d), jnp.float32)
        lse_partial = jax.ShapeDtypeStruct((columns * ROWS,), jnp.float32)
        arrivals = jax.ShapeDtypeStruct((columns,), jnp.int32)

    def shared(*shape):
        return plgpu.SMEM(shape, q.dtype, transforms=wg.TILED)

    def barriers(count, arrivals):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

    stages, keys = config.num_stages, config.block_kv
    out = launch(
        functools.partial(
            _attention_kernel,
            static=Statics(plan.spec, score, source, config, num_blocks),
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
        ),
        dict(
            o_ref=jax.ShapeDtypeStruct((t * h, d), q.dtype),
            lse_ref=jax.ShapeDtypeStruct((t * h,), jnp.float32),
            o_partial_ref=o_partial,
            lse_partial_ref=lse_partial,
        ),
        dict(
            q_smem=shared(COMPUTING, ROWS, d),
            o_smem=shared(COMPUTING, ROWS, d) if d <= 128 else None,
            k_smem=shared(stages, keys, d),
            v_smem=shared(stages, keys, d),
            k_full=barriers(stages, source.boxes),
            k_empty=barriers(stages, COMPUTING),
            v_full=barriers(stages, source.boxes),
            v_empty=barriers(stages, COMPUTING),
            turn=barriers(COMPUTING, 1),
            row_smem=plgpu.SMEM((COMPUTING, wg.THREADS), jnp.float32),
            absent_smem=plgpu.SMEM((COMPUTING, wg.THREADS), jnp.float32) if source.paged else None,
            seen_smem=plgpu.SMEM((COMPUTING, 1), jnp.int32),
            numbers_smem=plgpu.SMEM((RING, 1), jnp.int32),
            drawn=barriers(RING, 1),
        ),
        dict(counter_ref=jax.ShapeDtypeStruct((1,), jnp.int32), arrivals_ref=arrivals),
        name=name,
        num_blocks=num_blocks,
        num_warpgroups=COMPUTING + 1,
    )
    return out["o_ref"].reshape(t, h, d), out["lse_ref"].reshape(t, h)
