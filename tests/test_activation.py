"""Gated activations against PyTorch's in float64."""

import functools

import jax
import jax.numpy as jnp
import pytest
from rowwise import assert_rounded_once, normal

import jaxattn as ja
from jaxattn import reference

f16, bf16, f32 = jnp.float16, jnp.bfloat16, jnp.float32
OPS = ["silu", "gelu", "gelu_tanh"]


def check(op, shape, dtype, backend):
    x = normal(shape, dtype, scale=3.0)
    truth = jax.jit(functools.partial(reference.activate_and_multiply, activation=op))
    got = getattr(ja, f"{op}_and_mul")(x, backend=backend)
    assert_rounded_once(got, truth(x.astype(f32)), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "shape, dtype",
    [((8192, 28672), bf16), ((1, 28672), bf16), ((70000, 2), f32), ((3, 5, 222), f16)],
)
def test_kernel_on_a_gpu(op, shape, dtype):
    check(op, shape, dtype, "triton")
