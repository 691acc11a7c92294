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
from jaxattn.kv_cache import PagedKVCache
from jaxattn.page_table import PageTable


def check_table(page_table: PageTable, cache: PagedKVCache) -> PageTable:
    """The table, made for this cache, on the device and with at least one entry; raises otherwise."""
    if not isinstance(cache, PagedKVCache):
        raise TypeError(
            f"paged_kv_cache must be a PagedKVCache; got {type(cache).__name__}: "
            "make one of the arrays (k, v) by PagedKVCache((k, v), layout)"
        )
    cache.check()
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
    """Writes token i at `positions[i]` of request `batch_indices[i]`, in the cache's dtype, divided by its scales.

    Of a cache with scales per token, each token's own largest finite magnitude in a head sets them, and they are
    written beside it. In a float8 cache what is beyond the dtype's range saturates, and NaN stays NaN.

    The page table already owns the pages of the new tokens. A token is dropped where its request is
    outside [0, b) (padding rows of `get_batch_indices_positions` have -1), its position is negative
    or past the request's pages, or the page's id is outside [0, num_pages). No two tokens may go to
    one slot.

    Args:
      append_key, append_value: [t, num_kv_heads, head_dim], that of K and that of V; float16, bfloat16
        or float32, divided by the cache's scales, if it has any, and rounded to its dtype. What is
        beyond a float8 dtype's range saturates; NaN stays NaN.
      batch_indices: int32 [t].
      positions: int32 [t].
      paged_kv_cache: the cache of one layer. Its arrays are aliased to the result's: they are
        written in place where donated or not used again; otherwise XLA first copies them. Scales per
        token are the new tokens' own, for each head that of its largest finite magnitude.
      page_table: the pages of b requests.
      backend: "triton", "xla", "interpret", or None: Triton on an NVIDIA GPU, XLA elsewhere.

    Returns:
      The cache with the tokens, and their scales where each has its own, written.

    Raises:
      ValueError: shapes that do not fit, a backend that cannot run here.
      TypeError: indices are not int32, an unsupported dtype, key and value of different dtypes.
    """
    cache = paged_kv_cache
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
    qkv: Array | tuple[Array, Array, Array],
    batch_indices: Array,
    positions: Array,
    cos_sin_cache: Array,
    paged_kv_cache: PagedKVCache,
    page_table: PageTable,
    is_neox: bool = True,
    *,
    rope_positions: Array | None = None,
    q_norm_weight: Array | None = None,
    k_norm_weight: Array | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Array, PagedKVCache]:
    """What a layer does between its projection and its attention, in one kernel.

    Norms the heads of q and k where there are weights (`rmsnorm`), rotates them
    (`apply_rope_with_cos_sin_cache`), returns q and appends k and v (`append_paged_kv_cache`): each
    number is read once, computed in float32 and rounded once, and q, k and v are read where they
    lie, in the result of one projection or of three. Tokens are scaled, saturate and are dropped as
    by `append_paged_kv_cache`; the q of those that are dropped is returned.

    Args:
      qkv: [t, (num_qo_heads + 2 * num_kv_heads) * head_dim], the heads of q, then of k, then of v;
        float16, bfloat16 or float32. num_kv_heads and head_dim are the cache's. Or a tuple (q, k, v)
        of one dtype, [t, heads * head_dim] or [t, heads, head_dim] each; V's head_dim is then its own.
      batch_indices: int32 [t], the request of each token; -1 for padding.
      positions: int32 [t], its position in that request, where k and v are written.
      cos_sin_cache: float32 [max_position, rotary_dim], as `apply_rope_with_cos_sin_cache` takes it.
      paged_kv_cache: the cache of one layer. Its arrays are aliased to the result's: they are
        written in place where donated or not used again; otherwise XLA first copies them.
      page_table: the pages of b requests, which already own those of the new tokens.
      is_neox: pairs are the two halves of rotary_dim; otherwise even and odd neighbours.
      rope_positions: int32 [t], each token's row of the table; default: positions. One outside the table
        gives NaN. Where a rotation is not that of one position (M-RoPE's, say), make a table with a
        row a token, and this `jnp.arange(t)`.
      q_norm_weight, k_norm_weight: [head_dim], qkv's dtype or float32; both or neither.
      eps: added to the mean of squares; a Python float.
      backend: "triton", "xla", "interpret", or None: Triton on an NVIDIA GPU, XLA elsewhere.

    Returns:
      (q [t, num_qo_heads, head_dim] in qkv's dtype, the cache with k and v written, by its scales).

    Raises:
      ValueError: shapes that do not fit, one norm weight without the other, a table that is not
        float32, a backend that cannot run here.
      TypeError: indices are not int32, an unsupported dtype.
    """
    cache = paged_kv_cache
    page_table = check_table(page_table, cache)
    check_index("batch_indices", batch_indices, "t")
    t = batch_indices.shape[0]
    check_index("positions", positions, t)
    if rope_positions is not None:
        check_index("rope_positions", rope_positions, t)
    heads, d = _heads(qkv, t, cache), cache.head_dim
    check_cos_sin_cache(cos_sin_cache, d)
    weights = None
    if q_norm_weight is not None and k_norm_weight is not None:
        weights = (q_norm_weight, k_norm_weight)
        for name, weight in zip(("q_norm_weight", "k_norm_weight"), weights):
            check_norm_weight(name, weight, d, heads[0])
    elif q_norm_weight is not None or k_norm_weight is not None:
        raise ValueError("q_norm_weight and k_norm_weight must come together; got one of them")
    how: dict[str, Any] = dict(interleave=not is_neox, eps=float(eps))
    return dispatch(
        "xla" if t == 0 else backend,
        functools.partial(fused_kernels.rope_append, **how),
        functools.partial(reference.rope_append_paged_kv_cache, **how),
        heads,
        batch_indices,
        positions,
        rope_positions,
        cos_sin_cache,
        weights,
        cache,
        page_table,
    )


