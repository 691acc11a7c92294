"""Attention over a paged KV cache, norms and rotary embedding for serving language models in JAX."""

from jaxattn.kv_cache import PagedKVCache as PagedKVCache
from jaxattn.kv_cache import PageTable as PageTable
from jaxattn.kv_cache import get_batch_indices_positions as get_batch_indices_positions
from jaxattn.kv_cache import get_seq_lens as get_seq_lens
from jaxattn.plan import DecodePlan as DecodePlan
from jaxattn.plan import PrefillPlan as PrefillPlan
from jaxattn.plan import plan_decode as plan_decode
from jaxattn.plan import plan_prefill as plan_prefill
from jaxattn.plan import plan_ragged_prefill as plan_ragged_prefill
