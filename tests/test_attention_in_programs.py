"""Attention inside JAX programs: transforms, lengths that never recompile, bad input, nothing to attend to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    device_array,
    i32,
    make_paged,
    no_compilation,
    same_bits,
)
from jax.sharding import PartitionSpec as P

import jaxattn as ja
from jaxattn.kernels.triton import attention

BACKENDS = ["interpret", "xla"]
SLOW_INTERPRETED = [pytest.param("interpret", marks=pytest.mark.slow), "xla"]

# The same computation in another program: a float32 difference may tip a bfloat16 rounding.
ONE_ULP = dict(rtol=2**-7, atol=1e-5)


def decode_arguments(kv_lens, *, group=2, batch_seed=0, **how):
    paged = make_paged(kv_lens, page_size=16, **how)
    rng = np.random.default_rng(batch_seed)
    shape = (len(kv_lens), paged.cache.num_kv_heads * group, paged.cache.head_dim)
    q = device_array(rng.standard_normal(shape, np.float32), paged.cache.dtype)
    return q, paged.cache, paged.table


@functools.partial(jax.jit, static_argnames="backend")
def decode(q, cache, table, backend="interpret"):
    plan = ja.plan_decode(
        table,
        page_size=cache.page_size,
        num_qo_heads=q.shape[-2],
        num_kv_heads=cache.num_kv_heads,
        fixed_split_size=1,  # so that short requests have splits to merge
    )
    return ja.paged_decode(q, cache, plan, return_lse=True, backend=backend)


@pytest.mark.slow
def test_page_order_changes_nothing():
    """The same tokens on other pages give the same bits."""
    q, cache, table = decode_arguments([40, 17, 300])
    order = np.random.default_rng(5).permutation(cache.num_pages)
    moved = ja.PagedKVCache(tuple(x[np.argsort(order)] for x in cache.data))
    indices = np.asarray(table.indices)
    indices = np.where(indices < cache.num_pages, order[np.minimum(indices, order.size - 1)], 0)
    other = ja.PageTable(table.indptr, i32(indices), table.last_page_len)
    for a, b in zip(decode(q, cache, table), decode(q, moved, other), strict=True):
        assert same_bits(a, b)


@pytest.mark.slow
def test_decode_is_the_last_row_of_prefill():
    """To the bit or nearly, where both take the same tile: that of few rows and few programs."""
    q, cache, table = decode_arguments([33, 1, 200], num_kv_heads=1)
    heads = dict(num_qo_heads=q.shape[1], num_kv_heads=cache.num_kv_heads)
    qo_indptr = jnp.arange(4, dtype=jnp.int32)
    prefill = ja.plan_prefill(qo_indptr, table, page_size=16, num_qo_tokens=3, **heads)
    decode = ja.plan_decode(table, page_size=16, **heads)
    assert prefill.block_rows == decode.block_rows
    how = dict(return_lse=True, backend="interpret")
    ours = ja.paged_prefill(q, cache, prefill, **how)
    for a, b in zip(ours, ja.paged_decode(q, cache, decode, **how), strict=True):
        np.testing.assert_allclose(
            np.asarray(a.astype(jnp.float32)), np.asarray(b.astype(jnp.float32)), atol=1e-6
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap(backend):
    a, b = (decode_arguments([33, 0, 200], seed=seed, batch_seed=seed) for seed in (0, 1))
    stacked = jax.tree.map(lambda x, y: jnp.stack([x, y]), a, b)
    o, lse = jax.vmap(lambda q, cache, table: decode(q, cache, table, backend))(*stacked)
    for i, one in enumerate((a, b)):
        want_o, want_lse = decode(*one, backend)
        np.testing.assert_allclose(
            np.asarray(o[i].astype(jnp.float32)),
            np.asarray(want_o.astype(jnp.float32)),
            **ONE_ULP,
        )
        np.testing.assert_allclose(np.asarray(lse[i]), np.asarray(want_lse), rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_prefill(backend):
    @jax.jit
    def prefill(q, cache, table):
        plan = ja.plan_prefill(
            i32([0, 2, 5]),
            table,
            page_size=16,
            num_qo_tokens=q.shape[0],
            num_qo_heads=q.shape[1],
            num_kv_heads=cache.num_kv_heads,
        )
        return ja.paged_prefill(q, cache, plan, backend=backend).astype(jnp.float32)

    _, cache, table = decode_arguments([33, 20])
    q = device_array(np.random.default_rng(0).standard_normal((2, 6, 4, 64), np.float32))
    q = q.astype(cache.dtype)
    o = jax.vmap(prefill, in_axes=(0, None, None))(q, cache, table)
    for i in range(2):
        np.testing.assert_allclose(
            np.asarray(o[i]), np.asarray(prefill(q[i], cache, table)), **ONE_ULP
        )


@pytest.mark.parametrize("backend", SLOW_INTERPRETED)
def test_scan_and_while(backend):
    """The plan is made inside the loop, from lengths that the loop carries."""
    q, cache, _ = decode_arguments([64, 64])
    block_table = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)
    cache = ja.PagedKVCache(tuple(jnp.nan_to_num(x) for x in cache.data))

    def step(kv_len):
        table = ja.PageTable.from_block_table(block_table, kv_len, 16)
        return decode(q, cache, table, backend)[0].astype(jnp.float32)

    start = i32([0, 7])
    _, outs = jax.jit(lambda: jax.lax.scan(lambda n, _: (n + 1, step(n)), start, length=3))()
    for i in range(3):
        np.testing.assert_allclose(np.asarray(outs[i]), np.asarray(step(start + i)), **ONE_ULP)
    _, last = jax.lax.while_loop(
        lambda c: c[0][0] < 3, lambda c: (c[0] + 1, step(c[0])), (start, jnp.zeros_like(outs[0]))
    )
    np.testing.assert_allclose(np.asarray(last), np.asarray(outs[2]), **ONE_ULP)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shard_map_over_kv_heads(backend):
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    q, cache, table = decode_arguments([33, 0, 200])
    mesh = jax.make_mesh((2,), ("kv",), axis_types=(jax.sharding.AxisType.Auto,))
    kv = P(None, None, "kv")
    sharded = jax.shard_map(
        lambda q, cache, table: decode(q, cache, table, backend),
        mesh=mesh,
        in_specs=(P(None, "kv"), kv, P()),
        out_specs=P(None, "kv"),
        check_vma=backend != "interpret",  # Pallas's interpreter cannot follow varying axes
    )
    for a, b in zip(
        jax.jit(sharded)(q, cache, table), decode(q, cache, table, backend), strict=True
    ):
        np.testing.assert_allclose(
            np.asarray(a.astype(jnp.float32)), np.asarray(b.astype(jnp.float32)), **ONE_ULP
        )


def prefill_arguments(*, group=2):
    """Queries and keys of two requests, the second's first rows without keys, and a padding row."""
    _, cache, table = decode_arguments([33, 3])
    rng = np.random.default_rng(4)
    kh, d = cache.num_kv_heads, cache.head_dim
    q, k, v = (
        device_array(rng.standard_normal((n, heads, d), np.float32), cache.dtype)
        for n, heads in ((10, kh * group), (40, kh), (40, kh))
    )
    return q, i32([0, 4, 9]), cache, table, k, v


