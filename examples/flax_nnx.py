"""A Flax NNX model: the caches are variables that a donating `nnx.jit` updates in place, the plan an attribute."""

import functools

import jax.numpy as jnp
from flax import nnx

import jaxattn as ja

PAGE_SIZE, HEADS, KV_HEADS, HEAD_DIM, PAGES = 16, 8, 2, 64, 8
WIDTH = HEADS * HEAD_DIM


class Attention(nnx.Module):
    """A layer's attention for decode, x [b, WIDTH] -> [b, WIDTH]; what a step shares is set beforehand."""

    def __init__(self, rngs):
        self.qkv = nnx.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM, rngs=rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        pages = ja.PagedKVCache.zeros(PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM, jnp.float32)
        self.cache = nnx.Cache(pages)
        self.step = nnx.data(None)  # will hold arrays; to NNX a tuple is a constant otherwise

    def __call__(self, x):
        positions, table, plan = self.step
        b = x.shape[0]
        heads = self.qkv(x).reshape(b, HEADS + 2 * KV_HEADS, HEAD_DIM)
        q, k, v = jnp.split(heads, (HEADS, HEADS + KV_HEADS), axis=1)
        requests = jnp.arange(b, dtype=jnp.int32)
        cache = self.cache.get_value()
        cache = ja.append_paged_kv_cache(k, v, requests, positions, cache, table)
        self.cache.set_value(cache)
        return self.out(ja.paged_decode(q, cache, plan).reshape(b, WIDTH))


class Decoder(nnx.Module):
    def __init__(self, num_layers, rngs):
        self.layers = nnx.List([Attention(rngs) for _ in range(num_layers)])

    def __call__(self, x, kv_len, block_table):
        """x [b, WIDTH], kv_len int32 [b] tokens before this one."""
        positions, kv_len = kv_len, kv_len + 1
        table = ja.PageTable.from_block_table(block_table, kv_len, PAGE_SIZE)
        plan = ja.plan_decode(table, num_qo_heads=HEADS, num_kv_heads=KV_HEADS)
        for layer in self.layers:
            layer.step = nnx.data((positions, table, plan))
            x = x + layer(x)
            layer.step = nnx.data(None)
        return x, kv_len


@functools.partial(nnx.jit, donate_argnums=0)  # the model's arrays, the caches among them
def step(model, x, kv_len, block_table):
    print("tracing")  # Python runs once, when the program is compiled
    return model(x, kv_len, block_table)


model = Decoder(2, nnx.Rngs(0))
given = model.layers[0].cache.get_value().k
x, kv_len = jnp.ones((2, WIDTH)), jnp.zeros(2, jnp.int32)
block_table = jnp.asarray([[6, 1, 0, 3], [2, 7, 5, 4]], jnp.int32)
for _ in range(20):
    x, kv_len = step(model, x, kv_len, block_table)
print("tokens in the cache:", kv_len.tolist())
print("the model's first cache is gone, its memory reused:", given.is_deleted())
# prints:
# tracing
# tokens in the cache: [20, 20]
# the model's first cache is gone, its memory reused: True
