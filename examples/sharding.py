"""Tensor parallelism: each device holds some of the KV heads with their queries, and attends to them alone."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxattn as ja

jax.config.update("jax_num_cpu_devices", 2)  # a CPU as two devices; GPUs are what they are
PAGE_SIZE, HEADS, KV_HEADS, HEAD_DIM = 16, 8, 2, 64


def decode(q, k, v, kv_len, block_table, cache):
    """Of all heads, or of a device's own: q [b, h, d], k and v [b, kh, d], kv_len int32 [b] before the token."""
    positions, kv_len = kv_len, kv_len + 1
    table = ja.PageTable.from_block_table(block_table, kv_len, PAGE_SIZE)
    requests = jnp.arange(q.shape[0], dtype=jnp.int32)
    cache = ja.append_paged_kv_cache(k, v, requests, positions, cache, table)
    plan = ja.plan_decode(table, num_qo_heads=q.shape[1], num_kv_heads=k.shape[1])
    return ja.paged_decode(q, cache, plan), cache


mesh = jax.make_mesh((2,), ("kv",), axis_types=(AxisType.Auto,))
heads, pages = P(None, "kv"), P(None, None, "kv")  # axes: [b, heads, d] and [n, p, kh, d]
sharded = jax.jit(
    jax.shard_map(
        decode, mesh=mesh, in_specs=(heads, heads, heads, P(), P(), pages), out_specs=(heads, pages)
    ),
    donate_argnums=5,
)

q, k, v = (
    jax.random.normal(jax.random.key(i), (3, n, HEAD_DIM))
    for i, n in enumerate((HEADS, KV_HEADS, KV_HEADS))
)
kv_len = jnp.asarray([0, 20, 31], jnp.int32)
block_table = jnp.asarray([[0, 1], [2, 3], [5, 4]], jnp.int32)
cache = ja.PagedKVCache(
    tuple(jax.random.normal(jax.random.key(i), (6, PAGE_SIZE, KV_HEADS, HEAD_DIM)) for i in (3, 4))
)
want, _ = jax.jit(decode)(q, k, v, kv_len, block_table, cache)
cache = jax.device_put(cache, NamedSharding(mesh, pages))
o, cache = sharded(q, k, v, kv_len, block_table, cache)
print("KV heads on each device:", [shard.data.shape[2] for shard in cache.k.addressable_shards])
print(f"{jnp.abs(o - want).max():.3f} from one device")
# prints:
# KV heads on each device: [1, 1]
# 0.000 from one device
