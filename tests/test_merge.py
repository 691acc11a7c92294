"""Merging attention states against the float32 oracle, and against softmax over all keys."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import device_array
from jax.sharding import PartitionSpec as P
from rowwise import (
    F32_EPS,
    assert_no_copy,
    assert_rounded_once,
    compile_in_place,
    normal,
    on_host,
    same,
    two_devices,
)

import jaxattn as ja
from jaxattn import flashinfer, merge, reference

BACKENDS = ["interpret", "xla"]
# Natural logs where a test does not say otherwise.
merge_state, merge_state_in_place, merge_states = (
    functools.partial(op, lse_base="ln")
    for op in (merge.merge_state, merge.merge_state_in_place, merge.merge_states)
)
f16, bf16, f32 = jnp.float16, jnp.bfloat16, jnp.float32


def make_states(n, states, h, d, dtype, *, spread=5.0):
    """States of which some are empty, their v NaN; row 0 has none but empty ones."""
    v, s = normal((n, states, h, d), dtype), on_host(normal((n, states, h), seed=1, scale=spread))
    s = np.where(np.random.default_rng(2).random(s.shape) < 0.3, -np.inf, s)
    s[0] = -np.inf
    return jnp.where(jnp.isneginf(s)[..., None], jnp.nan, v), device_array(s, f32)


@functools.partial(jax.jit, static_argnames="lse_base")
def truth_of(v, s, lse_base="ln"):
    return reference.merge_states(v.astype(f32), s, lse_base=lse_base)


def assert_state(ours, truth, dtype):
    v, s = ours
    assert_rounded_once(v, truth[0], dtype)
    s, want = np.asarray(s), np.asarray(truth[1])
    assert s.dtype == np.float32
    np.testing.assert_array_equal(np.isneginf(s), np.isneginf(want))
    np.testing.assert_allclose(s, want, rtol=8 * F32_EPS, atol=8 * F32_EPS)


def check_merge_states(n, states, h, d, dtype, lse_base, backend):
    v, s = make_states(n, states, h, d, dtype)
    truth = truth_of(v, s, lse_base)
    assert_state(merge_states(v, s, lse_base=lse_base, backend=backend), truth, dtype)
    assert not np.asarray(truth[0][0]).any()
    assert np.isneginf(np.asarray(truth[1][0])).all()


def check_merge_state(n, h, d, dtype, lse_base, backend):
    v, s = make_states(n, 2, h, d, dtype)
    args = v[:, 0], s[:, 0], v[:, 1], s[:, 1]
    truth = truth_of(v, s, lse_base)
    how = dict(lse_base=lse_base, backend=backend)
    assert_state(merge_state(*args, **how), truth, dtype)
    assert_state(merge_state_in_place(*args, **how), truth, dtype)
    mask = jnp.arange(n) % 2 == 0
    v, s = merge_state_in_place(*args, mask, **how)
    assert_state((v[mask], s[mask]), (truth[0][mask], truth[1][mask]), dtype)
    assert same((v[~mask], s[~mask]), (args[0][~mask], args[1][~mask]))


# Numbers of states below, at and above a tile's, head dims that fill no tile.
STATES_CASES = [
    (3, 1, 2, 64, f32, "ln"),
    (2, 5, 3, 80, f16, "log2"),
    (2, 33, 1, 128, bf16, "ln"),
    (2, 70, 2, 96, f32, "log2"),
    (2, 2, 1, 256, bf16, "ln"),
]


STATE_CASES = [(4, 3, 64, f32, "ln"), (5, 7, 80, f16, "log2"), (3, 1, 256, bf16, "ln")]
GPU_STATE_CASES = [(4096, 32, 128, bf16, "ln"), (1000, 7, 80, f16, "log2"), (2, 1, 64, f32, "ln")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n,states,h,d,dtype,lse_base", STATES_CASES)
def test_merge_states(n, states, h, d, dtype, lse_base, backend):
    check_merge_states(n, states, h, d, dtype, lse_base, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("more", [1, 500])
@pytest.mark.parametrize("n,states,h,d,dtype,lse_base", STATES_CASES)
def test_merge_states_on_gpu(n, states, h, d, dtype, lse_base, more):
    check_merge_states(more * n, states, 8 * h, d, dtype, lse_base, None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n,h,d,dtype,lse_base", STATE_CASES)
def test_merge_state(n, h, d, dtype, lse_base, backend):
    check_merge_state(n, h, d, dtype, lse_base, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("n,h,d,dtype,lse_base", GPU_STATE_CASES)
def test_merge_state_on_gpu(n, h, d, dtype, lse_base):
    check_merge_state(n, h, d, dtype, lse_base, None)


OPS = ("merge_state", "merge_state_in_place", "merge_states")


@pytest.mark.parametrize("op", OPS)
def test_functions_on_arrays_take_no_base_for_granted(op):
    v, s = make_states(3, 2, 2, 64, f32)
    args = (v, s) if op == "merge_states" else (v[:, 0], s[:, 0], v[:, 1], s[:, 1])
    with pytest.raises(TypeError, match="lse_base"):
        getattr(merge, op)(*args)


@pytest.mark.parametrize("op", OPS)
def test_flashinfers_functions_are_in_base_2(op):
    """Those that `jaxattn` exports are FlashInfer's; lse_base can still be said."""
    v, s = make_states(3, 2, 2, 64, f32)
    args = (v, s) if op == "merge_states" else (v[:, 0], s[:, 0], v[:, 1], s[:, 1])
    ours = getattr(flashinfer, op)
    assert getattr(ja, op) is ours
    assert same(ours(*args), getattr(merge, op)(*args, lse_base="log2"))
    assert same(ours(*args, lse_base="ln"), getattr(merge, op)(*args, lse_base="ln"))


