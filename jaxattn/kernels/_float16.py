"""Products in float16 over keys and values of 8 bits: what brings queries and weights into its range.

Every float8 number is a float16 number, and the way from one to the other is short; the way to bfloat16 is not. A
query of bfloat16 has fewer bits than a float16 holds, but its exponent may lie outside: a power of two for each row
brings the row's largest magnitude to 2^14 .. 2^15, and what it took away goes back into the scores, exactly. Elements
less than 2^-29 of their row's largest lose bits. What products add up is float32 all the same.

Axes: r rows.
"""

import jax
import jax.numpy as jnp

# Weights go up to 2^15 instead of 1: so many binades more are left for the small ones.
HEADROOM = 15

_BIAS, _MANTISSA_BITS = 127, 23  # of float32
_TOP = 14  # the exponent of the largest magnitude afterwards


def powers(largest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of rows' largest magnitudes float32 [r]: what brings each row into range, and what undoes it, float32 [r]."""
    # A row of zeros must not ask for more than float32 holds.
    bits = jax.lax.bitcast_convert_type(largest, jnp.int32)
    exponent = jnp.maximum(bits >> _MANTISSA_BITS, _TOP + 1)

    def power_of_two(biased: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(biased << _MANTISSA_BITS, jnp.float32)

    return power_of_two(2 * _BIAS + _TOP - exponent), power_of_two(exponent - _TOP)