@functools.partial(jax.jit, static_argnames="backend")
def prefills(q, qo_indptr, cache, table, k, v, backend):
    """(o, lse) over paged keys, and over as many contiguous ones."""
    heads = dict(num_qo_tokens=q.shape[0], num_qo_heads=q.shape[1], num_kv_heads=cache.num_kv_heads)
    plan = ja.plan_prefill(qo_indptr, table, page_size=cache.page_size, fixed_split_size=1, **heads)
    paged = ja.paged_prefill(q, cache, plan, return_lse=True, backend=backend)
    kv_indptr = jnp.pad(jnp.cumsum(table.kv_len(cache.page_size), dtype=jnp.int32), (1, 0))
    plan = ja.plan_ragged_prefill(qo_indptr, kv_indptr, **heads)
    return paged, ja.ragged_prefill(q, k, v, plan, return_lse=True, backend=backend)


def assert_close(ours, want):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        a, b = (np.asarray(x.astype(jnp.float32)) for x in (a, b))
        np.testing.assert_allclose(a, b, **ONE_ULP)


@pytest.mark.parametrize("backend", SLOW_INTERPRETED)
def test_prefill_transforms(backend):
    """Every argument batched under vmap and scan, and lengths that a while loop carries."""
    q, qo_indptr, cache, table, k, v = prefill_arguments()
    other = (q + 1, i32([0, 6, 6]), cache, table, k - 1, v + 1)
    layers = jax.tree.map(lambda *x: jnp.stack(x), (q, qo_indptr, cache, table, k, v), other)
    run = functools.partial(prefills, backend=backend)
    each = [run(*jax.tree.map(lambda x, i=i: x[i], layers)) for i in range(2)]
    want = jax.tree.map(lambda *x: jnp.stack(x), *each)
    assert not same_bits(want[0][0][0], want[0][0][1])
    assert_close(jax.vmap(run)(*layers), want)
    _, scanned = jax.lax.scan(lambda c, xs: (c, run(*xs)), 0, layers)
    assert_close(scanned, want)

    def step(carry):
        i, _ = carry
        return i + 1, run(q, i32([0, 3, 7]) + i, cache, table, k, v)

    _, last = jax.lax.while_loop(lambda c: c[0] < 2, step, (jnp.int32(0), each[0]))
    assert_close(last, run(q, i32([1, 4, 8]), cache, table, k, v))