@pytest.mark.parametrize("surface", ["classes", "functions"])
def test_cascade(surface):
    """A prefix that requests share and their own tokens, apart and merged: as in one piece."""
    heads, page_size, prefix, own = (4, 2, 64), 4, 8, [5, 9, 1]
    rng = np.random.default_rng(0)
    q = device_array(rng.standard_normal((3, *heads[::2])), f32)
    cache = device_array(rng.standard_normal((12, 2, page_size, *heads[1:])), f32)
    shared, pages = np.array([9, 4], np.int32), [[2, 0], [1, 3, 5], [7]]

    def table(pages, lengths):
        indptr = np.cumsum([0, *map(len, pages)], dtype=np.int32)
        last = np.array([(n - 1) % page_size + 1 for n in lengths], np.int32)
        return indptr, np.concatenate(pages).astype(np.int32), last

    def classes(qo_indptr, table):
        wrapper = ja.BatchPrefillWithPagedKVCacheWrapper(None)
        wrapper.plan(qo_indptr, *table, *heads, page_size, q_data_type="float32")
        return wrapper.run_return_lse(q, cache)

    def functions(qo_indptr, table):
        plan = ja.plan_prefill(
            device_array(qo_indptr),
            ja.PageTable(*map(jnp.asarray, table)),
            page_size=page_size,
            num_qo_tokens=3,
            num_qo_heads=4,
            num_kv_heads=2,
            causal=False,
        )
        return ja.paged_prefill(q, ja.PagedKVCache(cache), plan, return_lse=True)

    attend = dict(classes=classes, functions=functions)[surface]
    each = np.arange(4, dtype=np.int32)
    whole = attend(each, table([[*shared, *x] for x in pages], [prefix + n for n in own]))
    one = attend(np.array([0, 3], np.int32), table([shared], [prefix]))
    two = attend(each, table(pages, own))
    if surface == "classes":  # as a port writes it
        merged = [ja.merge_state(*one, *two), ja.merge_state_in_place(*one, *two)]
        stacked = ja.merge_states(*(jnp.stack(x, axis=1) for x in zip(one, two)))
    else:
        merged = [merge_state(*one, *two), merge_state_in_place(*one, *two)]
        stacked = merge_states(*(jnp.stack(x, axis=1) for x in zip(one, two)))
    for state in (*merged, stacked):
        for ours, truth in zip(state, whole, strict=True):
            np.testing.assert_allclose(ours, truth, rtol=2e-6, atol=2e-6)


def test_bases_agree():
    v, s = make_states(3, 6, 2, 64, f32)
    v_ln, s_ln = merge_states(v, s)
    v_log2, s_log2 = merge_states(v, s / math.log(2), lse_base="log2")
    np.testing.assert_allclose(np.asarray(v_ln), np.asarray(v_log2), atol=1e-5)
    np.testing.assert_allclose(np.asarray(s_ln), np.asarray(s_log2) * math.log(2), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_pieces_make_the_whole(backend):
    """Softmax over 60 keys, in pieces of any size, merged in any order."""
    scores, values = normal((60, 3), scale=4.0), normal((60, 3, 64), seed=1)

    def state(keys):
        s = jax.nn.logsumexp(scores[keys], axis=0)
        weights = jnp.exp(scores[keys] - s[None])
        return (weights[..., None] * values[keys]).sum(axis=0)[None], s[None]

    pieces = [state(slice(*ends)) for ends in ((0, 1), (1, 40), (40, 60))]
    want = state(slice(0, 60))
    v, s = (jnp.stack(x, axis=1) for x in zip(*pieces, strict=True))
    one, two, three = pieces
    for got in (
        merge_states(v, s, backend=backend),
        merge_states(v[:, ::-1], s[:, ::-1], backend=backend),
        merge_state(*merge_state(*one, *two, backend=backend), *three, backend=backend),
        merge_state(*one, *merge_state(*three, *two, backend=backend), backend=backend),
    ):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_scores(backend):
    """Weights that overflow or vanish unless the peak is taken off first."""
    v = device_array([1.0, 2.0, 3.0])[None, :, None, None] * jnp.ones((1, 3, 1, 64))
    for shift in (1e30, -1e30, 5000.0):
        s = (device_array([0.0, 0.0, -200.0]) + jnp.float32(shift))[None, :, None]
        merged, lse = merge_states(v, s, backend=backend)
        peaks = 2 if shift == 5000.0 else 3
        np.testing.assert_allclose(np.asarray(merged), 1.5 if peaks == 2 else 2.0, rtol=1e-6)
        np.testing.assert_allclose(np.asarray(lse), shift + math.log(peaks), rtol=1e-6)


def test_no_states():
    v, s = merge_states(jnp.zeros((2, 0, 3, 64)), jnp.zeros((2, 0, 3)), backend="interpret")
    assert same((v, s), (jnp.zeros((2, 3, 64)), jnp.full((2, 3), -jnp.inf)))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [64, pytest.param(4096, marks=pytest.mark.gpu)])
