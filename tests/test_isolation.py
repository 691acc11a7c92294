"""No request reaches what its own table does not name, and none feels another's NaN, whatever its arrays hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_lse,
    assert_rivals,
    dense_attention,
    dense_batch,
    device_array,
    i32,
    same_bits,
)

import jaxattn as ja

BACKENDS = ["interpret", "xla", pytest.param(None, marks=pytest.mark.gpu, id="gpu")]
SLOW_INTERPRETED = [pytest.param("interpret", marks=pytest.mark.slow), *BACKENDS[1:]]
NUM_PAGES, PAGE, KH, D = 12, 4, 1, 64


def random_cache(num_pages=NUM_PAGES, page_size=PAGE, seed=0):
    rng = np.random.default_rng(seed)
    kv = rng.standard_normal((2, num_pages, page_size, KH, D), np.float32)
    return kv, ja.PagedKVCache(tuple(device_array(x) for x in kv))


def queries(n, seed=1):
    return np.random.default_rng(seed).standard_normal((n, 2, D)).astype(np.float32)


def attend(cache, table, q, qo_lens, backend, *, causal=True):
    """paged_decode where every request has one query, else paged_prefill: (o, lse)."""
    qo_indptr = None if qo_lens is None else i32(np.concatenate([[0], np.cumsum(qo_lens)]))
    return _attend(device_array(q), cache, table, qo_indptr, backend=backend, causal=causal)


@functools.partial(jax.jit, static_argnames=("backend", "causal"))
def _attend(q, cache, table, qo_indptr, *, backend, causal):
    """One program for all that lengths and tables may hold."""
    heads = dict(num_qo_heads=2, num_kv_heads=KH)
    how = dict(return_lse=True, backend=backend)
    if qo_indptr is None:
        return ja.paged_decode(q, cache, ja.plan_decode(table, **heads), **how)
    plan = ja.plan_prefill(qo_indptr, table, num_qo_tokens=len(q), causal=causal, **heads)
    return ja.paged_prefill(q, cache, plan, **how)


def expect(result, q, kv, wanted):
    """Each row of q against the (page, slot)s that it may see."""
    o, lse = result
    keys = [[x[[p for p, _ in seen], [s for _, s in seen]] for seen in wanted] for x in kv]
    how = dict(sm_scale=D**-0.5, causal=False)
    truth, truth_lse = dense_batch(q[:, None], *keys, dtype=np.float64, **how)
    plain, _ = dense_batch(q[:, None], *keys, dtype=np.float32, **how)
    assert_rivals(o, truth, plain, jnp.float32)
    assert_lse(lse, truth_lse.astype(np.float32))


def slots_of(pages, length):
    """(page, slot) of a request's tokens, those on a page that is None or not in the cache left out."""
    where = [
        (pages[t // PAGE] if t // PAGE < len(pages) else None, t % PAGE) for t in range(length)
    ]
    return [(p, s) for p, s in where if p is not None and 0 <= p < NUM_PAGES]


def test_a_row_counts_no_page_that_it_does_not_have():
    table = ja.PageTable.from_block_table(i32([[5, 6], [7, 8]]), i32([20, 8]), PAGE)
    np.testing.assert_array_equal(table.indptr, [0, 2, 4])
    np.testing.assert_array_equal(table.indices, [5, 6, 7, 8])


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_beyond_the_row_s_pages_are_absent(backend):
    kv, cache = random_cache()
    rows, lengths = [[0, 1], [2, 3], [4, 5]], [4, 9, 0]
    table = ja.PageTable.from_block_table(i32(rows), i32(lengths), PAGE)
    q = queries(3)
    own = [slots_of(r, n) for r, n in zip(rows, lengths, strict=True)]
    expect(attend(cache, table, q, None, backend), q, kv, own)
    # The last of request 1's queries stands at position 8, which is absent; the one before it sees the 8 that are not.
    q = queries(3)
    wanted = [own[1][:7], own[1], own[1]]
    expect(attend(cache, table, q, [0, 3, 0], backend), q, kv, wanted)


@pytest.mark.parametrize("combined", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_decode_step_too_many_writes_nowhere(backend, combined):
    kv, cache = random_cache()
    if combined:
        cache = ja.PagedKVCache(jnp.stack(cache.data, axis=1))
    table = ja.PageTable.from_block_table(i32([[0, 1], [2, 3], [4, 5]]), i32([4, 9, 0]), PAGE)
    new = jnp.full((3, KH, D), 7.0)
    where = i32([0, 1, 2]), i32([3, 8, 0])
    written = ja.append_paged_kv_cache(new, new, *where, cache, table, backend=backend)
    want = kv.copy()
    want[:, 0, 3] = 7.0
    np.testing.assert_array_equal(written.k, want[0])
    np.testing.assert_array_equal(written.v, want[1])
    rope = ja.precompute_freqs_cis(D, 16)
    qkv = jnp.full((3, (2 + 2 * KH) * D), 7.0)
    _, written = ja.rope_append_paged_kv_cache(qkv, *where, rope, cache, table, backend=backend)
    np.testing.assert_array_equal(written.v, want[1])


@pytest.mark.parametrize("bad", [-1, NUM_PAGES, 1000, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("backend", SLOW_INTERPRETED)
def test_pages_outside_the_cache_are_absent(backend, bad):
    """In the middle of a request, so that keys on both sides of it remain; for short tiles and tall ones."""
    kv, cache = random_cache()
    rows = [[3, bad, 5], [bad, 1, 2], [7, 8, 9]]
    lengths = [11, 6, 12]
    table = ja.PageTable.from_block_table(i32(rows), i32(lengths), PAGE)
    q = queries(3)
    own = [slots_of(r, n) for r, n in zip(rows, lengths, strict=True)]
    expect(attend(cache, table, q, None, backend), q, kv, own)

    def seen(r, position):
        return slots_of(rows[r], position + 1)

    q = queries(11 + 2 + 1)
    wanted = [seen(0, i) for i in range(11)] + [seen(1, 4), seen(1, 5), seen(2, 11)]
    expect(attend(cache, table, q, [11, 2, 1], backend), q, kv, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tall_tile_with_an_absent_page(backend):
    kv, cache = random_cache(num_pages=40)
    pages = np.random.default_rng(3).permutation(40).astype(np.int32)
    pages[5] = 99
    table = ja.PageTable.from_block_table(i32(pages[None]), i32([160]), PAGE)
    q = queries(150)
    assert (
        64
        <= ja.plan_prefill(
            i32([0, 150]), table, num_qo_tokens=150, num_qo_heads=2, num_kv_heads=1
        ).block_rows
    )
    where = [(pages[t // PAGE], t % PAGE) for t in range(160)]
    wanted = [[w for w in where[: 11 + i] if w[0] != 99] for i in range(150)]
    expect(attend(cache, table, q, [150], backend), q, kv, wanted)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("what", ["k", "v"])
@pytest.mark.parametrize("backend", SLOW_INTERPRETED)
def test_one_request_s_nan_stays_its_own(backend, what, poison):
    kv, cache = random_cache()
    rows, lengths = [[0, 1], [2, 3], [4, 5]], [7, 5, 8]
    table = ja.PageTable.from_block_table(i32(rows), i32(lengths), PAGE)
    kv[0 if what == "k" else 1, 2, 1] = poison  # request 1's second token
    poisoned = ja.PagedKVCache(tuple(device_array(x) for x in kv))
    for q, qo_lens, others in ((queries(3), None, [0, 2]), (queries(6), [2, 2, 2], [0, 1, 4, 5])):
        clean = attend(cache, table, q, qo_lens, backend)
        for a, b in zip(clean, attend(poisoned, table, q, qo_lens, backend), strict=True):
            assert same_bits(np.asarray(a)[others], np.asarray(b)[others])
            assert np.isfinite(np.asarray(a)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_request_s_nan_stays_its_own_in_contiguous_keys(backend):
    v = np.ones((10, 1, 16), np.float32)
    v[2] = np.inf  # token 2 is request 0's
    plan = ja.plan_ragged_prefill(
        i32([0, 1, 2]), i32([0, 4, 10]), num_qo_tokens=2, num_qo_heads=1, num_kv_heads=1
    )
    q, k = jnp.ones((2, 1, 16)), jnp.ones((10, 1, 16))
    o = ja.ragged_prefill(q, k, device_array(v), plan, backend=backend)
    np.testing.assert_allclose(np.asarray(o[1]), 1.0, rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("backend", BACKENDS)
def test_nonsense_in_a_table_reaches_no_page_that_it_does_not_name(backend, seed):
    """Any int32s at all: results are finite, and appending changes pages of the table alone."""
    rng = np.random.default_rng(seed)
    kv, cache = random_cache()
    wild = lambda n: rng.choice([-(2**31), -7, -1, 0, 1, 2, 3, 5, 11, 12, 2**31 - 1], n)
    indices = wild(6)
    table = ja.PageTable(i32([0, *wild(2), 6]), i32(indices), i32(wild(3)), PAGE)
    o, lse = attend(cache, table, queries(3), None, backend)
    assert np.isfinite(np.asarray(o)).all() and not np.isnan(np.asarray(lse)).any()
    o, _ = attend(cache, table, queries(5), [2, 2, 1], backend)
    assert np.isfinite(np.asarray(o)).all()
    t = 8
    # No two tokens to one slot: each has its own request or position.
    batch, position = rng.integers(-1, 4, t), np.arange(t) * 5 - 3
    new = jnp.full((t, KH, D), 7.0)
    written = ja.append_paged_kv_cache(
        new, new, i32(batch), i32(position), cache, table, backend=backend
    )
    changed = np.flatnonzero((np.asarray(written.k) != kv[0]).any(axis=(1, 2, 3)))
    assert set(changed.tolist()) <= set(indices.tolist())


def test_lengths_on_the_host_are_checked():
    rows = i32([[0, 1], [2, 3]])
    with pytest.raises(ValueError, match=r"kv_len must be in \[0, 8\].*kv_len\[1\]=9"):
        ja.PageTable.from_block_table(rows, np.array([4, 9], np.int32), PAGE)
    with pytest.raises(ValueError, match=r"kv_len\[0\]=-1"):
        ja.PageTable.from_block_table(rows, np.array([-1, 8], np.int32), PAGE)


def test_a_table_is_read_at_its_own_page_size():
    table = ja.PageTable.from_block_table(i32([[0, 1]]), i32([5]), PAGE)
    heads = dict(num_qo_heads=2, num_kv_heads=1)
    assert ja.plan_decode(table, **heads).page_size == PAGE
    with pytest.raises(ValueError, match="page_size must be that of the page table, 4; got 16"):
        ja.plan_decode(table, page_size=16, **heads)
    with pytest.raises(ValueError, match="page_size must be that of the page table, 4; got 8"):
        ja.plan_prefill(i32([0, 1]), table, page_size=8, num_qo_tokens=1, **heads)
    cache = ja.PagedKVCache.zeros(2, 8, 1, D, jnp.float32)
    new = jnp.ones((1, 1, D))
    with pytest.raises(ValueError, match="page_size must be that of the page table, 4; got 8"):
        ja.append_paged_kv_cache(new, new, i32([0]), i32([0]), cache, table)
    unknown = ja.PageTable(table.indptr, table.indices, table.last_page_len)
    with pytest.raises(ValueError, match="page_size must be given"):
        ja.plan_decode(unknown, **heads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table_without_entries_appends_nothing(backend):
    kv, cache = random_cache()
    table = ja.PageTable(i32([0, 0]), i32([]), i32([0]), PAGE)
    new = jnp.ones((2, KH, D))
    where = i32([0, -1]), i32([0, 0])
    written = ja.append_paged_kv_cache(new, new, *where, cache, table, backend=backend)
    np.testing.assert_array_equal(written.k, kv[0])
    qkv = jnp.ones((2, (2 + 2 * KH) * D))
    rope = ja.precompute_freqs_cis(D, 16)
    q, written = ja.rope_append_paged_kv_cache(qkv, *where, rope, cache, table, backend=backend)
    np.testing.assert_array_equal(written.v, kv[1])
    np.testing.assert_array_equal(np.asarray(q[0]), 1.0)  # position 0 does not turn


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_in_the_hundred_thousands(backend):
    """Weights come from differences of scores: rounding the scores themselves would show in the third digit.

    Of one split: the lse by which splits are merged is a float32, whose last place is 0.016 there.
    """
    n, d = 300, 64
    rng = np.random.default_rng(0)
    q = np.full((1, 1, d), 177.0, np.float32)
    q[..., 0] = 8.0
    k = np.full((n, 1, d), 177.0, np.float32)
    k[:, 0, 0] += (
        rng.integers(0, 16, n) / 4
    )  # the scores are exact in float32; logits up to 4 apart
    v = rng.standard_normal((n, 1, d)).astype(np.float32)
    plan = ja.plan_ragged_prefill(
        i32([0, 1]),
        i32([0, n]),
        num_qo_tokens=1,
        num_qo_heads=1,
        num_kv_heads=1,
        disable_split_kv=True,
    )
    o = ja.ragged_prefill(*map(jnp.asarray, (q, k, v)), plan, backend=backend)
    truth, _ = dense_attention(q, k, v, sm_scale=d**-0.5, causal=False, dtype=np.float64)
    assert 2e5 < (q[0, 0] @ k[0, 0]) * d**-0.5 < 3e5
    assert np.abs(np.asarray(o) - truth).max() < 1e-5


@pytest.mark.slow
def test_a_derivative_of_a_derivative():
    plan = ja.plan_ragged_prefill(
        i32([0, 3]), i32([0, 3]), num_qo_tokens=3, num_qo_heads=1, num_kv_heads=1
    )
    x = device_array(np.random.default_rng(0).standard_normal((3, 1, 16), np.float32))

    def loss(backend):
        return lambda x: (ja.ragged_prefill(x, x, x, plan, backend=backend) ** 2).sum()

    def twice(backend):
        return jax.grad(lambda x: jax.grad(loss(backend))(x).sum())(x)

    ours, plain = (np.asarray(twice(backend)) for backend in ("interpret", "xla"))
    np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)
    weight = jnp.ones(16)
    norm = lambda x: (ja.rmsnorm(x, weight, backend="interpret") ** 3).sum()
    assert np.isfinite(np.asarray(jax.grad(lambda x: jax.grad(norm)(x).sum())(x[:, 0]))).all()
