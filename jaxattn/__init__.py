"""Paged attention, norms and rotary embeddings for serving language models in JAX."""

from jaxattn.append import append_paged_kv_cache as append_paged_kv_cache
from jaxattn.append import rope_append_paged_kv_cache as rope_append_paged_kv_cache
from jaxattn.attention import paged_decode as paged_decode
from jaxattn.attention import paged_prefill as paged_prefill
from jaxattn.attention import ragged_prefill as ragged_prefill
from jaxattn.decode_plan import plan_decode as plan_decode
from jaxattn.dense import dot_product_attention as dot_product_attention
from jaxattn.flashinfer import (
    BatchAttentionWithAttentionSinkWrapper as BatchAttentionWithAttentionSinkWrapper,
)
from jaxattn.flashinfer import (
    BatchDecodeWithPagedKVCacheWrapper as BatchDecodeWithPagedKVCacheWrapper,
)
from jaxattn.flashinfer import (
    BatchPrefillWithCausalBidirectionalRangesWrapper as BatchPrefillWithCausalBidirectionalRangesWrapper,
)
from jaxattn.flashinfer import (
    BatchPrefillWithPagedKVCacheWrapper as BatchPrefillWithPagedKVCacheWrapper,
)
from jaxattn.flashinfer import (
    BatchPrefillWithRaggedKVCacheWrapper as BatchPrefillWithRaggedKVCacheWrapper,
)
from jaxattn.flashinfer import (
    CUDAGraphBatchDecodeWithPagedKVCacheWrapper as CUDAGraphBatchDecodeWithPagedKVCacheWrapper,
)
from jaxattn.flashinfer import (
    MultiLevelCascadeAttentionWrapper as MultiLevelCascadeAttentionWrapper,
)
from jaxattn.flashinfer import fused_add_rmsnorm as fused_add_rmsnorm
from jaxattn.flashinfer import gelu_and_mul as gelu_and_mul
from jaxattn.flashinfer import gelu_tanh_and_mul as gelu_tanh_and_mul
from jaxattn.flashinfer import gemma_fused_add_rmsnorm as gemma_fused_add_rmsnorm
from jaxattn.flashinfer import gemma_rmsnorm as gemma_rmsnorm
from jaxattn.flashinfer import get_batch_indices_positions as get_batch_indices_positions
from jaxattn.flashinfer import get_seq_lens as get_seq_lens
from jaxattn.flashinfer import merge_state as merge_state
from jaxattn.flashinfer import merge_state_in_place as merge_state_in_place
from jaxattn.flashinfer import merge_states as merge_states
from jaxattn.flashinfer import packbits as packbits
from jaxattn.flashinfer import rmsnorm as rmsnorm
from jaxattn.flashinfer import segment_packbits as segment_packbits
from jaxattn.flashinfer import silu_and_mul as silu_and_mul
from jaxattn.flashinfer import single_decode_with_kv_cache as single_decode_with_kv_cache
from jaxattn.flashinfer import single_prefill_with_kv_cache as single_prefill_with_kv_cache
from jaxattn.flashinfer import (
    single_prefill_with_kv_cache_return_lse as single_prefill_with_kv_cache_return_lse,
)
from jaxattn.flashinfer import top_k_renorm_probs as top_k_renorm_probs
from jaxattn.flashinfer import top_p_renorm_probs as top_p_renorm_probs
from jaxattn.kv_cache import PagedKVCache as PagedKVCache
from jaxattn.kv_scales import KVScales as KVScales
from jaxattn.model_step import Step as Step
from jaxattn.model_step import attend as attend
from jaxattn.model_step import begin_step as begin_step
from jaxattn.operands import MaskBits as MaskBits
from jaxattn.page_table import PageTable as PageTable
from jaxattn.plan import AttentionPlan as AttentionPlan
from jaxattn.prefill_plan import plan_prefill as plan_prefill
from jaxattn.prefill_plan import plan_ragged_prefill as plan_ragged_prefill
from jaxattn.ragged import paged_attention as paged_attention
from jaxattn.ragged import plan_paged_attention as plan_paged_attention
from jaxattn.rope import apply_llama31_rope as apply_llama31_rope
from jaxattn.rope import apply_llama31_rope_inplace as apply_llama31_rope_inplace
from jaxattn.rope import apply_llama31_rope_pos_ids as apply_llama31_rope_pos_ids
from jaxattn.rope import apply_llama31_rope_pos_ids_inplace as apply_llama31_rope_pos_ids_inplace
from jaxattn.rope import apply_rope as apply_rope
from jaxattn.rope import apply_rope_inplace as apply_rope_inplace
from jaxattn.rope import apply_rope_pos_ids as apply_rope_pos_ids
from jaxattn.rope import apply_rope_pos_ids_inplace as apply_rope_pos_ids_inplace
from jaxattn.rope import apply_rope_with_cos_sin_cache as apply_rope_with_cos_sin_cache
from jaxattn.rope import (
    apply_rope_with_cos_sin_cache_inplace as apply_rope_with_cos_sin_cache_inplace,
)
from jaxattn.rope import precompute_freqs_cis as precompute_freqs_cis
from jaxattn.sampling import min_p_sampling_from_probs as min_p_sampling_from_probs
from jaxattn.sampling import sampling_from_logits as sampling_from_logits
from jaxattn.sampling import sampling_from_probs as sampling_from_probs
from jaxattn.sampling import top_k_mask_logits as top_k_mask_logits
from jaxattn.sampling import top_k_sampling_from_probs as top_k_sampling_from_probs
from jaxattn.sampling import top_k_top_p_sampling_from_logits as top_k_top_p_sampling_from_logits
from jaxattn.sampling import top_k_top_p_sampling_from_probs as top_k_top_p_sampling_from_probs
from jaxattn.sampling import top_p_sampling_from_probs as top_p_sampling_from_probs
