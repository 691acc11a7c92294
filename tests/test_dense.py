"""dot_product_attention against jax.nn's own, over the arguments that both have."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import device_array, i32s
from jax.sharding import PartitionSpec as P
from rowwise import normal, on_host, two_devices

import jaxattn as ja

ON_GPU = pytest.param("triton", marks=pytest.mark.gpu)
BACKENDS = ["xla", "interpret", ON_GPU]
SLOW_INTERPRETED = ["xla", pytest.param("interpret", marks=pytest.mark.slow), ON_GPU]
f16, bf16, f32 = jnp.float16, jnp.bfloat16, jnp.float32
TOLERANCE = {f32: 2e-5, f16: 2e-3, bf16: 1e-2}


def make(b, t, s, n, k, h=32, dtype=f32, seed=0):
    q = normal((b, t, n, h), dtype, seed=seed)
    return q, *(normal((b, s, k, h), dtype, seed=seed + i) for i in (1, 2))


def holes(*shape, seed=0):
    """A random bool mask; every query sees a key, or jax.nn's result would have no meaning."""
    mask = np.random.default_rng(seed).random(shape) < 0.6
    mask[..., 0] = True
    return device_array(mask)


def left_padded(s, *lengths):
    return device_array(np.arange(s)[None, :] >= s - np.asarray(lengths)[:, None])[:, None, None, :]


@functools.partial(
    jax.jit,
    static_argnames=("scale", "is_causal", "local_window_size", "return_residual", "backend"),
)
def ours(q, k, v, **how):
    return ja.dot_product_attention(q, k, v, **how)


@functools.partial(
    jax.jit, static_argnames=("scale", "is_causal", "local_window_size", "return_residual")
)
def theirs(q, k, v, **how):
    """In float32."""
    with jax.default_matmul_precision("highest"):
        return jax.nn.dot_product_attention(*(x.astype(f32) for x in (q, k, v)), **how)


def check(q, k, v, *, backend, seen=None, **how):
    """seen: bool [B, T], the rows that see a key; the others must be 0."""
    o = ours(q, k, v, backend=backend, **how)
    want = on_host(theirs(q, k, v, **how))
    assert o.dtype == q.dtype and o.shape == want.shape
    o = on_host(o)
    if seen is not None:
        assert not o[~seen].any()
        o, want = o[seen], want[seen]
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(o, want, rtol=TOLERANCE[q.dtype.type], atol=TOLERANCE[q.dtype.type])


# Decode: one query over a cache.
DECODE = [
    (make(2, 1, 128, 4, 4), {}),
    (make(3, 1, 150, 8, 2, 64), dict(key_value_seq_lengths=i32s(1, 150, 77))),
    (make(2, 1, 37, 6, 2, 80), dict(local_window_size=(3, 20), scale=0.5)),
    (make(2, 1, 37, 4, 1, dtype=bf16), dict(is_causal=True)),
    (make(3, 1, 150, 4, 2, dtype=f16), dict(mask=left_padded(150, 150, 3, 129))),
    (make(2, 1, 300, 4, 1), dict(mask=holes(2, 1, 1, 300))),
    (
        make(2, 1, 40, 4, 4),
        dict(mask=holes(1, 1, 1, 40), key_value_seq_lengths=i32s(9, 40), local_window_size=(0, 30)),
    ),
    (make(2, 1, 37, 2, 2), dict(mask=jnp.ones((1, 1, 1, 1), bool))),
]