@pytest.mark.parametrize("backend", SLOW_INTERPRETED)
def test_prefill_under_shard_map_over_kv_heads(backend):
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    arguments = prefill_arguments()
    heads = P(None, "kv")
    sharded = jax.shard_map(
        functools.partial(prefills, backend=backend),
        mesh=jax.make_mesh((2,), ("kv",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=(heads, P(), P(None, None, "kv"), P(), heads, heads),
        out_specs=heads,
        check_vma=backend != "interpret",  # Pallas's interpreter cannot follow varying axes
    )
    assert_close(jax.jit(sharded)(*arguments), prefills(*arguments, backend))


@pytest.mark.parametrize("backend", [None, "interpret"])
def test_gradient_is_the_references(backend):
    q, cache, table = decode_arguments([33, 0, 60], dtype=jnp.float32)
    cache = ja.PagedKVCache(tuple(jnp.nan_to_num(x) for x in cache.data))

    def loss(q, cache, backend):
        o, lse = decode(q, cache, table, backend)
        return jnp.sum(o**2) + jnp.sum(jnp.where(lse == -jnp.inf, 0.0, lse))

    ours = jax.grad(loss, argnums=(0, 1))(q, cache, backend)
    want = jax.grad(loss, argnums=(0, 1))(q, cache, "xla")
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        assert np.abs(np.asarray(b)).max() > 0
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-4, atol=2e-5)


def test_a_kernel_is_traced_once_for_all_layers(monkeypatch):
    """And outside a program not anew at each call."""
    kernel, traced = attention._attention_kernel, []

    def counted(**refs):
        traced.append(refs)
        kernel(**refs)

    monkeypatch.setattr(attention, "_attention_kernel", counted)
    q, cache, table = decode_arguments([40, 17, 33])
    heads = dict(num_qo_heads=q.shape[1], num_kv_heads=cache.num_kv_heads)
    plan = jax.jit(lambda table: ja.plan_decode(table, **heads))(table)

    def layer(q):
        return ja.paged_decode(q, cache, plan, backend="interpret")

    in_one_program = jax.jit(lambda q: layer(layer(layer(q))))(q)
    assert len(traced) == 1
    apart = layer(q)
    with no_compilation():
        apart = layer(layer(apart))
    assert len(traced) == 1
    np.testing.assert_allclose(
        apart.astype(jnp.float32), in_one_program.astype(jnp.float32), **ONE_ULP
    )


def test_lengths_never_recompile():
    traces = []

    @jax.jit
    def step(q, cache, table):
        traces.append(1)
        return decode(q, cache, table, "xla")

    q, cache, _ = decode_arguments([64, 64])
    block_table = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)
    for lens in ([1, 64], [0, 0], [33, 16]):
        step(q, cache, ja.PageTable.from_block_table(block_table, device_array(lens), 16))
    assert len(traces) == 1 and step._cache_size() == 1


