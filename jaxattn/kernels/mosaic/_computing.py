"""A computing warpgroup of the Hopper kernel: the attention of 64 rows over the tiles that others load.

    S_i = Q K_i^T,   m_i = m_{i-1}, or rowmax S_i where it is far above
    P_i = exp(S_i - m_i),   O_i = exp(m_{i-1} - m_i) O_{i-1} + P_i V_i

over tiles i from a work item's last to its first; Q K_i^T and P_{i-1} V_{i-1} are under way together while the softmax
of the other computing warpgroup runs: they take turns (FlashAttention-3, Shah et al. 2024, algorithm 2).

Axes: r = 64 rows, k keys of a tile, d head dim.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxattn.kernels._float16 import HEADROOM
from jaxattn.kernels.mosaic import _queries
from jaxattn.kernels.mosaic import _warpgroup as wg
from jaxattn.kernels.mosaic._elements import KEY, ROW, ROWS, any_of_warp
from jaxattn.kernels.mosaic._keys import Keys
from jaxattn.kernels.mosaic._loading import Queries, Stages
from jaxattn.kernels.mosaic._online_softmax import (
    SLACK,
    OnlineSoftmax,
    State,
    along_keys,
    along_rows,
    finite,
    times,
)
from jaxattn.kernels.mosaic._products import begin_scores, wait_scores
from jaxattn.kernels.mosaic._rows import Mask, Rows
from jaxattn.kernels.mosaic._splits import Partials
from jaxattn.kernels.mosaic._token_scales import TokenScales
from jaxattn.kernels.mosaic._units import Schedule, Statics
from jaxattn.kv_scales import SMALLEST

COMPUTING = 2  # such warpgroups in a block


@dataclasses.dataclass(frozen=True)
class Computing:
    """A computing warpgroup; refs as in the kernel, of this warpgroup alone where they have an axis for it."""

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
        factor, headroom = self.scale(self.k_scale_ref, rows), SLACK
        if dtype == jnp.float16 and (source.narrow or self.scales is not None):
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

            Rows come without them, boxes with what lies before and behind the request's keys; and those of a line with
            tokens of pages behind a window, which may hold anything.
            """
            self.wait_full(self.values, n + i)
            if source.in_boxes:
                first = rows.first_key(i)
                line = source.in_line and source.may_begin_early
                begin = rows.unit.span.begin - first if line else -first
                end = rows.unit.span.own_end - first

                @pl.when((begin > 0) | (end < source.block))
                def _():
                    wg.clear_rows(self.values.tiles.at[self.values.stage(n + i)], begin, end)
                    plgpu.commit_smem()

        def first_of(stages, i, count):
            """The first rows of the i-th tile."""
            return stages.tiles.at[stages.stage(n + i), pl.ds(0, count)]

        def multiply_keys(i, keys=source.block):
            return begin_scores(q_tile, first_of(self.keys, i, keys))

        def multiply_values(o_acc, p, i):
            plgpu.wgmma(o_acc, p, first_of(self.values, i, p.shape[1]))

        def take(s, m, i, mask):
            """The i-th tile's scores, its tokens' scales, m with the scores taken in, and whose m has risen."""
            of = None
            if self.scales is not None:
                of = self.scales.columns(n + i, s.shape[1])
                s = s * along_rows(of.k, ROWS)
            s = score(s if before is None else times(s, before))
            if of is not None:
                s = softmax.exponents(s, of.log_v)
            if mask:
                s = self.mask(s, rows, i, mask)
            return s, of, *softmax.rise(m, s, scaled=of is not None)

        def weigh(s, of, m, i, mask):
            """The weights, and what they add to l."""
            m = finite(m) if mask else m
            parts = None if of is None else of.per_v
            weighed = softmax.weigh(s, m, scaled=of is not None, parts=parts)
            if self.scales is not None:
                if source.in_boxes:
                    # The copy engine's next writes there could come before reads that no such fence ends.
                    wg.fence()
                release(self.scales, n + i)
            return weighed

        def first(keys):
            mask = Mask.BOTH_ENDS
            self.wait_full(self.keys, n)
            self.take_turn()
            s = multiply_keys(0, keys)
            self.pass_turn()
            s = wait_scores(s, pending=0)
            release(self.keys, n)
            m, l = softmax.init()
            s, of, m, _ = take(s, m, 0, mask)
            p, sums = weigh(s, of, m, 0, mask)
            wait_masked_values(0)
            return m, l + sums, p.astype(dtype)

        def step(i, carry, o_acc, mask):
            m, l, p = carry
            self.wait_full(self.keys, n + i)
            self.take_turn()
            s = multiply_keys(i)
            wait_plain_values(i - 1)
            multiply_values(o_acc, p, i - 1)
            self.pass_turn()
            s = wait_scores(s, pending=1)
            release(self.keys, n + i)
            s, of, risen, rises = take(s, m, i, mask)
            # Weights rounded before this would make every product wait for the one before.
            o = plgpu.wgmma_accumulator_load(o_acc, wait_n=0)
            release(self.values, n + i - 1)

            def rescaled():
                alpha = jnp.exp2(m - (finite(risen) if mask else risen))
                return o * along_keys(alpha, o), l * along_keys(alpha, l)

            o, l = lax.cond(any_of_warp(rises), rescaled, lambda: (o, l))
            o_acc[...] = o
            p, sums = weigh(s, of, risen, i, mask)
            if mask:
                wait_masked_values(i)
            return risen, l + sums, p.astype(dtype)

        def over_tiles(o_acc):
            def tiles_step(mask):
                return functools.partial(step, o_acc=o_acc, mask=mask)

            def short():
                return tiles_step(None)(1, first(short_kv))

            def whole():
                return first(source.block)

            short_kv = self.static.config.short_kv
            carry = lax.cond(phases.short != 0, short, whole) if short_kv else whole()
            masks: list[Mask | None] = [Mask.BOTH_ENDS, None]
            if self.static.spec.visible.window_left is not None or source.may_begin_early:
                masks.append(Mask.BEGINNING)
            for mask, (begin, end) in zip(masks, phases.ranges(tiles)):
                carry = lax.fori_loop(begin, end, tiles_step(mask), carry)
            m, l, p = carry
            wait_plain_values(tiles - 1)
            multiply_values(o_acc, p, tiles - 1)
            o = o_acc[...]
            release(self.values, n + tiles - 1)
            return o, State(m, l)

        return pl.run_scoped(over_tiles, plgpu.ACC((ROWS, q_tile.shape[-1]), jnp.float32))

    def mask(self, s: jax.Array, rows: Rows, i: jax.Array, mask: Mask) -> jax.Array:
        """Scores s [r, k] of the unit's i-th tile from the last, -inf where a row sees no key."""
        source, span = self.static.source, rows.unit.span
        s = rows.mask(s, rows.first_key(i), mask)
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
