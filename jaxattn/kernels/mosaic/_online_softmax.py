"""The online softmax in the registers of a warpgroup: a row's numbers lie with the threads that hold its scores.

    l = sum_j exp(scale (s_j - m)),   acc = sum_j exp(scale (s_j - m)) v_j

over the keys j seen so far (FlashAttention-2, algorithm 1). Any m gives the same quotient, so m need not be the largest
score: it rises to it where a weight would come out above 2^SLACK, and only then the sums so far are multiplied by
exp(scale (m_old - m_new)) (FlashAttention-4, Zadouri et al. 2026: conditional rescaling). The scale,
`Score.exponent_scale`, is folded into the exponent, in base 2.

Axes: r = 64 rows, k keys of a tile, d head dim.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxattn.kernels.mosaic._elements import COLUMNS, ROW, ROWS, TILE, own_sums
from jaxattn.kv_scales import SMALLEST

LOG2E = math.log2(math.e)
LN2 = math.log(2)
# FlashAttention-4's; no other was tried. In float16 and bfloat16 a weight of up to 2^8 has as many bits as one of up
# to 1.
SLACK = 8


class State(NamedTuple):
    m: jax.Array  # float32 [r], of scores times scale log2(e); -inf before the first key
    l: jax.Array  # float32 [r, 8], `own_sums`, to be added up


@dataclasses.dataclass(frozen=True)
class OnlineSoftmax:
    scale: float
    factor: jax.Array | None = None  # float32, positive: a further one of all scores; or [r]
    headroom: int = SLACK  # weights go up to 2^headroom, at least SLACK

    @property
    def unit(self) -> float | jax.Array:
        unit = self.scale * LOG2E
        # Not 0, which times the -inf of a masked score is NaN.
        return unit if self.factor is None else jnp.maximum(unit * self.factor, SMALLEST)

    def init(self) -> State:
        l = plgpu.layout_cast(jnp.zeros((ROWS, COLUMNS), jnp.float32), TILE)
        return State(plgpu.layout_cast(jnp.full((ROWS,), -math.inf, jnp.float32), ROW), l)

    def exponents(self, s: jax.Array, more: jax.Array) -> jax.Array:
        """Scores s [r, k] as exponents of 2, to which `more` [k] is added."""
        return times(s, self.unit) + along_rows(more, ROWS)

    def rise(self, m: jax.Array, s: jax.Array, *, scaled: bool) -> tuple[jax.Array, jax.Array]:
        """m with scores s [r, k] taken in, and whether it has risen, bool [r].

        scaled: s is `exponents`; else scores without the scale, -inf where masked.
        """
        top = s.max(axis=1)
        top = top if scaled else top * self.unit
        if self.headroom > SLACK:
            top -= self.headroom - SLACK
        # Not top > m + SLACK, which is rounded: from 2^27 on, by up to 8.
        risen = top - m > SLACK
        return jnp.where(risen, top, m), risen

    def weigh(
        self, s: jax.Array, m: jax.Array, *, scaled: bool, parts: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The weights float32 [r, k] of scores s as in `rise`, and what they add to l; m [r], finite.

        parts: what of each key's weight counts in l, float32 [k].
        """
        x = s if scaled else times(s, self.unit)
        p = jnp.exp2(x - along_keys(m, s))
        return p, own_sums(p, parts)

    def finalize(
        self, state: State, o: jax.Array, sink: jax.Array | None, v_scale: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """The attention state (o [r, d], lse [r], natural log) of the sums o [r, d]; without keys 0 and -inf.

        sink float32 [r]: a further logit, without a value. v_scale: a factor of all values.
        """
        m, l = state.m, state.l.sum(axis=1)
        if sink is not None:
            peak = jnp.maximum(m, sink * LOG2E)
            safe = finite(peak)
            alpha = jnp.exp2(m - safe)
            m, l = peak, l * alpha + jnp.exp2(sink * LOG2E - safe)
            o = o * along_keys(alpha, o)
        empty = l == 0.0
        l = jnp.where(empty, 1.0, l)
        lse = (m + jnp.log2(l)) * LN2
        share = 1.0 / l if v_scale is None else v_scale / l
        return o * along_keys(share, o), jnp.where(empty, -math.inf, lse)


def finite(m: jax.Array) -> jax.Array:
    """m, or 0 for a row that has seen no key, whose -inf less itself would be NaN."""
    return jnp.where(m == -math.inf, 0.0, m)


def times(s: jax.Array, factor: float | jax.Array) -> jax.Array:
    """Scores s [r, k] times a factor of all, or [r], of each row's."""
    return s * (along_keys(factor, s) if isinstance(factor, jax.Array) and factor.ndim else factor)


def along_keys(x: jax.Array, like: jax.Array) -> jax.Array:
    """x [r] as [r, k]."""
    return lax.broadcast_in_dim(x, like.shape, [0])


def along_rows(x: jax.Array, rows: int) -> jax.Array:
    """x [k] as [r, k]."""
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])
