"""The paged cache's bookkeeping and its append, as FlashInfer's functions."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxattn import append, page_table
from jaxattn.checks import check_host_indptr, check_host_page_table
from jaxattn.flashinfer.index_arrays import Indices, index_array
from jaxattn.flashinfer.options import Unwritable, flashinfer_options
from jaxattn.kv_cache import PagedKVCache
from jaxattn.page_table import PageTable


def get_seq_lens(kv_indptr: Indices, kv_last_page_len: Indices, page_size: int) -> Array:
    """Tokens of each request, int32 [b]: 0 for one without pages.

    Args:
      kv_indptr: int32 [b + 1].
      kv_last_page_len: int32 [b].
      page_size: tokens a page.

    Raises:
      ValueError, TypeError: arrays that do not fit each other, and on the host those that no page
        table can have.
    """
    kv_last_page_len = index_array("kv_last_page_len", kv_last_page_len, "b")
    kv_indptr = index_array("kv_indptr", kv_indptr, len(kv_last_page_len) + 1)
    check_host_page_table(kv_indptr, None, kv_last_page_len, page_size)
    return page_table.get_seq_lens(jnp.asarray(kv_indptr), jnp.asarray(kv_last_page_len), page_size)


@flashinfer_options(seq_lens=None, batch_indices=Unwritable(), positions=Unwritable())
def get_batch_indices_positions(
    append_indptr: Indices,
    seq_lens: Indices,
    nnz: int,
    batch_indices: None = None,
    positions: None = None,
) -> tuple[Array, Array]:
    """For each appended token: its request, and its position in that request.

    The appended tokens are the last ones of their requests.

    Args:
      append_indptr: int32 [b + 1]; request i appends tokens `append_indptr[i]:append_indptr[i + 1]`.
      seq_lens: int32 [b], lengths after the append.
      nnz: capacity of the result, known at compile time; rows from `append_indptr[b]` on are
        padding.

    Returns:
      (batch_indices int32 [nnz], positions int32 [nnz]); a padding row has batch index -1, which
      `append_paged_kv_cache` drops, and position 0.

    Raises:
      ValueError, TypeError: arrays that do not fit each other.
    """
    seq_lens = index_array("seq_lens", seq_lens, "b")
    append_indptr = index_array("append_indptr", append_indptr, len(seq_lens) + 1)
    check_host_indptr("append_indptr", append_indptr)
    return page_table.get_batch_indices_positions(
        jnp.asarray(append_indptr), jnp.asarray(seq_lens), nnz
    )


def append_paged_kv_cache(
    append_key: Array,
    append_value: Array,
    batch_indices: Indices,
    positions: Indices,
    paged_kv_cache: Any,
    kv_indices: Indices,
    kv_indptr: Indices,
    kv_last_page_len: Indices,
    kv_layout: str = "NHD",
    *,
    backend: str | None = None,
) -> Any:
    """Writes token i at `positions[i]` of request `batch_indices[i]`, in the cache's dtype.

    FlashInfer writes to the cache and returns nothing. The page table already owns the pages of the
    new tokens; tokens are dropped as by `jaxattn.append.append_paged_kv_cache`.

    Args:
      append_key, append_value: [nnz, num_kv_heads, head_dim]; float16, bfloat16 or float32.
      batch_indices, positions: int32 [nnz], from `get_batch_indices_positions`.
      paged_kv_cache: a tuple of 4-D arrays (k, v), or one 5-D array, in kv_layout; with page_size 1
        the page axis may be missing. Also a `PagedKVCache`.
      kv_indices: int32 [kv_indptr[b]] or longer.
      kv_indptr: int32 [b + 1]; request i owns pages `kv_indices[kv_indptr[i]:kv_indptr[i + 1]]`.
      kv_last_page_len: int32 [b].
      kv_layout: "NHD" or "HND".
      backend: "triton", "xla", "interpret", or None: Triton on an NVIDIA GPU, XLA elsewhere.

    Returns:
      The cache in the form it came in, its arrays aliased: in place where donated.

    Raises:
      KeyError: an unknown kv_layout, or the cache is a list.
      ValueError, TypeError: shapes or dtypes that do not fit; on the host a page table that cannot
        be, page ids outside the cache included.
    """
    given = paged_kv_cache
    is_cache = isinstance(given, PagedKVCache)
    cache = given if is_cache else PagedKVCache.from_flashinfer(given, kv_layout)
    last_page_len = index_array("kv_last_page_len", kv_last_page_len, "b")
    indptr = index_array("kv_indptr", kv_indptr, len(last_page_len) + 1)
    indices = index_array("kv_indices", kv_indices, "num_pages")
    check_host_page_table(indptr, indices, last_page_len, cache.page_size, cache.num_pages)
    written = append.append_paged_kv_cache(
        append_key,
        append_value,
        jnp.asarray(index_array("batch_indices", batch_indices, "nnz")),
        jnp.asarray(index_array("positions", positions, "nnz")),
        cache,
        jax.tree.map(jnp.asarray, PageTable(indptr, indices, last_page_len)),
        backend=backend,
    )
    if is_cache:
        return written
    return jax.tree.map(lambda new, old: new.reshape(old.shape), written.data, given)