# Prefill: as many queries as keys, fewer (a chunk's first rows), or more.
PREFILL = [
    (make(2, 128, 128, 4, 4), {}),
    (make(2, 128, 128, 4, 2), dict(is_causal=True)),
    (make(2, 40, 150, 4, 1), dict(is_causal=True, local_window_size=(17, 5))),
    (make(2, 150, 40, 2, 1, 64), dict(local_window_size=120, scale=0.5)),
    (
        make(2, 64, 72, 4, 2, dtype=f16),
        dict(query_seq_lengths=i32s(32, 1), key_value_seq_lengths=i32s(30, 72)),
    ),
    (
        make(2, 64, 64, 4, 4, dtype=bf16),
        dict(query_seq_lengths=i32s(64, 20), key_value_seq_lengths=i32s(64, 20), is_causal=True),
    ),
    (make(2, 64, 64, 4, 2), dict(mask=holes(2, 1, 64, 64))),
    (make(2, 64, 150, 4, 2, dtype=bf16), dict(mask=holes(1, 1, 64, 150), is_causal=True)),
    (
        make(2, 33, 65, 6, 2),
        dict(
            mask=holes(2, 1, 33, 65),
            query_seq_lengths=i32s(33, 7),
            key_value_seq_lengths=i32s(65, 50),
        ),
    ),
    (make(2, 64, 64, 4, 1), dict(mask=holes(2, 1, 1, 64), is_causal=True)),
    (make(2, 40, 64, 4, 4), dict(mask=holes(1, 1, 1, 64), local_window_size=(50, 9))),
    (
        make(3, 33, 33, 4, 2),
        dict(mask=holes(3, 1, 1, 33), is_causal=True, query_seq_lengths=i32s(33, 1, 12)),
    ),
    (make(2, 20, 20, 2, 2), dict(mask=holes(2, 1, 20, 1) | True)),
]


def named(cases):
    return [
        pytest.param(*case, id="-".join([str(case[0][0].shape), case[0][0].dtype.name, *case[1]]))
        for case in cases
    ]


