"""Queries in float16, and keys and values of 8 bits on their way there: `kernels._float16` says why.

Axes: r rows, d head dim.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from jaxattn.kernels._float16 import powers


def in_float16(q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """q [r, d] as (float16 [r, d], float32 [r]): q is the product of the two."""
    q = q.astype(jnp.float32)
    down, up = powers(jnp.max(jnp.abs(q), axis=1))
    return (q * down[:, None]).astype(jnp.float16), up


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
