"""The FlashInfer-shaped wrappers and single-request functions against dense attention."""

import jax.numpy as jnp
import numpy as np
import pytest
from flashinfer_cases import (
    HEAD_DIM,
    HEADS,
    METADATA,
    NUM_KV_HEADS,
    NUM_QO_HEADS,
    check,
    indptr_of,
    normal,
    paged_case,
    table_of,
)
from helpers import device_array, make_paged, same_bits

import jaxattn as ja
from jaxattn.work_list import WorkItem

PAGED_CASES = [
    # page_size, layout, combined, metadata, dtype, lse_base, causal (of a prefill)
    (16, "NHD", False, "numpy", jnp.float16, "log2", True),
    (16, "HND", True, "device", jnp.bfloat16, "ln", False),
    (1, "HND", False, "lists", jnp.float16, "ln", True),
    (1, "NHD", True, "device", jnp.bfloat16, "log2", True),
    (5, "NHD", True, "lists", jnp.bfloat16, "log2", False),
]


@pytest.mark.parametrize("page_size,layout,combined,metadata,dtype,lse_base,causal", PAGED_CASES)
def test_paged(page_size, layout, combined, metadata, dtype, lse_base, causal):
    kv_lens, to = [3, 0, 40, 16], METADATA[metadata]
    paged, data = paged_case(kv_lens, page_size, layout, combined, dtype)
    how = dict(dtype=dtype, lse_base=lse_base)

    q, q_array = normal((len(kv_lens), NUM_QO_HEADS, HEAD_DIM), dtype)
    decode = ja.BatchDecodeWithPagedKVCacheWrapper(None, layout)
    decode.plan(*table_of(paged, to), *HEADS, page_size, q_data_type=dtype)
    result = decode.run(q_array, data, return_lse=True, lse_base=lse_base)
    check(result, q[:, None], paged.k, paged.v, causal=False, **how)

    qo_indptr = indptr_of([5, 2, 7, 16])
    q, q_array = normal((qo_indptr[-1], NUM_QO_HEADS, HEAD_DIM), dtype)
    prefill = ja.BatchPrefillWithPagedKVCacheWrapper(None, layout, backend="fa2")
    table = table_of(paged, to)
    prefill.plan(to(qo_indptr), *table, *HEADS, page_size, causal=causal, q_data_type=dtype)
    result = prefill.run_return_lse(q_array, data, lse_base=lse_base)
    check(result, np.split(q, qo_indptr[1:-1]), paged.k, paged.v, causal=causal, **how)


@pytest.mark.parametrize("splits", [dict(fixed_split_size=1), dict(disable_split_kv=True)])
def test_splits(splits):
    """They reach the plans; what they do there is tested with these."""
    kv_lens = [3, 0, 40, 16]
    paged, data = paged_case(kv_lens, 16, "NHD", False, "bfloat16")
    qo_indptr = indptr_of(kv_lens)
    how = dict(q_data_type="bfloat16", **splits)
    decode = ja.BatchDecodeWithPagedKVCacheWrapper(None)
    decode.plan(*table_of(paged), *HEADS, 16, **how)
    prefill = ja.BatchPrefillWithPagedKVCacheWrapper(None)
    prefill.plan(qo_indptr, *table_of(paged), *HEADS, 16, causal=True, **how)
    wrappers = [decode, prefill]
    if "disable_split_kv" in splits:
        ragged = ja.BatchPrefillWithRaggedKVCacheWrapper(None)
        ragged.plan(qo_indptr, qo_indptr, *HEADS, causal=True, **how)
        wrappers.append(ragged)
    for wrapper in wrappers:
        _, plan = wrapper._planned.made
        splits_of_a_tile = np.asarray(plan.items)[:, WorkItem._fields.index("num_splits")]
        assert splits_of_a_tile.max() == (1 if "disable_split_kv" in splits else 3)


