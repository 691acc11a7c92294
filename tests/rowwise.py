"""Data and judgement for the ops that work row by row: norms, rotary embedding, append, merge."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from helpers import device_array, i32

import jaxattn as ja

F32_EPS = float(jnp.finfo(jnp.float32).eps)


def normal(shape, dtype=jnp.float32, *, seed=0, scale=1.0):
    """Normal numbers: from the device for the GPU's gigabytes, else from the host, uncompiled."""
    if math.prod(shape) > 2**22:
        return (scale * jax.random.normal(jax.random.key(seed), shape, jnp.float32)).astype(dtype)
    numbers = scale * np.random.default_rng(seed).standard_normal(shape, np.float32)
    return device_array(numbers.astype(dtype))


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
    # As users compile it: the emitter that conftest.py takes for interpreted kernels needs memory of its own.
    options = {"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else {}
    lowered = jax.jit(fn, donate_argnums=donated).lower(*args)
    compiled = lowered.compile(compiler_options=options)
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


@dataclasses.dataclass(frozen=True)
class Append:
    """Requests that append tokens to a cache of NaN, on permuted pages."""

    key: jax.Array
    value: jax.Array
    batch_indices: jax.Array
    positions: jax.Array
    cache: ja.PagedKVCache
    table: ja.PageTable

    @property
    def args(self):
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def make_append(
    *,
    page_size=5,
    kv_heads=2,
    d=64,
    token_dtype=jnp.bfloat16,
    dtype=jnp.bfloat16,
    layout="NHD",
    combined=False,
    kv_lens=(13, 0, 1, 10),
    new=(4, 0, 1, 10),
    padding=3,
    num_pages=None,
    seed=0,
):
    rng = np.random.default_rng(seed)
    counts = [-(-n // page_size) for n in kv_lens]
    num_pages = num_pages or sum(counts) + 2
    indptr = np.concatenate([[0], np.cumsum(counts)])
    # Spare entries name pages too: they must not be written.
    pages = num_pages - 1 - rng.permutation(min(num_pages, sum(counts) + 2))
    last = [n - (c - 1) * page_size if c else 0 for n, c in zip(kv_lens, counts, strict=True)]
    table = ja.PageTable(*map(i32, (indptr, pages, last)))
    append_indptr = i32(np.concatenate([[0], np.cumsum(new)]))
    t = sum(new) + padding
    batch_indices, positions = ja.get_batch_indices_positions(
        append_indptr, table.kv_len(page_size), t
    )
    key, value = (normal((t, kv_heads, d), token_dtype, seed=i) for i in (1, 2))
    cache = jax.eval_shape(
        lambda: ja.PagedKVCache.zeros(
            num_pages, page_size, kv_heads, d, dtype, layout=layout, combined=combined
        )
    )
    # Not made of zeros first: those of a cache of 2^31 elements would take its gigabytes twice.
    cache = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), cache)
    return Append(key, value, batch_indices, positions, cache, table)


def by_loop(case):
    """(k, v) pages in float32, written a token at a time, not yet rounded to the cache's dtype."""
    cache, table = case.cache, case.table
    pages = [on_host(x).copy() for x in (cache.k, cache.v)]
    pages = [x.swapaxes(1, 2) if cache.layout == "HND" else x for x in pages]
    tokens = [on_host(x) for x in (case.key, case.value)]
    indptr, indices = np.asarray(table.indptr), np.asarray(table.indices)
    where = zip(np.asarray(case.batch_indices), np.asarray(case.positions), strict=True)
    for i, (batch, position) in enumerate(where):
        if not 0 <= batch < table.batch_size or position < 0:
            continue
        entry = indptr[batch] + position // cache.page_size
        if entry < indptr[batch + 1] and 0 <= indices[entry] < cache.num_pages:
            for x, new in zip(pages, tokens, strict=True):
                x[indices[entry], position % cache.page_size] = new[i]
    return [x.swapaxes(1, 2) if cache.layout == "HND" else x for x in pages]
