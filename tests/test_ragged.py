"""paged_attention, one ragged call of prompts, chunks, drafts and decode rows, against dense attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import i32, make_paged
from rowwise import normal, on_host, same

import jaxattn as ja

ON_GPU = pytest.param("triton", marks=pytest.mark.gpu)
BACKENDS = ["xla", "interpret", ON_GPU]
SLOW_INTERPRETED = ["xla", pytest.param("interpret", marks=pytest.mark.slow), ON_GPU]
f32 = jnp.float32
# A prompt, a chunk of one, a draft, a decode row, a request without tokens, one with keys and no queries.
QO_LENS, KV_LENS = (20, 16, 4, 1, 0, 0), (20, 53, 30, 70, 0, 9)
HEADS, PAGE_SIZE = 4, 5


def arguments(padding=3, **how):
    paged = make_paged(KV_LENS, page_size=PAGE_SIZE, head_dim=32, dtype=f32, **how)
    cu_q_lens = np.concatenate([[0], np.cumsum(QO_LENS)])
    q = normal((int(cu_q_lens[-1]) + padding, HEADS, 32))
    lens = dict(
        cu_q_lens=i32(cu_q_lens), kv_lens=i32(KV_LENS), block_tables=paged.table.to_block_table(16)
    )
    return paged, q, lens


@functools.partial(
    jax.jit, static_argnames=("window_left", "logits_soft_cap", "sm_scale", "return_lse", "backend")
)
def run(q, cache, **how):
    return ja.paged_attention(q, cache, **how)


def dense(q, k, v, window_left):
    """Queries that are the last of a request's tokens, in float64: (o, lse)."""
    t, s = len(q), len(k)
    i, j = np.arange(s - t, s)[:, None], np.arange(s)[None, :]
    seen = (j <= i) & (j >= i - (s if window_left is None else window_left))
    q, k, v = (x.astype(np.float64) for x in (q, *(np.repeat(x, 2, axis=1) for x in (k, v))))
    logits = np.where(seen, np.einsum("thd,shd->hts", q, k) * 0.3, -np.inf)
    weights = np.exp(logits)
    total = weights.sum(axis=-1)
    return np.einsum("hts,shd->thd", weights / total[..., None], v), np.log(total).T


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window_left", [None, 11])
def test_a_mixed_batch(window_left, backend):
    paged, q, lens = arguments()
    how = dict(sm_scale=0.3, window_left=window_left, return_lse=True, backend=backend)
    o, lse = (on_host(x) for x in run(q, paged.cache, **lens, **how))
    indptr = np.asarray(lens["cu_q_lens"])
    for i, (k, v) in enumerate(zip(paged.k, paged.v, strict=True)):
        rows = slice(indptr[i], indptr[i + 1])
        want = dense(on_host(q[rows]), k, v, window_left)
        np.testing.assert_allclose(o[rows], want[0], atol=2e-5)
        np.testing.assert_allclose(lse[rows], want[1], atol=2e-5)
    assert not o[indptr[-1] :].any() and (lse[indptr[-1] :] == -np.inf).all()


@pytest.mark.parametrize("backend", SLOW_INTERPRETED)
def test_what_lies_beyond_num_seqs_is_ignored(backend):
    """As engines leave it: arrays of fixed size, whose ends hold whatever the last step left there."""
    paged, q, lens = arguments()
    want = run(q, paged.cache, **lens, backend=backend)
    n = 4  # the first that have queries
    for num_seqs in (i32(n), i32([n])):
        stale = dict(
            cu_q_lens=lens["cu_q_lens"].at[n + 1 :].set(i32([7, 999])),
            kv_lens=lens["kv_lens"].at[n:].set(55),
            block_tables=lens["block_tables"].at[n:].set(10**6),
            num_seqs=num_seqs,
        )
        assert same(run(q, paged.cache, **stale, backend=backend), want)


@pytest.mark.parametrize("backend", SLOW_INTERPRETED)
def test_every_form_of_a_cache(backend):
    paged, q, lens = arguments()
    k, v = (jnp.pad(x, ((0, -x.shape[0] % 6), *[(0, 0)] * 3)) for x in paged.cache.data)
    want = run(q, paged.cache, **lens, backend=backend)
    for cache in ((k, v), tuple(x.reshape(6, -1, *x.shape[1:]) for x in (k, v))):
        assert same(run(q, cache, **lens, backend=backend), want)


@pytest.mark.parametrize("backend", SLOW_INTERPRETED)
def test_one_plan_for_a_scan_over_layers(backend):
    paged, q, lens = arguments()
    caches = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), paged.cache)

    @jax.jit
    def layers(q, caches):
        plan = ja.plan_paged_attention(
            **lens, num_q_tokens=q.shape[0], page_size=PAGE_SIZE, num_qo_heads=HEADS, num_kv_heads=2
        )
        return jax.lax.scan(
            lambda x, cache: (ja.paged_prefill(x, cache, plan, backend=backend),) * 2, q, caches
        )[1]

    got = layers(q, caches)
    x = q
    for i in range(2):
        x = run(x, jax.tree.map(lambda c, i=i: c[i], caches), **lens, backend=backend)
        np.testing.assert_allclose(on_host(got[i]), on_host(x), atol=1e-5)


@pytest.mark.parametrize("backend", SLOW_INTERPRETED)
def test_vmap(backend):
    """Over caches and over lengths."""
    paged, q, lens = arguments()
    caches = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), paged.cache)
    shorter = dict(lens, kv_lens=lens["kv_lens"] - i32([0, 0, 3, 5, 0, 0]))
    both = jax.tree.map(lambda *x: jnp.stack(x), lens, shorter)
    got = jax.vmap(lambda cache, lens: run(q, cache, **lens, backend=backend))(caches, both)
    for i, own in enumerate((lens, shorter)):
        want = run(q, jax.tree.map(lambda c, i=i: c[i], caches), **own, backend=backend)
        np.testing.assert_allclose(on_host(got[i]), on_host(want), atol=1e-5)


@pytest.mark.parametrize(
    "error,message,change",
    [
        (ValueError, "block_tables must have shape", dict(block_tables=i32([1, 2]))),
        (ValueError, r"kv_lens must have shape \[6\]", dict(kv_lens=i32([1]))),
        (ValueError, r"cu_q_lens must have shape \[7\]", dict(cu_q_lens=i32([0, 1]))),
        (TypeError, "cu_q_lens must be int32", dict(cu_q_lens=jnp.zeros(7))),
        (ValueError, "num_seqs must be one integer", dict(num_seqs=i32([1, 2]))),
        (ValueError, "num_seqs must be one integer", dict(num_seqs=jnp.ones(1))),
        (TypeError, "num_seqs must be an array", dict(num_seqs=3)),
        (ValueError, "q must have shape", dict(q=jnp.zeros((3, 4)))),
        (TypeError, r"a tuple \(k, v\)", dict(paged_kv_cache=[1, 2])),
        (ValueError, "num_kv_heads", dict(q=jnp.zeros((44, 3, 32)))),
    ],
)
def test_errors(error, message, change):
    paged, q, lens = arguments()
    with pytest.raises(error, match=message):
        ja.paged_attention(**(dict(q=q, paged_kv_cache=paged.cache) | lens | change))
