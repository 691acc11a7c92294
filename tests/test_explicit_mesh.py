"""Under a mesh of explicit axes: the ops take what these do not partition, work in shard_map, and else say so."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import i32s
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rowwise import normal, on_host

import jaxattn as ja

pytestmark = pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
WHOLE, BY_HEADS, BY_REQUESTS = P(), P(None, "x"), P("x")
PAGES = P(None, None, "x")


@pytest.fixture
def mesh():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        yield mesh


def inputs(mesh=None, heads=WHOLE, requests=WHOLE, pages=WHOLE):
    """q, k, v, lengths and the cache, put where the specs say."""
    q, k, v = (normal((2, h, HEAD_DIM), seed=i) for i, h in enumerate((HEADS, KV_HEADS, KV_HEADS)))
    cache = ja.PagedKVCache(tuple(normal((4, 4, KV_HEADS, HEAD_DIM), seed=i) for i in (5, 6)))
    args, specs = ((q, k, v), i32s(2, 5), cache), (heads, requests, pages)
    if mesh is None:
        return args
    return tuple(
        jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(args, specs, strict=True)
    )


def block_table():
    return i32s(0, 1, 2, 3).reshape(2, 2)


def step(heads, kv_len, cache, devices=1):
    """All of a step: indices, table, plan, append, attention."""
    sizes = dict(page_size=4, num_qo_heads=HEADS // devices, num_kv_heads=KV_HEADS // devices)
    q, k, v = (x[:, None] for x in heads)
    step = ja.begin_step(jnp.ones((2, 1), bool), kv_len, block_table(), **sizes)
    return ja.attend(q, k, v, cache, step, backend="xla")


def table(kv_len):
    return ja.PageTable.from_block_table(block_table(), kv_len, 4)


def plan(kv_len):
    return ja.plan_decode(table(kv_len), num_qo_heads=HEADS, num_kv_heads=KV_HEADS)


OPS = dict(
    step=step,
    decode=lambda heads, kv_len, cache: ja.paged_decode(heads[0], cache, plan(kv_len)),
    append=lambda heads, kv_len, cache: ja.append_paged_kv_cache(
        *heads[1:], i32s(0, 1), i32s(1, 4), cache, table(kv_len)
    ),
    dense=lambda heads, kv_len, cache: ja.dot_product_attention(
        heads[0][:, None], *(x[:, None] for x in heads[1:]), key_value_seq_lengths=kv_len
    ),
    rope=lambda heads, kv_len, cache: ja.apply_rope_pos_ids(*heads[:2], kv_len),
    rmsnorm=lambda heads, kv_len, cache: ja.rmsnorm(heads[0][:, 0], jnp.ones(HEAD_DIM)),
    merge=lambda heads, kv_len, cache: ja.merge_state(*[heads[0], heads[0][..., 0]] * 2),
)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_what_is_not_partitioned_is_taken(op, mesh):
    got = jax.jit(op)(*inputs(mesh))
    with jax.set_mesh(jax.make_mesh((1,), ("y",), axis_types=(AxisType.Auto,))):
        want = jax.jit(op)(*inputs())
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(on_host(x), on_host(y), atol=1e-5)


@pytest.mark.parametrize(
    "specs",
    [(BY_HEADS, WHOLE, PAGES), (BY_REQUESTS, BY_REQUESTS, WHOLE)],
    ids=["heads", "requests"],
)
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_what_is_partitioned_is_named(op, specs, mesh):
    if op is OPS["rmsnorm"] and specs[0] is BY_HEADS:
        return  # of one head, nothing is partitioned
    message = r"must not be partitioned by axes of an explicit mesh; got (float32|int32)\[.*@x.*jax.shard_map"
    for run in (op, jax.jit(op)):
        with pytest.raises(ValueError, match=message):
            run(*inputs(mesh, *specs))


def test_shard_map_is_what_to_do(mesh):
    specs = (BY_HEADS, WHOLE, PAGES)
    sharded = jax.shard_map(
        functools.partial(step, devices=2), in_specs=specs, out_specs=(P(None, None, "x"), PAGES)
    )
    got = jax.jit(sharded)(*inputs(mesh, *specs))
    want = jax.jit(step)(*inputs(mesh))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(on_host(x), on_host(y), atol=1e-5)
