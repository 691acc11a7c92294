"""begin_step and attend against dense attention: a model's layers over prompts, chunks, drafts and decode steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import device_array, i32, i32s
from jax.sharding import PartitionSpec as P
from rowwise import assert_no_copy, compile_in_place, normal, on_host, same, two_devices

import jaxattn as ja

ON_GPU = pytest.param("triton", marks=pytest.mark.gpu)
BACKENDS = ["xla", "interpret", ON_GPU]
SLOW_INTERPRETED = ["xla", pytest.param("interpret", marks=pytest.mark.slow), ON_GPU]
f32 = jnp.float32
PAGE_SIZE, HEADS, KV_HEADS, HEAD_DIM, WIDTH = 4, 4, 2, 32, 6
SIZES = dict(page_size=PAGE_SIZE, num_qo_heads=HEADS, num_kv_heads=KV_HEADS)
TABLE = ja.precompute_freqs_cis(HEAD_DIM, 64)


def tokens(n, seed=0):
    """q, k and v of a request's n tokens, as projections leave them."""
    heads = normal((n, HEADS + 2 * KV_HEADS, HEAD_DIM), seed=seed)
    return tuple(jnp.split(heads, (HEADS, HEADS + KV_HEADS), axis=1))


def dense(q, k, v, window_left=None):
    """Causal attention of one request's n tokens after rotary embedding, in float64."""
    n, half = q.shape[0], HEAD_DIM // 2
    cos, sin = np.split(np.asarray(TABLE, np.float64)[:n, None], 2, axis=-1)

    def rotated(x):
        x1, x2 = np.asarray(x, np.float64)[..., :half], np.asarray(x, np.float64)[..., half:]
        return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)

    group = HEADS // KV_HEADS
    k, v = np.repeat(rotated(k), group, axis=1), np.repeat(np.asarray(v, np.float64), group, axis=1)
    i, j = np.arange(n)[:, None], np.arange(n)[None, :]
    seen = (j <= i) & (j >= i - (n if window_left is None else window_left))
    logits = np.einsum("thd,shd->hts", rotated(q), k) / np.sqrt(HEAD_DIM)
    weights = np.where(seen, np.exp(logits), 0)
    return np.einsum("hts,shd->thd", weights / weights.sum(axis=-1, keepdims=True), v)


attend = jax.jit(
    ja.attend, static_argnames=("is_neox", "eps", "sm_scale", "logits_soft_cap", "backend")
)


@dataclasses.dataclass
class Server:
    """Requests whose steps are compared with what dense attention says of all their tokens."""

    backend: str
    kv_len: jax.Array
    cache: ja.PagedKVCache
    block_table: jax.Array
    requests: list[tuple[jax.Array, ...]]

    @classmethod
    def of(cls, backend, *lengths, seed=0):
        """A cache of NaN, on permuted pages."""
        b = len(lengths)
        cache = ja.PagedKVCache.zeros(b * WIDTH + 2, PAGE_SIZE, KV_HEADS, HEAD_DIM, f32)
        pages = np.random.default_rng(seed).permutation(b * WIDTH + 2)[: b * WIDTH]
        return cls(
            backend,
            jnp.zeros(b, jnp.int32),
            jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), cache),
            i32(pages.reshape(b, WIDTH)),
            [tokens(n, seed=seed + i) for i, n in enumerate(lengths)],
        )

    def step(self, t, begins, counts, windows=(None,)):
        """counts[i] next tokens of request i, from column begins[i] of t columns; padding is NaN. o of each window."""
        valid = np.zeros((len(counts), t), bool)
        arrays = [
            np.full((*valid.shape, *x.shape[1:]), np.nan, np.float32) for x in self.requests[0]
        ]
        for i, (begin, count) in enumerate(zip(begins, counts, strict=True)):
            valid[i, begin : begin + count] = True
            done = int(self.kv_len[i])
            for x, own in zip(arrays, self.requests[i], strict=True):
                x[i, begin : begin + count] = own[done : done + count]
        args = [device_array(x) for x in (valid, *arrays)]
        outs, self.cache, self.kv_len = program(
            *args, self.kv_len, self.block_table, self.cache, windows=windows, backend=self.backend
        )
        for window, o in zip(windows, outs, strict=True):
            o = on_host(o)
            assert not o[~valid].any()
            for i, (begin, count) in enumerate(zip(begins, counts, strict=True)):
                end = int(self.kv_len[i])
                want = dense(*(x[:end] for x in self.requests[i]), window)[end - count :]
                np.testing.assert_allclose(o[i, begin : begin + count], want, atol=2e-5)


