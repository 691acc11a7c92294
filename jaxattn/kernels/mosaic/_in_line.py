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
# Tokens that there is room for, for each query token: of several requests some may have many keys and few queries. Of
# one request's pages the pass takes those alone that it sees; of contiguous keys all.
ROOM = 4
FEW_TOKENS = 2048  # up to there the attention is over before a pass would pay


def pays(values: jax.Array, plan: AttentionPlan) -> bool:
    """Whether what is not moved in boxes should be laid in a line first, in the queries' dtype.

    Lines of K and V take together at most the memory of a layer's cache of that dtype.

    values: V, or the array that holds it.
    """
    narrow = values.dtype.name in FP8_DTYPES
    if narrow and 2**31 < values.size <= 2**32:  # Triton's lowering would miscount its elements
        return False
    tokens = plan.num_qo_tokens
    if plan.page_indices is None:
        room = values.size // (plan.num_kv_heads * values.shape[-1])
        fits = room <= ROOM * tokens
    else:
        room, of_cache = (n * plan.page_size for n in (plan.page_indices.size, values.shape[0]))
        fits = room <= of_cache and (plan.batch_size == 1 or room <= ROOM * tokens)
    queries = tokens // plan.batch_size
    # A key is seen by as many queries as a query sees keys.
    seen_by = min(queries, plan.spec.visible.width or queries)
    readers = seen_by * plan.spec.group // MAX_ROWS
    if narrow:
        many = readers * plan.spec.group >= NARROW_READERS
    else:
        many = readers >= (WIDE_READERS if values.shape[-1] > 128 else READERS)
    return fits and many and max(tokens, room) >= FEW_TOKENS
