"""An FP8 cache: half the bytes of 16 bits, with a scale for each token and head that its append finds."""

import functools

import jax
import jax.numpy as jnp

import jaxattn as ja

PAGE_SIZE, HEADS, KV_HEADS, HEAD_DIM, LENGTH = 16, 8, 2, 64, 100


@functools.partial(jax.jit, donate_argnames="cache")
def append_and_attend(q, k, v, cache):
    """LENGTH tokens of one request, then the attention of its last: q [1, h, d], k and v [t, kh, d]."""
    pages = jnp.arange(7, dtype=jnp.int32)[None]
    table = ja.PageTable.from_block_table(pages, jnp.asarray([LENGTH], jnp.int32), PAGE_SIZE)
    positions = jnp.arange(LENGTH, dtype=jnp.int32)
    cache = ja.append_paged_kv_cache(k, v, positions * 0, positions, cache, table)
    plan = ja.plan_decode(table, num_qo_heads=HEADS, num_kv_heads=KV_HEADS)
    return ja.paged_decode(q, cache, plan), cache


q, k, v = (
    jax.random.normal(jax.random.key(i), (tokens, heads, HEAD_DIM)).astype(jnp.bfloat16)
    for i, (tokens, heads) in enumerate(((1, HEADS), (LENGTH, KV_HEADS), (LENGTH, KV_HEADS)))
)
k = k.at[:, 1].multiply(1000)  # a head far beyond float8's range
q = q.at[:, HEADS // KV_HEADS :].divide(1000)
empty = functools.partial(ja.PagedKVCache.zeros, 7, PAGE_SIZE, KV_HEADS, HEAD_DIM)
caches = {
    "bfloat16": empty(jnp.bfloat16),
    "scales per token": empty(jnp.float8_e4m3fn, scales="token"),
    "scales per head": empty(
        jnp.float8_e4m3fn, scales=ja.KVScales.of(k=[1 / 64, 1000 / 64], v=1 / 64)
    ),
}
dense = jax.nn.dot_product_attention(*(x[None].astype(jnp.float32) for x in (q, k, v)))[0]
for name, cache in caches.items():
    o, cache = append_and_attend(q, k, v, cache)
    size = sum(x.nbytes for x in jax.tree.leaves(cache))
    off = jnp.abs(o.astype(jnp.float32) - dense).max() / jnp.abs(dense).max()
    print(f"{name}: {size} bytes, within 5% of dense attention: {bool(off < 0.05)}")
# prints:
# bfloat16: 57344 bytes, within 5% of dense attention: True
# scales per token: 30464 bytes, within 5% of dense attention: True
# scales per head: 28684 bytes, within 5% of dense attention: True
