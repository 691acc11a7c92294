"""What engines write with FlashInfer, torch replaced by jnp: 32 / 8 heads, pages of one token."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_lse, assert_rivals, dense_batch, device_array, make_paged, rounded

import jaxattn as ja

NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128

SIZES = [
    pytest.param([5, 0, 33, 1], id="small"),
    pytest.param([2048, 1, 777, 1000, 64, 0, 3000, 512], id="large", marks=pytest.mark.gpu),
]


def queries(num_rows, dtype, seed=1):
    """q as float32 numbers and as the array of that dtype."""
    shape = (num_rows, NUM_QO_HEADS, HEAD_DIM)
    q = rounded(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)
    return q, device_array(q, dtype)


def cache_with(kv_lens, dtype, page_size=1):
    return make_paged(
        kv_lens, page_size=page_size, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, dtype=dtype
    )


def check(o, qs, paged, dtype, causal=False):
    how = dict(sm_scale=HEAD_DIM**-0.5, causal=causal)
    truth, _ = dense_batch(qs, paged.k, paged.v, dtype=np.float64, **how)
    plain, _ = dense_batch(qs, paged.k, paged.v, dtype=dtype, **how)
    assert o.dtype == dtype
    assert_rivals(o, truth, plain, dtype)


@pytest.mark.parametrize("kv_lens", SIZES)
def test_prefill_wrapper(kv_lens):
    dtype = jnp.bfloat16
    paged = cache_with(kv_lens, dtype)
    qo_lens = [-(-n // 2) for n in kv_lens]  # the first half of each prompt is cached
    cu_seqlens_q = np.concatenate([[0], np.cumsum(qo_lens)]).astype(np.int32)
    q, q_array = queries(cu_seqlens_q[-1], dtype)
    k_cache, v_cache = paged.cache.k, paged.cache.v

    workspace = jnp.zeros(128, jnp.uint8)
    prefill_wrapper = ja.BatchPrefillWithPagedKVCacheWrapper(
        workspace, kv_layout="NHD", backend="fa2"
    )
    prefill_wrapper.plan(
        qo_indptr=cu_seqlens_q,
        paged_kv_indptr=np.asarray(paged.table.indptr),
        paged_kv_indices=paged.table.indices,
        paged_kv_last_page_len=np.asarray(paged.table.last_page_len),
        num_qo_heads=NUM_QO_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim_qk=HEAD_DIM,
        page_size=1,
        pos_encoding_mode="NONE",
        seq_lens=np.asarray(kv_lens, np.int32),
        q_data_type=jnp.bfloat16,
        kv_data_type=jnp.bfloat16,
        non_blocking=True,
        causal=True,
    )
    o = prefill_wrapper.run(q=q_array, paged_kv_cache=(k_cache, v_cache))

    check(o, np.split(q, cu_seqlens_q[1:-1]), paged, dtype, causal=True)


@pytest.mark.parametrize("kv_lens", SIZES)
def test_decode_wrapper(kv_lens):
    dtype = jnp.bfloat16
    paged = cache_with(kv_lens, dtype)
    q, q_array = queries(len(kv_lens), dtype)
    kv_cache = (paged.cache.k, paged.cache.v)

    decode_wrapper = ja.BatchDecodeWithPagedKVCacheWrapper(
        jnp.zeros(128, jnp.uint8), use_tensor_cores=True, kv_layout="NHD", backend="fa2"
    )
    decode_wrapper.plan(
        indptr=np.asarray(paged.table.indptr),
        indices=paged.table.indices,
        last_page_len=np.asarray(paged.table.last_page_len),
        num_qo_heads=NUM_QO_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        page_size=1,
        pos_encoding_mode="NONE",
        seq_lens=np.asarray(kv_lens, np.int32),
        data_type=jnp.bfloat16,
        q_data_type=jnp.bfloat16,
        kv_data_type=jnp.bfloat16,
        non_blocking=True,
    )
    o = decode_wrapper.run(q=q_array, paged_kv_cache=kv_cache)

    check(o, q[:, None], paged, dtype)


@pytest.mark.parametrize("kv_lens", SIZES)
def test_cuda_graph_decode_wrapper(kv_lens):
    dtype = jnp.float16  # FlashInfer's default data type
    max_batch_size, max_num_pages = len(kv_lens), 2 * sum(kv_lens)
    wrapper = ja.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(
        jnp.zeros(128, jnp.uint8),
        kv_layout="NHD",
        use_tensor_cores=True,
        max_batch_size=max_batch_size,
        max_num_pages=max_num_pages,
    )
    for step_lens in (kv_lens, [n + 1 for n in kv_lens], kv_lens[:-1]):
        paged = cache_with(step_lens, dtype)
        q, q_array = queries(len(step_lens), dtype)

        wrapper.plan(
            np.asarray(paged.table.indptr),
            paged.table.indices,
            np.asarray(paged.table.last_page_len),
            NUM_QO_HEADS,
            NUM_KV_HEADS,
            HEAD_DIM,
            1,
        )
        o = wrapper.run(q_array, (paged.cache.k, paged.cache.v))

        check(o, q[:, None], paged, dtype)


def test_page_size_16_and_lse():
    """The example of FlashInfer's README: one combined cache, states to merge."""
    dtype, kv_lens = jnp.float16, [31, 16, 1]
    paged = make_paged(
        kv_lens,
        page_size=16,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=dtype,
        combined=True,
    )
    q, q_array = queries(len(kv_lens), dtype)

    wrapper = ja.BatchDecodeWithPagedKVCacheWrapper(jnp.zeros(128, jnp.uint8), "NHD")
    wrapper.plan(
        paged.table.indptr,
        paged.table.indices,
        paged.table.last_page_len,
        NUM_QO_HEADS,
        NUM_KV_HEADS,
        HEAD_DIM,
        16,
        pos_encoding_mode="NONE",
        q_data_type=jnp.float16,
        kv_data_type=jnp.float16,
    )
    o, lse = wrapper.run_return_lse(q_array, paged.cache.data)

    check(o, q[:, None], paged, dtype)
    how = dict(sm_scale=HEAD_DIM**-0.5, causal=False, dtype=np.float64)
    _, truth = dense_batch(q[:, None], paged.k, paged.v, **how)
    assert_lse(lse, truth / np.log(2))


