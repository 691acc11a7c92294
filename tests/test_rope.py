"""Rotary embedding against the float32 oracle, and its tables against float64 formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import device_array, i32
from jax.sharding import PartitionSpec as P
from rowwise import (
    assert_no_copy,
    assert_rounded_once,
    compile_in_place,
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
f16, bf16, f32 = jnp.float16, jnp.bfloat16, jnp.float32


def check_rope(t, heads, kv_heads, d, rotary_dim, dtype, is_neox, flat, in_place, backend):
    q, k = normal((t, heads, d), dtype, scale=30.0), normal((t, kv_heads, d), dtype, seed=1)
    positions = np.random.default_rng(2).integers(0, 4096, t, np.int32)
    positions[:3] = -1, 4096, 4095
    positions = device_array(positions)
    table = ja.precompute_freqs_cis(d, 4096, rotary_dim=rotary_dim)
    truth_of = jax.jit(functools.partial(reference.rope, interleave=not is_neox))
    truth = truth_of(q.astype(f32), k.astype(f32), positions, table)
    if flat:
        q, k = q.reshape(t, -1), k.reshape(t, -1)
    op = ja.apply_rope_with_cos_sin_cache_inplace if in_place else ja.apply_rope_with_cos_sin_cache
    op = jax.jit(functools.partial(op, head_size=d, is_neox=is_neox, backend=backend))
    rotated = op(positions, q, k, cos_sin_cache=table)
    for x, y, want in zip((q, k), rotated, truth, strict=True):
        assert y.shape == x.shape
        x, y, want = (
            np.asarray(x).reshape(want.shape),
            np.asarray(y).reshape(want.shape),
            on_host(want),
        )
        assert np.isnan(on_host(y[:2, :, :rotary_dim])).all()
        assert not np.isnan(on_host(y[2:])).any()
        assert_rounded_once(y[2:], want[2:], dtype)
        assert same(y[..., rotary_dim:], x[..., rotary_dim:])


# Each breaks another assumption: halves that are no power of two, partial rotation, more heads than
# a block and a ragged last one, one head, 2-D and 3-D arrays.
CASES = [
    # heads, kv_heads, head_size, rotary_dim, dtype, is_neox, flat, in_place
    (4, 2, 64, 64, f32, True, True, False),
    (4, 2, 64, 64, bf16, False, False, True),
    (5, 1, 80, 80, bf16, True, False, True),
    (5, 1, 80, 80, f16, False, True, False),
    (3, 3, 112, 96, f32, True, True, False),
    (3, 3, 112, 96, f32, False, True, True),
    (70, 33, 128, 32, f16, True, False, False),
    (17, 2, 256, 256, bf16, True, True, True),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads,kv_heads,d,rotary_dim,dtype,is_neox,flat,in_place", CASES)
def test_rope(heads, kv_heads, d, rotary_dim, dtype, is_neox, flat, in_place, backend):
    check_rope(5, heads, kv_heads, d, rotary_dim, dtype, is_neox, flat, in_place, backend)


@pytest.mark.parametrize("config", [(4, 1, 2), (2, 2, 4), (1, 4, 4)])
def test_any_share_of_tokens_and_heads(config, monkeypatch):
    monkeypatch.setattr("jaxattn.kernels.triton.rope.default_config", lambda *_: Config(*config))
    check_rope(7, 5, 3, 80, 64, bf16, True, False, True, "interpret")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "t", [1, 4097]
)  # 4097 x 103 heads x 128: 0.2 GB in float32, some five copies of it
@pytest.mark.parametrize("heads,kv_heads,d,rotary_dim,dtype,is_neox,flat,in_place", CASES)
def test_rope_on_gpu(t, heads, kv_heads, d, rotary_dim, dtype, is_neox, flat, in_place):
    check_rope(max(t, 3), heads, kv_heads, d, rotary_dim, dtype, is_neox, flat, in_place, None)


def test_table():
    table = np.asarray(ja.precompute_freqs_cis(64, 50, 5e5, rotary_dim=48, rope_scale=2.0))
    angle = np.outer(np.arange(50), 5e5 ** (-np.arange(0, 48, 2) / 48) / 2.0)
    want = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    assert table.dtype == np.float32
    np.testing.assert_allclose(table, want, atol=1e-5)


def llama31_frequencies(rotary_dim, theta, scale, low, high, old):
    """As Llama-3.1's authors write them."""
    frequencies = []
    for freq in theta ** (-np.arange(0, rotary_dim, 2) / rotary_dim):
        wavelength = 2 * np.pi / freq
        if wavelength < old / high:
            frequencies.append(freq)
        elif wavelength > old / low:
            frequencies.append(freq / scale)
        else:
            smooth = (old / wavelength - low) / (high - low)
            frequencies.append((1 - smooth) * freq / scale + smooth * freq)
    return np.asarray(frequencies)


