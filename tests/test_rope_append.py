"""rope_append_paged_kv_cache against the oracles of its parts and a loop over tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import device_array, i32
from jax.sharding import PartitionSpec as P
from rowwise import (
    Append,
    assert_no_copy,
    assert_rounded_once,
    by_loop,
    compile_in_place,
    make_append,
    normal,
    on_host,
    same,
    two_devices,
)

import jaxattn as ja
from jaxattn import reference
from jaxattn.kernels.triton._heads import Config

BACKENDS = ["interpret", "xla"]
SLOW_INTERPRETED = [pytest.param("interpret", marks=pytest.mark.slow), "xla"]
EPS = 1e-5
f16, bf16, f32 = jnp.float16, jnp.bfloat16, jnp.float32


@dataclasses.dataclass(frozen=True)
class Case:
    """Tokens to append, whose keys have yet to be normed and rotated, and their queries."""

    query: jax.Array
    append: Append
    table: jax.Array
    weights: dict[str, jax.Array]
    is_neox: bool
    apart: bool = False  # q, k and v come as three arrays
    rope_positions: jax.Array | None = None

    @property
    def args(self):
        key, value, batch_indices, positions, cache, page_table = self.append.args
        parts = (self.query, key, value)
        qkv = parts if self.apart else jnp.concatenate([flat(x) for x in parts], axis=1)
        return qkv, batch_indices, positions, self.table, cache, page_table

    @property
    def how(self):
        how = dict(is_neox=self.is_neox, eps=EPS, **self.weights)
        if self.rope_positions is not None:
            how["rope_positions"] = self.rope_positions
        return how


def flat(x):
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2])


def make_case(
    heads=4,
    *,
    rotary_dim=None,
    norm=True,
    weight_dtype=f32,
    is_neox=True,
    positions=16,
    apart=False,
    turned=False,
    **append,
):
    """A case; apart: q, k and v in arrays of their own; turned: rotated by other positions than the slots'."""
    new = make_append(**append)
    t, _, d = new.key.shape
    weights = {}
    if norm:
        weights["q_norm_weight"] = normal((d,), weight_dtype, seed=4)
        weights["k_norm_weight"] = normal((d,), weight_dtype, seed=5)
    query = normal((t, heads, d), new.key.dtype, seed=3, scale=30.0)
    table = ja.precompute_freqs_cis(d, positions, rotary_dim=rotary_dim)
    where = positions - 1 - new.positions if turned else None
    return Case(query, new, table, weights, is_neox, apart, where)


run = jax.jit(ja.rope_append_paged_kv_cache, static_argnames=("is_neox", "eps", "backend"))


@functools.partial(jax.jit, static_argnames="is_neox")
def truth(q, k, positions, table, weights, *, is_neox):
    """Of queries and keys in float32, normed and rotated."""
    if weights:
        q = reference.rmsnorm(q, weights["q_norm_weight"], eps=EPS)
        k = reference.rmsnorm(k, weights["k_norm_weight"], eps=EPS)
    return reference.rope(q, k, positions, table, interleave=not is_neox)


def check(case, backend):
    q, cache = run(*case.args, **case.how, backend=backend)
    new = case.append
    assert (cache.layout, cache.combined) == (new.cache.layout, new.cache.combined)
    heads = case.query.astype(f32), new.key.astype(f32)
    rows = new.positions if case.rope_positions is None else case.rope_positions
    want_q, want_k = truth(*heads, rows, case.table, case.weights, is_neox=case.is_neox)
    k_pages, v_pages = by_loop(dataclasses.replace(new, key=want_k))
    assert_rounded_once(q, want_q, case.query.dtype)
    assert_rounded_once(cache.k, k_pages, new.cache.dtype)
    assert same(cache.v, device_array(v_pages, cache.dtype))
    written = np.isfinite(v_pages)
    assert written.any()
    assert not written.all()


