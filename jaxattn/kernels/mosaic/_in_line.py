"""When keys and values are laid in a line before the attention, by `kernels.triton.keys_in_line`.

The copy engine moves boxes of neighbouring rows as they are. Pages of few tokens, and numbers of 8 bits, the loading
threads bring row by row, for each tile of queries anew. Where many tiles read a key, one pass that gathers and converts
all keys takes less time than boxes save (`benchmarks/results/h200_sweeps_mosaic.txt`, 14.).
"""

import jax

from jaxattn.kv_scales import FP8_DTYPES
from jaxattn.plan import MAX_ROWS, AttentionPlan

# Tiles of queries that read a key, from which on the pass pays: for 16 bits in pages of few tokens, and for these where
# one warpgroup would load both keys and values; for 8 bits, times the heads that share a key.
READERS, WIDE_READERS, NARROW_READERS = 128, 16, 16
# Tokens that the page table has room for, for each query token. Of several requests some may have many keys and few
# queries, and the pass takes all. Of one request it takes those that are seen, and only memory counts.
ROOM, ROOM_OF_ONE = 4, 128
# Up to so many queries of prompts, or so much room for context, the attention is over before a pass pays.
FEW_QUERIES, LITTLE_ROOM = 2048, 16384


def pays(values: jax.Array, plan: AttentionPlan) -> bool:
    """Whether pages that are not moved in boxes should be laid in a line first, in the queries' dtype.

    Lines of K and V take together at most the memory of a layer's cache of that dtype, and of its scales of tokens.

    values: V, or the array that holds it.
    """
    if plan.page_indices is None:
        return False
    narrow = values.dtype.name in FP8_DTYPES
    if narrow and 2**31 < values.size <= 2**32:  # Triton's lowering would miscount its elements
        return False
    tokens = plan.num_qo_tokens
    room, of_cache = (n * plan.page_size for n in (plan.page_indices.size, values.shape[0]))
    if room > min(of_cache, tokens * (ROOM if plan.batch_size > 1 else ROOM_OF_ONE)):
        return False
    if tokens < FEW_QUERIES and room < LITTLE_ROOM:
        return False
    queries = tokens // plan.batch_size
    # A key is seen by as many queries as a query sees keys.
    seen_by = min(queries, plan.spec.visible.width or queries)
    readers = seen_by * plan.spec.group // MAX_ROWS
    if narrow:
        return readers * plan.spec.group >= NARROW_READERS
    return readers >= (WIDE_READERS if values.shape[-1] > 128 else READERS)