def test_llama31_table():
    table = ja.precompute_freqs_cis(
        128,
        40,
        5e5,
        rope_scale=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        old_context_len=8192,
    )
    angle = np.outer(np.arange(40), llama31_frequencies(128, 5e5, 8.0, 1.0, 4.0, 8192))
    want = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    np.testing.assert_allclose(np.asarray(table), want, atol=1e-5)


def test_table_of_given_frequencies():
    """Traced ones too; those of the formula give its table, bit for bit, through either way."""
    frequencies = np.linspace(1.0, 1e-3, 24, dtype=np.float32)
    table = ja.precompute_freqs_cis(64, 50, frequencies=frequencies)
    angle = np.outer(np.arange(50), frequencies.astype(np.float64))
    want = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    assert table.dtype == np.float32
    np.testing.assert_allclose(np.asarray(table), want, atol=1e-5)
    traced = jax.jit(lambda f: ja.precompute_freqs_cis(64, 50, rotary_dim=48, frequencies=f))
    assert same(traced(frequencies), table)

    own = reference.rope_frequencies(48, 5e5, 2.0)
    plain = ja.precompute_freqs_cis(64, 50, 5e5, rotary_dim=48, rope_scale=2.0)
    assert same(ja.precompute_freqs_cis(64, 50, frequencies=own), plain)


@pytest.mark.parametrize(
    "error,message,change",
    [
        (ValueError, "leave out rope_theta", dict(rope_theta=5e5)),
        (ValueError, "leave out .*rope_scale=2", dict(rope_scale=2.0)),
        (
            ValueError,
            "leave out .*Llama-3.1",
            dict(low_freq_factor=1.0, high_freq_factor=4.0, old_context_len=64),
        ),
        (ValueError, "must have rotary_dim / 2 = 16 elements; got 24", dict(rotary_dim=32)),
        (ValueError, "rotary_dim must be even and at most", dict(head_dim=32)),
        (ValueError, "frequencies must have shape", dict(frequencies=np.ones((24, 1), np.float32))),
        (TypeError, "frequencies must be float32", dict(frequencies=np.ones(24))),
        (TypeError, "frequencies must be an array", dict(frequencies=[1.0] * 24)),
    ],
)
def test_frequencies_that_cannot_be(error, message, change):
    args = dict(head_dim=64, max_seq_len=8, frequencies=np.ones(24, np.float32)) | change
    with pytest.raises(error, match=message):
        ja.precompute_freqs_cis(**args)


LLAMA31 = dict(rope_scale=8, low_freq_factor=1, high_freq_factor=4, old_context_len=8192)


