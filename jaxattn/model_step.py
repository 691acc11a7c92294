"""A model's step in two calls: `begin_step` once, from lengths and a block table, and `attend` in each layer.

Batches are dense, [b, t]: one token of each request (decode), or several (a prompt, a chunk, a draft), padded at the
left or at the right.

Axes: b requests, t tokens of a row, h query heads, kh KV heads, d head dim, w pages of a block-table row.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jaxattn.append import append_paged_kv_cache, rope_append_paged_kv_cache
from jaxattn.attention import paged_decode, paged_prefill
from jaxattn.checks import (
    check_host_lengths,
    check_index,
    check_int32,
    check_positive,
    check_shape,
    copied_from_host,
)
from jaxattn.decode_plan import plan_decode
from jaxattn.kv_cache import as_pool
from jaxattn.padded import of_runs, run_indptr
from jaxattn.page_table import PageTable
from jaxattn.plan import AttentionPlan
from jaxattn.prefill_plan import plan_prefill


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """What all layers of a step share. A pytree, from `begin_step`.

    Attributes:
      batch_indices: int32 [b, t], the request of each token, -1 for padding.
      positions: int32 [b, t], its position in that request, 0 for padding: a model's own rotary embedding reads it.
      page_table: the pages of the b requests, lengths after the step; a request without tokens in the step has none.
      kv_len: int32 [b], tokens of each request after the step, what the next one begins with.
      plan: of `paged_decode` where t is 1; else of `paged_prefill`, whose requests are the padding before each row's
        tokens, and these tokens, in turn.
      splitting: how the plan splits keys (static).
    """

    batch_indices: Array
    positions: Array
    page_table: PageTable
    kv_len: Array
    plan: AttentionPlan
    splitting: tuple[int | None, bool] = dataclasses.field(metadata=dict(static=True))

    def with_window(self, window_left: int | None) -> "Step":
        """This step for layers with another window: the same tokens and pages, a plan of their own."""
        qo_indptr, spec = self.plan.qo_indptr, self.plan.spec
        plan = _plan(
            qo_indptr,
            self.page_table,
            self.plan.num_qo_tokens,
            (spec.num_qo_heads, spec.num_kv_heads),
            window_left,
            self.splitting,
        )
        return dataclasses.replace(self, plan=plan)


def begin_step(
    valid: Array,
    kv_len: Array,
    block_table: Array,
    *,
    page_size: int,
    num_qo_heads: int,
    num_kv_heads: int,
    window_left: int | None = None,
    fixed_split_size: int | None = None,
    disable_split_kv: bool = False,
) -> Step:
    """Where a step's tokens go and what they see, once for all layers.

    Args:
      valid: bool [b, t], which tokens are real: in each row one run of them, with padding on either side. A row without
        any leaves its request as it is.
      kv_len: int32 [b], tokens of each request before the step.
      block_table: int32 [b, w], row i names request i's pages in order; pages for the new tokens are there already.
        Of caches that lie request by request, it is `jnp.arange(b * w, dtype=jnp.int32).reshape(b, w)`.
      page_size: tokens a page.
      num_qo_heads, num_kv_heads: heads of q and of the cache (of one shard, under shard_map).
      window_left: keys that a query sees before its own position, besides its own; None or -1: all. For layers with
        another window, `Step.with_window`.
      fixed_split_size, disable_split_kv: as for `plan_decode`.

    Returns:
      The step, for `attend`. Its `positions` are for a model's own rotary embedding, its `kv_len` for the next step.

    Raises:
      ValueError: shapes, head counts or a window that do not fit; rows of `valid` with holes, or lengths beyond a row's
        pages, before the step or after it, where they are on the host (NumPy).
      TypeError: arrays of other dtypes.
    """
    check_shape("valid", valid, ("b", "t"))
    b, t = valid.shape
    if valid.dtype != jnp.bool_:
        raise TypeError(f"valid must be bool; got {valid.dtype}: use valid.astype(bool)")
    if not b * t:
        raise ValueError(f"valid must have at least one row and one token; got {[b, t]}")
    if isinstance(valid, np.ndarray):
        for i in np.flatnonzero((np.diff(valid.astype(np.int32), prepend=0) > 0).sum(axis=1) > 1):
            raise ValueError(
                f"valid must be one run of tokens in each row; row {i} has several: {valid[i]}"
            )
    check_index("kv_len", kv_len, b)
    check_shape("block_table", block_table, (b, "w"))
    check_int32("block_table", block_table)
    check_positive(page_size=page_size)
    if isinstance(kv_len, np.ndarray):
        width = block_table.shape[1]
        fits = width * page_size, f"{width} pages of {page_size}"
        check_host_lengths("kv_len", kv_len, *fits)
        if isinstance(valid, np.ndarray):
            check_host_lengths("(kv_len + valid.sum(axis=1))", kv_len + valid.sum(axis=1), *fits)
    valid, kv_len, block_table = (copied_from_host(x) for x in (valid, kv_len, block_table))

    count = valid.sum(axis=1, dtype=jnp.int32)
    begin = jnp.argmax(valid, axis=1).astype(jnp.int32)
    token = jnp.arange(t, dtype=jnp.int32)[None, :]
    batch_indices = jnp.where(valid, jnp.arange(b, dtype=jnp.int32)[:, None], -1)
    positions = jnp.where(valid, kv_len[:, None] + token - begin[:, None], 0)
    # To this step's layers a request without tokens is an empty one: nothing to append, no keys to read.
    after = kv_len + count
    table = PageTable.from_block_table(block_table, jnp.where(count > 0, after, 0), page_size)
    splitting = (fixed_split_size, disable_split_kv)
    plan = _plan(
        None if t == 1 else run_indptr(begin, begin + count, t),
        table,
        b * t,
        (num_qo_heads, num_kv_heads),
        window_left,
        splitting,
    )
    return Step(batch_indices, positions, table, after, plan, splitting)


def _plan(
    qo_indptr: Array | None,
    table: PageTable,
    num_qo_tokens: int,
    heads: tuple[int, int],
    window_left: int | None,
    splitting: tuple[int | None, bool],
) -> AttentionPlan:
    how: dict[str, Any] = dict(
        num_qo_heads=heads[0],
        num_kv_heads=heads[1],
        window_left=window_left,
        fixed_split_size=splitting[0],
        disable_split_kv=splitting[1],
    )
    if qo_indptr is None:
        return plan_decode(table, **how)
    # Runs of padding have no pages: their rows of the table begin and end where the run's behind them begins.
    indptr = jnp.repeat(table.indptr, 2)[:-1]
    padded = PageTable(indptr, table.indices, of_runs(table.last_page_len), table.page_size)
    return plan_prefill(qo_indptr, padded, num_qo_tokens=num_qo_tokens, **how)


def attend(
    q: Array,
    k: Array,
    v: Array,
    paged_kv_cache: Any,
    step: Step,
    *,
    rope: Array | None = None,
    is_neox: bool = True,
    rope_positions: Array | None = None,
    q_norm_weight: Array | None = None,
    k_norm_weight: Array | None = None,
    eps: float = 1e-6,
    sm_scale: float | None = None,
    logits_soft_cap: float | None = None,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    score_mod: Callable[..., Array] | None = None,
    score_mod_arrays: Sequence[Array] = (),
    out_dtype: DTypeLike | None = None,
    backend: str | None = None,
) -> tuple[Array, Any]:
    """A layer's attention: appends the tokens' keys and values to the cache, then attends, causally.

    Args:
      q: [b, t, num_qo_heads, head_dim]; float16, bfloat16 or float32.
      k, v: [b, t, num_kv_heads, head_dim], V's its own; q's dtype.
      paged_kv_cache: the layer's cache, whose arrays are written in place where donated: a `PagedKVCache`, or a tuple
        (k, v) of arrays [n, p, kh, d]. Arrays [b, w, p, kh, d] are a pool of b * w pages, for models whose caches begin
        with the batch.
      step: from `begin_step`.
      rope: a table of cosines and sines, float32 [max_position, rotary_dim], from `precompute_freqs_cis` say: q and k
        come as their projections leave them and are rotated in the kernel that appends. None: they come rotated.
      is_neox, q_norm_weight, k_norm_weight, eps: as for `rope_append_paged_kv_cache`; they need `rope`.
      rope_positions: int32 [b, t], rows of the table; default: `step.positions`. It needs `rope`.
      sm_scale, logits_soft_cap, sinks, alibi_slopes, score_mod, score_mod_arrays, out_dtype: as for `paged_decode`.
      backend: as for `paged_decode`, of the attention; the append goes through Triton where that is "mosaic".

    Returns:
      (o [b, t, num_qo_heads, V's head_dim], the cache in the form in which it came). Padding gives 0.

    Raises:
      ValueError: shapes that do not fit the step or the cache; an option that needs `rope` without it.
      TypeError: unsupported or different dtypes; no cache, no step.
    """
    if not isinstance(step, Step):
        raise TypeError(f"step must come from begin_step; got {type(step).__name__}")
    b, t = step.batch_indices.shape
    plan = step.plan
    check_shape("q", q, (b, t, plan.num_qo_heads, "head_dim"))
    check_shape("k", k, (b, t, plan.num_kv_heads, q.shape[-1]))
    check_shape("v", v, (b, t, plan.num_kv_heads, "head_dim of v"))
    pool, back = as_pool(paged_kv_cache)
    q, k, v = (x.reshape(b * t, *x.shape[2:]) for x in (q, k, v))
    where = step.batch_indices.reshape(b * t), step.positions.reshape(b * t)
    writing = "triton" if backend == "mosaic" else backend
    if rope is None:
        needs = dict(
            is_neox=not is_neox,
            rope_positions=rope_positions is not None,
            q_norm_weight=q_norm_weight is not None,
            k_norm_weight=k_norm_weight is not None,
        )
        for name in (name for name, given in needs.items() if given):
            raise ValueError(f"{name} has no effect without rope: give its table, or leave it out")
        pool = append_paged_kv_cache(k, v, *where, pool, step.page_table, backend=writing)
    else:
        if rope_positions is not None:
            check_shape("rope_positions", rope_positions, (b, t))
            rope_positions = rope_positions.reshape(b * t)
        q, pool = rope_append_paged_kv_cache(
            (q, k, v),
            *where,
            rope,
            pool,
            step.page_table,
            is_neox,
            rope_positions=rope_positions,
            q_norm_weight=q_norm_weight,
            k_norm_weight=k_norm_weight,
            eps=eps,
            backend=writing,
        )
    attention: Callable[..., Array] = paged_decode if plan.is_decode else paged_prefill
    o = attention(
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
        backend=backend,
    )
    return o.reshape(b, t, *o.shape[1:]), back(pool)
