"""MXFP4 dequantised, beside a loop that reads the bits and beside transformers."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.models.mxfp4 import dequantize


def of_bits(nibble: int, scale: int) -> float:
    """One element: sign, two bits of exponent with bias 1, one of mantissa; the scale's exponent has bias 127."""
    sign, exponent, mantissa = nibble >> 3, (nibble >> 1) & 3, nibble & 1
    value = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
    return (-1.0) ** sign * value * 2.0 ** (scale - 127)


def random_blocks(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (*shape, 16), dtype=np.uint8)
    return blocks, rng.integers(110, 135, shape, dtype=np.uint8)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_every_element_is_what_its_bits_say(dtype):
    blocks, scales = random_blocks(2, 3, 5)
    blocks[0, 0] = np.arange(80).reshape(5, 16)  # every nibble, low and high
    scales[0, 1] = [1, 254, 127, 0, 200]  # beyond what float16 holds
    want = np.zeros((2, 3, 160), np.float64)
    for (e, row, n), scale in np.ndenumerate(scales):
        for i, byte in enumerate(blocks[e, row, n].tolist()):
            for half, nibble in enumerate((byte & 15, byte >> 4)):
                want[e, row, 32 * n + 2 * i + half] = of_bits(nibble, int(scale))
    ours = dequantize(blocks, scales, dtype)
    with np.errstate(over="ignore"):
        want = want.astype(dtype)
    assert ours.dtype == dtype and ours.shape == want.shape
    assert (np.signbit(ours) == np.signbit(want)).all()
    np.testing.assert_array_equal(ours, want)


def test_a_scale_that_is_not_a_number():
    blocks, scales = random_blocks(2, 3)
    scales[1, 1] = 255
    ours = dequantize(blocks, scales)
    assert (
        np.isnan(ours[1, 32:64]).all()
        and np.isfinite(np.delete(ours.ravel(), slice(128, 160))).all()
    )


def test_as_transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what these libraries warn of on import is theirs
        torch = pytest.importorskip("torch")
        mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, scales = random_blocks(3, 6, 2)
    theirs = mxfp4.convert_moe_packed_tensors(
        torch.tensor(blocks), torch.tensor(scales), dtype=torch.bfloat16
    )
    ours = dequantize(blocks, scales, jnp.bfloat16)
    # Theirs is [experts, in, out].
    np.testing.assert_array_equal(ours.astype(np.float32).swapaxes(1, 2), theirs.float().numpy())


@pytest.mark.parametrize(
    "error, message, change",
    [
        (TypeError, "MXFP4's blocks must be uint8; got int8", lambda b, s: (b.view(np.int8), s)),
        (
            TypeError,
            "MXFP4's scales must be uint8; got float32",
            lambda b, s: (b, s * np.float32(1)),
        ),
        (
            ValueError,
            r"16 bytes a scale; got \[2, 3, 8\], scales \[2, 3\]",
            lambda b, s: (b[..., :8], s),
        ),
        (ValueError, r"must have the shape of their scales", lambda b, s: (b, s[:1])),
    ],
)
def test_errors(error, message, change):
    with pytest.raises(error, match=message):
        dequantize(*change(*random_blocks(2, 3)))
