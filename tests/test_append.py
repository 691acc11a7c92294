"""append_paged_kv_cache against a loop over tokens, to the bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import device_array, i32
from jax.sharding import PartitionSpec as P
from rowwise import (
    assert_no_copy,
    by_loop,
    compile_in_place,
    make_append,
    normal,
    same,
    two_devices,
)

import jaxattn as ja

BACKENDS = ["interpret", "xla"]
f16, bf16, f32 = jnp.float16, jnp.bfloat16, jnp.float32


def check(case, backend):
    got = jax.jit(ja.append_paged_kv_cache, static_argnames="backend")(*case.args, backend=backend)
    assert got.layout == case.cache.layout
    assert got.dtype == case.cache.dtype
    assert got.combined == case.cache.combined
    written = np.isfinite(np.asarray(got.k.astype(f32)))
    assert written.any()
    assert not written.all()
    want = tuple(device_array(x, got.dtype) for x in by_loop(case))
    assert same((got.k, got.v), want)


# Each breaks another assumption: page sizes, both layouts, one array or two, head dims that fill no
# tile, and a cast from every dtype.
CASES = [
    # page_size, kv_heads, d, token dtype, cache dtype, layout, combined
    (1, 2, 64, bf16, bf16, "NHD", False),
    (5, 3, 80, f16, f16, "HND", False),
    (16, 1, 128, f32, bf16, "NHD", True),
    (5, 2, 96, bf16, f32, "HND", True),
    (64, 8, 256, f32, f16, "NHD", False),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page_size,kv_heads,d,token_dtype,dtype,layout,combined", CASES)
def test_append(page_size, kv_heads, d, token_dtype, dtype, layout, combined, backend):
    case = make_append(
        page_size=page_size,
        kv_heads=kv_heads,
        d=d,
        token_dtype=token_dtype,
        dtype=dtype,
        layout=layout,
        combined=combined,
    )
    check(case, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size,kv_heads,d,token_dtype,dtype,layout,combined", CASES)
def test_append_on_gpu(page_size, kv_heads, d, token_dtype, dtype, layout, combined):
    lens = dict(kv_lens=(4096, 0, 1, 1000, 7000), new=(4096, 0, 1, 1, 2000))
    case = make_append(
        page_size=page_size,
        kv_heads=kv_heads,
        d=d,
        token_dtype=token_dtype,
        dtype=dtype,
        layout=layout,
        combined=combined,
        **lens,
    )
    check(case, None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_without_a_place_are_dropped(backend):
    case = make_append(kv_lens=(8, 4), new=(8, 4), padding=0)
    batch = i32([-1, 2, 100, 0, 0, 0, 1, 1, 0, 0, 1, 0])
    positions = i32([0, 0, 0, -1, -5, 10, 5, 2**30, 3, 9, 4, 2])
    # Request 0's second page does not exist; what is left are two tokens each.
    for no_page in (-1, case.cache.num_pages):
        table = dataclasses.replace(case.table, indices=case.table.indices.at[1].set(no_page))
        check(
            dataclasses.replace(case, batch_indices=batch, positions=positions, table=table),
            backend,
        )


def test_no_tokens():
    case = make_append(new=(0, 0, 0, 0), padding=0)
    assert same(ja.append_paged_kv_cache(*case.args, backend="interpret"), case.cache)


@pytest.mark.gpu
@pytest.mark.parametrize("combined", [False, True])
def test_more_than_2_to_the_31_elements(combined, gpu_memory):
    """Offsets past int32; pages from the end of the pool, read back."""
    gpu_memory(9)  # K and V of 2^31 elements of 2 bytes; donated, so once
    page_size, kv_heads, d = 16, 8, 256
    num_pages = 2**31 // (page_size * kv_heads * d) + 9
    case = make_append(
        page_size=page_size,
        kv_heads=kv_heads,
        d=d,
        combined=combined,
        kv_lens=(100,),
        new=(100,),
        num_pages=num_pages,
    )
    assert case.cache.arrays[0].size > 2**31
    append = jax.jit(ja.append_paged_kv_cache, donate_argnums=4)
    got = append(*case.args)
    untouched = jax.jit(
        lambda x: jnp.isnan(x[: num_pages - 100]).all()
    )  # without a copy of the slice
    pages, slots = case.table.indices[case.positions[:100] // page_size], case.positions[:100] % 16
    for array, half, want in zip(got.arrays * 2, (0, 1), (case.key, case.value), strict=False):
        read = array[pages, half, slots] if combined else array[pages, slots]
        assert same(read, want[:100])
        assert bool(untouched(array))


@pytest.mark.parametrize("combined", [False, True])
def test_donated_cache_is_written_in_place(combined):
    case = make_append(dtype=f32, page_size=16, num_pages=512, combined=combined)
    assert_no_copy(compile_in_place(ja.append_paged_kv_cache, (4,), *case.args))


@pytest.mark.gpu
@pytest.mark.parametrize("combined", [False, True])
def test_donated_cache_is_written_in_place_on_gpu(combined):
    case = make_append(page_size=16, num_pages=4096, combined=combined)
    assert_no_copy(compile_in_place(ja.append_paged_kv_cache, (4,), *case.args))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("combined", [False, True])
def test_transforms(combined, backend):
    """A layer a time by vmap and by scan, the tokens of two KV heads on two devices."""
    case = make_append(combined=combined, page_size=4, d=32)
    key, value, *where, cache, table = case.args

    @jax.jit
    def append(key, value, cache):
        return ja.append_paged_kv_cache(key, value, *where, cache, table, backend=backend)

    layers = jax.tree.map(lambda x: jnp.stack([x, x + 1]), (key, value, cache))
    each = [append(*jax.tree.map(lambda x, i=i: x[i], layers)) for i in range(2)]
    want = jax.tree.map(lambda *x: jnp.stack(x), *each)
    assert same(jax.vmap(append)(*layers), want)
    _, scanned = jax.lax.scan(lambda c, xs: (c, append(*xs)), 0, layers)
    assert same(scanned, want)
    if jax.device_count() > 1:
        heads = P(None, "x")
        pages = P(*[None] * (3 if combined else 2), "x")
        sharded = jax.shard_map(
            append,
            mesh=two_devices(),
            in_specs=(heads, heads, pages),
            out_specs=pages,
            check_vma=backend != "interpret",  # Pallas's interpreter cannot follow varying axes
        )
        assert same(jax.jit(sharded)(key, value, cache), each[0])


@pytest.mark.parametrize("backend", [None, "interpret"])
def test_gradient_is_the_references(backend):
    case = make_append(token_dtype=f32, dtype=f32, d=16)
    key, value, *where, cache, table = case.args
    cache = jax.tree.map(lambda x: normal(x.shape), cache)

    def loss(key, value, cache, backend):
        new = ja.append_paged_kv_cache(key, value, *where, cache, table, backend=backend)
        return jnp.sum(new.k**3) + jnp.sum(new.v**2)

    ours = jax.grad(loss, argnums=(0, 1, 2))(key, value, cache, backend)
    want = jax.grad(loss, argnums=(0, 1, 2))(key, value, cache, "xla")
    assert np.abs(np.asarray(want[0])).max() > 0
    assert same(ours, want)


@pytest.mark.parametrize(
    "error,message,change",
    [
        (TypeError, r"must be a PagedKVCache; got tuple", dict(cache=lambda x: x.data)),
        (ValueError, "append_key must have shape", dict(key=lambda x: x[:, :1])),
        (ValueError, "append_value must have shape", dict(value=lambda x: x[..., :8])),
        (TypeError, "append_key must be one of", dict(key=lambda x: x.astype(jnp.int32))),
        (
            TypeError,
            "append_key and append_value must have the same",
            dict(value=lambda x: x.astype(f32)),
        ),
        (TypeError, "batch_indices must be int32", dict(batch_indices=lambda x: x.astype(f32))),
        (ValueError, "positions must have shape", dict(positions=lambda x: x[:-1])),
        (
            ValueError,
            "kv_indptr must have shape",
            dict(table=lambda x: ja.PageTable(*[x.indices] * 3)),
        ),
        (
            ValueError,
            "k pages must have shape",
            dict(cache=lambda x: ja.PagedKVCache((x.k[0],) * 2)),
        ),
    ],
)
def test_errors(error, message, change):
    case = make_append()
    changed = {name: new(getattr(case, name)) for name, new in change.items()}
    with pytest.raises(error, match=message):
        ja.append_paged_kv_cache(*dataclasses.replace(case, **changed).args)