def test_plan_again():
    """With other lengths and batch sizes; without lse; with a PagedKVCache."""
    dtype = jnp.float16
    wrapper = ja.BatchDecodeWithPagedKVCacheWrapper(None)
    for kv_lens in ([3, 0, 40, 16], [9, 9, 9, 9], [1, 17, 2]):
        paged, data = paged_case(kv_lens, 4, "NHD", False, dtype)
        q, q_array = normal((len(kv_lens), NUM_QO_HEADS, HEAD_DIM), dtype)
        wrapper.plan(*table_of(paged), *HEADS, 4)
        result = wrapper.run_return_lse(q_array, data)
        check(result, q[:, None], paged.k, paged.v, dtype, causal=False)
    assert same_bits(wrapper.run(q_array, data), result[0])
    assert same_bits(wrapper.run(q_array, paged.cache), result[0])


@pytest.mark.parametrize(
    "layout,metadata,causal", [("NHD", "numpy", True), ("HND", "device", False)]
)
def test_ragged_prefill(layout, metadata, causal):
    dtype, qo_indptr, kv_indptr = jnp.bfloat16, indptr_of([5, 0, 3, 20]), indptr_of([9, 4, 0, 33])
    to = METADATA[metadata]
    q, q_array = normal((qo_indptr[-1], NUM_QO_HEADS, HEAD_DIM), dtype)
    kv = [normal((kv_indptr[-1], NUM_KV_HEADS, HEAD_DIM), dtype, seed) for seed in (2, 3)]
    arrays = [x if layout == "NHD" else x.swapaxes(0, 1) for _, x in kv]
    wrapper = ja.BatchPrefillWithRaggedKVCacheWrapper(None, layout)
    wrapper.plan(to(qo_indptr), to(kv_indptr), *HEADS, causal=causal, q_data_type="bfloat16")
    result = wrapper.run(q_array, *arrays, return_lse=True)
    qs = np.split(q, qo_indptr[1:-1])
    ks, vs = (np.split(x, kv_indptr[1:-1]) for x, _ in kv)
    check(result, qs, ks, vs, dtype, causal=causal)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_single_request(layout):
    dtype, qo_len = jnp.float16, 6
    for kv_len, both in ((37, (True, False)), (6, (True,))):
        q, q_array = normal((qo_len, NUM_QO_HEADS, HEAD_DIM), dtype)
        kv = [normal((kv_len, NUM_KV_HEADS, HEAD_DIM), dtype, seed) for seed in (2, 3)]
        (k, v), arrays = (x for x, _ in kv), [x for _, x in kv]
        if layout == "HND":
            arrays = [x.swapaxes(0, 1) for x in arrays]
        for causal in both:
            result = ja.single_prefill_with_kv_cache_return_lse(
                q_array, *arrays, causal=causal, kv_layout=layout
            )
            check(result, [q], [k], [v], dtype, causal=causal)
        o, lse = ja.single_decode_with_kv_cache(
            q_array[0], *arrays, kv_layout=layout, return_lse=True, lse_base="ln"
        )
        check((o[None], lse[None]), [q[:1]], [k], [v], dtype, causal=False, lse_base="ln")


def test_single_request_without_keys():
    q, nothing = jnp.ones((3, 4, 64)), jnp.zeros((0, 2, 64))
    o, lse = ja.single_decode_with_kv_cache(q[0], nothing, nothing, return_lse=True)
    assert not o.any() and jnp.isneginf(lse).all()
    assert not ja.single_prefill_with_kv_cache(q, nothing, nothing).any()


