"""A Flax NNX model on a paged cache: a step for all layers, a line of attention in each, caches updated in place."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

import jaxattn as ja

PAGE_SIZE, HEADS, KV_HEADS, HEAD_DIM, PAGES = 16, 8, 2, 64, 8
WIDTH = HEADS * HEAD_DIM
ROPE = ja.precompute_freqs_cis(HEAD_DIM, 64)


class Attention(nnx.Module):
    def __init__(self, rngs):
        widths = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
        self.qkv = nnx.List([nnx.Linear(WIDTH, width, rngs=rngs) for width in widths])
        self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.cache = nnx.Cache(
            ja.PagedKVCache.zeros(PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM, jnp.float32)
        )

    def __call__(self, x, step=None):
        """x [b, t, WIDTH]; with a step, on the cache; without, the model's own dense attention of whole sequences."""
        q, k, v = (proj(x).reshape(*x.shape[:2], -1, HEAD_DIM) for proj in self.qkv)
        if step is None:
            positions = jnp.tile(jnp.arange(x.shape[1]), x.shape[0])
            flat = (a.reshape(-1, *a.shape[2:]) for a in (q, k))
            rotated = ja.apply_rope_with_cos_sin_cache(positions, *flat, HEAD_DIM, ROPE)
            q, k = (new.reshape(old.shape) for new, old in zip(rotated, (q, k)))
            o = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        else:
            o, cache = ja.attend(q, k, v, self.cache.get_value(), step, rope=ROPE)
            self.cache.set_value(cache)
        return self.out(o.reshape(x.shape))


class Decoder(nnx.Module):
    def __init__(self, num_layers, rngs):
        self.layers = nnx.List([Attention(rngs) for _ in range(num_layers)])

    def __call__(self, x, step=None):
        for layer in self.layers:
            x = x + layer(x, step)
        return x


@functools.partial(nnx.jit, donate_argnums=0)  # the model's arrays, the caches among them
def forward(model, x, valid, kv_len, block_table):
    """x [b, t, WIDTH], valid bool [b, t], kv_len int32 [b] tokens before them: a prompt, a chunk or one token."""
    print("tracing for", x.shape[1], "tokens a request")  # once each, when the program is compiled
    sizes = dict(page_size=PAGE_SIZE, num_qo_heads=HEADS, num_kv_heads=KV_HEADS)
    step = ja.begin_step(valid, kv_len, block_table, **sizes)
    return model(x, step), step.kv_len


model = Decoder(2, nnx.Rngs(0))
x = jax.random.normal(jax.random.key(1), (2, 30, WIDTH))  # what the two requests' tokens embed to
want = nnx.jit(Decoder.__call__)(model, x)
given = model.layers[0].cache.get_value().k
block_table = jnp.asarray([[6, 1, 0, 3], [2, 7, 5, 4]], jnp.int32)

lengths = [20, 9]  # of the prompts, which are padded at the left, as samplers do
padded = jnp.stack([jnp.pad(x[i, :n], ((20 - n, 0), (0, 0))) for i, n in enumerate(lengths)])
valid = jnp.arange(20)[None, :] >= 20 - jnp.asarray(lengths)[:, None]
o, kv_len = forward(model, padded, valid, jnp.zeros(2, jnp.int32), block_table)
off = max(jnp.abs(o[i, 20 - n :] - want[i, :n]).max() for i, n in enumerate(lengths))
print(f"prompts of {kv_len.tolist()} tokens: {off:.3f} from dense attention")
for _ in range(10):
    token = x[jnp.arange(2), kv_len][:, None]
    o, kv_len = forward(model, token, jnp.ones((2, 1), bool), kv_len, block_table)
off = max(jnp.abs(o[i, 0] - want[i, n - 1]).max() for i, n in enumerate(kv_len.tolist()))
print(f"{kv_len.tolist()} tokens in the cache: {off:.3f} from dense attention")
print("the model's first cache is gone, its memory reused:", given.is_deleted())
# prints:
# tracing for 20 tokens a request
# prompts of [20, 9] tokens: 0.000 from dense attention
# tracing for 1 tokens a request
# [30, 19] tokens in the cache: 0.000 from dense attention
# the model's first cache is gone, its memory reused: True
