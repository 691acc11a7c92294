"""What the loading warpgroups do, unit by unit: they keep the computing ones supplied.

The first of them draws units and tells the others of them, and loads queries; which keys and values it or a second one
loads, and how, is the loader's (`_loading`). What takes long is done while tiles that are under way are computed,
where `_units.Ahead` says so.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxattn.kernels.mosaic import _warpgroup as wg
from jaxattn.kernels.mosaic._computing import COMPUTING
from jaxattn.kernels.mosaic._elements import ROWS
from jaxattn.kernels.mosaic._keys import Keys
from jaxattn.kernels.mosaic._rows import Rows


def feed(static, schedule, queries, loader, q_ref, indices_ref):
    """The first loading warpgroup."""
    plgpu.set_max_registers(static.config.registers[1], action="decrease")
    keys_of = functools.partial(_keys_of, static, schedule, indices_ref)
    ahead = static.ahead

    def load_queries(r):
        row, unit = wg.row_of_thread(ROWS), schedule.look(r)
        index = [Rows.of(static, unit, i).q_rows(row) for i in range(COMPUTING)]
        pl.when(unit.exists)(lambda: queries.load(r, q_ref, index))

    def end_queries(r):
        wait = static.source.in_boxes
        pl.when(schedule.look(r).exists)(lambda: queries.end_load(r, wait=wait))

    def tell_drawn(r):
        schedule.begin_draw()
        schedule.tell(r, schedule.unit(schedule.end_draw()))

    def a_unit(state):
        """The unit of round r, whose queries and first keys are under way; n tiles were loaded before it."""
        r, n, begun, _ = state
        if ahead.draw:
            tell_drawn(r + 2)
        between = functools.partial(load_queries, r + 1) if ahead.queries else _nothing
        begun = loader.unit(keys_of(r), n, keys_of(r + 1), begun, between)
        if not ahead.draw:
            tell_drawn(r + 2)
        if not ahead.queries:
            load_queries(r + 1)
        end_queries(r + 1)
        n += schedule.look(r).span.tiles
        return r + 1, n, begun, schedule.look(r + 1).exists

    zero, one = jnp.int32(0), jnp.int32(1)
    schedule.tell(zero, schedule.unit(schedule.first()))
    begun = loader.begin(keys_of(zero))
    schedule.begin_draw()
    load_queries(zero)
    end_queries(zero)
    schedule.tell(one, schedule.unit(schedule.end_draw()))
    exists = schedule.look(zero).exists
    lax.while_loop(lambda state: state[3], a_unit, (zero, zero, begun, exists))
    loader.end()


def follow(static, schedule, loader, indices_ref):
    """A second loading warpgroup: what this loader loads of the units that the first one tells."""
    plgpu.set_max_registers(static.config.registers[1], action="decrease")
    keys_of = functools.partial(_keys_of, static, schedule, indices_ref)

    def a_unit(state):
        r, n, begun, _ = state
        exists = schedule.wait(r + 1)
        begun = loader.unit(keys_of(r), n, keys_of(r + 1), begun, _nothing)
        return r + 1, n + keys_of(r).span.tiles, begun, exists

    zero = jnp.int32(0)
    exists = schedule.wait(zero)
    lax.while_loop(
        lambda state: state[3], a_unit, (zero, zero, loader.begin(keys_of(zero)), exists)
    )
    loader.end()


def _keys_of(static, schedule, indices_ref, r):
    """Those of the unit of the r-th round."""
    unit = schedule.look(r)
    return Keys(static.source, unit.span, indices_ref, unit.head)


def _nothing():
    pass