@pytest.mark.slow
def test_scales():
    """Those of q and k multiply the scores', that of v the output."""
    dtype = jnp.bfloat16
    paged, data = paged_case([5, 20], 4, "NHD", False, dtype)
    q, q_array = normal((2, NUM_QO_HEADS, HEAD_DIM), dtype)
    decode = ja.BatchDecodeWithPagedKVCacheWrapper(None)
    decode.plan(*table_of(paged), *HEADS, 4, q_data_type=dtype, sm_scale=0.1)
    prefill = ja.BatchPrefillWithPagedKVCacheWrapper(None)
    prefill.plan([0, 1, 2], *table_of(paged), *HEADS, 4, q_data_type=dtype, sm_scale=0.1)
    k, v = (device_array(np.concatenate(x), dtype) for x in (paged.k, paged.v))
    ragged = ja.BatchPrefillWithRaggedKVCacheWrapper(None)
    ragged.plan([0, 1, 2], [0, 5, 25], *HEADS, q_data_type=dtype, sm_scale=0.1)
    for run, kv in ((decode.run, (data,)), (prefill.run, (data,)), (ragged.run, (k, v))):
        plain = run(q_array, *kv, return_lse=True)
        check(plain, q[:, None], paged.k, paged.v, dtype, causal=False, sm_scale=0.1)
        o, lse = run(q_array, *kv, q_scale=0.5, k_scale=3.0, v_scale=2.0, return_lse=True)
        o = o / 2
        check((o, lse), q[:, None], paged.k, paged.v, dtype, causal=False, sm_scale=0.15)
    one = (q_array[0], k[:5], v[:5])
    o, lse = ja.single_decode_with_kv_cache(
        *one, q_scale=0.5, k_scale=3.0, v_scale=jnp.float32(2), sm_scale=0.1, return_lse=True
    )
    result = (o[None] / 2, lse[None])
    check(result, q[:1, None], paged.k[:1], paged.v[:1], dtype, causal=False, sm_scale=0.15)
    o = ja.single_prefill_with_kv_cache(q_array[:1], *one[1:], k_scale=1.5, v_scale=2, sm_scale=0.1)
    np.testing.assert_allclose(
        np.asarray(o / 2, np.float32), np.asarray(result[0], np.float32), rtol=1e-2
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "half", jnp.bfloat16, np.float16, np.dtype("f4")])
def test_dtype_names(dtype):
    paged, data = paged_case([5], 4, "NHD", False, jnp.dtype(dtype))
    wrapper = ja.BatchDecodeWithPagedKVCacheWrapper(None)
    wrapper.plan(*table_of(paged), *HEADS, 4, q_data_type=None, data_type=dtype)
    q = jnp.ones((1, NUM_QO_HEADS, HEAD_DIM), jnp.dtype(dtype))
    assert wrapper.run(q, data).dtype == jnp.dtype(dtype)


@pytest.mark.gpu
def test_gpu_prefill():
    dtype, num_qo_heads, num_kv_heads, head_dim = jnp.float16, 32, 8, 128
    heads = (num_qo_heads, num_kv_heads, head_dim)
    qo_indptr, kv_lens = indptr_of([700, 1, 0, 129, 512]), [900, 2048, 5, 129, 1500]
    paged = make_paged(
        kv_lens, page_size=16, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype
    )
    q, q_array = normal((qo_indptr[-1], num_qo_heads, head_dim), dtype)
    qs = np.split(q, qo_indptr[1:-1])
    how = dict(causal=True, sm_scale=head_dim**-0.5)

    wrapper = ja.BatchPrefillWithPagedKVCacheWrapper(None)
    wrapper.plan(qo_indptr, *table_of(paged), *heads, 16, causal=True)
    result = wrapper.run_return_lse(q_array, paged.cache.data)
    check(result, qs, paged.k, paged.v, dtype, **how)

    k, v = (device_array(np.concatenate(x), dtype) for x in (paged.k, paged.v))
    wrapper = ja.BatchPrefillWithRaggedKVCacheWrapper(None)
    wrapper.plan(qo_indptr, indptr_of(kv_lens), *heads, causal=True)
    check(wrapper.run_return_lse(q_array, k, v), qs, paged.k, paged.v, dtype, **how)

    result = ja.single_prefill_with_kv_cache_return_lse(
        q_array[:700], k[:900], v[:900], causal=True
    )
    check(result, qs[:1], paged.k[:1], paged.v[:1], dtype, **how)
    o, lse = ja.single_decode_with_kv_cache(q_array[0], k, v, return_lse=True)
    how["causal"] = False
    everything = ([np.concatenate(x)] for x in (paged.k, paged.v))
    check((o[None], lse[None]), [q[:1]], *everything, dtype, **how)