@functools.partial(jax.jit, static_argnames=("windows", "backend"))
def program(valid, q, k, v, kv_len, block_table, cache, *, windows, backend):
    step = ja.begin_step(valid, kv_len, block_table, window_left=windows[0], **SIZES)
    outs = []
    for window in windows:
        own = step if window == windows[0] else step.with_window(window)
        o, cache = ja.attend(q, k, v, cache, own, rope=TABLE, backend=backend)
        outs.append(o)
    return outs, cache, step.kv_len


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_prompts_chunks_drafts_and_decode(side, backend):
    server = Server.of(backend, 20, 9, 14)

    def step(t, *counts):
        free = [t - n for n in counts]
        begins = [{"left": n, "right": 0, "both": n // 2}[side] for n in free]
        server.step(t, begins, counts)

    step(9, 9, 5, 1)  # prompts
    step(9, 5, 0, 9)  # a chunk of two, nothing of the third
    for counts in ((1, 1, 1), (1, 0, 0), (0, 1, 1)):
        step(1, *counts)
    step(9, 3, 2, 0)  # drafts
    assert server.kv_len.tolist() == [19, 9, 12]


@pytest.mark.parametrize("backend", SLOW_INTERPRETED)
def test_windows_share_a_step(backend):
    server = Server.of(backend, 20, 9)
    server.step(16, (0, 7), (16, 8), windows=(None, 5, 0))
    server.step(1, (0, 0), (1, 1), windows=(3, None))


@pytest.mark.parametrize("backend", SLOW_INTERPRETED)
def test_fields(backend):
    """A model's own rotary embedding reads positions; the next step begins with kv_len."""
    valid = device_array([[0, 1, 1], [1, 1, 0], [0, 0, 0], [1, 1, 1]], bool)
    step = ja.begin_step(
        valid, i32s(5, 0, 7, 2), jnp.arange(24, dtype=jnp.int32).reshape(4, 6), **SIZES
    )
    assert step.batch_indices.tolist() == [[-1, 0, 0], [1, 1, -1], [-1] * 3, [3, 3, 3]]
    assert step.positions.tolist() == [[0, 5, 6], [0, 1, 0], [0, 0, 0], [2, 3, 4]]
    assert step.kv_len.tolist() == [7, 2, 7, 5]
    assert step.page_table.kv_len().tolist() == [7, 2, 0, 5]

    # Rotated outside, by positions, it is what the fused op makes of it.
    q, k, v = (normal((4, 3, h, HEAD_DIM), seed=h) for h in (HEADS, KV_HEADS, KV_HEADS + 1))
    v = v[:, :, :KV_HEADS]
    cache = ja.PagedKVCache.zeros(24, PAGE_SIZE, KV_HEADS, HEAD_DIM, f32)
    flat = lambda x: x.reshape(12, *x.shape[2:])  # noqa: E731
    rotated = ja.apply_rope_with_cos_sin_cache(
        step.positions.reshape(-1), flat(q), flat(k), HEAD_DIM, TABLE, False, backend=backend
    )
    own = attend(
        *(x.reshape(y.shape) for x, y in zip(rotated, (q, k))), v, cache, step, backend=backend
    )
    how = dict(rope=TABLE, is_neox=False, backend=backend)
    fused = attend(q, k, v, cache, step, **how)
    for x, y in zip(jax.tree.leaves(own), jax.tree.leaves(fused), strict=True):
        np.testing.assert_allclose(on_host(x), on_host(y), atol=1e-5)
    # rope_positions rotate apart from the slots.
    assert same(attend(q, k, v, cache, step, rope_positions=step.positions, **how), fused)
    turned = attend(q, k, v, cache, step, rope_positions=step.positions + 3, **how)
    np.testing.assert_allclose(
        on_host(turned[0]), on_host(fused[0]), atol=1e-5
    )  # relative: as it was
    assert not same(turned[1], fused[1])


@pytest.mark.parametrize(
    "how", [dict(), dict(fixed_split_size=2), dict(disable_split_kv=True)], ids=str
)
def test_plans_are_those_of_their_arguments(how):
    """Of a decode step, also after `with_window`, which keeps how keys are split."""
    step = ja.begin_step(
        jnp.ones((2, 1), bool),
        i32s(40, 7),
        jnp.arange(24, dtype=jnp.int32).reshape(2, 12),
        window_left=9,
        **SIZES,
        **how,
    )
    heads = dict(num_qo_heads=HEADS, num_kv_heads=KV_HEADS)
    for window in (9, None, 30):
        own = step if window == 9 else step.with_window(window)
        want = ja.plan_decode(step.page_table, window_left=window, **heads, **how)
        assert jax.tree.structure(own.plan) == jax.tree.structure(want)
        assert same(own.plan, want)


@pytest.mark.parametrize("backend", SLOW_INTERPRETED)
def test_norms_caps_and_sinks_reach_the_ops(backend):
    q, k, v = (x[None] for x in tokens(7))
    step = ja.begin_step(jnp.ones((1, 7), bool), i32s(0), i32s(3, 1)[None], **SIZES)
    cache = ja.PagedKVCache.zeros(4, PAGE_SIZE, KV_HEADS, HEAD_DIM, f32)
    weights = [normal((HEAD_DIM,), seed=i) for i in (7, 8)]
    o, _ = attend(
        q,
        k,
        v,
        cache,
        step,
        rope=TABLE,
        q_norm_weight=weights[0],
        k_norm_weight=weights[1],
        eps=1e-5,
        sm_scale=0.3,
        logits_soft_cap=2.0,
        sinks=normal((HEADS,), seed=6),
        backend=backend,
    )
    normed = [
        ja.rmsnorm(x[0].reshape(-1, HEAD_DIM), w, 1e-5, backend="xla").reshape(x[0].shape)
        for x, w in zip((q, k), weights)
    ]
    positions = jnp.arange(7, dtype=jnp.int32)
    normed = ja.apply_rope_with_cos_sin_cache(positions, *normed, HEAD_DIM, TABLE, backend="xla")
    want = ja.dot_product_attention(
        *normed,
        v[0],
        is_causal=True,
        scale=0.3,
        logits_soft_cap=2.0,
        sinks=normal((HEADS,), seed=6),
        backend="xla",
    )
    np.testing.assert_allclose(on_host(o[0]), on_host(want), atol=2e-5)


@pytest.mark.parametrize("backend", SLOW_INTERPRETED)
@pytest.mark.parametrize("t", [1, 5])
def test_every_form_of_a_cache(t, backend):
    """A tuple comes back as a tuple, leaves that begin with the batch as they were; all hold the same numbers."""
    q, k, v = (
        normal((3, t, h, HEAD_DIM), seed=i) for i, h in enumerate((HEADS, KV_HEADS, KV_HEADS))
    )
    step = ja.begin_step(
        jnp.ones((3, t), bool),
        i32s(0, 2, 11),
        jnp.arange(12, dtype=jnp.int32).reshape(3, 4),
        **SIZES,
    )
    pool = tuple(normal((12, PAGE_SIZE, KV_HEADS, HEAD_DIM), seed=i) for i in (5, 6))
    by_batch = tuple(x.reshape(3, 4, *x.shape[1:]) for x in pool)
    o, cache = attend(q, k, v, ja.PagedKVCache(pool), step, backend=backend)
    for given in (pool, by_batch, ja.PagedKVCache(by_batch)):
        got_o, got = attend(q, k, v, given, step, backend=backend)
        assert same(got_o, o)
        assert jax.tree.structure(got) == jax.tree.structure(given)
        assert [x.shape for x in jax.tree.leaves(got)] == [x.shape for x in jax.tree.leaves(given)]
        assert same([x.reshape(y.shape) for x, y in zip(jax.tree.leaves(got), pool)], cache)


@pytest.mark.parametrize("backend", SLOW_INTERPRETED)
def test_programs(backend):
    """while_loop over steps, scan over layers, vmap over models: as a loop in Python, and traced once each."""
    layers, b = 2, 2
    q, k, v = (
        normal((layers, b, 1, h, HEAD_DIM), seed=i)
        for i, h in enumerate((HEADS, KV_HEADS, KV_HEADS))
    )
    pages = tuple(
        jnp.full((layers, b * WIDTH, PAGE_SIZE, KV_HEADS, HEAD_DIM), jnp.nan) for _ in "kv"
    )
    block_table = jnp.arange(b * WIDTH, dtype=jnp.int32).reshape(b, WIDTH)
    traced = []

    def layer(carry, xs):
        x, step = carry
        q, k, v, cache = xs
        traced.append("layer")
        o, cache = ja.attend(
            q + x, k + x[:, :, :KV_HEADS], v, cache, step, rope=TABLE, backend=backend
        )
        return (x + o, step), cache

    def one_step(state, q, k, v):
        x, kv_len, caches = state
        step = ja.begin_step(jnp.ones((b, 1), bool), kv_len, block_table, **SIZES)
        (x, _), caches = jax.lax.scan(layer, (x, step), (q, k, v, caches))
        return x, step.kv_len, caches

    def loop(q, k, v):
        start = jnp.zeros((b, 1, HEADS, HEAD_DIM)), i32s(0, 0), pages
        return jax.lax.while_loop(
            lambda s: jnp.any(s[1] < 7), lambda s: one_step(s, q, k, v), start
        )

    models = [jnp.stack([x, -x]) for x in (q, k, v)]
    x, kv_len, caches = jax.jit(jax.vmap(loop))(*models)
    assert len(traced) <= 2  # while_loop looks at its body once, or once more for types
    assert kv_len.tolist() == [[7, 7]] * 2
    one = jax.jit(one_step)
    for i in range(2):
        state = jnp.zeros((b, 1, HEADS, HEAD_DIM)), i32s(0, 0), pages
        for _ in range(7):
            state = one(state, *(m[i] for m in models))
        np.testing.assert_allclose(on_host(x[i]), on_host(state[0]), atol=1e-4)
        for a, c in zip(jax.tree.leaves(caches), jax.tree.leaves(state[2])):
            np.testing.assert_allclose(on_host(a[i]), on_host(c), atol=1e-4)


@pytest.mark.parametrize("backend", SLOW_INTERPRETED)
def test_vmap_of_prefill(backend):
    """Over models, whose prompts are padded differently."""
    arrays = [
        normal((2, 2, 5, h, HEAD_DIM), seed=i) for i, h in enumerate((HEADS, KV_HEADS, KV_HEADS))
    ]
    valid = device_array([[[0, 1, 1, 1, 1], [1] * 5], [[1, 0, 0, 0, 0], [0, 0, 1, 1, 0]]], bool)
    pages = ja.PagedKVCache.zeros(12, PAGE_SIZE, KV_HEADS, HEAD_DIM, f32)
    block_table = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)

    def op(valid, kv_len, q, k, v):
        step = ja.begin_step(valid, kv_len, block_table, **SIZES).with_window(4)
        return *ja.attend(q, k, v, pages, step, rope=TABLE, backend=backend), step.kv_len

    args = (valid, i32s(0, 7, 3, 0).reshape(2, 2), *arrays)
    got, op = jax.jit(jax.vmap(op))(*args), jax.jit(op)
    for i in range(2):
        want = op(*(x[i] for x in args))
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(on_host(x[i]), on_host(y), atol=1e-5)


@pytest.mark.parametrize("t", [1, 5])
def test_layers_that_each_begin_the_step_share_it(t):
    """XLA sees that their plans are one: the program is no longer than where it begins once."""
    arrays = [
        normal((2, t, h, HEAD_DIM), seed=i) for i, h in enumerate((HEADS, KV_HEADS, KV_HEADS))
    ]
    caches = [ja.PagedKVCache.zeros(12, PAGE_SIZE, KV_HEADS, HEAD_DIM, f32)] * 3
    block_table = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)

    def instructions(each):
        def model(q, k, v, kv_len, valid, caches):
            for i, cache in enumerate(caches):
                if each or i == 0:
                    step = ja.begin_step(valid, kv_len, block_table, **SIZES)
                o, _ = ja.attend(q, k, v, cache, step, backend="xla")
                q = q + o
            return q

        valid = jnp.ones((2, t), bool)
        compiled = jax.jit(model).lower(*arrays, i32s(3, 9), valid, caches).compile()
        return compiled.as_text().count(" = ")

    assert instructions(each=True) == instructions(each=False)


