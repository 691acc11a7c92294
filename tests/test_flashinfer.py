"""The FlashInfer-shaped wrappers against dense attention; capacities, recompilation and errors."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_lse, assert_rivals, dense_batch, make_paged, rounded, same_bits

import jaxattn as ja
from jaxattn.plan import WorkItem

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


# Errors. Each case changes one thing in a call that works.

TABLE = ([0, 2, 3], [4, 0, 2], [3, 1])  # two requests, of 7 and 1 tokens, pages of 4
CACHE = (jnp.zeros((6, 4, NUM_KV_HEADS, HEAD_DIM), jnp.float16),) * 2
Q = jnp.zeros((2, NUM_QO_HEADS, HEAD_DIM), jnp.float16)
KV = (jnp.zeros((8, NUM_KV_HEADS, HEAD_DIM), jnp.float16),) * 2


def decode_wrapper(plan=None, **init):
    plan = dict(zip(("indptr", "indices", "last_page_len"), TABLE, strict=True)) | (plan or {})
    sizes = dict(zip(("num_qo_heads", "num_kv_heads", "head_dim", "page_size"), (*HEADS, 4)))
    wrapper = ja.BatchDecodeWithPagedKVCacheWrapper(None, **init)
    wrapper.plan(**sizes | plan)
    return wrapper


def prefill_wrapper(plan=None, **init):
    names = ("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")
    sizes = dict(zip(("num_qo_heads", "num_kv_heads", "head_dim_qk", "page_size"), (*HEADS, 4)))
    wrapper = ja.BatchPrefillWithPagedKVCacheWrapper(None, **init)
    wrapper.plan(**dict(zip(names, ([0, 1, 2], *TABLE))) | sizes | (plan or {}))
    return wrapper


def ragged_wrapper(plan=None, **init):
    names = ("qo_indptr", "kv_indptr", "num_qo_heads", "num_kv_heads", "head_dim_qk")
    wrapper = ja.BatchPrefillWithRaggedKVCacheWrapper(None, **init)
    wrapper.plan(**dict(zip(names, ([0, 1, 2], [0, 7, 8], *HEADS))) | (plan or {}))
    return wrapper


def buffers(batch=2, pages=3, suffix="_buffer"):
    sizes = dict(indptr=batch + 1, indices=pages, last_page_len=batch)
    return {f"paged_kv_{name}{suffix}": np.zeros(n, np.int32) for name, n in sizes.items()}


GRAPH = dict(use_cuda_graph=True)

INIT_ERRORS = [
    (decode_wrapper, dict(kv_layout="NDH"), KeyError, "kv_layout must be 'NHD' or 'HND'"),
    (prefill_wrapper, dict(kv_layout="NDH"), KeyError, "kv_layout must be"),
    (ragged_wrapper, dict(kv_layout="NDH"), KeyError, "kv_layout must be"),
    (decode_wrapper, dict(backend="cudnn"), NotImplementedError, "backend='cudnn'"),
    (prefill_wrapper, dict(backend="fa3"), NotImplementedError, "backend='fa3'"),
    (ragged_wrapper, dict(backend="cutlass"), NotImplementedError, "backend='cutlass'"),
    (decode_wrapper, dict(jit_args=[]), NotImplementedError, "jit_args=list is not built"),
    (prefill_wrapper, dict(jit_kwargs={}), NotImplementedError, "jit_kwargs"),
    (ragged_wrapper, dict(variant_owns_mask=True), NotImplementedError, "variant_owns_mask=True"),
    (prefill_wrapper, dict(custom_mask_buf=Q), NotImplementedError, "custom_mask_buf"),
    (ragged_wrapper, dict(mask_indptr_buf=Q), NotImplementedError, "mask_indptr_buf"),
    (decode_wrapper, GRAPH, ValueError, "paged_kv_indptr_buffer must be an array"),
    (prefill_wrapper, GRAPH, ValueError, "qo_indptr_buf must be an array"),
    (ragged_wrapper, GRAPH, ValueError, "qo_indptr_buf must be an array"),
    (
        decode_wrapper,
        GRAPH | buffers() | dict(paged_kv_last_page_len_buffer=np.zeros(3, np.int32)),
        ValueError,
        "paged_kv_last_page_len_buffer must have 2 elements, .* batch_size=2; got 3",
    ),
    (
        prefill_wrapper,
        GRAPH | buffers(suffix="_buf") | dict(qo_indptr_buf=np.zeros(2, np.int32)),
        ValueError,
        "paged_kv_indptr_buf must have 2 elements, .* batch_size=1; got 3",
    ),
]


@pytest.mark.parametrize("make,init,error,message", INIT_ERRORS)
def test_constructor_errors(make, init, error, message):
    with pytest.raises(error, match=message):
        make(**init)


@pytest.mark.parametrize(
    "arguments", [{}, dict(max_batch_size=3), dict(indptr_buffer=Q), dict(max_num_pages=3)]
)
def test_graph_constructor_needs_capacities(arguments):
    with pytest.raises(ValueError, match="capacities must come from"):
        ja.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(None, **arguments)
    with pytest.raises(ValueError, match="max_batch_size must be a positive integer; got 0"):
        ja.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(None, max_batch_size=0, max_num_pages=3)


NOT_BUILT = NotImplementedError
EVERY_PLAN_ERROR = [
    (dict(pos_encoding_mode="ROPE"), KeyError, "pos_encoding_mode must be"),
    (dict(pos_encoding_mode="ALIBI"), NOT_BUILT, "pos_encoding_mode='ALIBI'"),
    (dict(window_left=5), NOT_BUILT, "window_left=5"),
    (dict(logits_soft_cap=30.0), NOT_BUILT, "logits_soft_cap=30.0"),
    (dict(q_data_type="float8_e4m3fn"), NOT_BUILT, "q_data_type='float8_e4m3fn'"),
    (dict(kv_data_type=jnp.float8_e5m2), NOT_BUILT, "kv_data_type='float8_e5m2'"),
    (dict(kv_data_type="bfloat16"), NOT_BUILT, "mixed dtypes .* kv_data_type='bfloat16'"),
    (dict(o_data_type="float32"), NOT_BUILT, "mixed dtypes .* o_data_type='float32'"),
    (dict(q_data_type="float17"), TypeError, "q_data_type must be a dtype"),
    (dict(q_data_type=None), TypeError, "q_data_type must be a dtype"),
    (dict(num_qo_heads=5), ValueError, "num_qo_heads must be a multiple"),
    (dict(sm_scale=-1.0), ValueError, "sm_scale must be positive"),
]
MASK_ERRORS = [
    (dict(custom_mask=Q), NOT_BUILT, "custom_mask"),
    (dict(packed_custom_mask=Q), NOT_BUILT, "packed_custom_mask"),
    (dict(head_dim_vo=32), NOT_BUILT, "head_dim_vo=32"),
    (dict(use_fp16_qk_reduction=True), NOT_BUILT, "use_fp16_qk_reduction=True"),
    (dict(prefix_len_ptr=Q), NOT_BUILT, "prefix_len_ptr"),
    (dict(token_pos_in_items_ptr=Q), NOT_BUILT, "token_pos_in_items_ptr"),
    (dict(token_pos_in_items_len=3), NOT_BUILT, "token_pos_in_items_len=3"),
    (dict(max_item_len_ptr=Q), NOT_BUILT, "max_item_len_ptr"),
    (dict(qo_indptr=[0, 1]), ValueError, r"qo_indptr must have shape \[3\]; got \[2\]"),
    (dict(qo_indptr=[0, 2, 1]), ValueError, "qo_indptr must start at 0 and not decrease"),
]
DECODE_PLAN_ERRORS = [
    (dict(q_len_per_req=0), ValueError, "q_len_per_req must be at least 1; got 0"),
    (dict(q_len_per_req=2), NOT_BUILT, "q_len_per_req=2"),
    (dict(window_right=1), NOT_BUILT, "window_right=1"),
    (dict(is_causal=True), NOT_BUILT, "is_causal=True"),
    (dict(data_type="bfloat16"), NOT_BUILT, "data_type sets only the kv_data_type"),
    (dict(page_size=0), ValueError, "page_size must be a positive integer"),
    (dict(head_dim=0), ValueError, "head_dim must be a positive integer"),
    (dict(indptr=[0, 2]), ValueError, r"indptr must have shape \[3\]; got \[2\]"),
    (dict(indptr=[1, 2, 3]), ValueError, "indptr must start at 0"),
    (dict(indptr=np.arange(3.0)), TypeError, "indptr must be int32; got float64"),
    (dict(indices=np.arange(3)), TypeError, "indices must be int32; got int64"),
    (dict(indices=[4, 0]), ValueError, r"indices must have indptr\[-1\]=3 elements; got 2"),
    (dict(last_page_len=[[1], [2]]), ValueError, r"last_page_len must have shape \[batch_size\]"),
]
PLAN_ERRORS = [
    *((decode_wrapper, *case) for case in EVERY_PLAN_ERROR + DECODE_PLAN_ERRORS),
    *((prefill_wrapper, *case) for case in EVERY_PLAN_ERROR + MASK_ERRORS),
    *((ragged_wrapper, *case) for case in EVERY_PLAN_ERROR + MASK_ERRORS),
    (ragged_wrapper, dict(kv_indptr=[0, 3, 2]), ValueError, "kv_indptr must start at 0"),
    (decode_wrapper, dict(fixed_split_size=0), ValueError, "fixed_split_size must be a positive"),
    (prefill_wrapper, dict(fixed_split_size=0), ValueError, "fixed_split_size must be a positive"),
    (ragged_wrapper, dict(fixed_split_size=4), NOT_BUILT, "fixed_split_size=4"),
    (ragged_wrapper, dict(v_indptr=Q), NOT_BUILT, "v_indptr"),
    (ragged_wrapper, dict(o_indptr=Q), NOT_BUILT, "o_indptr"),
]


@pytest.mark.parametrize("make,plan,error,message", PLAN_ERRORS)
def test_plan_errors(make, plan, error, message):
    with pytest.raises(error, match=message):
        make(plan)


@pytest.mark.parametrize("rows", [1, 3])
def test_graph_capacity_errors(rows):
    wrapper = decode_wrapper(**GRAPH, **buffers())
    plan = (*HEADS, 4)
    with pytest.raises(ValueError, match="indptr holds 3 requests, more than .* fixed at 2"):
        wrapper.plan([0, 1, 2, 3], [0, 1, 2], [1, 1, 1], *plan)
    with pytest.raises(ValueError, match="indices holds 4 pages, more than .* fixed at 3"):
        wrapper.plan([0, 2, 4], [0, 1, 2, 3], [1, 1], *plan)
    with pytest.raises(ValueError, match=r"planned \(2\), or the largest number .* \(2\); got"):
        wrapper.run(jnp.zeros((rows, NUM_QO_HEADS, HEAD_DIM), jnp.float16), CACHE)

    qo_buffer = dict(qo_indptr_buf=np.zeros(3, np.int32))
    wrapper = prefill_wrapper(**GRAPH, **qo_buffer, **buffers(suffix="_buf"))
    with pytest.raises(ValueError, match=r"qo_indptr\[-1\]=4 must not exceed .* first plan, 2"):
        wrapper.plan([0, 3, 4], *TABLE, *plan)
    wrapper.plan(jnp.asarray([0, 1, 2], jnp.int32), *TABLE, *plan)
    with pytest.raises(ValueError, match=r"the largest number planned for \(2\); got 3"):
        wrapper.run(jnp.zeros((3, NUM_QO_HEADS, HEAD_DIM), jnp.float16), CACHE)


BF16 = Q.astype(jnp.bfloat16)
EVERY_RUN_ERROR = [
    (dict(q=Q[0]), ValueError, r"q must have shape \[rows, 4, 64\]"),
    (dict(q=Q[:, :2]), ValueError, r"q must have shape \[rows, 4, 64\]"),
    (dict(q=Q[:1]), ValueError, r"q must have as many rows as planned \(2\).*; got 1"),
    (dict(q=BF16), ValueError, "q must be float16, the q_data_type of plan; got bfloat16"),
    (dict(out=Q), NOT_BUILT, "out cannot be written"),
    (dict(lse=Q, return_lse=True), NOT_BUILT, "lse cannot be written"),
    (dict(kv_cache_sf=CACHE), NOT_BUILT, "kv_cache_sf=tuple"),
    (dict(lse_base="e", return_lse=True), ValueError, "lse_base must be one of 'log2', 'ln'"),
    (dict(k_scale=jnp.float32(2)), TypeError, "k_scale must be a Python number"),
    (dict(q_scale=-1.0), ValueError, "sm_scale must be positive"),
    (dict(v_scale=jnp.ones(4)), ValueError, r"v_scale must be a number or .* got \(4,\)"),
]
PAGED_RUN_ERRORS = [
    (dict(paged_kv_cache=list(CACHE)), KeyError, "must be a tuple"),
    (dict(paged_kv_cache=CACHE[:1]), ValueError, r"must be \(k, v\); got 1 arrays"),
    (dict(paged_kv_cache=CACHE[0]), ValueError, "a combined cache must have shape"),
    (
        dict(paged_kv_cache=(CACHE[0], CACHE[1].astype(jnp.float32))),
        ValueError,
        "kv must be float16, the kv_data_type of plan; got float32",
    ),
    (
        dict(paged_kv_cache=tuple(x[:, :2] for x in CACHE)),
        ValueError,
        "page_size=4, as plan; got page_size=2",
    ),
    (dict(window_left=3), NOT_BUILT, "window_left=3"),
    (dict(sinks=Q), NOT_BUILT, "sinks"),
    (
        dict(skip_softmax_threshold_scale_factor=1.0),
        NOT_BUILT,
        "skip_softmax_threshold_scale_factor=1.0",
    ),
]
PREFILL_RUN_ERRORS = [
    (dict(use_fp16_softmax=True), NOT_BUILT, "use_fp16_softmax=True"),
    (dict(uses_spcompress=True), NOT_BUILT, "uses_spcompress=True"),
]
RUN_ERRORS = [
    *((decode_wrapper, *case) for case in EVERY_RUN_ERROR + PAGED_RUN_ERRORS),
    *((prefill_wrapper, *case) for case in EVERY_RUN_ERROR + PAGED_RUN_ERRORS + PREFILL_RUN_ERRORS),
    *((ragged_wrapper, *case) for case in EVERY_RUN_ERROR),
    (decode_wrapper, dict(q_len_per_req=2), NOT_BUILT, "q_len_per_req=2"),
    (prefill_wrapper, dict(lse_layout="HN"), NOT_BUILT, "lse_layout='HN'"),
    (ragged_wrapper, dict(lse_layout="HN"), NOT_BUILT, "lse_layout='HN'"),
    (ragged_wrapper, dict(o_scale=2.0), NOT_BUILT, "o_scale=2.0"),
    (ragged_wrapper, dict(k=KV[0][0]), ValueError, r"k must have shape \[num_kv_tokens"),
    (ragged_wrapper, dict(k=KV[0][:7]), ValueError, r"at least kv_indptr\[-1\]=8 rows; got 7"),
    (ragged_wrapper, dict(v=KV[0][:7]), ValueError, r"v must have shape \[8, 2, 64\]"),
]


@pytest.mark.parametrize("make,run,error,message", RUN_ERRORS)
def test_run_errors(make, run, error, message):
    kv = dict(k=KV[0], v=KV[1]) if make is ragged_wrapper else dict(paged_kv_cache=CACHE)
    with pytest.raises(error, match=message):
        make().run(**dict(q=Q) | kv | run)


@pytest.mark.parametrize(
    "wrapper",
    [
        ja.BatchDecodeWithPagedKVCacheWrapper,
        ja.BatchPrefillWithPagedKVCacheWrapper,
        ja.BatchPrefillWithRaggedKVCacheWrapper,
    ],
)
def test_run_needs_a_plan_and_no_more_arguments(wrapper):
    kv = KV if wrapper is ja.BatchPrefillWithRaggedKVCacheWrapper else (CACHE,)
    with pytest.raises(RuntimeError, match=f"{wrapper.__name__}.run needs a plan: call plan"):
        wrapper(None).run(Q, *kv)
    with pytest.raises(NOT_BUILT, match="custom kernels, which are not built; got 1"):
        wrapper(None).run(Q, *kv, Q)


SINGLE_ERRORS = [
    (dict(kv_layout="NDH"), KeyError, "kv_layout must be"),
    (dict(pos_encoding_mode="ROPE"), KeyError, "pos_encoding_mode must be"),
    (dict(pos_encoding_mode="ROPE_LLAMA"), NOT_BUILT, "pos_encoding_mode='ROPE_LLAMA'"),
    (dict(window_left=3), NOT_BUILT, "window_left=3"),
    (dict(logits_soft_cap=1.0), NOT_BUILT, "logits_soft_cap=1.0"),
    (dict(lse_base="e", return_lse=True), ValueError, "lse_base must be one of"),
    (dict(k_scale=jnp.float32(2)), TypeError, "k_scale must be a Python number"),
    (dict(v_scale=jnp.ones(4)), ValueError, "v_scale must be a number"),
    (dict(k=KV[0][:, :, :8]), ValueError, r"k must have shape \[kv_len, num_kv_heads, 64\]"),
    (dict(v=KV[0][:5]), ValueError, r"v must have shape \[8, 2, 64\]"),
    (dict(k=KV[0].astype(jnp.float32)), TypeError, "must have the same dtype"),
]
SINGLE_PREFILL_ERRORS = [
    (dict(q=Q[0]), ValueError, r"q must have shape \[qo_len, num_qo_heads, head_dim\]"),
    (dict(backend="fa3"), NOT_BUILT, "backend='fa3'"),
    (dict(k=KV[0][:1], v=KV[1][:1], causal=True), ValueError, "kv_len=1, qo_len=2"),
    (dict(scale_q=Q), NOT_BUILT, "scale_q"),
    (dict(scale_k=Q), NOT_BUILT, "scale_k"),
    (dict(scale_v=Q), NOT_BUILT, "scale_v"),
    (dict(o_dtype=jnp.float32), NOT_BUILT, "o_dtype"),
    (dict(custom_mask=Q), NOT_BUILT, "custom_mask"),
    (dict(packed_custom_mask=Q), NOT_BUILT, "packed_custom_mask"),
    (dict(use_fp16_qk_reduction=True), NOT_BUILT, "use_fp16_qk_reduction"),
    (dict(kv_cache_sf=KV), NOT_BUILT, "kv_cache_sf"),
]


@pytest.mark.parametrize("change,error,message", SINGLE_ERRORS + SINGLE_PREFILL_ERRORS)
def test_single_prefill_errors(change, error, message):
    with pytest.raises(error, match=message):
        ja.single_prefill_with_kv_cache(**dict(q=Q, k=KV[0], v=KV[1]) | change)


@pytest.mark.parametrize(
    "change,error,message",
    [*SINGLE_ERRORS, (dict(q=Q), ValueError, r"q must have shape \[num_qo_heads, head_dim\]")],
)
def test_single_decode_errors(change, error, message):
    with pytest.raises(error, match=message):
        ja.single_decode_with_kv_cache(**dict(q=Q[0], k=KV[0], v=KV[1]) | change)


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
