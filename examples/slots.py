"""Requests that join and leave: a fixed number of slots, of which any may be empty. Nothing recompiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxattn as ja

SLOTS, PAGES_EACH, PAGE_SIZE, HEADS, KV_HEADS, HEAD_DIM = 3, 2, 4, 4, 2, 64
block_table = jnp.arange(SLOTS * PAGES_EACH, dtype=jnp.int32).reshape(SLOTS, PAGES_EACH)


@functools.partial(jax.jit, donate_argnames="cache")
def step(q, k, v, active, kv_len, cache):
    """One token of each active slot: q [b, h, d], k and v [b, kh, d], active bool [b], kv_len int32 [b] before it."""
    print("tracing")  # Python runs once, when the program is compiled
    slots = jnp.where(active, jnp.arange(SLOTS, dtype=jnp.int32), -1)  # -1: append nothing
    positions, kv_len = kv_len, jnp.where(active, kv_len + 1, 0)  # 0: attend to nothing
    table = ja.PageTable.from_block_table(block_table, kv_len, PAGE_SIZE)
    cache = ja.append_paged_kv_cache(k, v, slots, positions, cache, table)
    plan = ja.plan_decode(table, num_qo_heads=HEADS, num_kv_heads=KV_HEADS)
    return ja.paged_decode(q, cache, plan), kv_len, cache


def token(request, position):
    """q, k and v of a request's token, which a model would compute."""
    x = np.random.default_rng([request, position]).standard_normal((HEADS + 2 * KV_HEADS, HEAD_DIM))
    return np.split(x.astype(np.float32), (HEADS, HEADS + KV_HEADS))


cache = ja.PagedKVCache.zeros(SLOTS * PAGES_EACH, PAGE_SIZE, KV_HEADS, HEAD_DIM, jnp.float32)
kv_len = jnp.zeros(SLOTS, jnp.int32)
slots = [7, None, None]  # the request in each slot
for i in range(5):
    if i == 2:
        slots[2] = 8  # request 8 joins
    if i == 4:
        slots[0] = None  # request 7 leaves; its pages are free, whatever they hold
    x = [token(0 if r is None else r, int(n)) for r, n in zip(slots, kv_len)]
    active = jnp.asarray([r is not None for r in slots])
    o, kv_len, cache = step(*map(jnp.asarray, map(np.stack, zip(*x))), active, kv_len, cache)
    print(f"requests {slots}, lengths {kv_len.tolist()}")

q, k, v = (jnp.asarray(np.stack(x)) for x in zip(*(token(8, n) for n in range(3))))
dense = jax.nn.dot_product_attention(q[None, -1:], k[None], v[None])[0, 0]
print(f"request 8 is {jnp.abs(o[2] - dense).max():.3f} from dense attention")
print("empty slots give zeros:", not o[:2].any())
# prints:
# tracing
# requests [7, None, None], lengths [1, 0, 0]
# requests [7, None, None], lengths [2, 0, 0]
# requests [7, None, 8], lengths [3, 0, 1]
# requests [7, None, 8], lengths [4, 0, 2]
# requests [None, None, 8], lengths [0, 0, 3]
# request 8 is 0.000 from dense attention
# empty slots give zeros: True
