"""The online softmax in the registers of a warpgroup: a row's numbers lie with the threads that hold its scores.

    m = max_j s_j,   l = sum_j exp(scale (s_j - m)),   acc = sum_j exp(scale (s_j - m)) v_j

over the keys j seen so far; a new tile rescales the old sums by exp(scale (m_old - m_new)) (FlashAttention-2,
algorithm 1). The scale, `Score.exponent_scale`, is folded into the exponent, in base 2.

Axes: r = 64 rows, k keys of a tile, d head dim.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxattn.kv_scales import SMALLEST

LOG2E = math.log2(math.e)
LN2 = math.log(2)
ROWS = 64  # of a warpgroup's product
TILE = plgpu.Layout.WGMMA  # [r, k] and [r, d]
ROW = TILE.reduce(1)  # [r]
KEY = TILE.reduce(0)  # [k]


class State(NamedTuple):
    m: jax.Array  # float32 [r], of scores times scale log2(e); -inf before the first key
    l: jax.Array  # float32 [r]


class Weights(NamedTuple):
    p: jax.Array  # float32 [r, k]
    alpha: jax.Array  # float32 [r]: what the sums so far are to be multiplied by


@dataclasses.dataclass(frozen=True)
class OnlineSoftmax:
    scale: float
    factor: jax.Array | None = None  # float32, positive: a further one of all scores; or [r]
    headroom: int = 0  # weights go up to 2^headroom

    @property
    def unit(self) -> float | jax.Array:
        unit = self.scale * LOG2E
        # Not 0, which times the -inf of a masked score is NaN.
        return unit if self.factor is None else jnp.maximum(unit * self.factor, SMALLEST)

    def init(self) -> State:
        return State(of_rows(-math.inf), of_rows(0.0))

    def exponents(self, s: jax.Array, more: jax.Array) -> jax.Array:
        """Scores s [r, k] as exponents of 2, to which `more` [k] is added."""
        return times(s, self.unit) + along_rows(more, ROWS)

    def update(
        self, state: State, s: jax.Array, *, masked: bool, parts: jax.Array | None = None
    ) -> tuple[State, Weights]:
        """Takes in scores s [r, k] without the scale, -inf where masked; with parts float32 [k], `exponents`.

        parts: what of each key's weight counts in l.
        """
        unit = self.unit if parts is None else 1.0
        top = s.max(axis=1) * unit
        m = jnp.maximum(state.m, top - self.headroom if self.headroom else top)
        # A row without any key yet has m = -inf, and -inf - -inf is NaN: shift by 0 there instead.
        peak = jnp.where(m == -math.inf, 0.0, m) if masked else m
        alpha = jnp.exp2(state.m - peak)
        p = jnp.exp2(times(s, unit) - along_keys(peak, s))
        counted = p if parts is None else p * along_rows(parts, ROWS)
        return State(m, state.l * alpha + counted.sum(axis=1)), Weights(p, alpha)

    def finalize(
        self, state: State, o: jax.Array, sink: jax.Array | None, v_scale: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """The attention state (o [r, d], lse [r], natural log) of the sums o [r, d]; without keys 0 and -inf.

        sink float32 [r]: a further logit, without a value. v_scale: a factor of all values.
        """
        m, l = state
        if sink is not None:
            peak = jnp.maximum(m, sink * LOG2E)
            safe = jnp.where(peak == -math.inf, 0.0, peak)
            alpha = jnp.exp2(m - safe)
            m, l = peak, l * alpha + jnp.exp2(sink * LOG2E - safe)
            o = o * along_keys(alpha, o)
        empty = l == 0.0
        l = jnp.where(empty, 1.0, l)
        lse = (m + jnp.log2(l)) * LN2
        share = 1.0 / l if v_scale is None else v_scale / l
        return o * along_keys(share, o), jnp.where(empty, -math.inf, lse)


def of_rows(x: float) -> jax.Array:
    """float32 [r], the same for each row."""
    return plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), ROW)


def times(s: jax.Array, factor: float | jax.Array) -> jax.Array:
    """Scores s [r, k] times a factor of all, or [r], of each row's."""
    return s * (along_keys(factor, s) if isinstance(factor, jax.Array) and factor.ndim else factor)


def along_keys(x: jax.Array, like: jax.Array) -> jax.Array:
    """x [r] as [r, k]."""
    return lax.broadcast_in_dim(x, like.shape, [0])


def along_rows(x: jax.Array, rows: int) -> jax.Array:
    """x [k] as [r, k]."""
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])
