"""Groups of rows times their matrices, beside a loop over the groups in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import device_array, i32

from jaxattn.grouped_matmul import Groups, grouped_matmul


def inputs(sizes, n, k, dtype, *, repeat=1, none=0, seed=0):
    """x, weights, the group of each row, and what they give; matrices of empty groups are NaN.

    The rows of all groups are mixed; `none` of them are in none, and where repeat is 1 their x is NaN.
    """
    rng = np.random.default_rng(seed)
    e, m = len(sizes), sum(sizes) + none
    group = rng.permutation(np.repeat(np.arange(e + 1), [*sizes, none]))
    x = rng.standard_normal((m // repeat, k)).astype(np.float32)
    weights = rng.standard_normal((e, n, k)).astype(np.float32) / np.sqrt(k)
    x, weights = (np.array(device_array(a, dtype)) for a in (x, weights))
    if repeat == 1:
        x[group == e] = np.nan
    weights[np.asarray(sizes) == 0] = np.nan
    want = np.zeros((m, n))
    for i, g in enumerate(group.tolist()):
        if g < e:
            want[i] = weights[g].astype(np.float64) @ x[i // repeat].astype(np.float64)
    return x, weights, group, want


@pytest.mark.parametrize(
    "backend", ["xla", "interpret", pytest.param("triton", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize(
    "sizes, n, k, dtype, more",
    [
        # A group of several tiles, a part of a tile of columns.
        ([0, 3, 0, 40, 1, 0], 70, 96, jnp.bfloat16, dict(none=5)),
        ([1], 8, 130, jnp.float32, dict()),  # the inner dim ends in a tile of two
        ([0, 0, 18], 130, 24, jnp.float16, dict(repeat=3)),  # less than a tile
        ([0, 0], 8, 16, jnp.float32, dict(none=4)),  # no row is in a group
        (
            [1100, 4],
            16,
            64,
            jnp.bfloat16,
            dict(repeat=4),
        ),  # tall tiles, dealt out to several programs
    ],
)
def test_groups(sizes, n, k, dtype, more, backend):
    x, weights, group, want = inputs(sizes, n, k, dtype, **more)
    if backend == "xla":
        weights[np.asarray(sizes) == 0] = 0  # XLA multiplies by them too
    groups = Groups.of(i32(group), len(sizes))
    out = grouped_matmul(x, weights, groups, backend=backend)
    assert out.dtype == jnp.float32 and out.shape == want.shape
    real = group < len(sizes)
    np.testing.assert_allclose(np.asarray(out)[real], want[real], atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 32, 512, 4096])
def test_experts_of_gpt_oss(tokens):
    rng = np.random.default_rng(tokens)
    chosen = np.stack([rng.permutation(32)[:4] for _ in range(tokens)]).reshape(-1)
    x = jax.random.normal(jax.random.key(0), (tokens, 2880), jnp.bfloat16)
    weights = jax.random.normal(jax.random.key(1), (32, 2880, 2880), jnp.bfloat16) / 54
    groups = Groups.of(i32(chosen), 32)
    ours = np.asarray(grouped_matmul(x, weights, groups, backend="triton"))
    for i in rng.choice(tokens * 4, min(tokens * 4, 16), replace=False):
        row, matrix = (np.asarray(a, np.float64) for a in (x[i // 4], weights[chosen[i]]))
        np.testing.assert_allclose(ours[i], matrix @ row, atol=1e-4, rtol=0)


def test_gradient_is_the_references():
    x, weights, group, _ = inputs([2, 0, 4], 8, 16, jnp.float32, repeat=2)
    weights[1] = 0
    groups = Groups.of(i32(group), 3)

    def loss(x, weights, backend):
        return jnp.sum(grouped_matmul(x, weights, groups, backend=backend) ** 3)

    ours, want = (jax.grad(loss, (0, 1))(x, weights, backend) for backend in ("interpret", "xla"))
    for a, b in zip(ours, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


GROUPS = Groups(jnp.zeros(8, jnp.int32), jnp.ones(2, jnp.int32))


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
        (ValueError, "groups.ends must have shape", dict(weights=jnp.ones((3, 8, 16)))),
        (TypeError, "groups.order must be int32", dict(groups=GROUPS._replace(order=jnp.ones(4)))),
        (ValueError, "a multiple of x's rows; got 8 rows, and 3", dict(x=jnp.ones((3, 16)))),
    ],
)
def test_errors(error, message, change):
    given = dict(x=jnp.ones((4, 16)), weights=jnp.ones((2, 8, 16)), groups=GROUPS)
    with pytest.raises(error, match=message):
        grouped_matmul(**(given | change))
