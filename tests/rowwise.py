"""Data and judgement for the ops that work row by row: norms, rotary embedding, append, merge."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np

F32_EPS = float(jnp.finfo(jnp.float32).eps)


def normal(shape, dtype=jnp.float32, *, seed=0, scale=1.0):
    """Normal numbers: from the device for the GPU's gigabytes, else from the host, uncompiled."""
    if math.prod(shape) > 2**22:
        return (scale * jax.random.normal(jax.random.key(seed), shape, jnp.float32)).astype(dtype)
    numbers = scale * np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(numbers.astype(dtype))


def on_host(x):
    """The array in float32."""
    return np.asarray(x).astype(np.float32)


def assert_rounded_once(ours, truth, dtype):
    """Ours is the float32 truth, rounded once to dtype; some float32 ulp apart before that."""
    assert ours.dtype == dtype
    assert ours.shape == truth.shape
    ours, truth = on_host(ours), on_host(truth)
    if not truth.size:
        return
    finite = truth[np.isfinite(truth)]
    peak = float(np.abs(finite).max()) if finite.size else 0.0
    half_ulp = 0.0 if dtype == jnp.float32 else float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(ours, truth, rtol=half_ulp + 16 * F32_EPS, atol=8 * F32_EPS * peak)


def same(a, b):
    """Whether two pytrees of arrays are equal, NaN included."""
    return all(
        np.array_equal(on_host(x), on_host(y), equal_nan=True)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def compile_in_place(fn, donated, *args):
    """`fn`, compiled with these arguments donated; its results must take all their memory."""
    compiled = jax.jit(fn, donate_argnums=donated).lower(*args).compile()
    size = sum(x.size * x.dtype.itemsize for i in donated for x in jax.tree.leaves(args[i]))
    assert compiled.memory_analysis().alias_size_in_bytes == size
    return compiled


def assert_no_copy(compiled):
    """The program copies nothing, and holds no buffers but those of tokens."""
    copies = [line for line in compiled.as_text().splitlines() if re.search(r"\bcopy\S*\(", line)]
    assert not copies
    memory = compiled.memory_analysis()
    assert 8 * memory.temp_size_in_bytes < memory.alias_size_in_bytes


def two_devices():
    return jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
