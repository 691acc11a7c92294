"""The FlashInfer-shaped wrappers against dense attention; capacities, recompilation and errors."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_lse, assert_rivals, dense_batch, make_paged, rounded, same_bits

import jaxattn as ja
from jaxattn.work_list import WorkItem

GROUP, NUM_KV_HEADS, HEAD_DIM = 2, 2, 64
NUM_QO_HEADS = GROUP * NUM_KV_HEADS
HEADS = (NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM)

# How index arrays arrive.
METADATA = {
    "numpy": np.asarray,
    "lists": lambda x: np.asarray(x).tolist(),
    "device": jnp.asarray,
}


def indptr_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def normal(shape, dtype, seed=1):
    """Numbers that the dtype holds, as float32 in numpy and as an array of that dtype."""
    x = rounded(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)
    return x, jnp.asarray(x).astype(dtype)


def table_of(paged, as_metadata=np.asarray):
    """FlashInfer's three index arrays; indices without the nonsense that fills their capacity."""
    indices = np.asarray(paged.table.indices)[: int(paged.table.indptr[-1])]
    return [as_metadata(x) for x in (paged.table.indptr, indices, paged.table.last_page_len)]


def check(result, qs, ks, vs, dtype, *, causal, lse_base="log2", sm_scale=HEAD_DIM**-0.5):
    """`result` is (o, lse) of the requests, and 0, -inf in the rows after theirs."""
    o, lse = result
    how = dict(sm_scale=sm_scale, causal=causal)
    truth, truth_lse = dense_batch(qs, ks, vs, dtype=np.float64, **how)
    plain, _ = dense_batch(qs, ks, vs, dtype=dtype, **how)
    rows = len(truth)
    assert o.dtype == dtype and lse.shape == o.shape[:2]
    assert_rivals(o[:rows], truth, plain, dtype)
    assert_lse(lse[:rows], truth_lse if lse_base == "ln" else truth_lse / np.log(2))
    np.testing.assert_array_equal(np.asarray(o[rows:], np.float32), 0)
    np.testing.assert_array_equal(np.asarray(lse[rows:]), -np.inf)


@contextlib.contextmanager
def no_compilation():
    compiled = []

    def listen(event, duration, **kwargs):
        if "backend_compile" in event:
            compiled.append(kwargs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


def test_compilations_are_noticed():
    with pytest.raises(AssertionError), no_compilation():
        jax.jit(lambda x: x * 3)(jnp.ones(3))


PAGED_CASES = [
    # page_size, layout, combined, metadata, dtype, lse_base, causal (of a prefill)
    (16, "NHD", False, "numpy", jnp.float16, "log2", True),
    (16, "HND", True, "device", jnp.bfloat16, "ln", False),
    (1, "HND", False, "lists", jnp.float16, "ln", True),
    (1, "NHD", True, "device", jnp.bfloat16, "log2", True),
    (5, "NHD", True, "lists", jnp.bfloat16, "log2", False),
]


def paged_case(kv_lens, page_size, layout, combined, dtype):
    """Requests, and their cache as FlashInfer takes it: pages of one token have no page axis."""
    paged = make_paged(
        kv_lens,
        page_size=page_size,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=dtype,
        layout=layout,
        combined=combined,
    )
    data = paged.cache.data
    if page_size == 1:
        data = jax.tree.map(lambda x: jnp.squeeze(x, -3 if layout == "NHD" else -2), data)
    return paged, data


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
    k, v = (jnp.asarray(np.concatenate(x)).astype(dtype) for x in (paged.k, paged.v))
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
    assert same_bits(o / 2, result[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "half", jnp.bfloat16, np.float16, np.dtype("f4")])
def test_dtype_names(dtype):
    paged, data = paged_case([5], 4, "NHD", False, jnp.dtype(dtype))
    wrapper = ja.BatchDecodeWithPagedKVCacheWrapper(None)
    wrapper.plan(*table_of(paged), *HEADS, 4, q_data_type=None, data_type=dtype)
    q = jnp.ones((1, NUM_QO_HEADS, HEAD_DIM), jnp.dtype(dtype))
    assert wrapper.run(q, data).dtype == jnp.dtype(dtype)


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
        k, v = (jnp.asarray(x).astype(dtype) for x in (k, v))
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
        wrapper.plan(jnp.asarray([0, 4, 10], jnp.int32), *table, *HEADS, 4, q_data_type=dtype)
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

    k, v = (jnp.asarray(np.concatenate(x)).astype(dtype) for x in (paged.k, paged.v))
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
