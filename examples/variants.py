"""What today's models compute: a window and sinks, a soft cap, tree speculation, and a score of one's own."""

import jax
import jax.numpy as jnp

import jaxattn as ja

heads = dict(num_qo_heads=4, num_kv_heads=2)
normal = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
cache = ja.PagedKVCache((normal(0, 12, 16, 2, 64), normal(1, 12, 16, 2, 64)))
block_table = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
table = ja.PageTable.from_block_table(block_table, jnp.asarray([90, 33], jnp.int32), page_size=16)

# gpt-oss: the last 32 keys, and a logit per head that has no value. Pages behind the window are never read.
local = ja.plan_decode(table, window_left=31, **heads)
o, lse = ja.paged_decode(normal(2, 2, 4, 64), cache, local, sinks=jnp.zeros(4), return_lse=True)
print("window and sinks:", o.shape, "finite:", bool(jnp.isfinite(lse).all()))

# Gemma 2: logits become 50 tanh(x / 50).
q = normal(3, 8, 4, 64)
qo_indptr = jnp.asarray([0, 5, 8], jnp.int32)  # 5 new tokens of request 0, 3 of request 1
plan = ja.plan_prefill(qo_indptr, table, num_qo_tokens=8, **heads)
print("soft cap:", ja.paged_prefill(q, cache, plan, logits_soft_cap=50.0).shape)

# Tree speculation: a bit for each (new token, key). Here each new token sees the old ones and itself.
kv_len = table.kv_len()
masks = [jnp.ones((5, 90), bool), jnp.ones((3, 33), bool)]
masks = [m.at[:, m.shape[1] - len(m) :].set(jnp.eye(len(m), dtype=bool)) for m in masks]
bits = ja.MaskBits.of(jnp.concatenate([m.ravel() for m in masks]), qo_indptr, kv_len)
tree = ja.plan_prefill(qo_indptr, table, num_qo_tokens=8, mask=bits, **heads)
print("tree:", ja.paged_prefill(q, cache, tree).shape)


# What we did not think of: a function of the score, the positions and the head, traced into the kernel.
def closer_is_better(score, query_position, key_position, query_head, strength):
    distance = (query_position - key_position).astype(jnp.float32)
    return score - strength * jnp.log1p(distance)


strength = jnp.asarray([0.0, 0.5, 1.0, 2.0])
mine = dict(score_mod=closer_is_better, score_mod_arrays=[strength])
same, other = (ja.paged_prefill(q, cache, plan, **how) for how in ({}, mine))
print("head 0 unchanged:", bool(jnp.allclose(same[:, 0], other[:, 0], atol=1e-5)))
print("head 3 unchanged:", bool(jnp.allclose(same[:, 3], other[:, 3], atol=1e-5)))

# prints:
# window and sinks: (2, 4, 64) finite: True
# soft cap: (8, 4, 64)
# tree: (8, 4, 64)
# head 0 unchanged: True
# head 3 unchanged: False
