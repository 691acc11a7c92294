"""MXFP4 weights, as gpt-oss's checkpoints hold them: 4 bits an element, and a scale for 32 of them.

OCP Microscaling Formats (MX) Specification v1.0: a block is 32 elements E2M1 (section 5.3.3) that share one scale E8M0
(section 5.4.1), a power of two. A byte holds two elements, the first in its low half.
"""

import functools

import jax
import numpy as np

BLOCK = 32
BYTES = BLOCK // 2

# What the three bits below the sign say: two of exponent, one of mantissa.
_MAGNITUDES = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6])
_SCALE_BIAS, _NOT_A_NUMBER = 127, 255


def dequantize(
    blocks: np.ndarray, scales: np.ndarray, dtype: jax.typing.DTypeLike = np.float32
) -> np.ndarray:
    """The weights that MXFP4 blocks stand for.

    Args:
      blocks: uint8 [..., n, 16], n blocks of a row.
      scales: uint8 [..., n].
      dtype: of the weights, a float; float32 and bfloat16 round none.

    Returns:
      dtype [..., 32 n]; NaN where a scale is E8M0's NaN.

    Raises:
      TypeError: blocks or scales that are not uint8.
      ValueError: shapes that do not fit.
    """
    for name, x in (("blocks", blocks), ("scales", scales)):
        if x.dtype != np.uint8:
            raise TypeError(f"MXFP4's {name} must be uint8; got {x.dtype}")
    if blocks.shape != (*scales.shape, BYTES):
        raise ValueError(
            f"MXFP4's blocks must have the shape of their scales and {BYTES} bytes a scale; got "
            f"{list(blocks.shape)}, scales {list(scales.shape)}"
        )
    pairs = _pairs(np.dtype(dtype))
    weights = pairs[(scales.astype(np.uint16) << 8)[..., None] | blocks]
    return weights.view(dtype).reshape(*scales.shape[:-1], -1)


@functools.cache
def _pairs(dtype: np.dtype) -> np.ndarray:
    """The two weights of each byte under each scale, as one number of their bits: [256 * 256], scales first.

    A scale and a byte are 16 bits, so that looking them up is all there is to do for a model of 20 billion weights.
    """
    signed = np.concatenate([_MAGNITUDES, -_MAGNITUDES])
    bits = np.arange(256)
    scales = np.ldexp(1.0, bits - _SCALE_BIAS)
    scales[_NOT_A_NUMBER] = np.nan
    pairs = np.stack([signed[bits & 15], signed[bits >> 4]], axis=-1)
    with np.errstate(over="ignore", invalid="ignore"):  # float16 does not reach as far
        weights = (scales[:, None, None] * pairs).astype(dtype)
    return weights.reshape(-1).view(np.dtype(f"uint{16 * dtype.itemsize}"))