@pytest.mark.parametrize("backend,interleave", [("interpret", False), ("xla", True)])
@pytest.mark.parametrize(
    "ragged,by_position,theta,scaling",
    [
        (ja.apply_rope, ja.apply_rope_pos_ids, 1e4, {}),
        (ja.apply_llama31_rope, ja.apply_llama31_rope_pos_ids, 5e5, LLAMA31),
    ],
    ids=["plain", "llama31"],
)
def test_on_the_fly_is_the_table(ragged, by_position, theta, scaling, backend, interleave):
    """FlashInfer's defaults, and rows past the last request, which are copied."""
    q, k = normal((9, 3, 64)), normal((9, 2, 64), seed=1)
    indptr, offsets = i32([0, 2, 2, 6]), i32([30, 5, 0])
    positions = i32([30, 31, 0, 1, 2, 3, 0, 0, 0])
    how = dict(rotary_dim=48, interleave=interleave, backend=backend)
    table = ja.precompute_freqs_cis(64, 32, theta, rotary_dim=48, **scaling)
    want = ja.apply_rope_with_cos_sin_cache(
        positions, q, k, 64, table, not interleave, backend=backend
    )
    for got in (ragged(q, k, indptr, offsets, **how), by_position(q, k, positions, **how)):
        for a, b, x in zip(got, want, (q, k), strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5)
            assert same(a[6:], x[6:])


@pytest.mark.parametrize(
    "op,twin,where",
    [
        (ja.apply_rope, ja.apply_rope_inplace, ([0, 4], [7])),
        (ja.apply_rope_pos_ids, ja.apply_rope_pos_ids_inplace, ([3, 1, 4, 1],)),
        (ja.apply_llama31_rope, ja.apply_llama31_rope_inplace, ([0, 4], [7])),
        (
            ja.apply_llama31_rope_pos_ids,
            ja.apply_llama31_rope_pos_ids_inplace,
            ([3, 1, 4, 1],),
        ),
    ],
)
def test_inplace_twins(op, twin, where):
    q, k = normal((4, 2, 32)), normal((4, 1, 32), seed=1)
    where = [i32(x) for x in where]
    assert twin.__name__ == f"{op.__name__}_inplace"
    assert same(twin(q, k, *where), op(q, k, *where))
    compile_in_place(twin, (0, 1), q, k, *where)


@pytest.mark.gpu
def test_in_place_on_gpu():
    q, k = normal((16384, 32 * 128), bf16), normal((16384, 8 * 128), bf16)
    positions = jnp.arange(16384, dtype=jnp.int32)
    table = ja.precompute_freqs_cis(128, 16384)

    def rotate(q, k, positions, table):
        return ja.apply_rope_with_cos_sin_cache_inplace(positions, q, k, 128, table)

    assert_no_copy(compile_in_place(rotate, (0, 1), q, k, positions, table))


def test_scores_depend_on_distance_alone():
    q, k = normal((1, 1, 64)), normal((1, 1, 64), seed=1)

    def score(i, j):
        rotated_q, _ = ja.apply_rope_pos_ids(q, k, i32([i]))
        _, rotated_k = ja.apply_rope_pos_ids(q, k, i32([j]))
        return float(jnp.vdot(rotated_q, rotated_k))

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-3)


@pytest.mark.parametrize("backend", SLOW_INTERPRETED)
def test_transforms(backend):
    q, k = normal((2, 3, 4, 32), bf16), normal((2, 3, 2, 32), bf16, seed=1)
    positions = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)
    table = ja.precompute_freqs_cis(32, 16)

    indptr, offsets = i32([0, 2, 3]), i32([5, 1])

    @jax.jit
    def rope(positions, q, k):
        q, k = ja.apply_rope_with_cos_sin_cache_inplace(positions, q, k, 32, table, backend=backend)
        q, k = ja.apply_rope(q, k, indptr, offsets, backend=backend)
        q, k = ja.apply_llama31_rope(q, k, indptr, offsets, backend=backend)
        q, k = ja.apply_rope_pos_ids(q, k, positions, interleave=True, backend=backend)
        q, k = ja.apply_llama31_rope_pos_ids_inplace(q, k, positions, backend=backend)
        return ja.apply_rope_with_cos_sin_cache(positions, q, k, 32, table, backend=backend)

    each = [rope(*(x[i] for x in (positions, q, k))) for i in range(2)]
    want = jax.tree.map(lambda *x: jnp.stack(x), *each)
    assert same(jax.vmap(rope)(positions, q, k), want)
    _, scanned = jax.lax.scan(lambda c, xs: (c, rope(*xs)), 0, (positions, q, k))
    assert same(scanned, want)
    if jax.device_count() > 1:
        heads = P(None, "x")
        sharded = jax.shard_map(
            rope,
            mesh=two_devices(),
            in_specs=(P(), heads, heads),
            out_specs=(heads, heads),
            check_vma=backend != "interpret",  # Pallas's interpreter cannot follow varying axes
        )
        assert same(jax.jit(sharded)(positions[0], q[0], k[0]), each[0])


