"""The online softmax: the one place where m, l and acc change.

    m = max_j s_j,   l = sum_j exp(scale (s_j - m)),   acc = sum_j exp(scale (s_j - m)) v_j

over the keys j seen so far; a new tile of keys rescales the old sums by exp(scale (m_old - m_new))
(FlashAttention-2, algorithm 1). The scale, `Score.exponent_scale`, is folded into the exponent, in base 2.

Axes: r rows (query token x group), k keys of a tile, d head dim.
"""

import dataclasses
import math
import struct
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from jaxattn.kv_scales import MIN_SCALE

LOG2E = math.log2(math.e)
LN2 = math.log(2)


class State(NamedTuple):
    m: jax.Array  # float32 [r], of scores times `unit`; -inf before the first key
    l: jax.Array  # float32 [r], or [r, k]: a sum for each place of a tile
    acc: tuple[jax.Array, ...]  # float32 [r, d / n] each, of the n parts that values come in


@dataclasses.dataclass(frozen=True)
class OnlineSoftmax:
    scale: float
    # Add up the places of a tile in the end only: where several warps hold a row, a sum makes them wait for each
    # other. Where one does, it takes registers that large tiles do not have.
    late_sum: bool
    interpret: bool
    # Weights go up to 2^headroom instead of 1: in float16, so many binades more are left for the small ones.
    headroom: int = 0
    # What each row's scores are to be multiplied by besides, float32 [r] or [], positive; None: nothing.
    row_scale: jax.Array | None = None

    def init(
        self,
        rows: int,
        keys: int,
        head_dim: int,
        logit: jax.Array | None = None,
        *,
        parts: int = 1,
    ) -> State:
        """Before the first key; with a logit float32 [r], as if a key with that logit and value 0 had been seen.

        parts: that values come in, as in `update`.
        """
        acc = tuple(jnp.zeros((rows, head_dim // parts), jnp.float32) for _ in range(parts))
        l = jnp.zeros((rows, keys) if self.late_sum else (rows,), jnp.float32)
        if logit is None:
            return State(jnp.full((rows,), -jnp.inf, jnp.float32), l, acc)
        one = jnp.where(logit == -jnp.inf, 0.0, 1.0)
        if self.late_sum:
            l = jnp.where((jnp.arange(keys, dtype=jnp.int32) == 0)[None, :], one[:, None], l)
        else:
            l = one
        return State(logit * (self.unit / self.scale), l, acc)

    def with_value_scales(
        self, s: jax.Array, v_scale: jax.Array | None, dtype: DTypeLike
    ) -> jax.Array:
        """What `update` takes for scores, from float32 scores s [r, k] without the scale.

        v_scale: float32 [k], as in `update`; dtype: of the values. In 16 bits its logarithm is added, so that the
        largest weight is as large as without it, whatever the scales; the sum of weights takes it out. Scores are
        masked afterwards: a token that is not seen may have any scale, NaN included.
        """
        if v_scale is None or _exact(dtype):
            return s
        log = self._log2(v_scale)[None, :]
        if not self.interpret:
            return self._fma(s, jnp.asarray(self._units, jnp.float32).reshape(-1, 1), log)
        s = s if self.row_scale is None else s * self.row_scale.reshape(-1, 1)
        return s + log * (1 / (self.scale * LOG2E))

    def update(
        self,
        state: State,
        s: jax.Array,
        v: tuple[jax.Array, ...],
        v_scale: jax.Array | None = None,
    ) -> State:
        """Takes in a tile: float32 scores s [r, k] without the scale, -inf where masked, and values v [k, d].

        v: the values, or, of n parts, each n-th of their columns.

        v_scale: float32 [k], what the values are to be multiplied by, after `with_value_scales` took it into s.
        """
        exact = _exact(v[0].dtype)
        taken_out = None if v_scale is None or exact else self._reciprocal(v_scale)[None, :]
        weighed = taken_out is not None
        exponents = weighed and not self.interpret  # s is in `unit`s
        if self.interpret and self.row_scale is not None and not weighed:
            s = s * self.row_scale.reshape(-1, 1)
        top = jnp.max(s, axis=1)
        if not exponents:
            top = top * self._units
        m = jnp.maximum(state.m, top - self.headroom * self.binade if self.headroom else top)
        # A row without any key yet has m = -inf, and -inf - -inf is NaN: shift by 0 there instead.
        peak = jnp.where(m == -jnp.inf, 0.0, m)
        p = self._rescale(s, peak[:, None]) if exponents else self._weight(s, peak)
        alpha = self._rescale(state.m, peak)
        if not self.late_sum:
            l = state.l * alpha + jnp.sum(p if taken_out is None else p * taken_out, axis=1)
        elif taken_out is None:
            l = state.l * alpha[:, None] + p
        else:
            l = self._fma(p, taken_out, state.l * alpha[:, None])
        if v_scale is not None and exact:
            # What is not seen may have any scale.
            p = jnp.where(s == -jnp.inf, 0.0, p * v_scale[None, :])
        p = p.astype(v[0].dtype)
        pv = [self.dot(p, part) for part in v]
        return State(m, l, tuple(a * alpha[:, None] + x for a, x in zip(state.acc, pv)))

    def finalize(
        self, state: State, v_scale: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The attention state (o [r, d], lse [r], natural log); a row without keys gives 0 and -inf.

        v_scale: float32 [], what all values are to be multiplied by.
        """
        l = jnp.sum(state.l, axis=1) if self.late_sum else state.l
        empty = l == 0.0
        l = jnp.where(empty, 1.0, l)
        acc = state.acc[0]
        if len(state.acc) > 1:
            acc = jnp.stack(state.acc, axis=-1).reshape(acc.shape[0], -1)
        o = acc / l[:, None]
        o = o if v_scale is None else o * v_scale
        lse = (state.m * (self.scale * LOG2E / self.unit) + jnp.log2(l)) * LN2
        return o, jnp.where(empty, -jnp.inf, lse)

    def with_logit(
        self, o: jax.Array, lse: jax.Array, logit: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """What `init` with a logit leads to, of the attention state without it.

        In float16 the logit of a key without a value must not set the largest weight: those of values would be lost.
        """
        peak = jnp.maximum(lse, logit)
        shift = jnp.where(peak == -jnp.inf, 0.0, peak)
        kept = jnp.exp(lse - shift)
        total = kept + jnp.exp(logit - shift)
        total = jnp.where(total == 0.0, 1.0, total)
        return o * (kept / total)[:, None], jnp.where(
            peak == -jnp.inf, peak, shift + jnp.log(total)
        )

    def dot(self, a: jax.Array, b: jax.Array, *, trans_b: bool = False) -> jax.Array:
        """a @ b (a @ b.T) in float32.

        float32 inputs are split into three TF32 products, for tensor cores. H200, against float64: error 7.8e-7,
        where plain FMAs have 9.2e-7 and take four times as long, and one TF32 product has 4.3e-4. The parts of
        a head_dim above 128 do not fit into shared memory: there it is FMAs.
        """
        precision = None
        if a.dtype == jnp.float32:
            x3 = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
            plain = self.interpret or b.shape[1] > 128
            precision = jax.lax.Precision.HIGHEST if plain else x3
        return plgpu.dot(a, b, trans_b=trans_b, precision=precision)

    def tanh(self, x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """tanh of float32 x; for inputs of 16 bits by one MUFU instruction, whose relative error is 2^-11."""
        if self.interpret or dtype == jnp.float32:
            return jnp.tanh(x)
        return _asm("tanh.approx.f32 $0, $1;", x)

    @property
    def unit(self) -> float:
        """What maxima are kept in: of scores times scale log2(e), rounded once, so that all weights of a row are 2 to
        the power of a difference from the very same number. An interpreter without the fused multiply-add that this
        rests on keeps those of the scores themselves."""
        return 1.0 if self.interpret else self.scale * LOG2E

    @property
    def binade(self) -> float:
        """How much maxima differ by where weights differ by a factor of 2."""
        return self.unit / (self.scale * LOG2E)

    @property
    def _units(self) -> jax.Array | float:
        """`unit` of each row, for scores that `row_scale` has not been applied to."""
        if self.interpret or self.row_scale is None:
            return self.unit
        return self.row_scale * self.unit

    def _weight(self, s: jax.Array, peak: jax.Array) -> jax.Array:
        """exp(scale s - m), as one FMA and one MUFU instruction.

        `jnp.exp2` lowers to `ex2.approx` without flush-to-zero, which costs a compare and two multiplies more, and
        Pallas never contracts the multiply and the add. H200, paged prefill 1 x 16384: 320 -> 429 TFLOP/s.
        """
        if self.interpret:
            return jnp.exp2((s - peak[:, None]) * (self.scale * LOG2E))
        if self.row_scale is not None:
            asm = "{.reg .f32 t; fma.rn.f32 t, $1, $3, $2; ex2.approx.ftz.f32 $0, t;}"
            units = jnp.broadcast_to(self.row_scale.reshape(-1, 1) * self.unit, s.shape)
            return _asm(asm, s, jnp.broadcast_to(-peak[:, None], s.shape), units)
        unit = _bits(self.unit)
        asm = f"{{.reg .f32 t; fma.rn.f32 t, $1, {unit}, $2; ex2.approx.ftz.f32 $0, t;}}"
        return _asm(asm, s, jnp.broadcast_to(-peak[:, None], s.shape))

    def _rescale(self, m: jax.Array, peak: jax.Array) -> jax.Array:
        """exp(m_old - m), exactly 1 where the maximum did not change."""
        if self.interpret:
            return jnp.exp2((m - peak) * (self.scale * LOG2E))
        return _asm("ex2.approx.ftz.f32 $0, $1;", m - peak)

    def _log2(self, v_scale: jax.Array) -> jax.Array:
        """log2 of what is at least `MIN_SCALE`, NaN of NaN; by one MUFU instruction, whose error is 2^-22.

        No append writes less, but others may write 0 for a vector of zeros.
        """
        if self.interpret:
            return jnp.log2(jnp.maximum(v_scale, MIN_SCALE))
        asm = f"{{.reg .f32 t; max.NaN.f32 t, $1, {_bits(MIN_SCALE)}; lg2.approx.ftz.f32 $0, t;}}"
        return _asm(asm, v_scale)

    def _reciprocal(self, v_scale: jax.Array) -> jax.Array:
        """1 / what is at least `MIN_SCALE`, finite of NaN: a weight of 0 times it must be 0.

        By one MUFU instruction, which errs by a unit in the last place.
        """
        if self.interpret:
            return 1.0 / jnp.where(v_scale > MIN_SCALE, v_scale, MIN_SCALE)
        asm = f"{{.reg .f32 t; max.f32 t, $1, {_bits(MIN_SCALE)}; rcp.approx.ftz.f32 $0, t;}}"
        return _asm(asm, v_scale)

    def _fma(self, a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
        """a * b + c of float32, which broadcast against a; as one instruction, which Pallas never makes of the two."""
        if self.interpret:
            return a * b + c
        args = (a, *(jnp.broadcast_to(x, a.shape) for x in (b, c)))
        return _asm("fma.rn.f32 $0, $1, $2, $3;", *args)


def _exact(dtype: DTypeLike) -> bool:
    """Whether a product of a weight and a scale can be held in a dtype as it is."""
    return jnp.dtype(dtype) == jnp.float32


def _bits(x: float) -> str:
    """A float32 literal of PTX."""
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    return f"0f{bits:08X}"


def _asm(asm: str, *args: jax.Array) -> jax.Array:
    """A float32 instruction for each element."""
    (y,) = plgpu.elementwise_inline_asm(
        asm,
        args=args,
        constraints="=f" + ",f" * len(args),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, jnp.float32)],
    )
    return y
