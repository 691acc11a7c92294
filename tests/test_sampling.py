"""Sampling: kept sets against a sort in float64, draws against the distribution, kernels against the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn as ja

BACKENDS = ["interpret", "xla"]
f16, bf16, f32 = jnp.float16, jnp.bfloat16, jnp.float32


def probabilities(rows, vocab, *, deviation=2.0, seed=0):
    """float32 rows of softmaxed normal logits."""
    logits = deviation * np.random.default_rng(seed).standard_normal((rows, vocab))
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def kept_of(row, *, top_k=None, top_p=1.0, min_p=0.0, joint=False):
    """Which tokens of a row are kept, by a sort in float64."""
    row = np.asarray(row, np.float64)
    row = np.where(np.isfinite(row) & (row > 0), row, 0)
    descending = np.sort(row)[::-1]
    kept = np.ones(row.size, bool)
    if top_k is not None:
        kept &= row >= descending[min(top_k, row.size) - 1]
    mass = row.sum() if joint else row[kept].sum()
    if top_p < 1:
        above = np.array([row[row > x].sum() for x in row])
        kept &= (above < top_p * mass) | (row == row.max())
    return kept & (row >= min_p * row.max())


CASES = {
    "plain": ({}, lambda p, k, **how: ja.sampling_from_probs(p, k, **how)),
    "top_k": (dict(top_k=5), lambda p, k, **how: ja.top_k_sampling_from_probs(p, 5, k, **how)),
    "top_p": (dict(top_p=0.7), lambda p, k, **how: ja.top_p_sampling_from_probs(p, 0.7, k, **how)),
    "min_p": (dict(min_p=0.2), lambda p, k, **how: ja.min_p_sampling_from_probs(p, 0.2, k, **how)),
    "top_k_top_p": (
        dict(top_k=5, top_p=0.7),
        lambda p, k, **how: ja.top_k_top_p_sampling_from_probs(p, 5, 0.7, k, **how),
    ),
    "joint": (
        dict(top_k=5, top_p=0.7, joint=True),
        lambda p, k, **how: ja.top_k_top_p_sampling_from_probs(
            p, 5, 0.7, k, filter_apply_order="joint", **how
        ),
    ),
    "logits": ({}, lambda p, k, **how: ja.sampling_from_logits(jnp.log(p), k, **how)),
    "logits_top_k_top_p": (
        dict(top_k=5, top_p=0.7),
        lambda p, k, **how: ja.top_k_top_p_sampling_from_logits(jnp.log(p), 5, 0.7, k, **how),
    ),
}

GPU_CASES = [
    # rows, vocabulary, dtype, deviation of the logits
    (32, 128256, f32, 1.0),
    (128, 151936, f32, 4.0),
    (3, 50257, bf16, 2.0),
    (1, 32000, f16, 2.0),
    (5, 7, f32, 1.0),
]


def check_kernels(backend, rows, vocab, dtype, deviation):
    """Kernels draw what the definition draws: with limits of each row, all kinds of them side by side, and ties."""
    probs = jnp.asarray(probabilities(rows, vocab, deviation=deviation)).astype(dtype)
    logits = jnp.log(probs.astype(f32)).astype(dtype)
    rng = np.random.default_rng(1)

    def each(dtype, *values):
        return jnp.asarray(rng.permutation(np.resize(np.asarray(values, dtype), rows)))

    top_k = each(np.int32, 1, vocab, min(50, vocab), 2, max(1, vocab // 2), 2**31 - 1)
    top_p = each(np.float32, 0.9, 0.1, 1.0, 1e-9, 0.999)
    min_p = each(np.float32, 0.0, 1e-3, 0.5, 1.0)
    warm = each(np.float32, 1.0, 0.0, 0.3, 2.0)
    keys = jax.random.split(jax.random.key(7), rows)

    def draws(backend):
        how = dict(backend=backend)
        both = ja.top_k_top_p_sampling_from_probs
        return dict(
            plain=ja.sampling_from_probs(probs, keys, **how),
            first=both(probs, top_k, top_p, keys, **how),
            joint=both(probs, top_k, top_p, keys, filter_apply_order="joint", **how),
            min_p=ja.min_p_sampling_from_probs(probs, min_p, keys, **how),
            logits=ja.sampling_from_logits(
                logits, keys, temperature=warm, top_k=top_k, top_p=top_p, min_p=min_p, **how
            ),
            masked=ja.top_k_mask_logits(logits, top_k, **how),
            top_p=ja.top_p_renorm_probs(probs, top_p, **how),
            top_k=ja.top_k_renorm_probs(probs, top_k, **how),
        )

    got, want = (jax.jit(draws, static_argnums=0)(backend) for backend in (backend, "xla"))
    for name in want:
        ours, theirs = (np.asarray(x[name]).astype(np.float32) for x in (got, want))
        if name in ("top_p", "top_k"):  # divided by sums in another order
            np.testing.assert_array_equal(ours > 0, theirs > 0, err_msg=name)
            rtol = 1e-5 if dtype == f32 else float(jnp.finfo(dtype).eps)
            np.testing.assert_allclose(ours, theirs, rtol=rtol, err_msg=name)
        else:
            np.testing.assert_array_equal(ours, theirs, err_msg=name)


@pytest.mark.parametrize("rows, vocab, dtype, deviation", [(6, 300, f32, 2.0)])
def test_interpreted_kernels(rows, vocab, dtype, deviation):
    check_kernels("interpret", rows, vocab, dtype, deviation)


@pytest.mark.gpu
@pytest.mark.parametrize("rows, vocab, dtype, deviation", GPU_CASES)
def test_kernels_on_a_gpu(rows, vocab, dtype, deviation):
    check_kernels("triton", rows, vocab, dtype, deviation)