def test_prefill_lengths_never_recompile():
    q, _, cache, _, k, v = prefill_arguments()
    block_table = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)
    step = jax.jit(functools.partial(prefills, backend="xla"))
    for qo_lens, kv_lens in (([0, 0], [0, 0]), ([10, 0], [48, 1]), ([1, 4], [1, 30])):
        qo_indptr = i32(np.concatenate([[0], np.cumsum(qo_lens)]))
        kv_len = i32(kv_lens)
        step(q, qo_indptr, cache, ja.PageTable.from_block_table(block_table, kv_len, 16), k, v)
    assert step._cache_size() == 1


ERRORS = [
    (
        lambda q, c, t, p: ja.paged_decode(q[:1], c, p),
        ValueError,
        r"q must have shape \[2, 4, head",
    ),
    (lambda q, c, t, p: ja.paged_decode(q[:, :2], c, p), ValueError, "q must have shape"),
    (lambda q, c, t, p: ja.paged_decode(q[..., :32], c, p), ValueError, "must have head_dim=32"),
    (
        lambda q, c, t, p: ja.paged_decode(q.astype(jnp.float32), c, p),
        TypeError,
        "q and paged_kv_cache must have the same dtype",
    ),
    (
        lambda q, c, t, p: ja.paged_decode(q.astype(jnp.int32), c, p),
        TypeError,
        "q must be one of float16",
    ),
    (
        lambda q, c, t, p: ja.paged_decode(q, ja.PagedKVCache.zeros(4, 8, 2, 64, jnp.bfloat16), p),
        ValueError,
        "must have page_size=16, as plan; got page_size=8",
    ),
    (
        lambda q, c, t, p: ja.paged_decode(q, ja.PagedKVCache.zeros(4, 16, 4, 64, jnp.bfloat16), p),
        ValueError,
        "must have num_kv_heads=2",
    ),
    (lambda q, c, t, p: ja.paged_decode(q, c, t), TypeError, "plan must come from plan_decode"),
    (lambda q, c, t, p: ja.paged_prefill(q, c, p), TypeError, "plan must come from plan_prefill"),
    (lambda q, c, t, p: ja.paged_decode(q, c, p, sm_scale=0.0), ValueError, "must be positive"),
    (
        lambda q, c, t, p: ja.paged_decode(q, c, p, backend="cuda"),
        ValueError,
        "backend must be one of None, 'triton'",
    ),
    (
        lambda q, c, t, p: jax.jit(lambda s: ja.paged_decode(q, c, p, sm_scale=s))(1.0),
        TypeError,
        "sm_scale must be a Python float",
    ),
]


@pytest.mark.parametrize("call,error,message", ERRORS)
def test_errors(call, error, message):
    q, cache, table = decode_arguments([20, 3])
    plan = ja.plan_decode(table, page_size=16, num_qo_heads=4, num_kv_heads=2)
    with pytest.raises(error, match=message):
        call(q, cache, table, plan)


