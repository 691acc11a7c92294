"""Writing new keys and values to a paged KV cache, alone or straight from a layer's projection."""

import functools
from typing import Any

from jax import Array

from jaxattn import reference
from jaxattn.checks import (
    check_cos_sin_cache,
    check_float,
    check_index,
    check_norm_weight,
    check_same_dtype,
    check_shape,
)
from jaxattn.dispatch import dispatch
from jaxattn.kernels.triton import append as kernels
from jaxattn.kernels.triton import rope_append as fused_kernels
from jaxattn.kv_cache import PagedKVCache, PageTable


def check_table(page_table: PageTable, cache: PagedKVCache) -> PageTable:
    """The table, made for this cache, on the device and with at least one entry; raises otherwise."""
    page_table.check()
    return page_table.with_page_size(cache.page_size).padded()


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
      append_key, append_value: [t, num_kv_heads, head_dim], that of K and that of V; float16, bfloat16
        or float32, rounded to the cache's dtype.
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
    page_table = check_table(page_table, cache)
    check_index("batch_indices", batch_indices, "t")
    t = batch_indices.shape[0]
    check_index("positions", positions, t)
    sizes = dict(t=t, num_kv_heads=cache.num_kv_heads, head_dim=cache.head_dim)
    check_shape("append_key", append_key, tuple(sizes.values()), sizes)
    sizes |= dict(head_dim=cache.head_dim_v)
    check_shape("append_value", append_value, tuple(sizes.values()), sizes)
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


def rope_append_paged_kv_cache(
    qkv: Array,
    batch_indices: Array,
    positions: Array,
    cos_sin_cache: Array,
    paged_kv_cache: PagedKVCache,
    page_table: PageTable,
    is_neox: bool = True,
    *,
    q_norm_weight: Array | None = None,
    k_norm_weight: Array | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Array, PagedKVCache]:
    """What a layer does between its projection and its attention, in one kernel.

    Norms the heads of q and k where there are weights (`rmsnorm`), rotates them
    (`apply_rope_with_cos_sin_cache`), returns q and appends k and v (`append_paged_kv_cache`): each
    number is read once, computed in float32 and rounded once, and q, k and v need not be cut out of
    the projection's result. Tokens are dropped as by `append_paged_kv_cache`; their q is returned.

    Args:
      qkv: [t, (num_qo_heads + 2 * num_kv_heads) * head_dim], the heads of q, then of k, then of v;
        float16, bfloat16 or float32. num_kv_heads and head_dim are the cache's.
      batch_indices: int32 [t], the request of each token; -1 for padding.
      positions: int32 [t], its position in that request, which is also its row of the table; one
        outside the table gives NaN.
      cos_sin_cache: float32 [max_position, rotary_dim], as `apply_rope_with_cos_sin_cache` takes it.
      paged_kv_cache: the cache of one layer. Its arrays are aliased to the result's: they are
        written in place where donated or not used again; otherwise XLA first copies them.
      page_table: the pages of b requests, which already own those of the new tokens.
      is_neox: pairs are the two halves of rotary_dim; otherwise even and odd neighbours.
      q_norm_weight, k_norm_weight: [head_dim], qkv's dtype or float32; both or neither.
      eps: added to the mean of squares; a Python float.
      backend: "triton", "xla", "interpret", or None: Triton on an NVIDIA GPU, XLA elsewhere.

    Returns:
      (q [t, num_qo_heads, head_dim] in qkv's dtype, the cache with k and v written).

    Raises:
      ValueError: shapes that do not fit, one norm weight without the other, a table that is not
        float32, a backend that cannot run here.
      TypeError: indices are not int32, an unsupported dtype.
    """
    cache = paged_kv_cache
    cache.check()
    page_table = check_table(page_table, cache)
    check_index("batch_indices", batch_indices, "t")
    t = batch_indices.shape[0]
    check_index("positions", positions, t)
    check_shape("qkv", qkv, (t, "(num_qo_heads + 2 * num_kv_heads) * head_dim"))
    check_float("qkv", qkv)
    d, kv_heads = cache.head_dim, cache.num_kv_heads
    if cache.head_dim_v != d:
        raise ValueError(
            f"rope_append needs K and V of one head_dim; the cache has {d} and {cache.head_dim_v}: "
            "use apply_rope_with_cos_sin_cache and append_paged_kv_cache"
        )
    num_heads, rest = divmod(qkv.shape[1], d)
    if rest or num_heads <= 2 * kv_heads:
        raise ValueError(
            f"qkv must have (num_qo_heads + 2 * {kv_heads}) * {d} columns, num_qo_heads at least 1, "
            f"for the cache's num_kv_heads={kv_heads}, head_dim={d}; got {qkv.shape[1]}"
        )
    check_cos_sin_cache(cos_sin_cache, d)
    weights = None
    if q_norm_weight is not None and k_norm_weight is not None:
        weights = (q_norm_weight, k_norm_weight)
        for name, weight in zip(("q_norm_weight", "k_norm_weight"), weights):
            check_norm_weight(name, weight, d, qkv)
    elif q_norm_weight is not None or k_norm_weight is not None:
        raise ValueError("q_norm_weight and k_norm_weight must come together; got one of them")
    how: dict[str, Any] = dict(interleave=not is_neox, eps=eps)
    return dispatch(
        "xla" if t == 0 else backend,
        functools.partial(fused_kernels.rope_append, **how),
        functools.partial(reference.rope_append_paged_kv_cache, **how),
        qkv,
        batch_indices,
        positions,
        cos_sin_cache,
        weights,
        cache,
        page_table,
    )
