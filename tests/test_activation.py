"""Gated activations against Python's own functions, in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import device_array
from rowwise import assert_rounded_once, normal

import jaxattn as ja
from jaxattn import reference
from jaxattn.models import feed_forward

f16, bf16, f32 = jnp.float16, jnp.bfloat16, jnp.float32
TRUTH = {
    "silu": lambda x: x / (1 + math.exp(-x)) if x > -700 else 0.0,
    "gelu": lambda x: x * math.erfc(-x / math.sqrt(2)) / 2,
    "gelu_tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
}


@pytest.mark.parametrize("backend", ["interpret", "xla"])
@pytest.mark.parametrize("op", TRUTH)
def test_values(op, backend):
    """From one flat end of the activation to the other; halves that fill no tile."""
    gate = np.concatenate([np.linspace(-12, 12, 295), [0.0, -0.0, 1e-20, 80.0, -80.0]])
    up = np.random.default_rng(0).standard_normal((2, 3, gate.size))
    x = np.concatenate([np.broadcast_to(gate, up.shape), up], axis=-1).astype(np.float32)
    gate, up = np.split(x.astype(np.float64), 2, axis=-1)
    truth = np.vectorize(TRUTH[op])(gate) * up
    got = getattr(ja, f"{op}_and_mul")(device_array(x), backend=backend)
    assert got.shape == truth.shape
    np.testing.assert_allclose(got, truth, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [f16, bf16])
def test_it_is_rounded_once(dtype):
    x = normal((3, 94), dtype, scale=3.0)
    truth = reference.activate_and_multiply(x.astype(f32), "silu")
    assert_rounded_once(ja.silu_and_mul(x, backend="interpret"), truth, dtype)


def test_its_gradient():
    x = normal((2, 6))
    total = lambda x, backend: ja.gelu_and_mul(x, backend=backend).sum()  # noqa: E731
    got = jax.grad(functools.partial(total, backend="interpret"))(x)
    step = 1e-2
    for place in ((0, 1), (1, 5)):  # of a gate, of what is gated
        up, down = (total(x.at[place].add(by), "xla") for by in (step, -step))
        np.testing.assert_allclose(got[place], (up - down) / (2 * step), atol=1e-3)


def test_nothing_and_errors():
    assert ja.silu_and_mul(jnp.zeros((0, 8))).shape == (0, 4)
    assert ja.silu_and_mul(jnp.zeros((3, 0))).shape == (3, 0)
    with pytest.raises(ValueError, match=r"must have shape \[..., 2 d\], .*got \[2, 5\]"):
        ja.silu_and_mul(jnp.zeros((2, 5)))
    with pytest.raises(
        TypeError, match="input must be one of float16, bfloat16, float32; got int32"
    ):
        ja.gelu_and_mul(jnp.zeros((2, 4), jnp.int32))


@pytest.mark.gpu
@pytest.mark.parametrize("op", TRUTH)
@pytest.mark.parametrize(
    "shape, dtype",
    [((8192, 28672), bf16), ((1, 28672), bf16), ((70000, 2), f32), ((3, 5, 222), f16)],
)
def test_kernel_on_a_gpu(op, shape, dtype):
    x = normal(shape, dtype, scale=3.0)
    truth = jax.jit(functools.partial(reference.activate_and_multiply, activation=op))
    got = getattr(ja, f"{op}_and_mul")(x, backend="triton")
    assert_rounded_once(got, truth(x.astype(f32)), dtype)


def test_a_model_takes_the_kernel_for_many_rows(monkeypatch):
    """And XLA's fusion for fewer, with the same result."""
    monkeypatch.setattr(feed_forward, "MANY_ROWS", 5)
    mlp = feed_forward.Gated(33, "gelu_pytorch_tanh")
    rng = np.random.default_rng(0)
    weights = jax.tree.map(
        lambda source: device_array(rng.standard_normal(source.shape) / 4, jnp.bfloat16),
        mlp.sources("layer.", 16),
    )
    for rows in (4, 5):
        x = device_array(rng.standard_normal((rows, 16)), jnp.bfloat16)
        run = functools.partial(mlp, x, weights, is_token=jnp.ones(rows, bool))
        program = str(jax.make_jaxpr(functools.partial(run, backend="interpret"))())
        assert ("jaxattn_gelu_tanh_and_mul" in program) == (rows == 5)
        ours, xlas = (run(backend=backend) for backend in ("interpret", "xla"))
        np.testing.assert_allclose(
            ours.astype(jnp.float32), xlas.astype(jnp.float32), rtol=0.02, atol=0.02
        )