def _heads(
    qkv: Array | tuple[Array, Array, Array], t: int, cache: PagedKVCache
) -> tuple[Array, ...]:
    """([t, heads of q, k and v, head_dim],), or that of q, of k and of v; raises where they do not fit the cache."""
    kv_heads, d, dv = cache.num_kv_heads, cache.head_dim, cache.head_dim_v
    if isinstance(qkv, (tuple, list)):
        if len(qkv) != 3:
            raise ValueError(f"qkv must be one array or (q, k, v); got {len(qkv)} arrays")
        q, k, v = qkv
        heads = (
            _parted("q", q, t, "num_qo_heads", d),
            _parted("k", k, t, kv_heads, d),
            _parted("v", v, t, kv_heads, dv),
        )
        check_same_dtype(q=q, k=k, v=v)
        return heads
    check_shape("qkv", qkv, (t, "(num_qo_heads + 2 * num_kv_heads) * head_dim"))
    check_float("qkv", qkv)
    if dv != d:
        raise ValueError(
            f"one qkv needs K and V of one head_dim; the cache has {d} and {dv}: give (q, k, v)"
        )
    num_heads, rest = divmod(qkv.shape[1], d)
    if rest or num_heads <= 2 * kv_heads:
        raise ValueError(
            f"qkv must have (num_qo_heads + 2 * {kv_heads}) * {d} columns, num_qo_heads at least 1, "
            f"for the cache's num_kv_heads={kv_heads}, head_dim={d}; got {qkv.shape[1]}"
        )
    return (qkv.reshape(t, num_heads, d),)


def _parted(name: str, x: Array, t: int, heads: int | str, head_dim: int) -> Array:
    """x as [t, heads, head_dim], given that or flat; raises where it is neither."""
    check_float(name, x)
    flat = x.ndim == 2 and x.shape[0] == t and x.shape[1] % head_dim == 0
    parted = x.reshape(t, x.shape[1] // head_dim, head_dim) if flat else x
    count = parted.shape[1] if x.ndim > 1 and isinstance(heads, str) else heads
    if parted.shape != (t, count, head_dim) or count == 0:
        raise ValueError(
            f"{name} must have shape [t, heads * head_dim] or [t, heads, head_dim], {t=}, {heads=}, {head_dim=}; "
            f"got {list(x.shape)}"
        )
    return parted
