"""Keys and values in 8 bits: what a stored number stands for, and which number is stored.

A float8 cache holds few bits of a number, and a scale brings a vector of numbers into its range:

    k = k_scale * stored k,   v = v_scale * stored v

with one scale for all, one for each KV head, or one for each token and head: then a token's own largest magnitude
sets it when the token is appended, and nothing need be calibrated. Attention never multiplies a cache by its scales:
those of k go into the scores, those of v into the weights or the output.

The kernels and the reference call the same functions here.

Axes: n pages, p page size, kh KV heads.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jaxattn.checks import check_shape

FP8_DTYPES = ("float8_e4m3fn", "float8_e5m2")

# A token's own scale is at least this, also of zeros: sums of its reciprocals over any number of keys stay finite.
MIN_SCALE = 2.0**-64
# A given scale counts as at least this, whose reciprocal is finite: 0, which a calibration finds for a head of zeros.
SMALLEST = 2.0**-126


def fp8_dtype(name: DTypeLike) -> jnp.dtype:
    """The float8 dtype of a cache that is asked for; "fp8" is float8_e4m3fn, which has one bit more than e5m2.

    Raises:
      ValueError: another one.
    """
    try:
        dtype = jnp.dtype("float8_e4m3fn" if isinstance(name, str) and name == "fp8" else name)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in FP8_DTYPES:
        raise ValueError(f"kv_dtype must be 'fp8' or one of {', '.join(FP8_DTYPES)}; got {name!r}")
    return dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVScales:
    """What the numbers of a cache are multiplied by: float32 arrays, positive and finite, in a pytree.

    A scale below 2^-126, 0 included, counts as 2^-126. One above 2^90 or so may take numbers beyond float32 on the way.
    Only arrays on the host (NumPy) are checked.

    Attributes:
      k, v: [] for all; [kh] for each KV head; or, both of them, pages [n, p, kh] (NHD) or [n, kh, p] (HND) for each
        token and head, which are part of the cache and written by the append.
    """

    k: Array
    v: Array

    @classmethod
    def of(cls, k: Any, v: Any) -> "KVScales":
        """From numbers or arrays of any real dtype; None is 1."""
        k, v = (jnp.asarray(1.0 if x is None else x).astype(jnp.float32) for x in (k, v))
        return cls(k, v)

    @property
    def per_token(self) -> bool:
        """Whether they are pages; `check` refuses those of which only one is."""
        return max(np.ndim(self.k), np.ndim(self.v)) > 1

    def check(self, page_shape: tuple[int, ...], num_kv_heads: int) -> None:
        """Raises ValueError or TypeError, with the reason, unless they fit pages of this shape, head_dim left out."""
        for name, x in (("k_scale", self.k), ("v_scale", self.v)):
            if not hasattr(x, "dtype") or x.dtype != jnp.float32:
                came = getattr(x, "dtype", type(x).__name__)
                raise TypeError(
                    f"{name} must be a float32 array; got {came}: use KVScales.of(k_scale, v_scale)"
                )
            if self.per_token:
                check_shape(name, x, page_shape)
            elif x.ndim == 1:
                check_shape(name, x, (num_kv_heads,))
            if isinstance(x, np.ndarray | np.generic) and not np.all((x > 0) & np.isfinite(x)):
                raise ValueError(f"{name} must be positive and finite; got {x}")


def columns(k: Array, v: Array, there: Array) -> tuple[Array, Array, Array]:
    """What kernels that multiply in 16 bits make of tokens' scales, float32 each: (k, log2 v, 1 / v).

    Scores are multiplied by the first, the second is added to their exponents of 2, where a weight times v might be out
    of 16 bits, and by the third a weight counts in the sum. Where a token is not there they are (1, -inf, 0).
    """
    # Others than the append may write 0 for a vector of zeros. A GPU's maximum would drop NaN.
    v = jnp.where(v <= MIN_SCALE, MIN_SCALE, v)
    # Of NaN 0, so that it is for those alone who see the token: it makes their exponents NaN, and weights of 0 stay 0.
    part = jnp.where(there & (v > 0), 1.0 / v, 0.0)
    return jnp.where(there, k, 1.0), jnp.where(there, jnp.log2(v), -jnp.inf), part


def largest(x: Array) -> Array:
    """The largest magnitude along the last axis, float32; NaN and infinities do not count."""
    x = x.astype(jnp.float32)
    return jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), 0.0), axis=-1)


def own_scale(magnitude: Array, dtype: DTypeLike) -> Array:
    """The scale, float32, that takes a vector with this largest magnitude to the largest number of a float8 dtype."""
    return jnp.maximum(magnitude * (1 / float(jnp.finfo(dtype).max)), MIN_SCALE)


def stored(x: Array, scale: Array | None, dtype: DTypeLike, *, saturating: bool = False) -> Array:
    """x / scale in a cache's dtype; what is beyond the range of a float8 dtype saturates, and NaN stays NaN.

    scale: float32, broadcasts against x; None: 1. saturating: the conversion to a float8 dtype does so by itself.
    """
    if scale is not None:
        x = x.astype(jnp.float32) * (1.0 / jnp.maximum(scale, SMALLEST))
    if jnp.dtype(dtype).name not in FP8_DTYPES:
        return x.astype(dtype)
    x = x.astype(jnp.float32)
    if saturating:
        return x.astype(dtype)
    most = float(jnp.finfo(dtype).max)
    # A GPU's minimum and maximum drop NaN.
    return jnp.where(jnp.isnan(x), x, jnp.clip(x, -most, most)).astype(dtype)
