"""Prefill: prompts of several lengths in one call, each of which attends to itself, causally."""

import jax
import jax.numpy as jnp

import jaxattn as ja

PAGE_SIZE, HEADS, KV_HEADS, HEAD_DIM = 16, 8, 2, 64


@jax.jit
def prefill(q, k, v, qo_indptr, block_table, cache):
    """q [t, h, d], k and v [t, kh, d]: the prompts' tokens one after the other; prompt i has rows qo_indptr[i:i+2]."""
    kv_len = qo_indptr[1:] - qo_indptr[:-1]  # lengths after the append
    table = ja.PageTable.from_block_table(block_table, kv_len, PAGE_SIZE)
    batch_indices, positions = ja.get_batch_indices_positions(qo_indptr, kv_len, q.shape[0])
    cache = ja.append_paged_kv_cache(k, v, batch_indices, positions, cache, table)
    plan = ja.plan_prefill(
        qo_indptr, table, num_qo_tokens=q.shape[0], num_qo_heads=HEADS, num_kv_heads=KV_HEADS
    )
    return ja.paged_prefill(q, cache, plan), cache


block_table = jnp.asarray([[7, 2, 4], [0, 5, 3], [1, 6, 8]], jnp.int32)  # each prompt's pages
cache = ja.PagedKVCache.zeros(9, PAGE_SIZE, KV_HEADS, HEAD_DIM, jnp.float32)
qo_indptr = jnp.asarray([0, 5, 45, 46], jnp.int32)  # prompts of 5, 40 and 1 tokens
q, k, v = (
    jax.random.normal(jax.random.key(i), (46, heads, HEAD_DIM))
    for i, heads in enumerate((HEADS, KV_HEADS, KV_HEADS))
)
o, cache = prefill(q, k, v, qo_indptr, block_table, cache)

for i, (begin, end) in enumerate([(0, 5), (5, 45), (45, 46)]):
    rows = slice(begin, end)
    own = (x[None, rows] for x in (q, k, v))
    dense = jax.nn.dot_product_attention(*own, is_causal=True)[0]
    off = jnp.abs(o[rows] - dense).max()
    print(f"prompt {i}: tokens {begin} to {end}, {off:.3f} from dense attention")
# prints:
# prompt 0: tokens 0 to 5, 0.000 from dense attention
# prompt 1: tokens 5 to 45, 0.000 from dense attention
# prompt 2: tokens 45 to 46, 0.000 from dense attention
