"""Groups of rows times their matrices, beside a loop over the groups in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.grouped_matmul import grouped_matmul
from jaxattn.kernels.triton.grouped_matmul import Tiles

NAN = np.nan


def inputs(sizes, n, k, spare, dtype, seed=0):
    """x, weights and what they give; rows past the groups, and matrices of empty groups, are NaN."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((sum(sizes) + spare, k)).astype(np.float32)
    weights = rng.standard_normal((len(sizes), n, k)).astype(np.float32) / np.sqrt(k)
    x, weights = (np.array(jnp.asarray(a, dtype)) for a in (x, weights))
    x[sum(sizes) :] = NAN
    weights[np.asarray(sizes) == 0] = NAN
    ends = np.cumsum(sizes)
    want = [
        x[end - size : end].astype(np.float64) @ weights[g].astype(np.float64).T
        for g, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]
    return x, weights, np.asarray(sizes, np.int32), np.concatenate(want)


@pytest.mark.parametrize(
    "backend", ["xla", "interpret", pytest.param("triton", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize(
    "sizes, n, k, spare, dtype",
    [
        (
            [0, 3, 0, 40, 1, 0],
            70,
            96,
            5,
            jnp.bfloat16,
        ),  # a group of several tiles, a part of a tile of columns
        ([1], 8, 130, 0, jnp.float32),  # the inner dim ends in a tile of two
        ([0, 0, 17], 130, 24, 0, jnp.float16),  # less than a tile
        ([0, 0], 8, 16, 4, jnp.float32),  # all rows are past the groups
        ([300, 5], 16, 64, 0, jnp.bfloat16),  # tall tiles
    ],
)
def test_groups(sizes, n, k, spare, dtype, backend):
    x, weights, group_sizes, want = inputs(sizes, n, k, spare, dtype)
    if backend == "xla":
        weights[group_sizes == 0] = 0  # XLA multiplies by them too
    out = grouped_matmul(x, weights, group_sizes, backend=backend)
    assert out.dtype == jnp.float32 and out.shape == (len(x), n)
    np.testing.assert_allclose(np.asarray(out)[: len(want)], want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("block", [1, 16])
def test_every_row_of_a_group_is_in_one_tile(block):
    rng = np.random.default_rng(0)
    m = 150
    tiles = jax.jit(lambda sizes: Tiles.of(sizes, m, block))
    for sizes in [[0, 0, m], [m, 0, 0], [0, 0, 0], [49, 50, 51], *rng.integers(0, 50, (20, 3))]:
        sizes = np.asarray(sizes, np.int32) * (1 if sum(sizes) == m else rng.integers(0, 2, 3))
        group, begin, end = map(np.asarray, tiles(jnp.asarray(sizes, jnp.int32)))
        assert (end - begin <= block).all()
        owner = np.full(m, -1)
        for g, first, last in zip(group, begin, end, strict=True):
            assert (owner[first:last] == -1).all()
            owner[first:last] = g
        want = np.repeat(np.arange(3), sizes)
        np.testing.assert_array_equal(owner, np.pad(want, (0, m - len(want)), constant_values=-1))


def test_gradient_is_the_references():
    x, weights, sizes, _ = inputs([2, 0, 3], 8, 16, 0, jnp.float32)
    weights[1] = 0

    def loss(x, weights, backend):
        return jnp.sum(grouped_matmul(x, weights, sizes, backend=backend) ** 3)

    ours, want = (jax.grad(loss, (0, 1))(x, weights, backend) for backend in ("interpret", "xla"))
    for a, b in zip(ours, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "error, message, change",
    [
        (ValueError, "x must have shape", dict(x=jnp.ones((2, 3, 4)))),
        (ValueError, r"weights must have shape \[e, n, 16\]", dict(weights=jnp.ones((2, 8, 15)))),
        (
            TypeError,
            "x and weights must have the same",
            dict(weights=jnp.ones((2, 8, 16), jnp.bfloat16)),
        ),
        (ValueError, "group_sizes must have shape", dict(group_sizes=jnp.ones(3, jnp.int32))),
        (TypeError, "group_sizes must be int32", dict(group_sizes=jnp.ones(2))),
    ],
)
def test_errors(error, message, change):
    given = dict(
        x=jnp.ones((4, 16)), weights=jnp.ones((2, 8, 16)), group_sizes=jnp.ones(2, jnp.int32)
    )
    with pytest.raises(error, match=message):
        grouped_matmul(**(given | change))
