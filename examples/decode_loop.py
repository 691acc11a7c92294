"""A decode loop on the device: a donated cache, and a `lax.while_loop` that plans, appends and attends at each step."""

import functools

import jax
import jax.numpy as jnp

import jaxattn as ja

PAGE_SIZE, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 16, 8, 2, 64, 2
WIDTH = HEADS * HEAD_DIM


def step(params, x, kv_len, block_table, caches):
    """One token of each of b requests through all layers: x [b, WIDTH], kv_len int32 [b] tokens before it."""
    b = x.shape[0]
    positions, kv_len = kv_len, kv_len + 1  # a token stands at the length before it is appended
    table = ja.PageTable.from_block_table(block_table, kv_len, PAGE_SIZE)
    plan = ja.plan_decode(table, num_qo_heads=HEADS, num_kv_heads=KV_HEADS)  # once for all layers
    new_caches = []
    for (w_qkv, w_o), cache in zip(params, caches):
        heads = (x @ w_qkv).reshape(b, HEADS + 2 * KV_HEADS, HEAD_DIM)
        q, k, v = jnp.split(heads, (HEADS, HEADS + KV_HEADS), axis=1)
        requests = jnp.arange(b, dtype=jnp.int32)
        cache = ja.append_paged_kv_cache(k, v, requests, positions, cache, table)
        x = x + ja.paged_decode(q, cache, plan).reshape(b, WIDTH) @ w_o
        new_caches.append(cache)
    return x, kv_len, tuple(new_caches)


@functools.partial(jax.jit, donate_argnames="caches")  # written in place, not copied
def decode(params, x, kv_len, last_len, block_table, caches):
    """Steps until every request has last_len tokens."""
    return jax.lax.while_loop(
        lambda state: jnp.any(state[1] < last_len),
        lambda state: step(params, state[0], state[1], block_table, state[2]),
        (x, kv_len, caches),
    )


keys = jax.random.split(jax.random.key(0), 2 * LAYERS + 1)
params = [
    (
        jax.random.normal(a, (WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM)) * WIDTH**-0.5,
        jax.random.normal(b, (WIDTH, WIDTH)) * WIDTH**-0.5,
    )
    for a, b in zip(keys[1::2], keys[2::2])
]
block_table = jax.random.permutation(keys[0], 12).astype(jnp.int32).reshape(3, 4)
caches = tuple(
    ja.PagedKVCache.zeros(12, PAGE_SIZE, KV_HEADS, HEAD_DIM, jnp.float32) for _ in range(LAYERS)
)
given = caches[0].k
x, kv_len, caches = decode(
    params, jnp.ones((3, WIDTH)), jnp.zeros(3, jnp.int32), 50, block_table, caches
)
print("tokens in the cache:", kv_len.tolist())
print("the cache that was passed in is gone, its memory reused:", given.is_deleted())
print("equal requests stay equal, on different pages:", bool(jnp.allclose(x, x[:1], atol=1e-3)))
# prints:
# tokens in the cache: [50, 50, 50]
# the cache that was passed in is gone, its memory reused: True
# equal requests stay equal, on different pages: True
