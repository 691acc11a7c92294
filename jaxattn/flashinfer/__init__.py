"""FlashInfer's attention classes and functions: same names, arguments, order and defaults.

For those who port. A wrapper keeps a plan and calls `paged_decode`, `paged_prefill` or
`ragged_prefill`. It differs from FlashInfer in what JAX arrays are:

- Results are returned. `out` and `lse` cannot be written and raise NotImplementedError.
- `plan` reads no device value. Index arrays may live on the host (numpy, lists) or on the device,
  int32 either way; those on the host are also checked: indptr's order, enough indices and key rows,
  and the rows of q.
- Shapes are compiled. Indices are padded to a power of two, so that growing lengths seldom
  recompile; with `use_cuda_graph=True` the buffers' lengths are capacities, and `jax.jit` over them
  stands in for the graph: other lengths, and fewer requests, never recompile the attention.

Accepted for source compatibility, without a meaning under XLA: the workspace (any value, None
included; XLA allocates scratch memory), the contents of CUDA-graph buffers, `use_tensor_cores`
(always used), `non_blocking` (nothing blocks), `enable_pdl`, and hints that restate the index
arrays: `seq_lens`, `seq_lens_q`, `block_tables`, `max_token_per_sequence`, `max_sequence_kv`,
`uniform_q_len`. `rope_scale` and `rope_theta` only mean something with a `pos_encoding_mode` that
is not built. One kernel serves all cases: `backend` is "auto" or "fa2". Every other option raises
NotImplementedError unless it is off.

lse is in base 2, as FlashInfer's; `lse_base="ln"` gives the natural log of the functional surface.
"""

from jaxattn.flashinfer.cuda_graph_decode import (
    CUDAGraphBatchDecodeWithPagedKVCacheWrapper as CUDAGraphBatchDecodeWithPagedKVCacheWrapper,
)
from jaxattn.flashinfer.decode import (
    BatchDecodeWithPagedKVCacheWrapper as BatchDecodeWithPagedKVCacheWrapper,
)
from jaxattn.flashinfer.paged_prefill import (
    BatchPrefillWithPagedKVCacheWrapper as BatchPrefillWithPagedKVCacheWrapper,
)
from jaxattn.flashinfer.ragged_prefill import (
    BatchPrefillWithRaggedKVCacheWrapper as BatchPrefillWithRaggedKVCacheWrapper,
)
from jaxattn.flashinfer.single import single_decode_with_kv_cache as single_decode_with_kv_cache
from jaxattn.flashinfer.single import single_prefill_with_kv_cache as single_prefill_with_kv_cache
from jaxattn.flashinfer.single import (
    single_prefill_with_kv_cache_return_lse as single_prefill_with_kv_cache_return_lse,
)
