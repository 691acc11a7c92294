"""Arguments, order and defaults are FlashInfer's (0.7.2); and what its older names do here."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_paged, same_bits

import jaxattn as ja
from jaxattn import flashinfer
from jaxattn.append import append_paged_kv_cache

ROPE = "rotary_dim=None, interleave=False, rope_scale=1, rope_theta=1e4"
LLAMA31 = (
    "rotary_dim=None, interleave=False, rope_scale=8, rope_theta=5e5, low_freq_factor=1, "
    "high_freq_factor=4, old_context_len=8192"
)
CLASSES = {
    "BatchDecodeWithPagedKVCacheWrapper": dict(
        __init__="self, float_workspace_buffer, kv_layout='NHD', use_cuda_graph=False, "
        "use_tensor_cores=False, paged_kv_indptr_buffer=None, paged_kv_indices_buffer=None, "
        "paged_kv_last_page_len_buffer=None, backend='auto', jit_args=None",
        plan="self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, "
        "page_size, *, pos_encoding_mode='NONE', window_left=-1, window_right=0, "
        "logits_soft_cap=None, q_data_type='float16', kv_data_type=None, o_data_type=None, "
        "data_type=None, sm_scale=None, rope_scale=None, rope_theta=None, non_blocking=True, "
        "block_tables=None, seq_lens=None, fixed_split_size=None, disable_split_kv=False, "
        "q_len_per_req=1, is_causal=None",
        run="self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None, "
        "lse=None, return_lse=False, enable_pdl=None, window_left=None, sinks=None, "
        "q_len_per_req=None, skip_softmax_threshold_scale_factor=None, kv_cache_sf=None",
    ),
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper": dict(
        __init__="self, workspace_buffer, indptr_buffer, indices_buffer, last_page_len_buffer, "
        "kv_layout='NHD', use_tensor_cores=False",
    ),
    "BatchPrefillWithPagedKVCacheWrapper": dict(
        __init__="self, float_workspace_buffer, kv_layout='NHD', use_cuda_graph=False, "
        "qo_indptr_buf=None, paged_kv_indptr_buf=None, paged_kv_indices_buf=None, "
        "paged_kv_last_page_len_buf=None, custom_mask_buf=None, mask_indptr_buf=None, "
        "backend='auto', jit_args=None, jit_kwargs=None, variant_owns_mask=False",
        plan="self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, "
        "num_qo_heads, num_kv_heads, head_dim_qk, page_size, head_dim_vo=None, custom_mask=None, "
        "packed_custom_mask=None, causal=False, pos_encoding_mode='NONE', "
        "use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None, "
        "rope_scale=None, rope_theta=None, q_data_type='float16', kv_data_type=None, "
        "o_data_type=None, non_blocking=True, prefix_len_ptr=None, token_pos_in_items_ptr=None, "
        "token_pos_in_items_len=0, max_item_len_ptr=None, seq_lens=None, seq_lens_q=None, "
        "block_tables=None, max_token_per_sequence=None, max_sequence_kv=None, "
        "fixed_split_size=None, disable_split_kv=False, uniform_q_len=None",
        run="self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None, "
        "lse=None, return_lse=False, lse_base='log2', lse_layout='NH', enable_pdl=None, "
        "window_left=None, sinks=None, kv_cache_sf=None, "
        "skip_softmax_threshold_scale_factor=None, use_fp16_softmax=None, uses_spcompress=None",
    ),
    "BatchPrefillWithRaggedKVCacheWrapper": dict(
        __init__="self, float_workspace_buffer, kv_layout='NHD', use_cuda_graph=False, "
        "qo_indptr_buf=None, kv_indptr_buf=None, custom_mask_buf=None, mask_indptr_buf=None, "
        "backend='auto', jit_args=None, jit_kwargs=None, variant_owns_mask=False",
        plan="self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, "
        "head_dim_vo=None, custom_mask=None, packed_custom_mask=None, causal=False, "
        "pos_encoding_mode='NONE', use_fp16_qk_reduction=False, window_left=-1, "
        "logits_soft_cap=None, sm_scale=None, rope_scale=None, rope_theta=None, "
        "q_data_type='float16', kv_data_type=None, o_data_type=None, non_blocking=True, "
        "prefix_len_ptr=None, token_pos_in_items_ptr=None, token_pos_in_items_len=0, "
        "max_item_len_ptr=None, fixed_split_size=None, disable_split_kv=False, seq_lens=None, "
        "seq_lens_q=None, max_token_per_sequence=None, max_sequence_kv=None, v_indptr=None, "
        "o_indptr=None, uniform_q_len=None",
        run="self, q, k, v, *args, q_scale=None, k_scale=None, v_scale=None, o_scale=None, "
        "out=None, lse=None, return_lse=False, lse_base='log2', lse_layout='NH', "
        "enable_pdl=None, kv_cache_sf=None",
    ),
    "BatchAttentionWithAttentionSinkWrapper": dict(
        __init__="self, float_workspace_buffer, kv_layout='NHD', use_cuda_graph=False, "
        "qo_indptr_buf=None, paged_kv_indptr_buf=None, paged_kv_indices_buf=None, "
        "paged_kv_last_page_len_buf=None, custom_mask_buf=None, mask_indptr_buf=None, "
        "backend='auto', pos_encoding_mode='NONE', use_fp16_qk_reduction=False, "
        "q_data_type='bfloat16', kv_data_type='bfloat16', head_dim_qk=128, head_dim_vo=128, "
        "window_left=-1",
        run="self, q, paged_kv_cache, sink, sm_scale",
    ),
    "BatchPrefillWithCausalBidirectionalRangesWrapper": dict(
        __init__="self, float_workspace_buffer, kv_layout='NHD', use_cuda_graph=False, "
        "qo_indptr_buf=None, paged_kv_indptr_buf=None, paged_kv_indices_buf=None, "
        "paged_kv_last_page_len_buf=None, pos_encoding_mode='NONE', q_data_type='bfloat16', "
        "kv_data_type='bfloat16', o_data_type=None, head_dim_qk=128, head_dim_vo=128",
        plan="self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, "
        "num_qo_heads, num_kv_heads, head_dim_qk, page_size, head_dim_vo=None, custom_mask=None, "
        "packed_custom_mask=None, causal=False, pos_encoding_mode='NONE', "
        "use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None, "
        "q_data_type=None, kv_data_type=None, o_data_type=None, non_blocking=True, "
        "prefix_len_ptr=None, token_pos_in_items_ptr=None, token_pos_in_items_len=0, "
        "max_item_len_ptr=None, max_token_per_sequence=None, max_sequence_kv=None, "
        "fixed_split_size=None, disable_split_kv=False",
        run="self, q, paged_kv_cache, bidirectional_ranges, causal_window_left=-1, "
        "range_window_left=-1, q_scale=None, k_scale=None, v_scale=None, out=None, lse=None, "
        "return_lse=False, enable_pdl=None, kv_cache_sf=None",
    ),
    "MultiLevelCascadeAttentionWrapper": dict(
        __init__="self, num_levels, float_workspace_buffer, kv_layout='NHD', "
        "use_cuda_graph=False, qo_indptr_buf_arr=None, paged_kv_indptr_buf_arr=None, "
        "paged_kv_indices_buf_arr=None, paged_kv_last_page_len_buf_arr=None",
        plan="self, qo_indptr_arr, paged_kv_indptr_arr, paged_kv_indices_arr, "
        "paged_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, causal=False, "
        "pos_encoding_mode='NONE', use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, "
        "logits_soft_cap=None, rope_scale=None, rope_theta=None, q_data_type='float16', "
        "kv_data_type=None",
        run="self, q, paged_kv_cache",
    ),
}
RANDOM = "deterministic=True, generator=None, check_nan=False, seed=None, offset=None"
ORDER = "filter_apply_order='top_k_first'"
# Their names are also those of functions that take a key.
DRAWS = {
    "sampling_from_probs": f"probs, indices=None, {RANDOM}, return_valid=False",
    "sampling_from_logits": f"logits, indices=None, {RANDOM}",
    "top_p_sampling_from_probs": f"probs, top_p, indices=None, {RANDOM}, return_valid=False",
    "top_k_sampling_from_probs": f"probs, top_k, indices=None, {RANDOM}, return_valid=False",
    "min_p_sampling_from_probs": f"probs, min_p, indices=None, {RANDOM}, return_valid=False",
    "top_k_top_p_sampling_from_probs": f"probs, top_k, top_p, indices=None, {ORDER}, {RANDOM}, return_valid=False",
    "top_k_top_p_sampling_from_logits": f"logits, top_k, top_p, indices=None, {ORDER}, {RANDOM}",
}
FUNCTIONS = {
    **DRAWS,
    "top_p_renorm_probs": "probs, top_p, is_deterministic=False",
    "top_k_renorm_probs": "probs, top_k, is_deterministic=False",
    "top_k_mask_logits": "logits, top_k",
    "silu_and_mul": "input, out=None, enable_pdl=None",
    "gelu_and_mul": "input, out=None, enable_pdl=None",
    "gelu_tanh_and_mul": "input, out=None, enable_pdl=None",
    "packbits": "x, bitorder='big'",
    "segment_packbits": "x, indptr, bitorder='big'",
    "single_decode_with_kv_cache": "q, k, v, kv_layout='NHD', pos_encoding_mode='NONE', "
    "use_tensor_cores=False, q_scale=None, k_scale=None, v_scale=None, window_left=-1, "
    "logits_soft_cap=None, sm_scale=None, rope_scale=None, rope_theta=None, return_lse=False",
    "single_prefill_with_kv_cache": "q, k, v, scale_q=None, scale_k=None, scale_v=None, "
    "o_dtype=None, custom_mask=None, packed_custom_mask=None, causal=False, kv_layout='NHD', "
    "pos_encoding_mode='NONE', use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, "
    "logits_soft_cap=None, rope_scale=None, rope_theta=None, backend='auto', return_lse=False, "
    "kv_cache_sf=None, k_scale=None, v_scale=None",
    "merge_state": "v_a, s_a, v_b, s_b",
    "merge_state_in_place": "v, s, v_other, s_other, mask=None",
    "merge_states": "v, s",
    "get_seq_lens": "kv_indptr, kv_last_page_len, page_size",
    "get_batch_indices_positions": "append_indptr, seq_lens, nnz, batch_indices=None, "
    "positions=None",
    "append_paged_kv_cache": "append_key, append_value, batch_indices, positions, "
    "paged_kv_cache, kv_indices, kv_indptr, kv_last_page_len, kv_layout='NHD'",
    "rmsnorm": "input, weight, eps=1e-6, out=None, enable_pdl=None",
    "gemma_rmsnorm": "input, weight, eps=1e-6, out=None, enable_pdl=None",
    "fused_add_rmsnorm": "input, residual, weight, eps=1e-6, enable_pdl=None",
    "gemma_fused_add_rmsnorm": "input, residual, weight, eps=1e-6, enable_pdl=None",
    "apply_rope": f"q, k, indptr, offsets, {ROPE}",
    "apply_rope_inplace": f"q, k, indptr, offsets, {ROPE}",
    "apply_rope_pos_ids": f"q, k, pos_ids, {ROPE}",
    "apply_rope_pos_ids_inplace": f"q, k, pos_ids, {ROPE}",
    "apply_llama31_rope": f"q, k, indptr, offsets, {LLAMA31}",
    "apply_llama31_rope_inplace": f"q, k, indptr, offsets, {LLAMA31}",
    "apply_llama31_rope_pos_ids": f"q, k, pos_ids, {LLAMA31}",
    "apply_llama31_rope_pos_ids_inplace": f"q, k, pos_ids, {LLAMA31}",
    "apply_rope_with_cos_sin_cache": "positions, query, key, head_size, cos_sin_cache, "
    "is_neox=True",
    "apply_rope_with_cos_sin_cache_inplace": "positions, query, key, head_size, cos_sin_cache, "
    "is_neox=True",
}
METHODS = [(f"{c}.{m}", s) for c, methods in CLASSES.items() for m, s in methods.items()]


@pytest.mark.parametrize("name,theirs", [*FUNCTIONS.items(), *METHODS])
def test_signature(name, theirs):
    """What is ours alone is by keyword only, or gives a default to what FlashInfer requires."""
    ours = flashinfer
    for part in name.split("."):
        ours = getattr(ours, part)
    mine = inspect.signature(ours).parameters
    theirs = inspect.signature(eval(f"lambda {theirs}: None")).parameters
    by_position = [x for x in theirs if theirs[x].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert list(mine)[: len(by_position)] == by_position
    assert theirs.keys() <= mine.keys()
    for parameter, x in theirs.items():
        if x.default is not x.empty:
            assert mine[parameter].default == x.default, parameter
    for parameter in mine.keys() - theirs.keys():
        assert mine[parameter].kind is inspect.Parameter.KEYWORD_ONLY, parameter


def test_top_level_names_are_the_same():
    """Except append's, which takes a PageTable there, and the draws', which take a key there."""
    names = {*CLASSES, *FUNCTIONS, "single_prefill_with_kv_cache_return_lse"}
    assert names <= vars(flashinfer).keys()
    differ = {name for name in names if getattr(ja, name) is not getattr(flashinfer, name)}
    assert differ == {"append_paged_kv_cache", *DRAWS}


@pytest.mark.parametrize("name", [name for name in CLASSES if name.startswith(("Batch", "CUDA"))])
def test_older_names(name):
    """begin_forward is plan; forward is refused, as its defaults would overrule the plan's."""
    kind = getattr(flashinfer, name)
    assert kind.begin_forward is kind.plan
    graph = dict(max_batch_size=1, max_num_pages=1) if name.startswith("CUDAGraph") else {}
    wrapper = kind(None, **graph)
    for forward in (wrapper.forward, wrapper.forward_return_lse):
        with pytest.raises(NotImplementedError, match=f"{name}.forward would .* call run"):
            forward(jnp.ones(1), None, causal=True)
    wrapper.end_forward()
    wrapper.reset_workspace_buffer(None, int_workspace_buffer=None)
    wrapper.prewarm_paged_kv_stride_variant()
    assert wrapper.workspace_size(1, 2, causal=True) == (0, 0)
    assert wrapper.resolved_backend == "fa2"
    if "Decode" in name:
        assert wrapper.use_tensor_cores


