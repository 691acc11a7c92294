"""Errors of the FlashInfer-shaped surface. Each case changes one thing in a call that works."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import i32

import jaxattn as ja

NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM = HEADS = (4, 2, 64)
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
    (dict(pos_encoding_mode="ROPE_LLAMA"), NOT_BUILT, "'ROPE_LLAMA' .* with apply_rope"),
    (dict(window_left=-2), ValueError, "window_left must be at least 0, or -1 .*; got -2"),
    (dict(window_left=1.5), ValueError, "window_left must be an integer or None; got 1.5"),
    (dict(logits_soft_cap=-1.0), ValueError, "logits_soft_cap must be positive"),
    (dict(q_data_type="float8_e4m3fn"), NOT_BUILT, "q_data_type='float8_e4m3fn'"),
    (dict(kv_data_type=jnp.float8_e4m3b11fnuz), NOT_BUILT, "kv_data_type='float8_e4m3b11fnuz'"),
    (dict(kv_data_type="bfloat16"), NOT_BUILT, "mixed dtypes .* kv_data_type='bfloat16'"),
    (dict(o_data_type="float8_e4m3fn"), NOT_BUILT, "o_data_type='float8_e4m3fn'"),
    (dict(o_data_type="float33"), TypeError, "o_data_type must be a dtype"),
    (dict(q_data_type="float17"), TypeError, "q_data_type must be a dtype"),
    (dict(q_data_type=None), TypeError, "q_data_type must be a dtype"),
    (dict(num_qo_heads=5), ValueError, "num_qo_heads must be a multiple"),
    (dict(sm_scale=-1.0), ValueError, "sm_scale must be positive"),
]
MASK_ERRORS = [
    (dict(custom_mask=Q), TypeError, "custom_mask must be bool; got float16: cast it"),
    (dict(custom_mask=np.ones(7, bool)), ValueError, r"qo_len \* kv_len elements, 8; got 7"),
    (dict(custom_mask=jnp.ones(9, bool)), ValueError, r"qo_len \* kv_len elements, 8; got 9"),
    (
        dict(packed_custom_mask=np.ones(2, bool)),
        TypeError,
        "packed_custom_mask must be uint8; got bool: pack it by segment_packbits",
    ),
    (
        dict(packed_custom_mask=np.ones(1, np.uint8), custom_mask=np.ones(8, bool)),
        ValueError,
        r"packed_custom_mask must have .* ceil\(qo_len \* kv_len / 8\) elements, 2; got 1",
    ),
    (dict(head_dim_vo=0), ValueError, "head_dim_vo must be a positive integer"),
    (dict(use_fp16_qk_reduction=True), NOT_BUILT, "use_fp16_qk_reduction=True"),
    (dict(prefix_len_ptr=Q), NOT_BUILT, "prefix_len_ptr"),
    (dict(token_pos_in_items_ptr=Q), NOT_BUILT, "token_pos_in_items_ptr"),
    (dict(token_pos_in_items_len=3), NOT_BUILT, "token_pos_in_items_len=3"),
    (dict(max_item_len_ptr=Q), NOT_BUILT, "max_item_len_ptr"),
    (dict(qo_indptr=[0, 1]), ValueError, r"qo_indptr must have shape \[3\]; got \[2\]"),
    (dict(qo_indptr=[0, 2, 1]), ValueError, "qo_indptr must start at 0 and not decrease"),
]
DECODE_PLAN_ERRORS = [
    (dict(q_len_per_req=0), ValueError, "q_len_per_req must be a positive integer; got 0"),
    (dict(q_len_per_req=2), ValueError, "at least q_len_per_req=2 tokens.*; request 1 has 1"),
    (dict(q_len_per_req=2, is_causal=False), NOT_BUILT, "is_causal=False with q_len_per_req=2"),
    (dict(window_right=-2), ValueError, "window_right must be at least 0"),
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
    wrapper.plan(i32([0, 1, 2]), *TABLE, *plan)
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
    (dict(lse_base="e"), ValueError, "lse_base must be one of 'log2', 'ln'"),
    (dict(k_scale=0), ValueError, "k_scale must be positive and finite; got 0"),
    (dict(q_scale=-1.0), ValueError, "q_scale must be positive and finite; got -1.0"),
    (dict(v_scale=jnp.ones(4)), ValueError, r"v_scale must be a number or .* \[2\]; got \(4,\)"),
]
PAGED_RUN_ERRORS = [
    (dict(paged_kv_cache=list(CACHE)), KeyError, "must be a tuple"),
    (dict(paged_kv_cache=(1, 2)), TypeError, "kv must be an array; got int"),
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
    (dict(window_left=3), ValueError, "window_left must be that of plan, -1, or None; got 3"),
    (dict(sinks=Q), ValueError, r"sinks must have shape \[4\]"),
    (dict(sinks=jnp.zeros(4, jnp.bfloat16)), TypeError, "sinks must be float32; got bfloat16"),
    (
        dict(paged_kv_cache=(CACHE[0], CACHE[1][..., :32])),
        ValueError,
        "v must have head_dim 64, as planned; got 32",
    ),
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
    (decode_wrapper, dict(q_len_per_req=2), ValueError, "q_len_per_req must be that of plan, 1"),
    (prefill_wrapper, dict(lse_layout="HN"), NOT_BUILT, "lse_layout='HN'"),
    (ragged_wrapper, dict(lse_layout="HN"), NOT_BUILT, "lse_layout='HN'"),
    (ragged_wrapper, dict(o_scale=2.0), NOT_BUILT, "o_scale=2.0"),
    (ragged_wrapper, dict(k=KV[0][0]), ValueError, r"k must have shape \[num_kv_tokens"),
    (ragged_wrapper, dict(k=KV[0][:7]), ValueError, r"at least kv_indptr\[-1\]=8 rows; got 7"),
    (ragged_wrapper, dict(v=KV[0][:7]), ValueError, r"v must have shape \[8, 2, head_dim of v\]"),
    (ragged_wrapper, dict(v=KV[0][..., :32]), ValueError, "v must have head_dim 64, as planned"),
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
    (dict(window_left=-3), ValueError, "window_left must be at least 0"),
    (dict(logits_soft_cap=-1.0), ValueError, "logits_soft_cap must be positive"),
    (dict(lse_base="e", return_lse=True), ValueError, "lse_base must be one of"),
    (dict(k_scale=np.float32(np.inf)), ValueError, "k_scale must be positive and finite"),
    (dict(v_scale=jnp.ones(4)), ValueError, "v_scale must be a number"),
    (dict(k=KV[0][:, :, :8]), ValueError, r"k must have shape \[kv_len, num_kv_heads, 64\]"),
    (dict(v=KV[0][:5]), ValueError, r"v must have shape \[8, 2, head_dim of v\]"),
    (dict(k=KV[0].astype(jnp.float32)), TypeError, "must have the same dtype"),
    (dict(lse_base="e"), ValueError, "lse_base must be one of"),
]
SINGLE_PREFILL_ERRORS = [
    (dict(q=Q[0]), ValueError, r"q must have shape \[qo_len, num_qo_heads, head_dim\]"),
    (dict(backend="fa3"), NOT_BUILT, "backend='fa3'"),
    (dict(k=KV[0][:1], v=KV[1][:1], causal=True), ValueError, "kv_len=1, qo_len=2"),
    (dict(scale_q=Q), NOT_BUILT, "scale_q"),
    (dict(scale_k=Q), NOT_BUILT, "scale_k"),
    (dict(scale_v=Q), NOT_BUILT, "scale_v"),
    (dict(o_dtype="float8_e5m2"), NOT_BUILT, "o_dtype='float8_e5m2'"),
    (dict(custom_mask=Q), ValueError, r"custom_mask must have shape \[2, 8\]; got \[2, 4, 64\]"),
    (dict(custom_mask=jnp.ones((2, 8))), TypeError, "custom_mask must be bool; got float32"),
    (dict(packed_custom_mask=np.ones(1, np.uint8)), ValueError, "elements, 2; got 1"),
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
