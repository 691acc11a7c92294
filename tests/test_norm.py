"""rmsnorm and its kin against the float32 oracle."""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import triton as plgpu
from jax.sharding import PartitionSpec as P
from rowwise import (
    assert_no_copy,
    assert_rounded_once,
    compile_in_place,
    normal,
    same,
    two_devices,
)

import jaxattn as ja
from jaxattn import reference
from jaxattn.kernels.triton import rmsnorm as kernels

BACKENDS = ["interpret", "xla"]
f16, bf16, f32 = jnp.float16, jnp.bfloat16, jnp.float32

# Each breaks another assumption: rows that share a program, or not, and do not fill it; hidden
# sizes that are no power of two; several or no leading axes; a row of several tiles, or of more
# than stay in registers; squares that overflow fp16; weights of another dtype.
CASES = [
    # shape, dtype, weight dtype, scale
    ((3, 111), f32, f32, 1.0),
    ((2, 5, 64), bf16, bf16, 1.0),
    ((1030, 1), f32, f32, 1.0),
    ((4096,), f16, f16, 300.0),
    ((3, 5120), bf16, f32, 1.0),
    ((2, 45000), f16, f32, 1.0),
]
GPU_CASES = [
    ((16384, 4096), bf16, bf16, 1.0),
    ((4096, 4096), f16, f16, 300.0),
    ((8192, 5120), bf16, f32, 1.0),
    ((1, 16384), bf16, bf16, 1.0),
    ((4096, 2560), f32, f32, 1.0),
    ((1000, 111), f16, f16, 1.0),
    ((1001, 111), bf16, bf16, 1.0),
    ((1001, 128), bf16, bf16, 1.0),
    ((4096, 32, 128), bf16, bf16, 1.0),
    ((100, 131072), bf16, bf16, 1.0),
    # A tile of each kind for many rows: a warp, 8, 16 and 32 of them; the weight early and late.
    ((1000, 3000), bf16, f32, 1.0),
    ((1000, 6000), bf16, bf16, 1.0),
    ((1000, 12288), bf16, bf16, 1.0),
    ((1000, 16384), f16, f32, 1.0),
    ((1000, 20480), bf16, bf16, 1.0),
]


truth_of = jax.jit(functools.partial(reference.rmsnorm, eps=1e-5))


def check_rmsnorm(shape, dtype, weight_dtype, scale, backend):
    x = normal(shape, dtype, scale=scale)
    weight = normal(shape[-1:], weight_dtype, seed=1)
    truth = truth_of(x.astype(f32), weight)
    assert_rounded_once(ja.rmsnorm(x, weight, 1e-5, backend=backend), truth, dtype)