def test_donated_state_is_updated_in_place(n, masked):
    v, s = normal((n, 4, 64)), normal((n, 4))
    mask = [jnp.arange(n) % 2 == 0] if masked else []
    compiled = compile_in_place(merge_state_in_place, (0, 1), v, s, v, s, *mask)
    if jax.default_backend() == "gpu":  # XLA's own fusions on a CPU keep what they please
        assert_no_copy(compiled)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms(backend):
    v, s = make_states(2 * 3, 4, 2, 64, bf16)
    v, s = v.reshape(2, 3, *v.shape[1:]), s.reshape(2, 3, *s.shape[1:])

    @jax.jit
    def merge_them(v, s):
        v, s = merge_states(v, s, backend=backend)
        other = merge_state(v, s, v, s, backend=backend)
        mask = jnp.arange(v.shape[0]) != 1
        return merge_state_in_place(v + 1, s, *other, mask, backend=backend)

    each = [merge_them(v[i], s[i]) for i in range(2)]
    want = jax.tree.map(lambda *x: jnp.stack(x), *each)
    assert same(jax.vmap(merge_them)(v, s), want)
    _, scanned = jax.lax.scan(lambda c, xs: (c, merge_them(*xs)), 0, (v, s))
    assert same(scanned, want)
    if jax.device_count() > 1:
        sharded = jax.shard_map(
            merge_them,
            mesh=two_devices(),
            in_specs=(P(None, None, "x"), P(None, None, "x")),
            out_specs=(P(None, "x"), P(None, "x")),
            check_vma=backend != "interpret",  # Pallas's interpreter cannot follow varying axes
        )
        assert same(jax.jit(sharded)(v[0], s[0]), each[0])


@pytest.mark.parametrize("backend", [None, "interpret"])
def test_gradient_is_the_references(backend):
    """Finite also where all states are empty."""
    v, s = make_states(3, 4, 2, 64, f32)

    def loss(v, s, backend):
        v, s = merge_states(v, s, backend=backend)
        return jnp.sum(v**2) + jnp.sum(jnp.where(s == -jnp.inf, 0.0, s))

    ours = jax.grad(loss, argnums=(0, 1))(v, s, backend)
    want = jax.grad(loss, argnums=(0, 1))(v, s, "xla")
    for a, b in zip(ours, want, strict=True):
        assert np.isfinite(np.asarray(a)).all()
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-5)


V, S = jnp.ones((3, 2, 64)), jnp.ones((3, 2))


@pytest.mark.parametrize(
    "error,message,args",
    [
        (ValueError, "v_a must have shape", (V[0], S, V, S)),
        (ValueError, "v_b must have shape", (V, S, V[:2], S)),
        (ValueError, "s_a must have shape", (V, S[:2], V, S)),
        (TypeError, "v_a must be one of", (V.astype(jnp.int32), S, V, S)),
        (TypeError, "s_b must be one of", (V, S, V, S.astype(jnp.int32))),
        (TypeError, "v_a and v_b must have the same dtype", (V, S, V.astype(bf16), S)),
    ],
)
def test_errors(error, message, args):
    with pytest.raises(error, match=message):
        merge_state(*args)


def test_other_errors():
    with pytest.raises(ValueError, match="lse_base must be one of"):
        merge_state(V, S, V, S, lse_base="e")
    with pytest.raises(ValueError, match="v must have shape"):
        merge_states(V, S)
    with pytest.raises(ValueError, match="s must have shape"):
        merge_states(V[None], S)
    with pytest.raises(TypeError, match="s must be float32 to be updated in place"):
        merge_state_in_place(V, S.astype(bf16), V, S)
    with pytest.raises(ValueError, match="mask must have shape"):
        merge_state_in_place(V, S, V, S, jnp.ones(2, bool))
    with pytest.raises(TypeError, match="mask must be bool"):
        merge_state_in_place(V, S, V, S, jnp.ones(3, jnp.int32))