@pytest.mark.parametrize("backend", [None, "interpret"])
def test_gradient_is_the_references(backend):
    q, k = normal((5, 2, 32)), normal((5, 1, 32), seed=1)
    positions = jnp.arange(5, dtype=jnp.int32)

    def loss(q, k, backend):
        q, k = ja.apply_rope_pos_ids(q, k, positions, 16, backend=backend)
        return jnp.sum(q**3) + jnp.sum(k**3)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    ours, want = grad(q, k, backend), grad(q, k, "xla")
    for a, b in zip(ours, want, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-5)


Q, K, POSITIONS = jnp.ones((3, 2, 8)), jnp.ones((3, 1, 8)), jnp.zeros(3, jnp.int32)
TABLE = jnp.ones((4, 8))


@pytest.mark.parametrize(
    "error,message,args",
    [
        (TypeError, "positions must be int32", (POSITIONS.astype(f32), Q, K, 8, TABLE)),
        (ValueError, "positions must have shape", (POSITIONS[None], Q, K, 8, TABLE)),
        (ValueError, "head_size must be a positive", (POSITIONS, Q, K, 0, TABLE)),
        (ValueError, "query must have shape", (POSITIONS, Q[:2], K, 8, TABLE)),
        (ValueError, "key must have shape", (POSITIONS, Q, jnp.ones((3, 12)), 8, TABLE)),
        (TypeError, "query must be one of", (POSITIONS, Q.astype(jnp.int32), K, 8, TABLE)),
        (TypeError, "query and key must have the same", (POSITIONS, Q.astype(bf16), K, 8, TABLE)),
        (ValueError, "cos_sin_cache must have shape", (POSITIONS, Q, K, 8, TABLE[0])),
        (ValueError, "cos_sin_cache must be float32", (POSITIONS, Q, K, 8, TABLE.astype(bf16))),
        (ValueError, "rotary_dim must be even", (POSITIONS, Q, K, 8, TABLE[:, :3])),
        (ValueError, "rotary_dim must be even", (POSITIONS, Q, K, 8, jnp.ones((4, 10)))),
    ],
)
def test_errors(error, message, args):
    with pytest.raises(error, match=message):
        ja.apply_rope_with_cos_sin_cache(*args)


def test_on_the_fly_errors():
    offsets = jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match="q must have shape"):
        ja.apply_rope_pos_ids(Q[0], K, POSITIONS)
    with pytest.raises(ValueError, match="k must have shape"):
        ja.apply_rope_pos_ids(Q, K[:2], POSITIONS)
    with pytest.raises(ValueError, match="pos_ids must have shape"):
        ja.apply_rope_pos_ids(Q, K, POSITIONS[:2])
    with pytest.raises(ValueError, match="rotary_dim must be even"):
        ja.apply_rope_pos_ids(Q, K, POSITIONS, 7)
    with pytest.raises(ValueError, match="indptr must have shape"):
        ja.apply_rope(Q, K, POSITIONS, offsets)
    with pytest.raises(TypeError, match="offsets must be int32"):
        ja.apply_rope(Q, K, POSITIONS[:2], offsets.astype(f32))


def test_table_errors():
    with pytest.raises(ValueError, match="must come together"):
        ja.precompute_freqs_cis(64, 10, low_freq_factor=1.0)
    with pytest.raises(ValueError, match="max_seq_len must be a positive"):
        ja.precompute_freqs_cis(64, 0)
    with pytest.raises(ValueError, match="rotary_dim must be even"):
        ja.precompute_freqs_cis(64, 10, rotary_dim=66)
