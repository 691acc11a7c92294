"""Writing new keys and values to a paged KV cache."""

from jax import Array

from jaxattn import reference
from jaxattn.checks import check_float, check_index, check_same_dtype, check_shape
from jaxattn.dispatch import dispatch
from jaxattn.kernels import append as kernels
from jaxattn.kv_cache import PagedKVCache, PageTable


def append_paged_kv_cache(
    append_key: Array,
    append_value: Array,
    batch_indices: Array,
    positions: Array,
    paged_kv_cache: PagedKVCache,
    page_table: PageTable,
    *,
    backend: str | None = None,
) -> PagedKVCache:
    """Writes token i at `positions[i]` of request `batch_indices[i]`, in the cache's dtype.

    The page table already owns the pages of the new tokens. A token is dropped where its request is
    outside [0, b) (padding rows of `get_batch_indices_positions` have -1), its position is negative
    or past the request's pages, or the page's id is outside [0, num_pages). No two tokens may go to
    one slot.

    Args:
      append_key, append_value: [t, num_kv_heads, head_dim]; float16, bfloat16 or float32, rounded
        to the cache's dtype.
      batch_indices: int32 [t].
      positions: int32 [t].
      paged_kv_cache: the cache of one layer. Its arrays are aliased to the result's: they are
        written in place where donated or not used again; otherwise XLA first copies them.
      page_table: the pages of b requests.
      backend: "triton", "xla", "interpret", or None: Triton on an NVIDIA GPU, XLA elsewhere.

    Returns:
      The cache with the tokens written.

    Raises:
      ValueError: shapes that do not fit, a backend that cannot run here.
      TypeError: indices are not int32, an unsupported dtype, key and value of different dtypes.
    """
    cache = paged_kv_cache
    cache.check()
    page_table.check()
    check_index("batch_indices", batch_indices, "t")
    t = batch_indices.shape[0]
    check_index("positions", positions, t)
    sizes = dict(t=t, num_kv_heads=cache.num_kv_heads, head_dim=cache.head_dim)
    check_shape("append_key", append_key, tuple(sizes.values()), sizes)
    check_shape("append_value", append_value, append_key.shape, sizes)
    check_float("append_key", append_key)
    check_same_dtype(append_key=append_key, append_value=append_value)
    return dispatch(
        "xla" if t == 0 else backend,
        kernels.append,
        reference.append_paged_kv_cache,
        append_key,
        append_value,
        batch_indices,
        positions,
        cache,
        page_table,
    )