def test_plans_of_the_other_kind_of_keys_are_errors():
    q, cache, table = decode_arguments([20, 3])
    indptr = i32([0, 1, 2])
    heads = dict(num_qo_tokens=2, num_qo_heads=4, num_kv_heads=2)
    ragged = ja.plan_ragged_prefill(indptr, indptr, **heads)
    paged = ja.plan_prefill(indptr, table, page_size=16, **heads)
    with pytest.raises(ValueError, match="use plan_prefill"):
        ja.paged_prefill(q, cache, ragged)
    with pytest.raises(ValueError, match="use plan_ragged_prefill"):
        ja.ragged_prefill(q, q[:, :2], q[:, :2], paged)
    with pytest.raises(ValueError, match=r"k must have shape \[num_kv_tokens, 2, 64\]"):
        ja.ragged_prefill(q, q, q, ragged)
    with pytest.raises(ValueError, match="kv_layout must be one of"):
        ja.ragged_prefill(q, q, q, ragged, kv_layout="NDH")
    k = q[:, :2]
    with pytest.raises(ValueError, match=r"v must have shape \[2, 2, head_dim of v\]"):
        ja.ragged_prefill(q, k, k[:1], ragged)
    with pytest.raises(TypeError, match="q and k and v must have the same dtype"):
        ja.ragged_prefill(q, k, k.astype(jnp.float32), ragged)
    with pytest.raises(TypeError, match="q must be one of float16"):
        ja.ragged_prefill(q.astype(jnp.int32), k, k, ragged)
    with pytest.raises(ValueError, match=r"q must have shape \[2, 4, head_dim\]; got \[1"):
        ja.paged_prefill(q[:1], cache, paged)
    with pytest.raises(ValueError, match="must be positive"):
        ja.paged_prefill(q, cache, paged, sm_scale=-1.0)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the error of a machine without a GPU")
def test_triton_without_a_gpu_says_what_can_run():
    q, cache, table = decode_arguments([20, 3])
    with pytest.raises(ValueError, match="needs an NVIDIA GPU.*'xla', 'interpret'"):
        decode(q, cache, table, "triton")


@pytest.mark.slow
@pytest.mark.parametrize("backend", [None, "interpret"])
def test_numpy_arrays_and_x64(backend):
    """Index arrays may come from NumPy, and a program may run with 64-bit types enabled."""
    q, cache, table = decode_arguments([40, 300, 0])
    want = decode(q, cache, table, "xla")
    table = ja.PageTable(*(np.asarray(x) for x in jax.tree.leaves(table)))
    with jax.enable_x64(True):
        plan = ja.plan_decode(table, page_size=16, num_qo_heads=4, num_kv_heads=2)
        got = ja.paged_decode(q, cache, plan, return_lse=True, backend=backend)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(
            np.asarray(a.astype(jnp.float32)), np.asarray(b.astype(jnp.float32)), atol=5e-3
        )


@pytest.mark.parametrize("backend", SLOW_INTERPRETED)
def test_nothing_to_attend_to(backend):
    """No query tokens; and requests without any page or key."""
    _, cache, _ = decode_arguments([16])
    empty = jnp.zeros(0, jnp.int32)
    none = ja.PageTable(jnp.zeros(3, jnp.int32), empty, jnp.zeros(2, jnp.int32))
    q = jnp.ones((2, 4, 64), cache.dtype)
    o, lse = decode(q, cache, none, backend)
    assert not np.asarray(o.astype(jnp.float32)).any() and np.isneginf(np.asarray(lse)).all()
    heads = dict(num_qo_heads=4, num_kv_heads=2)
    indptr = jnp.zeros(3, jnp.int32)
    plan = ja.plan_prefill(indptr, none, page_size=16, num_qo_tokens=0, **heads)
    assert ja.paged_prefill(q[:0], cache, plan, backend=backend).shape == (0, 4, 64)
    plan = ja.plan_ragged_prefill(indptr, indptr, num_qo_tokens=2, **heads)
    o = ja.ragged_prefill(q, q[:0, :2], q[:0, :2], plan, backend=backend)
    assert not np.asarray(o.astype(jnp.float32)).any()


@pytest.mark.slow
def test_rows_cut_off_from_q_move_nothing():
    """With fewer rows in q than qo_indptr speaks of, the rows that are there stay what they were."""
    _, cache, table = decode_arguments([24])
    q = device_array(np.random.default_rng(0).standard_normal((6, 4, 64)), cache.dtype)

    @functools.partial(jax.jit, static_argnames="backend")
    def prefill(q, backend):
        plan = ja.plan_prefill(
            i32([0, 6]),
            table,
            page_size=16,
            num_qo_tokens=q.shape[0],
            num_qo_heads=4,
            num_kv_heads=2,
        )
        return ja.paged_prefill(q, cache, plan, backend=backend).astype(jnp.float32)

    for backend in BACKENDS:
        np.testing.assert_allclose(prefill(q[:3], backend), prefill(q, backend)[:3], **ONE_ULP)
