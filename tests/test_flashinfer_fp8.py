"""FlashInfer's classes on FP8 caches: its own tests' grids and tolerances, and float64 on what the cache stands for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flashinfer_cases import table_of
from helpers import assert_rivals, dense_batch, device_array, make_paged, rounded, with_scales

import jaxattn as ja

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
f16, bf16, f32 = jnp.float16, jnp.bfloat16, jnp.float32
LOOSE = dict(
    atol=1e-2, rtol=2e-1
)  # FlashInfer's, of 16-bit attention beside that of the same numbers in 8 bits


def quantised(k, v, dtype):
    """k and v in a float8 dtype with one scale each, as FlashInfer's tests."""
    scales = [float(jnp.abs(x).max()) / 256 for x in (k, v)]
    return [(x.astype(f32) / s).astype(dtype) for x, s in zip((k, v), scales, strict=True)], scales


def tenths(rng, shape):
    """Normal numbers of FlashInfer's tests' size, float16."""
    return device_array(0.1 * rng.standard_normal(shape, np.float32), f16)


def check_batch(batch, qo_len, kv_len, page_size, kh, h, d, dtype, layout="NHD"):
    rng = np.random.default_rng(0)
    pages_each = -(-kv_len // page_size)
    shape = (page_size, kh) if layout == "NHD" else (kh, page_size)
    k, v = (tenths(rng, (batch * pages_each, *shape, d)) for _ in "kv")
    (k8, v8), (k_scale, v_scale) = quantised(k, v, dtype)
    q = device_array(rng.standard_normal((batch * qo_len, h, d), np.float32), f16)
    indptr = np.arange(batch + 1, dtype=np.int32) * pages_each
    indices = np.arange(batch * pages_each, dtype=np.int32)
    last = np.full(batch, (kv_len - 1) % page_size + 1, np.int32)
    table, sizes = (indptr, indices, last), (h, kh, d, page_size)
    if qo_len == 1:
        make = lambda: ja.BatchDecodeWithPagedKVCacheWrapper(None, layout)
        lead = ()
    else:
        make = lambda: ja.BatchPrefillWithPagedKVCacheWrapper(None, layout)
        lead = (np.arange(batch + 1, dtype=np.int32) * qo_len,)
    plain, ours = make(), make()
    plain.plan(*lead, *table, *sizes, q_data_type=f16)
    ours.plan(*lead, *table, *sizes, q_data_type=f16, kv_data_type=dtype)
    want = plain.run(q, (k, v))
    got = ours.run(q, (k8, v8), k_scale=k_scale, v_scale=v_scale)
    assert got.dtype == f16
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), **LOOSE)


