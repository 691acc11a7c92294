"""The FlashInfer-shaped wrappers' capacities: what never recompiles, index arrays on the device, plans inside jit."""

import contextlib

import jax
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
from helpers import (
    device_array,
    i32,
    make_paged,
    no_compilation,
    same_bits,
)

import jaxattn as ja


def test_compilations_are_noticed():
    with pytest.raises(AssertionError), no_compilation():
        jax.jit(lambda x: x * 3)(jnp.ones(3))


def test_growing_lengths_seldom_recompile():
    wrapper = ja.BatchDecodeWithPagedKVCacheWrapper(None)
    for total in (10, 12, 16):
        paged, data = paged_case([total - 4, 4], 1, "NHD", False, jnp.float16)
        data = jax.tree.map(lambda x: x[:12], data)  # the pool itself does not grow
        q = jnp.ones((2, NUM_QO_HEADS, HEAD_DIM), jnp.float16)
        indptr, indices, last_page_len = table_of(paged)
        with contextlib.nullcontext() if total == 10 else no_compilation():
            wrapper.plan(indptr, indices % 12, last_page_len, *HEADS, 1)
            wrapper.run(q, data)


@pytest.mark.parametrize("how", ["numbers", "buffers", "plain wrapper"])
def test_graph_decode_never_recompiles(how):
    page_size, most, max_num_pages, dtype = 4, 5, 64, jnp.float16
    buffers = [np.empty(n, np.int32) for n in (most + 1, max_num_pages, most)]
    if how == "numbers":
        wrapper = ja.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(
            None, max_batch_size=most, max_num_pages=max_num_pages
        )
    elif how == "buffers":
        wrapper = ja.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(None, *buffers)
    else:
        wrapper = ja.BatchDecodeWithPagedKVCacheWrapper(None, "NHD", True, False, *buffers)
    assert wrapper.is_cuda_graph_enabled

    # One pool of pages for all steps; q always has the largest batch's rows.
    first = [20, 0, 33, 1, 7]
    for kv_lens in (first, [1, 2, 3, 4, 5], [60, 1], [17]):
        paged = make_paged(
            kv_lens,
            page_size=page_size,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_DIM,
            dtype=dtype,
            spare_pages=max_num_pages - sum(-(-n // page_size) for n in kv_lens),
        )
        b = len(kv_lens)
        q, q_array = normal((most, NUM_QO_HEADS, HEAD_DIM), dtype)
        with contextlib.nullcontext() if kv_lens is first else no_compilation():
            wrapper.plan(*table_of(paged), *HEADS, page_size)
            result = wrapper.run(q_array, paged.cache.data, return_lse=True)
        check(result, q[:b, None], paged.k, paged.v, dtype, causal=False)
        # A q of the batch's own rows gives as many.
        fewer = wrapper.run_return_lse(q_array[:b], paged.cache.data)
        assert fewer[0].shape[0] == fewer[1].shape[0] == b
        assert all(same_bits(x, y[:b]) for x, y in zip(fewer, result, strict=True))
        # Index arrays on the device: capacities are reached there.
        wrapper.plan(*table_of(paged, jnp.asarray), *HEADS, page_size)
        assert same_bits(wrapper.run(q_array, paged.cache.data), result[0])


@pytest.mark.parametrize("metadata", METADATA)
def test_graph_prefill_never_recompiles(metadata):
    to = METADATA[metadata]
    page_size, most, max_num_pages, dtype = 4, 3, 32, jnp.bfloat16
    buffers = [np.empty(n, np.int32) for n in (most + 1, most + 1, max_num_pages, most)]
    paged_wrapper = ja.BatchPrefillWithPagedKVCacheWrapper(None, "NHD", True, *buffers)
    ragged_wrapper = ja.BatchPrefillWithRaggedKVCacheWrapper(None, "NHD", True, *buffers[:2])
    _, full_q = normal((20, NUM_QO_HEADS, HEAD_DIM), dtype)
    how = dict(causal=True, q_data_type=dtype)
    first = ([8, 0, 12], [9, 4, 30])
    for qo_lens, kv_lens in (first, ([1, 2, 3], [50, 2, 10]), ([20], [64])):
        paged = make_paged(
            kv_lens,
            page_size=page_size,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_DIM,
            dtype=dtype,
            spare_pages=max_num_pages - sum(-(-n // page_size) for n in kv_lens),
        )
        qo_indptr, kv_indptr = indptr_of(qo_lens), indptr_of(kv_lens)
        total = qo_indptr[-1]
        qs = np.split(np.asarray(full_q[:total], np.float32), qo_indptr[1:-1])
        k, v = (np.zeros((80, NUM_KV_HEADS, HEAD_DIM), np.float32) for _ in range(2))
        k[: kv_indptr[-1]], v[: kv_indptr[-1]] = np.concatenate(paged.k), np.concatenate(paged.v)
        k, v = (device_array(x, dtype) for x in (k, v))
        table = table_of(paged, to)
        # On the device, shorter index arrays are padded by a small program of their own.
        may_compile = (qo_lens, kv_lens) == first or metadata == "device"
        with contextlib.nullcontext() if may_compile else no_compilation():
            paged_wrapper.plan(to(qo_indptr), *table, *HEADS, page_size, **how)
            result = paged_wrapper.run_return_lse(full_q, paged.cache.data)
            ragged_wrapper.plan(to(qo_indptr), to(kv_indptr), *HEADS, **how)
            ragged = ragged_wrapper.run_return_lse(full_q, k, v)
        check(result, qs, paged.k, paged.v, dtype, causal=True)
        check(ragged, qs, paged.k, paged.v, dtype, causal=True)
        fewer = paged_wrapper.run(full_q[:total], paged.cache.data)
        assert same_bits(fewer, result[0][:total])


@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_device_qo_indptr_is_not_read(device):
    """Rows of q past qo_indptr[-1] give nothing; rows that q lacks are cut off."""
    dtype = jnp.bfloat16
    paged, data = paged_case([4, 30], 4, "NHD", False, dtype)
    q, q_array = normal((12, NUM_QO_HEADS, HEAD_DIM), dtype)
    wrapper = ja.BatchPrefillWithPagedKVCacheWrapper(None)
    table = table_of(paged, jnp.asarray)
    with jax.transfer_guard_device_to_host("disallow"):
        wrapper.plan(i32([0, 4, 10]), *table, *HEADS, 4, q_data_type=dtype)
        longer = wrapper.run_return_lse(q_array, data)
        shorter = wrapper.run_return_lse(q_array[:7], data)
    check(longer, [q[:4], q[4:10]], paged.k, paged.v, dtype, causal=False)
    check(shorter, [q[:4], q[4:7]], paged.k, paged.v, dtype, causal=False)


def test_inside_jit():
    """A plan from outside, one made within, and one left to the first run, which must not leak."""
    dtype = jnp.float32
    paged, data = paged_case([4, 30], 4, "NHD", False, dtype)
    _, q = normal((2, NUM_QO_HEADS, HEAD_DIM), dtype)
    decode = ja.BatchDecodeWithPagedKVCacheWrapper(None)
    table = table_of(paged, jnp.asarray)
    decode.plan(*table, *HEADS, 4, q_data_type=dtype)
    expected = decode.run(q, data)
    np.testing.assert_allclose(jax.jit(decode.run)(q, data), expected, atol=1e-6)

    @jax.jit
    def step(q, data, table):
        wrapper = ja.BatchDecodeWithPagedKVCacheWrapper(None)
        wrapper.plan(*table, *HEADS, 4, q_data_type=dtype)
        layers = jnp.zeros(2)
        return jax.lax.scan(lambda q, _: (wrapper.run(q, data), None), q, layers)[0]

    np.testing.assert_allclose(step(q, data, table), decode.run(expected, data), atol=1e-6)

    prefill = ja.BatchPrefillWithPagedKVCacheWrapper(None)
    prefill.plan(jnp.arange(3, dtype=jnp.int32), *table, *HEADS, 4, q_data_type=dtype)
    np.testing.assert_allclose(jax.jit(prefill.run)(q, data), expected, atol=1e-6)
    np.testing.assert_allclose(prefill.run(q, data), expected, atol=1e-6)


# On a GPU, at real sizes: the Triton kernels behind the wrappers.


@pytest.mark.gpu
@pytest.mark.parametrize("page_size,layout", [(1, "NHD"), (16, "HND")])
def test_gpu_graph_decode(page_size, layout):
    dtype, num_qo_heads, num_kv_heads, head_dim, most = jnp.bfloat16, 32, 8, 128, 64
    rng = np.random.default_rng(0)
    wrapper = ja.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(
        None, kv_layout=layout, max_batch_size=most, max_num_pages=2**17
    )
    for kv_lens in (rng.integers(0, 2000, most), [100_000, *rng.integers(0, 300, 40)]):
        paged = make_paged(
            kv_lens,
            page_size=page_size,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            layout=layout,
        )
        q, q_array = normal((len(kv_lens), num_qo_heads, head_dim), dtype)
        heads = (num_qo_heads, num_kv_heads, head_dim)
        wrapper.plan(*table_of(paged), *heads, page_size, q_data_type=dtype)
        result = wrapper.run_return_lse(q_array, paged.cache.data)
        how = dict(causal=False, sm_scale=head_dim**-0.5)
        check(result, q[:, None], paged.k, paged.v, dtype, **how)