def test_single_request():
    """FlashInfer's first example: one request, decode and causal append."""
    dtype, kv_len, qo_len = jnp.float16, 40, 7
    rng = np.random.default_rng(3)
    k, v = (
        rounded(rng.standard_normal((kv_len, NUM_KV_HEADS, HEAD_DIM), np.float32), dtype)
        for _ in range(2)
    )
    k_array, v_array = device_array(k, dtype), device_array(v, dtype)
    q, q_array = queries(qo_len, dtype)
    for causal, qs, o in (
        (False, q[:1], ja.single_decode_with_kv_cache(q_array[0], k_array, v_array)[None]),
        (True, q, ja.single_prefill_with_kv_cache(q_array, k_array, v_array, causal=True)),
    ):
        how = dict(sm_scale=HEAD_DIM**-0.5, causal=causal)
        truth, _ = dense_batch([qs], [k], [v], dtype=np.float64, **how)
        plain, _ = dense_batch([qs], [k], [v], dtype=dtype, **how)
        assert_rivals(o, truth, plain, dtype)


@pytest.mark.parametrize(
    "num_tokens", [5, pytest.param(4096, marks=pytest.mark.gpu)], ids=["small", "large"]
)
def test_norms(num_tokens):
    hidden, eps, dtype = 4096, 1e-6, jnp.bfloat16
    rng = np.random.default_rng(0)
    x, residual = (
        rounded(rng.standard_normal((num_tokens, hidden), np.float32), dtype) for _ in range(2)
    )
    weight = rounded(rng.standard_normal(hidden, np.float32), dtype)
    x_array, residual_array, weight_array = (device_array(a, dtype) for a in (x, residual, weight))

    def norm(x):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight[None, :]

    normed = ja.rmsnorm(x_array, weight_array, eps)
    truth = norm(x)
    assert_rivals(normed, truth, rounded(truth, dtype), dtype)

    normed, residual_array = ja.fused_add_rmsnorm(x_array, residual_array, weight_array, eps)
    truth = norm(x + residual)
    assert_rivals(normed, truth, rounded(truth, dtype), dtype)
    assert_rivals(residual_array, x + residual, rounded(x + residual, dtype), dtype)


@pytest.mark.parametrize(
    "num_tokens", [6, pytest.param(4096, marks=pytest.mark.gpu)], ids=["small", "large"]
)
def test_rope(num_tokens):
    dtype, max_seq_len = jnp.bfloat16, 8192
    rng = np.random.default_rng(0)
    positions = rng.integers(0, max_seq_len, num_tokens).astype(np.int32)
    shapes = [(num_tokens, heads * HEAD_DIM) for heads in (NUM_QO_HEADS, NUM_KV_HEADS)]
    query, key = (rounded(rng.standard_normal(shape, np.float32), dtype) for shape in shapes)

    cos_sin_cache = ja.precompute_freqs_cis(HEAD_DIM, max_seq_len)
    rotated = ja.apply_rope_with_cos_sin_cache_inplace(
        positions=device_array(positions),
        query=device_array(query, dtype),
        key=device_array(key, dtype),
        head_size=HEAD_DIM,
        cos_sin_cache=cos_sin_cache,
    )

    frequency = 1e4 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angle = (positions[:, None] * frequency[None, :].astype(np.float32))[:, None, :]
    for ours, x in zip(rotated, (query, key), strict=True):
        first, second = np.split(x.reshape(num_tokens, -1, HEAD_DIM), 2, axis=-1)
        truth = np.concatenate(
            [
                first * np.cos(angle) - second * np.sin(angle),
                second * np.cos(angle) + first * np.sin(angle),
            ],
            axis=-1,
        ).reshape(x.shape)
        assert ours.dtype == dtype
        assert_rivals(ours, truth, rounded(truth, dtype), dtype)
