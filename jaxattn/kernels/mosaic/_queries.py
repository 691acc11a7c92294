"""A warpgroup's queries in shared memory, made float16 where products are: keys of 8 bits have that type, not bfloat16.

Axes: r = 64 rows, d head dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxattn.kernels._float16 import powers
from jaxattn.kernels.mosaic import _warpgroup as wg
from jaxattn.kernels.mosaic._elements import TILE
from jaxattn.kernels.mosaic._online_softmax import along_keys


def put(tile: Any, x: jax.Array) -> None:
    """tile [r, d] (shared memory, TILED), of a type as wide, holds x's bytes."""
    tile[...] = _as(x, tile.dtype)


def in_float16(tile: Any, dtype: jax.typing.DTypeLike) -> jax.Array:
    """tile float16 [r, d] (shared memory, TILED), which holds bytes of `dtype`, bfloat16, becomes these numbers but for
    a factor for each row, float32 [r]."""
    q = _as(plgpu.load(tile, layout=TILE), dtype).astype(jnp.float32)
    down, up = powers(jnp.abs(q).max(axis=1))
    wg.sync()  # a thread writes what another one may have read
    put(tile, (q * along_keys(down, q)).astype(jnp.float16))
    plgpu.commit_smem()
    return up


def _as(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)