GRID = [
    # batch, qo_len, kv_len, page_size, KV heads, heads, head_dim, dtype, layout
    (12, 1, 54, 1, 4, 4, 128, E4M3, "NHD"),
    (17, 1, 97, 8, 4, 32, 128, E5M2, "NHD"),
    (12, 1, 97, 16, 4, 32, 256, E4M3, "HND"),
    (12, 7, 54, 8, 4, 4, 64, E4M3, "HND"),
    (17, 53, 97, 16, 4, 32, 128, E5M2, "NHD"),
    (12, 7, 97, 1, 4, 32, 256, E4M3, "NHD"),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", GRID)
def test_grid(case):
    check_batch(*case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GRID)
def test_grid_gpu(case):
    check_batch(*case)


def check_single(kv_len, dtype):
    rng = np.random.default_rng(0)
    k, v = (tenths(rng, (kv_len, 4, 128)) for _ in "kv")
    (k8, v8), (k_scale, v_scale) = quantised(k, v, dtype)
    q = device_array(rng.standard_normal((32, 128), np.float32), f16)
    want = ja.single_decode_with_kv_cache(q, k, v)
    got = ja.single_decode_with_kv_cache(q, k8, v8, k_scale=k_scale, v_scale=v_scale)
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    np.testing.assert_allclose(got, want, atol=1e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("kv_len", [7, 39, 1170])
def test_single_decode(kv_len, dtype):
    check_single(kv_len, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("kv_len", [7, 19, 39, 1170, 39275])
def test_single_decode_gpu(kv_len, dtype):
    check_single(kv_len, dtype)


def case(kind=None, lens=(5, 40)):
    paged = make_paged(lens, page_size=4, num_kv_heads=2, dtype=E4M3)
    if kind:
        paged = with_scales(paged, kind, heads=[np.float32([0.5, 2]), np.float32([3, 0.25])])
    q = rounded(np.random.default_rng(0).standard_normal((len(lens), 4, 64), np.float32), bf16)
    return paged, q, device_array(q, bf16)


def judge(o, q, paged, q_scale=1.0):
    q = q * np.broadcast_to(np.float32(q_scale), 4)[None, :, None]
    how = dict(sm_scale=0.125, causal=False)
    truth, _ = dense_batch(q[:, None], paged.k, paged.v, dtype=np.float64, **how)
    plain, _ = dense_batch(q[:, None], paged.k, paged.v, dtype=bf16, score_dtype=f32, **how)
    assert_rivals(o, truth, plain, bf16)


def planned(paged, kv_data_type=E4M3):
    wrapper = ja.BatchDecodeWithPagedKVCacheWrapper(None)
    wrapper.plan(*table_of(paged), 4, 2, 64, 4, q_data_type=bf16, kv_data_type=kv_data_type)
    return wrapper


@pytest.mark.parametrize("q_scale", [None, 0.5, jnp.float32(0.5), np.float32([1, 2, 0.5, 4])])
@pytest.mark.parametrize("kind", ["tensor", "head"])
def test_scales_are_numbers_or_arrays(kind, q_scale):
    paged, q, q_array = case(kind)
    scales = paged.cache.scales
    k, v = (float(x) if kind == "tensor" else x for x in (scales.k, scales.v))
    o = planned(paged).run(q_array, paged.cache.data, q_scale=q_scale, k_scale=k, v_scale=v)
    judge(o, q, paged, 1.0 if q_scale is None else q_scale)


@pytest.mark.parametrize("q_scale", [None, 0.5])
def test_a_cache_with_scales_of_its_own(q_scale):
    paged, q, q_array = case("token")
    judge(planned(paged).run(q_array, paged.cache, q_scale=q_scale), q, paged, q_scale or 1.0)
    with pytest.raises(ValueError, match="must be None for a cache that has scales"):
        planned(paged).run(q_array, paged.cache, k_scale=2.0)


def test_other_scales_compile_nothing(caplog):
    paged, _, q = case(lens=(5, 40, 11))  # sizes that no other test has compiled
    wrapper = planned(paged)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        wrapper.run(q, paged.cache.data, k_scale=1.5, v_scale=2.0)
        assert "Compiling" in caplog.text
        caplog.clear()
        wrapper.run(q, paged.cache.data, k_scale=2.5, v_scale=3.0)
    assert "Compiling" not in caplog.text


def test_prefill_ragged_and_cascade():
    paged, q, q_array = case("head")
    scales = dict(k_scale=paged.cache.k_scale, v_scale=paged.cache.v_scale)
    types = dict(q_data_type=bf16, kv_data_type=E4M3)
    prefill = ja.BatchPrefillWithPagedKVCacheWrapper(None)
    prefill.plan(np.int32([0, 1, 2]), *table_of(paged), 4, 2, 64, 4, **types)
    judge(prefill.run(q_array, paged.cache.data, **scales), q, paged)
    bare = make_paged((5, 40), page_size=4, num_kv_heads=2, dtype=E4M3)
    ragged = ja.BatchPrefillWithRaggedKVCacheWrapper(None)
    ragged.plan(np.int32([0, 1, 2]), np.int32([0, 5, 45]), 4, 2, 64, **types)
    kv = [device_array(np.concatenate(x), E4M3) for x in (bare.k, bare.v)]
    judge(ragged.run(q_array, *kv, **scales), q, paged)
    cascade = ja.MultiLevelCascadeAttentionWrapper(1, None)
    arrays = [[x] for x in (np.int32([0, 1, 2]), *table_of(paged))]
    cascade.plan(*arrays, 4, 2, 64, 4, **types)
    judge(cascade.run(q_array, paged.cache), q, paged)


def test_append_takes_an_fp8_cache():
    paged, _, _ = case()
    key = jnp.full((2, 2, 64), 1000.0, bf16)  # saturates
    at = np.int32([0, 1]), np.int32([4, 39])
    cache = ja.flashinfer.append_paged_kv_cache(
        key, -key, *at, paged.cache.data, *(np.asarray(x) for x in table_in_order(paged))
    )
    page = int(paged.table.indices[1])
    np.testing.assert_array_equal(np.asarray(cache[0][page, 0]).astype(np.float32), 448.0)
    np.testing.assert_array_equal(np.asarray(cache[1][page, 0]).astype(np.float32), -448.0)
    own = dataclasses.replace(paged.cache, scales=ja.KVScales.of(4.0, 4.0))
    cache = ja.flashinfer.append_paged_kv_cache(
        key, -key, *at, own, *(np.asarray(x) for x in table_in_order(paged))
    )
    np.testing.assert_array_equal(np.asarray(cache.k[page, 0]).astype(np.float32), 256.0)


def table_in_order(paged):
    """As the append takes it: indices first."""
    indptr, indices, last = table_of(paged)
    return indices, indptr, last