@pytest.mark.parametrize("by_batch", [False, True])
@pytest.mark.parametrize("t", [1, 8])
def test_a_donated_cache_is_written_in_place(t, by_batch):
    q, k, v = (normal((4, t, h, 64), seed=i) for i, h in enumerate((4, 2, 2)))
    lead = (4, 64) if by_batch else (256,)
    cache = tuple(jnp.zeros((*lead, 16, 2, 64)) for _ in "kv")
    table = ja.precompute_freqs_cis(64, 1024)

    def run(cache, q, k, v, kv_len):
        step = ja.begin_step(
            jnp.ones((4, t), bool),
            kv_len,
            jnp.arange(256, dtype=jnp.int32).reshape(4, 64),
            page_size=16,
            num_qo_heads=4,
            num_kv_heads=2,
        )
        return ja.attend(q, k, v, cache, step, rope=table)

    compiled = compile_in_place(run, (0,), cache, q, k, v, i32s(0, 5, 100, 900))
    if jax.default_backend() == "gpu":
        assert_no_copy(compiled)


def test_heads_of_two_devices():
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    q, k, v = (
        normal((2, 3, h, HEAD_DIM), seed=i) for i, h in enumerate((HEADS, KV_HEADS, KV_HEADS))
    )
    cache = tuple(normal((4, PAGE_SIZE, KV_HEADS, HEAD_DIM), seed=i) for i in (5, 6))

    def run(devices, q, k, v, cache):
        step = ja.begin_step(
            jnp.ones((2, 3), bool),
            i32s(1, 4),
            i32s(0, 1, 2, 3).reshape(2, 2),
            page_size=PAGE_SIZE,
            num_qo_heads=HEADS // devices,
            num_kv_heads=KV_HEADS // devices,
        )
        return ja.attend(q, k, v, cache, step, rope=TABLE, backend="xla")

    heads = P(None, None, "x")
    sharded = jax.shard_map(
        functools.partial(run, 2), mesh=two_devices(), in_specs=(heads,) * 4, out_specs=heads
    )
    got, want = jax.jit(sharded)(q, k, v, cache), jax.jit(functools.partial(run, 1))(q, k, v, cache)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(on_host(x), on_host(y), atol=1e-5)


