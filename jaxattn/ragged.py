"""One ragged call for prompts, chunks, drafts and decode rows together: the call shape of vLLM and of JAX's engines.

Axes: t query tokens of all requests one after the other, b requests, m pages of a block-table row, h query heads,
d head dim.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxattn.attention import paged_prefill
from jaxattn.checks import (
    check_array,
    check_host_indptr,
    check_index,
    check_shape,
    copied_from_host,
)
from jaxattn.kv_cache import as_pool
from jaxattn.page_table import PageTable
from jaxattn.plan import AttentionPlan
from jaxattn.prefill_plan import plan_prefill


def plan_paged_attention(
    cu_q_lens: Array,
    kv_lens: Array,
    block_tables: Array,
    *,
    num_q_tokens: int,
    page_size: int,
    num_qo_heads: int,
    num_kv_heads: int,
    num_seqs: Array | None = None,
    window_left: int | None = None,
    fixed_split_size: int | None = None,
    disable_split_kv: bool = False,
) -> AttentionPlan:
    """The plan of a mixed batch, for `paged_prefill`; one serves all layers of a step that share a window.

    Args:
      cu_q_lens: int32 [b + 1], starts at 0; request i has rows `cu_q_lens[i]:cu_q_lens[i + 1]` of q, the last of its
        kv_lens[i] tokens: one of them in decode, all in a whole prompt, anything between in a chunk or a draft.
      kv_lens: int32 [b], tokens of each request, these included.
      block_tables: int32 [b, m], row i names request i's pages in order.
      num_q_tokens: rows of q; those from cu_q_lens[b] on are padding.
      page_size: tokens a page.
      num_qo_heads, num_kv_heads: heads of q and of the cache (of one shard, under shard_map).
      num_seqs: int32 [] or [1], requests that there are: what the arrays hold beyond may be anything. Default: all b.
      window_left, fixed_split_size, disable_split_kv: as for `plan_prefill`.

    Raises:
      ValueError, TypeError: shapes, dtypes, head counts or a window that do not fit.
    """
    check_shape("block_tables", block_tables, ("b", "m"))
    b = block_tables.shape[0]
    check_index("kv_lens", kv_lens, b)
    check_index("cu_q_lens", cu_q_lens, b + 1)
    if num_seqs is None:
        check_host_indptr("cu_q_lens", cu_q_lens)
    else:
        check_array("num_seqs", num_seqs, "jnp.int32")
        if num_seqs.size != 1 or not jnp.issubdtype(num_seqs.dtype, jnp.integer):
            raise ValueError(
                f"num_seqs must be one integer; got {num_seqs.dtype} {list(num_seqs.shape)}"
            )
        n = jnp.asarray(num_seqs).reshape(()).astype(jnp.int32)
        cu_q_lens, kv_lens = copied_from_host(cu_q_lens), copied_from_host(kv_lens)
        cu_q_lens = cu_q_lens.at[jnp.minimum(jnp.arange(b + 1, dtype=jnp.int32), n)].get(
            mode="clip"
        )
        kv_lens = jnp.where(jnp.arange(b, dtype=jnp.int32) < n, kv_lens, 0)
    return plan_prefill(
        cu_q_lens,
        PageTable.from_block_table(block_tables, kv_lens, page_size),
        num_qo_tokens=num_q_tokens,
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        window_left=window_left,
        fixed_split_size=fixed_split_size,
        disable_split_kv=disable_split_kv,
    )


def paged_attention(
    q: Array,
    paged_kv_cache: Any,
    *,
    cu_q_lens: Array,
    kv_lens: Array,
    block_tables: Array,
    num_seqs: Array | None = None,
    window_left: int | None = None,
    sm_scale: float | None = None,
    logits_soft_cap: float | None = None,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    score_mod: Callable[..., Array] | None = None,
    score_mod_arrays: Sequence[Array] = (),
    out_dtype: DTypeLike | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Causal attention of a mixed batch over paged keys: prompts, chunks, drafts and decode rows in one ragged call.

    It plans and attends. Layers that call it with the same lengths share the plan, which XLA computes once; across the
    bodies of a scan over layers it does not see that, and `plan_paged_attention` before the scan, then `paged_prefill`,
    say it.

    Args:
      q: [t, h, d], float16, bfloat16 or float32; the cache's dtype, unless that is float8.
      paged_kv_cache: the cache of one layer, which already holds the new tokens: a `PagedKVCache`, or a tuple (k, v) of
        arrays [n, p, kh, d], or [b, w, p, kh, d] for a pool of b * w pages.
      cu_q_lens, kv_lens, block_tables, num_seqs, window_left: as for `plan_paged_attention`.
      The rest: as for `paged_decode`.

    Returns:
      o [t, h, V's head_dim]; with return_lse, (o, lse float32 [t, h], natural log). Padding gives 0 and -inf.

    Raises: as `plan_paged_attention` and `paged_decode`.
    """
    pool, _ = as_pool(paged_kv_cache)
    pool.check()
    check_shape("q", q, ("t", "h", "d"))
    plan = plan_paged_attention(
        cu_q_lens,
        kv_lens,
        block_tables,
        num_q_tokens=q.shape[0],
        page_size=pool.page_size,
        num_qo_heads=q.shape[1],
        num_kv_heads=pool.num_kv_heads,
        num_seqs=num_seqs,
        window_left=window_left,
    )
    return paged_prefill(
        q,
        pool,
        plan,
        sm_scale=sm_scale,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        score_mod=score_mod,
        score_mod_arrays=score_mod_arrays,
        out_dtype=out_dtype,
        return_lse=return_lse,
        backend=backend,
    )
