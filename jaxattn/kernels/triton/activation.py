"""Gated activations: of rows [2 d], the first half through the activation, times the second half.

    y_i = activation(x_i) * x_(d + i)

in float32, rounded once. Each element is read once and written once: a copy, as far as memory sees it.

Grid: (rows, d / block).
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxattn.kernels.triton._launch import Out, launch
from jaxattn.kernels.triton._rows import block_of, load, pow2, store


@dataclasses.dataclass(frozen=True)
class Config:
    block: int  # columns of a program, a power of two
    num_warps: int


def default_config(d: int) -> Config:
    """8 elements a thread: 16 bytes of a dtype of 16 bits."""
    block = min(1024, max(256, pow2(d)))
    return Config(block, block // 256)


def _silu(x):
    return x / (1 + jnp.exp(-x))


def _gelu(x):
    # The lowering has no erf. This erfc is within 1.2e-7 of the true one, relatively and everywhere (Press et al.,
    # Numerical Recipes, "Error function": a Chebyshev fit).
    z = jnp.abs(x) * math.sqrt(0.5)
    t = 1 / (1 + 0.5 * z)
    fit = jnp.zeros_like(t)
    for coefficient in _ERFC:
        fit = fit * t + coefficient
    half = 0.5 * t * jnp.exp(fit - z * z)
    return x * jnp.where(x < 0, half, 1 - half)


_ERFC = (
    *(0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807),
    *(-0.18628806, 0.09678418, 0.37409196, 1.00002368, -1.26551223),
)


def _gelu_tanh(x):
    return 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}


def _kernel(x_ref, y_ref, *, activation: str, block: int):
    d = x_ref.shape[1] // 2
    row = pl.program_id(0)
    column, exist = block_of(pl.program_id(1), block, d)
    gate, up = (load(x_ref, (row, column + i * d), exist).astype(jnp.float32) for i in (0, 1))
    y = ACTIVATIONS[activation](gate) * up
    store(y_ref, row * d + column, exist, y.astype(y_ref.dtype))


def activate_and_multiply(x: jax.Array, *, activation: str, interpret: bool) -> jax.Array:
    """x [..., 2 d] -> [..., d], x's dtype."""
    *leading, double = x.shape
    d = double // 2
    rows = x.reshape(-1, double)
    config = default_config(d)
    y = launch(
        functools.partial(_kernel, activation=activation, block=config.block),
        dict(x_ref=rows),
        dict(y_ref=Out((rows.shape[0] * d,), x.dtype)),
        name=f"jaxattn_{activation}_and_mul",
        grid=(rows.shape[0], pl.cdiv(d, config.block)),
        num_warps=config.num_warps,
        num_stages=1,
        interpret=interpret,
    )["y_ref"]
    return y.reshape(*leading, d)