def check_fused(shape, dtype, weight_dtype, scale, backend):
    x, residual = (normal(shape, dtype, seed=i, scale=scale) for i in (0, 1))
    weight = normal(shape[-1:], weight_dtype, seed=2)
    total = x.astype(f32) + residual.astype(f32)
    truth = truth_of(total, weight)
    normed, new_residual = ja.fused_add_rmsnorm(x, residual, weight, 1e-5, backend=backend)
    # Tight enough to tell the norm of the sum from the norm of the rounded sum.
    assert_rounded_once(normed, truth, dtype)
    assert same(new_residual, total.astype(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape,dtype,weight_dtype,scale", CASES)
@pytest.mark.parametrize("check", [check_rmsnorm, check_fused])
def test_norm(check, shape, dtype, weight_dtype, scale, backend):
    check(shape, dtype, weight_dtype, scale, backend)


@pytest.mark.slow
# Rows that share a program or not, whose last tile is full or not, that are kept whole or in part; of each kind, every
# other way to load the weight is alone and every other one fused.
@pytest.mark.parametrize("nth,load_weight", [*enumerate(typing.get_args(kernels.LoadWeight))])
@pytest.mark.parametrize("block_rows,kept_tiles", [(1, 4), (4, 4), (1, 1), (2, 1)])
@pytest.mark.parametrize("hidden", [192, 200, 195])
def test_every_kind_of_tile(hidden, block_rows, kept_tiles, nth, load_weight, monkeypatch):
    check = (check_rmsnorm, check_fused)[(nth + hidden + block_rows // 2 + kept_tiles) % 2]
    config = kernels.Config(block_rows, 64, kept_tiles, 1, load_weight)
    monkeypatch.setattr(kernels, "default_config", lambda *_: config)
    monkeypatch.setattr(plgpu, "load", lambda at, **how: within(at, plgpu_load(at, **how), **how))
    monkeypatch.setattr(
        plgpu, "store", lambda at, x, **how: plgpu_store(at, within(at, x, **how), **how)
    )
    check((5, hidden), bf16, f32, 1.0, "interpret")


plgpu_load, plgpu_store = plgpu.load, plgpu.store


def within(at, x, mask=None, other=None):
    """x, or NaN if an element that is accessed lies outside the array: the interpreter moves such elements inside."""
    inside = True
    for index, size in zip(at.transforms[-1].indices, at.ref.shape, strict=True):
        inside &= (index >= 0) & (index < size)
    return jnp.where(jnp.all(inside if mask is None else inside | ~mask), x, jnp.nan).astype(
        x.dtype
    )


@pytest.mark.gpu
@pytest.mark.parametrize("shape,dtype,weight_dtype,scale", GPU_CASES)
@pytest.mark.parametrize("check", [check_rmsnorm, check_fused])
def test_norm_on_gpu(check, shape, dtype, weight_dtype, scale):
    check(shape, dtype, weight_dtype, scale, None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_eps_may_be_an_array_without_axes(backend):
    x, weight = normal((3, 96), bf16), normal((96,), bf16, seed=1)
    want = ja.rmsnorm(x, weight, 0.5, backend=backend)
    for eps in (np.array(0.5), jnp.float32(0.5)):
        assert same(ja.rmsnorm(x, weight, eps, backend=backend), want)
        assert same(ja.fused_add_rmsnorm(x, 0 * x, weight, eps, backend=backend)[0], want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gemma_adds_one_to_the_weight(backend):
    x, residual = normal((3, 96), bf16), normal((3, 96), bf16, seed=1)
    # 2^-12 is lost where 1 + weight is rounded to bfloat16.
    weight = jnp.full(96, 2.0**-12, bf16)
    one_more = 1 + weight.astype(f32)
    assert same(
        ja.gemma_rmsnorm(x, weight, backend=backend), ja.rmsnorm(x, one_more, backend=backend)
    )
    assert same(
        ja.gemma_fused_add_rmsnorm(x, residual, weight, backend=backend),
        ja.fused_add_rmsnorm(x, residual, one_more, backend=backend),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_is_the_same(backend):
    x, weight = normal((3, 40000), bf16), normal((40000,), bf16, seed=1)
    assert same(
        ja.rmsnorm(x, weight, in_place=True, backend=backend),
        ja.rmsnorm(x, weight, backend=backend),
    )


def test_zero_rows():
    assert ja.rmsnorm(jnp.zeros((0, 8)), jnp.ones(8), backend="interpret").shape == (0, 8)


@pytest.mark.parametrize("rows", [64, pytest.param(4096, marks=pytest.mark.gpu)])
def test_donated_buffers_are_reused(rows):
    x, weight = normal((rows, 4096)), normal((4096,))
    for norm, *args in (
        (lambda x, w: ja.rmsnorm(x, w, in_place=True), x, weight),
        (ja.fused_add_rmsnorm, x, x, weight),
    ):
        assert_no_copy(compile_in_place(norm, range(len(args) - 1), *args))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms(backend):
    x, residual = normal((4, 6, 96), bf16), normal((4, 6, 96), bf16, seed=1)
    weight = normal((96,), bf16, seed=2)

    @jax.jit
    def norm(x, residual):
        plain = (ja.rmsnorm, ja.gemma_rmsnorm, functools.partial(ja.rmsnorm, in_place=True))
        fused = (ja.fused_add_rmsnorm, ja.gemma_fused_add_rmsnorm)
        return tuple(op(x, weight, backend=backend) for op in plain) + tuple(
            y for op in fused for y in op(x, residual, weight, backend=backend)
        )

    want = norm(x, residual)
    assert same(jax.vmap(norm)(x, residual), want)
    assert same(jax.vmap(norm, in_axes=1, out_axes=1)(x, residual), want)
    _, scanned = jax.lax.scan(lambda c, xs: (c, norm(*xs)), 0, (x, residual))
    assert same(scanned, want)
    if jax.device_count() > 1:
        rows = P("x")
        sharded = jax.shard_map(
            norm,
            mesh=two_devices(),
            in_specs=(rows, rows),
            out_specs=rows,
            check_vma=backend != "interpret",  # Pallas's interpreter cannot follow varying axes
        )
        assert same(jax.jit(sharded)(x, residual), want)


@pytest.mark.parametrize("backend", [None, "interpret"])
def test_gradient_is_the_references(backend):
    x, residual, weight = normal((5, 24)), normal((5, 24), seed=1), normal((24,), seed=2)

    def loss(x, residual, weight, backend):
        y, total = ja.fused_add_rmsnorm(x, residual, weight, backend=backend)
        return jnp.sum(ja.gemma_rmsnorm(y, weight, backend=backend) ** 3) + jnp.sum(total**2)

    ours = jax.grad(loss, argnums=(0, 1, 2))(x, residual, weight, backend)
    want = jax.grad(loss, argnums=(0, 1, 2))(x, residual, weight, "xla")
    for a, b in zip(ours, want, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "error,message,args",
    [
        (TypeError, "input must be one of", (jnp.ones((2, 8), jnp.int32), jnp.ones(8))),
        (ValueError, "input must have shape", (jnp.float32(1), jnp.ones(8))),
        (ValueError, "weight must have shape", (jnp.ones((2, 8)), jnp.ones(9))),
        (TypeError, "weight must be float16", (jnp.ones((2, 8), f16), jnp.ones(8, bf16))),
    ],
)
def test_errors(error, message, args):
    with pytest.raises(error, match=message):
        ja.rmsnorm(*args)


def test_fused_errors():
    x, weight = jnp.ones((2, 8)), jnp.ones(8)
    with pytest.raises(ValueError, match="residual must have shape"):
        ja.fused_add_rmsnorm(x, jnp.ones((3, 8)), weight)
    with pytest.raises(TypeError, match="input and residual must have the same dtype"):
        ja.fused_add_rmsnorm(x, jnp.ones((2, 8), bf16), weight)