# Each breaks another assumption: with and without norms, weights of either dtype, partial rotation,
# neighbours, halves that are no power of two, heads that fill no tile or many, every kind of cache.
CASES = [
    dict(heads=4, kv_heads=2, d=64, page_size=1, norm=False),
    dict(heads=3, kv_heads=3, d=80, page_size=5, token_dtype=f16, dtype=f16, layout="HND"),
    dict(heads=8, kv_heads=1, d=128, page_size=16, token_dtype=f32, combined=True),
    dict(heads=5, kv_heads=1, d=96, rotary_dim=64, dtype=f32, layout="HND", combined=True),
    dict(heads=4, kv_heads=2, d=112, rotary_dim=96, token_dtype=f32, dtype=f32, is_neox=False),
    dict(heads=70, kv_heads=7, d=256, dtype=f16, norm=False, rotary_dim=32, is_neox=False),
    dict(heads=1, kv_heads=1, d=64, weight_dtype=bf16, page_size=64, padding=0),
    dict(heads=5, kv_heads=2, d=64, apart=True, turned=True),
    dict(heads=3, kv_heads=3, d=80, apart=True, norm=False, rotary_dim=48, layout="HND"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_rope_append(shape, backend):
    check(make_case(**shape), backend)


@pytest.mark.parametrize("config", [(4, 1, 2), (2, 2, 4), (1, 4, 4)])
def test_any_share_of_tokens_and_heads(config, monkeypatch):
    run.clear_cache()  # of programs of the same shape in other tiles
    taken = []

    def of(*_):
        taken.append(Config(*config))
        return taken[-1]

    monkeypatch.setattr("jaxattn.kernels.triton.rope_append.default_config", of)
    check(make_case(heads=5, kv_heads=3, d=80, rotary_dim=64), "interpret")
    assert taken


@pytest.mark.gpu
@pytest.mark.parametrize("t", [1, 5000])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_rope_append_on_gpu(shape, t):
    lens = dict(kv_lens=(4096, 0, 1, 7000), new=(t, 0, 1, min(t, 2000)))
    check(make_case(**shape, **lens, positions=7000), None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_neox", [True, False])
def test_without_norms_it_is_the_two_ops(is_neox, backend):
    case = make_case(norm=False, is_neox=is_neox)
    new = case.append
    q, k = ja.apply_rope_with_cos_sin_cache(
        new.positions, case.query, new.key, 64, case.table, is_neox, backend=backend
    )
    cache = ja.append_paged_kv_cache(k, new.value, *new.args[2:], backend=backend)
    assert same(run(*case.args, is_neox=is_neox, backend=backend), (q, cache))


@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("triton", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shaped", [flat, lambda x: x])
def test_three_arrays_are_one(shaped, backend):
    """Bit for bit, with V's head_dim its own where there are three."""
    one = make_case(norm=True)
    new = one.append
    how = dict(one.how, backend=backend)
    three = tuple(shaped(x) for x in (one.query, new.key, new.value))
    q, cache = run(three, *one.args[1:], **how)
    want_q, want = run(*one.args, **how)
    assert same((q, cache), (want_q, want))

    narrow = (*three[:2], shaped(new.value[..., :48]))
    k, v = new.cache.data
    q, cache = run(narrow, *one.args[1:4], ja.PagedKVCache((k, v[..., :48])), one.args[5], **how)
    assert same((q, cache.k, cache.v), (want_q, want.k, want.v[..., :48]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_the_table_a_token(backend):
    """Rotations that are not of one position, as M-RoPE's, are a table of their own; slots stay where they are."""
    case = make_case(norm=False)
    rows = case.append.positions
    gathered = dataclasses.replace(
        case,
        table=case.table[rows],
        rope_positions=jnp.arange(rows.shape[0], dtype=jnp.int32),
    )
    got = run(*gathered.args, **gathered.how, backend=backend)
    assert same(got, run(*case.args, **case.how, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_without_a_place_are_dropped(backend):
    case = make_case(kv_lens=(8, 4), new=(8, 4), padding=0)
    new = case.append
    batch = i32([-1, 2, 100, 0, 0, 0, 1, 1, 0, 0, 1, 0])
    positions = i32([0, 0, 0, -1, -5, 10, 5, 2**30, 3, 9, 4, 2])
    # Request 0's second page does not exist; what is left are two tokens each.
    for no_page in (-1, new.cache.num_pages):
        table = dataclasses.replace(new.table, indices=new.table.indices.at[1].set(no_page))
        changed = dataclasses.replace(new, batch_indices=batch, positions=positions, table=table)
        check(dataclasses.replace(case, append=changed), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_position_outside_the_table_gives_nan(backend):
    """In q and k of that token alone: request 0's last, position 12."""
    case = make_case(positions=12, kv_lens=(13, 2), new=(4, 2), rotary_dim=48)
    cache = jax.tree.map(jnp.zeros_like, case.append.cache)
    q, cache = run(*case.args[:4], cache, case.args[5], **case.how, backend=backend)
    nan = np.isnan(on_host(q)).any(axis=(1, 2))
    assert nan.tolist() == [i == 3 for i in range(9)]
    assert np.isnan(on_host(q[3, :, :48])).all() and not np.isnan(on_host(q[3, :, 48:])).any()
    assert np.isnan(on_host(cache.k)).sum() == 2 * 48
    assert not np.isnan(on_host(cache.v)).any()


def test_no_tokens():
    case = make_case(new=(0, 0, 0, 0), padding=0)
    q, cache = run(*case.args, **case.how, backend="interpret")
    assert q.shape == (0, 4, 64)
    assert same(cache, case.append.cache)


@pytest.mark.parametrize(
    "dtype,num_pages", [(f32, 512), pytest.param(bf16, 4096, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("combined", [False, True])
def test_donated_cache_is_written_in_place(dtype, num_pages, combined):
    case = make_case(
        token_dtype=dtype, dtype=dtype, page_size=16, num_pages=num_pages, combined=combined
    )

    def op(*args):
        return ja.rope_append_paged_kv_cache(*args, **case.how)

    assert_no_copy(compile_in_place(op, (4,), *case.args))


@pytest.mark.parametrize("backend", SLOW_INTERPRETED)
@pytest.mark.parametrize("combined", [False, True])
def test_transforms(combined, backend):
    """A layer a time by vmap and by scan, the tokens of two KV heads on two devices."""
    case = make_case(combined=combined, page_size=4, d=32)
    qkv, *where, cache, page_table = case.args

    @jax.jit
    def op(qkv, cache):
        return run(qkv, *where, cache, page_table, **case.how, backend=backend)

    layers = jax.tree.map(lambda x: jnp.stack([x, x + 1]), (qkv, cache))
    each = [op(*jax.tree.map(lambda x, i=i: x[i], layers)) for i in range(2)]
    want = jax.tree.map(lambda *x: jnp.stack(x), *each)
    assert same(jax.vmap(op)(*layers), want)
    _, scanned = jax.lax.scan(lambda c, xs: (c, op(*xs)), 0, layers)
    assert same(scanned, want)
    if jax.device_count() > 1:
        # Each device's columns are its own heads of q, of k and of v.
        by_device = qkv.reshape(-1, 8, 32)[:, device_array([0, 1, 4, 6, 2, 3, 5, 7]), :]
        pages = P(*[None] * (3 if combined else 2), "x")
        sharded = jax.shard_map(
            op,
            mesh=two_devices(),
            in_specs=(P(None, "x"), pages),
            out_specs=(P(None, "x"), pages),
            check_vma=backend != "interpret",  # Pallas's interpreter cannot follow varying axes
        )
        assert same(jax.jit(sharded)(by_device.reshape(qkv.shape), cache), each[0])


@pytest.mark.parametrize("backend", [None, "interpret"])
def test_gradient_is_the_references(backend):
    case = make_case(token_dtype=f32, dtype=f32, d=16)
    qkv, *where, cache, page_table = case.args
    cache = jax.tree.map(lambda x: normal(x.shape), cache)

    def loss(qkv, cache, weights, backend):
        q, new = ja.rope_append_paged_kv_cache(
            qkv, *where, cache, page_table, **weights, backend=backend
        )
        return jnp.sum(q**3) + jnp.sum(new.k**3) + jnp.sum(new.v**2)

    args = qkv, cache, case.weights
    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3)
    ours, want = grad(*args, backend), grad(*args, "xla")
    assert all(np.abs(np.asarray(x)).max() > 0 for x in jax.tree.leaves(want))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-4)


ARGS = ("qkv", "batch_indices", "positions", "cos_sin_cache", "paged_kv_cache", "page_table")


@pytest.mark.parametrize(
    "error,message,change",
    [
        (ValueError, r"qkv must have shape \[18, \(num", dict(qkv=lambda x: x[:3])),
        (
            ValueError,
            r"qkv must have \(num_qo_heads \+ 2 \* 2\) \* 64",
            dict(qkv=lambda x: x[:, 1:]),
        ),
        (ValueError, "num_qo_heads at least 1", dict(qkv=lambda x: x[:, : 4 * 64])),
        (ValueError, r"\(q, k, v\); got 2 arrays", dict(qkv=lambda x: (x, x))),
        (
            ValueError,
            r"k must have shape \[t, heads \* head_dim\].*heads=2, head_dim=64; got \[18, 256\]",
            dict(qkv=lambda x: (x[:, :256], x[:, :256], x[:, :128])),
        ),
        (
            ValueError,
            "q must have shape",
            dict(qkv=lambda x: (x[:, :0], x[:, :128], x[:, :128])),
        ),
        (
            TypeError,
            "q and k and v must have the same dtype",
            dict(qkv=lambda x: (x[:, :256].astype(f32), x[:, :128], x[:, :128])),
        ),
        (TypeError, "qkv must be one of", dict(qkv=lambda x: x.astype(jnp.int32))),
        (TypeError, "batch_indices must be int32", dict(batch_indices=lambda x: x.astype(f32))),
        (ValueError, "positions must have shape", dict(positions=lambda x: x[:-1])),
        (ValueError, "rope_positions must have shape", dict(rope_positions=lambda x: x[:-1])),
        (TypeError, "rope_positions must be int32", dict(rope_positions=lambda x: x.astype(f32))),
        (ValueError, "cos_sin_cache must be float32", dict(cos_sin_cache=lambda x: x.astype(bf16))),
        (ValueError, "rotary_dim must be even", dict(cos_sin_cache=lambda x: x[:, :3])),
        (
            ValueError,
            "k pages must have shape",
            dict(paged_kv_cache=lambda x: ja.PagedKVCache((x.k[0],) * 2)),
        ),
        (
            ValueError,
            "kv_indptr must have shape",
            dict(page_table=lambda x: ja.PageTable(*[x.indices] * 3)),
        ),
        (ValueError, "must come together", dict(k_norm_weight=lambda x: None)),
        (ValueError, "q_norm_weight must have shape", dict(q_norm_weight=lambda x: x[1:])),
        (
            TypeError,
            "k_norm_weight must be bfloat16 as input or float32",
            dict(k_norm_weight=lambda x: x.astype(f16)),
        ),
    ],
)
def test_errors(error, message, change):
    case = make_case()
    args = dict(zip(ARGS, case.args, strict=True)) | case.weights
    args["rope_positions"] = case.append.positions
    args |= {name: new(args[name]) for name, new in change.items()}
    with pytest.raises(error, match=message):
        ja.rope_append_paged_kv_cache(**args)
