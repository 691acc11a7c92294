"""FlashInfer's names, arguments, order and defaults, for those who port: `import jaxattn.flashinfer as flashinfer`.

A wrapper keeps a plan and calls `paged_decode`, `paged_prefill` or `ragged_prefill`. It differs from FlashInfer in what
JAX arrays are:

- Results are returned. Buffers to write to, such as `out` and `lse`, raise NotImplementedError.
- `plan` reads no device value. Index arrays may live on the host (NumPy, lists) or on the device, int32 either way.
  Those on the host are copied, and checked: whatever cannot be a page table raises ValueError.
- Shapes are compiled. Indices are padded to a power of two, so that growing lengths seldom recompile; with
  `use_cuda_graph=True` the buffers' lengths are capacities, and `jax.jit` over them stands in for the graph: other
  lengths, and fewer requests, never recompile the attention. custom_mask_buf's length is a capacity too.

What becomes of every other option is said in `options.py` and, by it, in each docstring: an option that is not built
raises NotImplementedError unless it is off, one without a meaning under XLA is ignored.

lse is in base 2, as FlashInfer's, where it is returned and where it is merged; `lse_base="ln"` asks for the natural log
of the functional surface.
"""

from jaxattn.flashinfer.activation import gelu_and_mul as gelu_and_mul
from jaxattn.flashinfer.activation import gelu_tanh_and_mul as gelu_tanh_and_mul
from jaxattn.flashinfer.activation import silu_and_mul as silu_and_mul
from jaxattn.flashinfer.attention_sink import (
    BatchAttentionWithAttentionSinkWrapper as BatchAttentionWithAttentionSinkWrapper,
)
from jaxattn.flashinfer.bidirectional_ranges import (
    BatchPrefillWithCausalBidirectionalRangesWrapper as BatchPrefillWithCausalBidirectionalRangesWrapper,
)
from jaxattn.flashinfer.cascade import merge_state as merge_state
from jaxattn.flashinfer.cascade import merge_state_in_place as merge_state_in_place
from jaxattn.flashinfer.cascade import merge_states as merge_states
from jaxattn.flashinfer.cuda_graph_decode import (
    CUDAGraphBatchDecodeWithPagedKVCacheWrapper as CUDAGraphBatchDecodeWithPagedKVCacheWrapper,
)
from jaxattn.flashinfer.decode import (
    BatchDecodeWithPagedKVCacheWrapper as BatchDecodeWithPagedKVCacheWrapper,
)
from jaxattn.flashinfer.multi_level_cascade import (
    MultiLevelCascadeAttentionWrapper as MultiLevelCascadeAttentionWrapper,
)
from jaxattn.flashinfer.norm import fused_add_rmsnorm as fused_add_rmsnorm
from jaxattn.flashinfer.norm import gemma_fused_add_rmsnorm as gemma_fused_add_rmsnorm
from jaxattn.flashinfer.norm import gemma_rmsnorm as gemma_rmsnorm
from jaxattn.flashinfer.norm import rmsnorm as rmsnorm
from jaxattn.flashinfer.page import append_paged_kv_cache as append_paged_kv_cache
from jaxattn.flashinfer.page import get_batch_indices_positions as get_batch_indices_positions
from jaxattn.flashinfer.page import get_seq_lens as get_seq_lens
from jaxattn.flashinfer.paged_prefill import (
    BatchPrefillWithPagedKVCacheWrapper as BatchPrefillWithPagedKVCacheWrapper,
)
from jaxattn.flashinfer.quantization import packbits as packbits
from jaxattn.flashinfer.quantization import segment_packbits as segment_packbits
from jaxattn.flashinfer.ragged_prefill import (
    BatchPrefillWithRaggedKVCacheWrapper as BatchPrefillWithRaggedKVCacheWrapper,
)
from jaxattn.flashinfer.sampling import min_p_sampling_from_probs as min_p_sampling_from_probs
from jaxattn.flashinfer.sampling import sampling_from_logits as sampling_from_logits
from jaxattn.flashinfer.sampling import sampling_from_probs as sampling_from_probs
from jaxattn.flashinfer.sampling import top_k_renorm_prob as top_k_renorm_prob
from jaxattn.flashinfer.sampling import top_k_renorm_probs as top_k_renorm_probs
from jaxattn.flashinfer.sampling import top_k_sampling_from_probs as top_k_sampling_from_probs
from jaxattn.flashinfer.sampling import (
    top_k_top_p_sampling_from_logits as top_k_top_p_sampling_from_logits,
)
from jaxattn.flashinfer.sampling import (
    top_k_top_p_sampling_from_probs as top_k_top_p_sampling_from_probs,
)
from jaxattn.flashinfer.sampling import top_p_renorm_prob as top_p_renorm_prob
from jaxattn.flashinfer.sampling import top_p_renorm_probs as top_p_renorm_probs
from jaxattn.flashinfer.sampling import top_p_sampling_from_probs as top_p_sampling_from_probs
from jaxattn.flashinfer.single import single_decode_with_kv_cache as single_decode_with_kv_cache
from jaxattn.flashinfer.single import single_prefill_with_kv_cache as single_prefill_with_kv_cache
from jaxattn.flashinfer.single import (
    single_prefill_with_kv_cache_return_lse as single_prefill_with_kv_cache_return_lse,
)
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
from jaxattn.sampling import top_k_mask_logits as top_k_mask_logits