def make_step(valid=None, kv_len=None, block_table=None, **sizes):
    valid = jnp.ones((2, 3), bool) if valid is None else valid
    kv_len = i32s(1, 4) if kv_len is None else kv_len
    block_table = i32s(0, 1, 2, 3).reshape(2, 2) if block_table is None else block_table
    return ja.begin_step(valid, kv_len, block_table, **(SIZES | sizes))


@pytest.mark.parametrize(
    "error,message,change",
    [
        (TypeError, "valid must be bool", dict(valid=jnp.ones((2, 3)))),
        (ValueError, "valid must have shape", dict(valid=jnp.ones(3, bool))),
        (ValueError, "at least one row", dict(valid=jnp.ones((2, 0), bool))),
        (
            ValueError,
            "one run of tokens in each row; row 1",
            dict(valid=np.array([[0, 1, 1], [1, 0, 1]], bool)),
        ),
        (TypeError, "kv_len must be int32", dict(kv_len=jnp.ones(2))),
        (ValueError, "kv_len must have shape", dict(kv_len=i32s(1))),
        (ValueError, r"kv_len must be in \[0, 8\]", dict(kv_len=np.array([1, 9], np.int32))),
        (
            ValueError,
            r"\(kv_len \+ valid.sum\(axis=1\)\)\[1\]=9",
            dict(valid=np.ones((2, 3), bool), kv_len=np.array([5, 6], np.int32)),
        ),
        (ValueError, "block_table must have shape", dict(block_table=i32s(1, 2))),
        (TypeError, "block_table must be int32", dict(block_table=jnp.ones((2, 2)))),
        (
            ValueError,
            "page_size must be a positive integer; got None",
            dict(page_size=None, kv_len=np.array([1, 4], np.int32)),
        ),
        (ValueError, "num_kv_heads", dict(num_kv_heads=3)),
        (ValueError, "window_left must be", dict(window_left=-3)),
        (ValueError, "choose one", dict(fixed_split_size=2, disable_split_kv=True)),
    ],
)
def test_errors_of_begin_step(error, message, change):
    with pytest.raises(error, match=message):
        make_step(**change)