@pytest.mark.parametrize("backend", SLOW_INTERPRETED)
@pytest.mark.parametrize("arrays,how", named(DECODE + PREFILL))
def test_it_is_jax_nns(arrays, how, backend):
    seen = None
    if "query_seq_lengths" in how:
        length = np.asarray(how["query_seq_lengths"])
        seen = np.arange(arrays[0].shape[1])[None, :] < length[:, None]
    check(*arrays, **how, seen=seen, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("t", [1, 40])
def test_padded_prompts(t, is_causal, backend):
    """As models call it: a mask of keys in prefill and in decode, padding left or right; rows that see none are 0."""
    real = np.ones((3, 40), bool)
    real[0, :15] = real[1, 33:] = False
    mask = device_array(real)[:, None, None, :]
    seen = None
    if is_causal:
        seen = np.cumsum(real, axis=1)[:, :t] > 0
    check(*make(3, t, 40, 4, 2), mask=mask, is_causal=is_causal, seen=seen, backend=backend)


def visible(b, t, s, *, mask=None, is_causal=False, local_window_size=None, **lengths):
    """bool [b, t, s]: what each query sees, from its definition."""
    i, j = np.arange(t)[None, :, None], np.arange(s)[None, None, :]
    seen = np.ones((b, t, s), bool)
    if mask is not None:
        seen &= np.asarray(mask)[:, 0]
    if is_causal:
        seen &= j <= i
    if local_window_size is not None:
        seen &= (i - local_window_size[0] <= j) & (j <= i + local_window_size[1])
    for name, at in (("query_seq_lengths", i), ("key_value_seq_lengths", j)):
        if name in lengths:
            seen &= at < np.asarray(lengths[name])[:, None, None]
    return seen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "t,how",
    [
        (1, dict(key_value_seq_lengths=i32s(5, 130))),
        (1, dict(mask=holes(2, 1, 1, 140))),
        (20, dict(is_causal=True)),
        (20, dict(local_window_size=(2, 3))),
        (20, dict(mask=holes(2, 1, 1, 140), is_causal=True)),
        (20, dict(mask=holes(2, 1, 20, 140) & holes(2, 1, 1, 140, seed=1))),
        (20, dict(query_seq_lengths=i32s(20, 3), key_value_seq_lengths=i32s(140, 7))),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_what_no_query_sees_may_be_nan(t, how, backend):
    """Behind the lengths, behind the causal mask, outside of windows, masked out; among keys that are seen."""
    q, k, v = make(2, t, 140, 4, 2)
    unseen = device_array(~visible(2, t, 140, **how).any(axis=1))[..., None, None]
    assert unseen.any()
    want = ours(q, k, v, **how, backend=backend)
    got = ours(q, *(jnp.where(unseen, jnp.nan, x) for x in (k, v)), **how, backend=backend)
    assert not np.isnan(on_host(want)).any()
    np.testing.assert_array_equal(on_host(got), on_host(want))


@pytest.mark.parametrize("backend", SLOW_INTERPRETED)
@pytest.mark.parametrize("t", [1, 9])
def test_queries_without_keys_give_zero(t, backend):
    q, k, v = make(3, t, 20, 4, 2)
    mask = jnp.ones((3, 1, 1, 20), bool).at[1].set(False)
    for how in (dict(mask=mask), dict(key_value_seq_lengths=i32s(20, 0, 3))):
        o, lse = ours(q, k, v, **how, return_residual=True, backend=backend)
        o, lse = on_host(o), on_host(lse)
        assert not o[1].any() and (lse[1] == -np.inf).all()
        assert o[0].all() and o[2].all() and np.isfinite(lse[[0, 2]]).all()
    if t > 1:
        rows = jnp.ones((3, 1, t, 20), bool).at[1].set(False).at[2, :, 4].set(False)
        o = on_host(ours(q, k, v, mask=rows, backend=backend))
        assert not o[1].any() and not o[2, 4].any() and o[2, 3].all() and o[0].all()


@pytest.mark.parametrize("backend", SLOW_INTERPRETED)
@pytest.mark.parametrize("t", [1, 7])
def test_residual_axes_and_value_dims(t, backend):
    q, k, v = make(1, t, 30, 4, 2)
    how = dict(key_value_seq_lengths=i32s(21), return_residual=True)
    want = theirs(q, k, v, **how)
    for x, y in zip(ours(q, k, v, **how, backend=backend), want, strict=True):
        np.testing.assert_allclose(on_host(x), on_host(y), rtol=2e-5, atol=2e-5)
    # Without an axis of requests, and with a head dim of V's own.
    o = ours(q[0], k[0], v[0, ..., :20], key_value_seq_lengths=i32s(21), backend=backend)
    np.testing.assert_allclose(on_host(o), on_host(want[0])[0, ..., :20], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("t", [1, 20])
def test_caps_and_sinks(t, backend):
    """What jax.nn has not: a plain computation in float64."""
    q, k, v = make(2, t, 30, 4, 2)
    sinks = normal((4,), seed=9)
    mask = np.asarray(holes(2, 1, 1, 30))
    o = jax.jit(functools.partial(ja.dot_product_attention, logits_soft_cap=3.0, backend=backend))(
        q, k, v, mask=device_array(mask), sinks=sinks
    )
    q64, k64, v64 = (np.asarray(x, np.float64) for x in (q, k, v))
    k64, v64 = (np.repeat(x, 2, axis=2) for x in (k64, v64))
    logits = 3 * np.tanh(np.einsum("btnh,bsnh->bnts", q64, k64) / np.sqrt(32) / 3)
    weights = np.where(mask, np.exp(logits), 0)
    total = weights.sum(axis=-1, keepdims=True) + np.exp(np.asarray(sinks))[:, None, None]
    want = np.einsum("bnts,bsnh->btnh", weights / total, v64)
    np.testing.assert_allclose(on_host(o), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_ring_cache(backend):
    """The last 8 of 13 tokens, wrapped around: a step of a window's decode, whatever the order of the keys."""
    q, k, v = make(2, 1, 13, 4, 2)
    slots = np.arange(5, 13) % 8
    ring = [jnp.zeros((2, 10, 2, 32)).at[:, slots].set(x[:, 5:]) for x in (k, v)]
    mask = device_array(np.arange(10) < 8)[None, None, None, :]
    o = ours(q, *ring, mask=mask, backend=backend)
    want = theirs(q, k[:, 5:], v[:, 5:])
    np.testing.assert_allclose(on_host(o), on_host(want), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", SLOW_INTERPRETED)
def test_programs(backend):
    """A decode loop over a dense cache: while_loop, a scan over layers in it, and a vmap of it all; traced once."""
    layers, b, s = 2, 2, 24
    q0, k0, v0 = make(b, 1, s, 4, 2, 16)
    traced = []

    def attention(q, k, v, length, how):
        traced.append(how)
        if how == "jax":
            with jax.default_matmul_precision("highest"):  # a GPU's default is TF32
                return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=length)
        if how == "mask":
            mask = (jnp.arange(s)[None, :] < length[:, None])[:, None, None, :]
            return ja.dot_product_attention(q, k, v, mask=mask, backend=backend)
        return ja.dot_product_attention(q, k, v, key_value_seq_lengths=length, backend=backend)

    def decode(x, how):
        def layer(carry, cache):
            x, length = carry
            k, v = (
                jax.vmap(lambda c, new, at: jax.lax.dynamic_update_slice_in_dim(c, new, at, 0))(
                    c, jnp.tanh(x[:, :, :2] * (i + 1)), length - 1
                )
                for i, c in enumerate(cache)
            )
            return (x + attention(x, k, v, length, how), length), (k, v)

        def step(state):
            x, length, caches = state
            (x, _), caches = jax.lax.scan(layer, (x, length + 1), caches)
            return x, length + 1, caches

        caches = tuple(jnp.stack([c] * layers) for c in (k0, v0))
        return jax.lax.while_loop(
            lambda state: jnp.any(state[1] < 12), step, (x, i32s(3, 6), caches)
        )[0]

    xs = jnp.stack([q0, -q0])
    want = jax.jit(jax.vmap(lambda x: decode(x, "jax")))(xs)
    for how in ("lengths", "mask"):
        got = jax.jit(jax.vmap(lambda x, how=how: decode(x, how)))(xs)
        assert traced.count(how) == traced.count("jax")
        np.testing.assert_allclose(on_host(got), on_host(want), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", SLOW_INTERPRETED)
@pytest.mark.parametrize(
    "name,values",
    [
        ("key_value_seq_lengths", [i32s(20, 3), i32s(7, 30)]),
        ("mask", [holes(2, 1, 1, 30), holes(2, 1, 1, 30, seed=1)]),
        ("mask", [holes(2, 1, 9, 30), holes(2, 1, 9, 30, seed=1)]),
    ],
    ids=["lengths", "key mask", "mask"],
)
def test_vmap_of_prefill(name, values, backend):
    q, k, v = make(2, 9, 30, 4, 2)

    def op(scale, x):
        return ours(q, scale * k, v, **{name: x}, local_window_size=(20, 20), backend=backend)

    got = jax.vmap(op)(device_array([1.0, 0.5]), jnp.stack(values))
    for i, (scale, x) in enumerate(zip((1.0, 0.5), values, strict=True)):
        np.testing.assert_allclose(on_host(got[i]), on_host(op(scale, x)), rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["xla", None])
@pytest.mark.parametrize(
    "t,how", [(1, dict(key_value_seq_lengths=i32s(5, 20))), (8, dict(is_causal=True))]
)
def test_gradients(t, how, backend):
    arrays = make(2, t, 20, 4, 2, 16)

    def loss(op, *x):
        return jnp.sum(op(*x, **how) ** 3)

    for i in range(3):
        got, want = (
            jax.jit(jax.grad(functools.partial(loss, op), argnums=i))(*arrays)
            for op in (functools.partial(ja.dot_product_attention, backend=backend), theirs)
        )
        assert np.abs(on_host(want)).max() > 0
        np.testing.assert_allclose(on_host(got), on_host(want), rtol=1e-4, atol=1e-4)


MODES = [
    (4, False, {}),
    (2, True, {}),
    (1, False, {}),
    (4, False, dict(is_causal=True)),
    (4, True, dict(is_causal=True, local_window_size=(3, 2))),
    (4, False, dict(query_seq_lengths=i32s(64, 32), key_value_seq_lengths=i32s(32, 64))),
    (
        4,
        False,
        dict(
            is_causal=True,
            query_seq_lengths=i32s(64, 32),
            key_value_seq_lengths=i32s(32, 64),
        ),
    ),
    (4, True, dict(mask=jnp.tril(jnp.ones((128, 128), bool))[None, None])),
    (4, False, dict(mask=jnp.ones((1, 1, 128), bool))),
    (
        4,
        False,
        dict(
            mask=jnp.tril(jnp.ones((128, 128), bool))[None, None],
            query_seq_lengths=i32s(64, 32),
            key_value_seq_lengths=i32s(32, 64),
        ),
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kv_heads,use_vmap,how", MODES, ids=["-".join([str(k), *how]) for k, _, how in MODES]
)
def test_results_and_derivatives_where_jax_tests_its_own(kv_heads, use_vmap, how):
    """The shapes and masks of JAX's tests of dot_product_attention: padding, causal, custom, windows, vmap, GQA."""
    q, k, v = make(2, 128, 128, 4, kv_heads, dtype=bf16)
    grad = normal((2, 128, 4, 32), bf16, seed=7)

    def run(op, *arrays):
        op = functools.partial(op, **how)
        out, vjp = jax.vjp(jax.vmap(op) if use_vmap else op, *arrays)
        return out, *vjp(grad.astype(out.dtype))

    got = jax.jit(functools.partial(run, ja.dot_product_attention))(q, k, v)
    want = jax.jit(functools.partial(run, theirs))(*(x.astype(f32) for x in (q, k, v)))
    for x, y in zip(got, want, strict=True):
        assert x.dtype == bf16
        np.testing.assert_allclose(on_host(x), on_host(y), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_queries(backend):
    q, k, v = make(2, 0, 20, 4, 2)
    for how in ({}, dict(mask=holes(2, 1, 1, 20)), dict(query_seq_lengths=i32s(0, 0))):
        assert ours(q, k, v, **how, backend=backend).shape == q.shape


def test_nothing_is_copied():
    """No array as large as the cache but the cache itself."""
    q, k, v = make(2, 1, 4096, 4, 2, 64)
    compiled = (
        jax.jit(ja.dot_product_attention)
        .lower(q, k, v, key_value_seq_lengths=i32s(5, 4096))
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < k.nbytes / 2


def test_shard_map():
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    q, k, v = make(2, 1, 30, 4, 2)
    heads = P(None, None, "x")
    op = jax.shard_map(
        functools.partial(ja.dot_product_attention, backend="xla"),
        mesh=two_devices(),
        in_specs=(heads, heads, heads),
        out_specs=heads,
    )
    np.testing.assert_allclose(
        on_host(jax.jit(op)(q, k, v)), on_host(theirs(q, k, v)), rtol=2e-5, atol=2e-5
    )


ERRORS = [
    (ValueError, "bias is not served", dict(bias=jnp.zeros((1, 1, 1, 1)))),
    (ValueError, "implementation='cudnn' is one of jax.nn", dict(implementation="cudnn")),
    (ValueError, "mask must be the same for all heads", dict(mask=jnp.ones((2, 4, 1, 20), bool))),
    (ValueError, "mask must have shape", dict(mask=jnp.ones((2, 1, 1, 19), bool))),
    (ValueError, "mask must have shape", dict(mask=jnp.ones((1, 2, 1, 1, 20), bool))),
    (ValueError, "mask must have shape", dict(mask=jnp.ones((3, 1, 3, 20), bool))),
    (TypeError, "mask must be bool", dict(mask=jnp.ones((2, 1, 1, 20)))),
    (TypeError, "mask must be an array", dict(mask=[True])),
    (ValueError, "local_window_size must be", dict(local_window_size=-1)),
    (ValueError, "local_window_size must be", dict(local_window_size=(3, None))),
    (ValueError, "local_window_size must be", dict(local_window_size=True)),
    (ValueError, "query_seq_lengths must have shape", dict(query_seq_lengths=i32s(1))),
    (TypeError, "key_value_seq_lengths must be int32", dict(key_value_seq_lengths=jnp.ones(2))),
    (ValueError, "key must have shape", dict(key=jnp.zeros((2, 20, 2, 16)))),
    (ValueError, "value must have shape", dict(value=jnp.zeros((2, 19, 2, 32)))),
    (ValueError, "query must have shape", dict(query=jnp.zeros((2, 32)))),
    (TypeError, "must have the same dtype", dict(query=jnp.zeros((2, 3, 4, 32), bf16))),
    (
        ValueError,
        "at least one request and one key",
        dict(key=jnp.zeros((2, 0, 2, 32)), value=jnp.zeros((2, 0, 2, 32))),
    ),
    (ValueError, "^scale must be positive", dict(scale=-1.0)),
    (ValueError, "multiple|divide", dict(query=jnp.zeros((2, 3, 3, 32)))),
]


@pytest.mark.parametrize("error,message,change", ERRORS)
def test_errors(error, message, change):
    q, k, v = make(2, 3, 20, 4, 2)
    args = dict(query=q, key=k, value=v) | change
    with pytest.raises(error, match=message):
        ja.dot_product_attention(**args)


@pytest.mark.parametrize("error,name", [(ValueError, "local_window_size"), (TypeError, "scale")])
def test_what_is_static_must_not_be_traced(error, name):
    def attend(x):
        return ja.dot_product_attention(*make(2, 3, 20, 4, 2), **{name: x})

    with pytest.raises(error, match=f"^{name} must be .* known when the function is traced"):
        jax.jit(attend)(1)
