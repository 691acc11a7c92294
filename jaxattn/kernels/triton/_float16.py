"""Queries in float16, for the product with keys of 8 bits.

Every float8 number is a float16 number, and the way from one to the other is short; the way to bfloat16 is not. A
query of bfloat16 has fewer bits than a float16 holds, but its exponent may lie outside: a power of two for each row
brings the row's largest magnitude to 2^14 .. 2^15, and what it took away goes back into the scores, exactly. Elements
less than 2^-29 of their row's largest lose bits.

Axes: r rows, d head dim.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

_BIAS, _MANTISSA_BITS = 127, 23  # of float32
_TOP = 14  # the exponent of the largest magnitude afterwards


def in_float16(q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """q [r, d] as (float16 [r, d], float32 [r]): q is the product of the two."""
    q = q.astype(jnp.float32)
    largest = jax.lax.bitcast_convert_type(jnp.max(jnp.abs(q), axis=1), jnp.int32)
    # A row of zeros must not ask for more than float32 holds.
    exponent = jnp.maximum(largest >> _MANTISSA_BITS, _TOP + 1)

    def power_of_two(biased: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(biased << _MANTISSA_BITS, jnp.float32)

    down = power_of_two(2 * _BIAS + _TOP - exponent)
    return (q * down[:, None]).astype(jnp.float16), power_of_two(exponent - _TOP)


def paired(x: jax.Array) -> jax.Array:
    """Rows [n, d] of 8-bit elements as int16 [n, d / 2], the same memory."""
    return jax.lax.bitcast_convert_type(x.reshape(x.shape[0], -1, 2), jnp.int16)


def unpaired(x: jax.Array, dtype: jnp.dtype, *, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """The even and the odd elements, float16, of pairs int16 of a float8 dtype."""
    if interpret:
        both = jax.lax.bitcast_convert_type(x, dtype).astype(jnp.float16)
        return both[..., 0], both[..., 1]
    if dtype == jnp.float8_e5m2:
        # The upper half of a float16.
        low, high = x << 8, x & -256
    else:
        (two,) = plgpu.elementwise_inline_asm(
            "cvt.rn.f16x2.e4m3x2 $0, $1;",
            args=[x],
            constraints="=r,h",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.int32)],
        )
        low, high = two.astype(jnp.int16), (two >> 16).astype(jnp.int16)
    even, odd = (jax.lax.bitcast_convert_type(y, jnp.float16) for y in (low, high))
    return even, odd