def test_norms_take_flashinfers_arguments():
    x, weight = jnp.ones((2, 8)), jnp.full(8, 2.0)
    assert same_bits(flashinfer.rmsnorm(x, weight, 1e-6, None, True), ja.rmsnorm(x, weight))
    flashinfer.fused_add_rmsnorm(x, x, weight, 1e-6, False)
    for norm in (flashinfer.rmsnorm, flashinfer.gemma_rmsnorm):
        with pytest.raises(NotImplementedError, match="out cannot be written.* in_place=True"):
            norm(x, weight, out=x)


@pytest.mark.parametrize("as_given", [np.asarray, lambda x: np.asarray(x).tolist(), jnp.asarray])
@pytest.mark.parametrize(
    "form,page_size", [("tuple", 4), ("one array", 4), ("PagedKVCache", 4), ("no page axis", 1)]
)
def test_append(form, page_size, as_given):
    """As the function on arrays; the cache comes back in the form it went in."""
    paged = make_paged([5, 3], page_size=page_size, combined=form == "one array", dtype=jnp.float32)
    indices = paged.table.indices[: int(paged.table.indptr[-1])]
    qo_indptr, lengths = np.array([0, 1, 3], np.int32), np.array([5, 3], np.int32)
    where = flashinfer.get_batch_indices_positions(as_given(qo_indptr), as_given(lengths), 4)
    k, v = jnp.ones((4, 2, 64)), jnp.full((4, 2, 64), 2.0)
    want = append_paged_kv_cache(k, v, *where, paged.cache, paged.table)
    given = paged.cache if form == "PagedKVCache" else paged.cache.data
    if form == "no page axis":
        given = jax.tree.map(lambda x: x[:, 0], given)
    table = (as_given(x) for x in (indices, paged.table.indptr, paged.table.last_page_len))
    got = flashinfer.append_paged_kv_cache(k, v, *map(as_given, where), given, *table)
    assert jax.tree.structure(got) == jax.tree.structure(given)
    for a, b, c in zip(*map(jax.tree.leaves, (got, want, given)), strict=True):
        assert a.shape == c.shape and same_bits(a, b)
    lens = flashinfer.get_seq_lens(
        *map(as_given, (paged.table.indptr, paged.table.last_page_len)), page_size
    )
    np.testing.assert_array_equal(lens, lengths)


def test_errors_of_the_page_functions():
    for buffers in (dict(batch_indices=jnp.zeros(3)), dict(positions=jnp.zeros(3))):
        with pytest.raises(NotImplementedError, match=f"{[*buffers][0]} cannot be written"):
            flashinfer.get_batch_indices_positions([0, 3], [3], 3, **buffers)
    with pytest.raises(ValueError, match="append_indptr must start at 0 and not decrease"):
        flashinfer.get_batch_indices_positions([0, 3, 1], [3, 3], 3)
    with pytest.raises(ValueError, match=r"kv_last_page_len\[0\] must be from 1"):
        flashinfer.get_seq_lens([0, 1], [0], 4)
    kv, cache = jnp.ones((1, 2, 8)), (jnp.zeros((3, 4, 2, 8)),) * 2
    with pytest.raises(ValueError, match=r"kv_indices\[0\] must be .* num_pages=3; got 3"):
        flashinfer.append_paged_kv_cache(kv, kv, [0], [0], cache, [3], [0, 1], [1])
    with pytest.raises(KeyError, match="kv_layout must be"):
        flashinfer.append_paged_kv_cache(kv, kv, [0], [0], cache, [0], [0, 1], [1], "NDH")