@pytest.mark.parametrize(
    "error,message,change",
    [
        (TypeError, "step must come from begin_step; got tuple", dict(step=())),
        (ValueError, r"q must have shape \[2, 3, 4, head_dim\]", dict(q=jnp.zeros((2, 3, 2, 32)))),
        (ValueError, "k must have shape", dict(k=jnp.zeros((2, 3, 2, 16)))),
        (ValueError, "v must have shape", dict(v=jnp.zeros((2, 4, 2, 32)))),
        (TypeError, r"PagedKVCache or a tuple \(k, v\).*got dict", dict(paged_kv_cache={})),
        (ValueError, "k pages must have shape", dict(paged_kv_cache=(jnp.zeros((4, 4, 2)),) * 2)),
        (ValueError, "is_neox has no effect without rope", dict(is_neox=False)),
        (
            ValueError,
            "rope_positions has no effect without rope",
            dict(rope_positions=jnp.zeros((2, 3), jnp.int32)),
        ),
        (ValueError, "q_norm_weight has no effect without rope", dict(q_norm_weight=jnp.ones(32))),
        (ValueError, "rope_positions must have shape", dict(rope=TABLE, rope_positions=i32s(1, 2))),
        (TypeError, "same dtype", dict(q=jnp.zeros((2, 3, 4, 32), jnp.bfloat16))),
    ],
)
def test_errors_of_attend(error, message, change):
    args = dict(
        q=jnp.zeros((2, 3, 4, 32)),
        k=jnp.zeros((2, 3, 2, 32)),
        v=jnp.zeros((2, 3, 2, 32)),
        paged_kv_cache=ja.PagedKVCache.zeros(4, PAGE_SIZE, KV_HEADS, HEAD_DIM, f32),
        step=make_step(),
    )
    with pytest.raises(error, match=message):
        ja.attend(**(args | change))
