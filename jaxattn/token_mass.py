"""What sampling counts with: a token's place in the order of likelihood, and its probability as an integer.

**Keys.** An int32 for each token, ordered as the tokens' values are (logits, or probabilities): the bits of the float,
those of negative numbers reversed. A set of likeliest tokens is then `key >= threshold`, which a search over integers
finds exactly.

**Masses.** Floats added in another order make another sum; a token at the border of a nucleus would come and go with
how a row is cut. So probabilities are integers: weights are multiplied by a power of two that brings a row's total to
2^28 .. 2^30, and each is truncated to 12 bits after the point. A total has 40 to 42 bits, more than float32 holds of
any of its weights; sums of masses are exact, and the same in whatever order.

Kernels and the reference both read these definitions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

LOW_BITS = 12
LOW = (1 << LOW_BITS) - 1
MAX_VOCAB = 1 << (31 - LOW_BITS)  # so many low parts are added in an int32
DIGIT_BITS = 14  # of a fraction: three digits, so that an int32 holds sums of products of two
NUM_DIGITS = 3
_DIGIT = (1 << DIGIT_BITS) - 1
_BIAS, _MANTISSA_BITS = 127, 23  # of float32
_FINITE = 0x7F7FFFFF  # the largest float32
_TOTAL_EXPONENT = 29


class Limits(NamedTuple):
    """Which tokens of a row are kept, [b] each, or [1] for all rows; None: no row is limited so."""

    rate: Array | None = None  # float32, log2(e) / temperature; None: 1 for probabilities
    top_k: Array | None = None  # int32, at least 1; the vocabulary or more: all
    top_p: Array | None = None  # float32 in (0, 1]; 1: all
    min_p: Array | None = None  # float32 in [0, 1], of the likeliest token's probability

    @property
    def searched(self) -> bool:
        """Whether a threshold depends on how many tokens, or how much mass, is above it."""
        return self.top_k is not None or self.top_p is not None


class Mass(NamedTuple):
    """`high + low / 2^12`, int32 both; parts that were only added may have a low of more than 12 bits."""

    high: Array
    low: Array

    def carried(self) -> "Mass":
        """The same, its low of 12 bits."""
        return Mass(self.high + (self.low >> LOW_BITS), self.low & LOW)

    def plus(self, other: "Mass") -> "Mass":
        return Mass(self.high + other.high, self.low + other.low).carried()

    def less_than(self, other: "Mass") -> Array:
        """Whether it is less than another, both carried."""
        return (self.high < other.high) | ((self.high == other.high) & (self.low < other.low))

    def weight(self, scale: Array) -> Array:
        """The float32 weight that has this mass, nearly."""
        return (self.high.astype(jnp.float32) + self.low.astype(jnp.float32) / (LOW + 1)) / scale


def cleaned(x: Array, logits: bool) -> Array:
    """float32 values: what is no probability is 0, and a logit that is NaN is -inf."""
    x = x.astype(jnp.float32)
    if logits:
        # A zero has one sign, as it has one place in the order.
        return jnp.where(x == 0, 0.0, jnp.where(x == x, x, -jnp.inf))
    # Positive and finite, by one comparison: the bits of such a float are those of 1 .. _FINITE.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits - 1 < _FINITE, x, 0.0)


def nothing(logits: bool) -> float:
    """The value of a token that is never drawn."""
    return -float("inf") if logits else 0.0


def key_of(value: Array, *, signed: bool = True) -> Array:
    """int32, ordered as float32 values; no NaN, no -0. signed: whether some may be negative."""
    bits = jax.lax.bitcast_convert_type(value, jnp.int32)
    return _reversed_if_negative(bits) if signed else bits


def value_of(key: Array) -> Array:
    """The inverse of `key_of`."""
    return jax.lax.bitcast_convert_type(_reversed_if_negative(key), jnp.float32)


def _reversed_if_negative(bits: Array) -> Array:
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def weight_of(value: Array, peak: Array, rate: Array, logits: bool) -> Array:
    """float32 weights of cleaned values: the probability, or 2^((logit - peak) * rate) of a logit.

    Args:
      peak: the row's largest logit.
      rate: log2(e) / temperature.
    """
    if not logits:
        return value
    below = jnp.where(value == peak, 0.0, value - peak)  # inf - inf is none
    return jnp.where(value > -jnp.inf, jnp.exp2(below * rate), 0.0)


def value_with_weight(weight: Array, peak: Array, rate: Array, logits: bool) -> Array:
    """The value that has a weight: the inverse of `weight_of`."""
    return peak + jnp.log2(weight) / rate if logits else weight


def scale_of(total: Array) -> Array:
    """The power of two by which weights of this float32 total are multiplied.

    A total of about 1, summed in whichever order, has one scale: where scales change is at 2/3 and 4/3.
    """
    biased = jax.lax.bitcast_convert_type(1.5 * total, jnp.int32) >> _MANTISSA_BITS
    scale = jnp.clip(2 * _BIAS + _TOTAL_EXPONENT - biased, 1, 2 * _BIAS)
    return jax.lax.bitcast_convert_type(scale << _MANTISSA_BITS, jnp.float32)


def mass_of(weight: Array, scale: Array) -> Mass:
    scaled = weight * scale
    high = scaled.astype(jnp.int32)
    low = ((scaled - high.astype(jnp.float32)) * (LOW + 1)).astype(jnp.int32)
    return Mass(high, low)


def digits_of(fraction: Array) -> list[Array]:
    """Three digits of 14 bits, the highest first, of a float32 fraction in [0, 1)."""
    digits = []
    for _ in range(NUM_DIGITS):
        fraction = fraction * (_DIGIT + 1)
        digits.append(fraction.astype(jnp.int32))
        fraction = fraction - digits[-1].astype(jnp.float32)
    return digits


def random_digits(key: Array, rows: int) -> Array:
    """int32 [rows, 3], uniform digits; `key` is one random key, or one for each row [rows]."""
    if key.shape:
        bits = jax.vmap(lambda one: jax.random.bits(one, (NUM_DIGITS,), jnp.uint32))(key)
    else:
        bits = jax.random.bits(key, (rows, NUM_DIGITS), jnp.uint32)
    return (bits >> (32 - DIGIT_BITS)).astype(jnp.int32)


def share(total: Mass, digits: list[Array]) -> tuple[Mass, Array]:
    """floor(total * fraction), and whether that left something out; long multiplication of a carried total."""
    total_digits = [
        total.high >> (2 * DIGIT_BITS - LOW_BITS),
        (total.high >> (DIGIT_BITS - LOW_BITS)) & _DIGIT,
        ((total.high << LOW_BITS) | total.low) & _DIGIT,
    ]
    carry, product = jnp.zeros_like(total.high), []
    for place in range(2 * NUM_DIGITS - 1):  # from the least
        for i in range(NUM_DIGITS):
            j = place - i
            if 0 <= j < NUM_DIGITS:
                carry += total_digits[NUM_DIGITS - 1 - i] * digits[NUM_DIGITS - 1 - j]
        product.append(carry & _DIGIT)
        carry >>= DIGIT_BITS
    left_out = (product[0] | product[1] | product[2]) != 0
    low, middle, high = product[3], product[4], carry
    return (
        Mass(
            (high << (2 * DIGIT_BITS - LOW_BITS))
            | (middle << (DIGIT_BITS - LOW_BITS))
            | (low >> LOW_BITS),
            low & LOW,
        ),
        left_out,
    )
