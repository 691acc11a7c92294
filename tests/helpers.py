"""Adversarial attention data, and the two-reference rule that judges a kernel."""

import contextlib
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

import jaxattn as ja


@dataclasses.dataclass(frozen=True)
class Paged:
    """Requests with keys and values on permuted pages; every slot that no request owns is NaN."""

    cache: ja.PagedKVCache
    table: ja.PageTable
    k: list[
        np.ndarray
    ]  # float32 [kv_len, kh, d] of each request, already rounded to the cache's dtype
    v: list[np.ndarray]


def rounded(x: np.ndarray, dtype) -> np.ndarray:
    """x as the dtype stores it, in float32; float64 rounds nothing."""
    return x if dtype == np.float64 else x.astype(jnp.dtype(dtype)).astype(np.float32)


def device_array(x, dtype=None) -> jax.Array:
    """x on the device, moved there from NumPy: `jnp.asarray` compiles a program for each shape."""
    if isinstance(x, jax.Array):
        return x if dtype is None else x.astype(dtype)
    # Of a copy: on a CPU the array may lie where NumPy's does.
    return jax.device_put(np.array(x, dtype))


def i32(x) -> jax.Array:
    return device_array(x, jnp.int32)


def i32s(*numbers) -> jax.Array:
    return i32(numbers)


def normal(rng, shape, dtype, scale=1.0, most=2**22 - 3) -> np.ndarray:
    """Normal numbers of this dtype; after `most`, a prime, they repeat, since drawing and rounding them takes long."""
    drawn = scale * rng.standard_normal(min(math.prod(shape), most), np.float32)
    return np.resize(drawn.astype(jnp.dtype(dtype)), shape)


def make_paged(
    kv_lens,
    *,
    page_size,
    num_kv_heads=2,
    head_dim=64,
    head_dim_v=None,
    dtype=jnp.bfloat16,
    layout="NHD",
    combined=False,
    spare_pages=3,
    spare_entries=5,
    scale=1.0,
    seed=0,
) -> Paged:
    rng = np.random.default_rng(seed)
    counts = [-(-n // page_size) for n in kv_lens]
    num_pages = sum(counts) + spare_pages
    order = rng.permutation(num_pages).astype(np.int32)
    pages = np.full((2, num_pages, page_size, num_kv_heads, head_dim), np.nan, jnp.dtype(dtype))
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    tokens = []
    for i, n in enumerate(kv_lens):
        kv = normal(rng, (2, n, num_kv_heads, head_dim), dtype, scale)
        own = order[indptr[i] : indptr[i + 1]]
        position = np.arange(n)
        pages[:, own[position // page_size], position % page_size] = kv
        tokens.append(kv.astype(np.float32))
    indices = np.full(
        indptr[-1] + spare_entries, num_pages + 7, np.int32
    )  # unused entries: nonsense
    indices[: indptr[-1]] = order[: indptr[-1]]
    last = [n - (c - 1) * page_size if c else 0 for n, c in zip(kv_lens, counts, strict=True)]
    if layout == "HND":
        pages = pages.swapaxes(2, 3)
    dv = head_dim_v or head_dim  # V's, at most K's
    data = pages.swapaxes(0, 1) if combined else (pages[0], pages[1, ..., :dv])
    data = jax.tree.map(device_array, data)
    table = ja.PageTable(*map(i32, (indptr, indices, last)), page_size)
    return Paged(
        ja.PagedKVCache(data, layout),
        table,
        [kv[0] for kv in tokens],
        [kv[1, ..., :dv] for kv in tokens],
    )


def with_scales(paged: Paged, kind: str, *, heads=None, seed=0) -> Paged:
    """The same stored numbers under scales: "tensor", "head" or "token"; k and v are those that the cache stands for.

    heads: two float arrays [kh], what k's and v's scales are near to; scales of slots that no request owns are NaN or
    infinite.
    """
    cache, rng = paged.cache, np.random.default_rng(seed)
    kh, p = cache.num_kv_heads, cache.page_size
    near = heads or [np.full(kh, 0.7), np.full(kh, 3.0)]
    indptr, indices = np.asarray(paged.table.indptr), np.asarray(paged.table.indices)
    scales, tokens = [], []
    for base, own in zip(near, (paged.k, paged.v), strict=True):
        if kind != "token":
            scale = np.float32(base[0] if kind == "tensor" else base)
            scales.append(device_array(scale))
            tokens.append([x * np.broadcast_to(scale, (kh,))[:, None] for x in own])
            continue
        pages = np.full((cache.num_pages, p, kh), np.nan, np.float32)
        pages[:, 1::2] = np.inf
        each = [(base * rng.uniform(0.1, 2, (len(x), kh))).astype(np.float32) for x in own]
        for i, scale in enumerate(each):
            position = np.arange(len(scale))
            pages[indices[indptr[i] + position // p], position % p] = scale
        scales.append(device_array(pages if cache.layout == "NHD" else pages.swapaxes(1, 2)))
        tokens.append([x * scale[..., None] for x, scale in zip(own, each, strict=True)])
    cache = dataclasses.replace(cache, scales=ja.KVScales(*scales))
    return Paged(cache, paged.table, *tokens)


def multiply_by_group(x, y):
    """x [h, m, n] by y [kh, n, l], each KV head's for the query heads of its group: [h, m, l], through BLAS."""
    (h, m, n), (kh, _, l) = x.shape, y.shape
    return (x.reshape(kh, h // kh * m, n) @ y).reshape(h, m, l)


def dense_attention(q, k, v, *, sm_scale, causal, dtype, score_dtype=None):
    """One request, q [t, h, d] and k, v [s, kh, d], every intermediate rounded to `dtype`: (o, lse).

    In float64 it is the truth; in a kernel's own dtype, the plain computation that a kernel must rival; where
    scores overflow that dtype, score_dtype=jnp.float32 keeps them.
    """
    t, h, d = q.shape
    s, kh, _ = k.shape
    if t == 0 or s == 0:
        return np.zeros((t, h, d), np.float32), np.full((t, h), -np.inf, np.float32)
    exact = np.float64 if dtype == np.float64 else np.float32
    q, k, v = (x.swapaxes(0, 1).astype(exact) for x in (q, k, v))
    score_dtype = score_dtype or dtype
    scores = rounded(multiply_by_group(q, k.swapaxes(1, 2)), score_dtype)
    scores = rounded(scores * exact(sm_scale), score_dtype)
    if causal:
        seen = np.arange(s)[None, :] <= np.arange(t)[:, None] + s - t
        scores = np.where(seen, scores, -np.inf)
    peak = scores.max(axis=-1, keepdims=True)
    peak = np.where(np.isneginf(peak), 0, peak)
    weights = np.exp(scores - peak)
    total = weights.sum(axis=-1, keepdims=True)
    p = rounded(weights / np.where(total == 0, 1, total), dtype)
    o = rounded(multiply_by_group(p, v), dtype)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + peak
    return o.swapaxes(0, 1), lse[..., 0].T


def dense_batch(qs, ks, vs, **how):
    """`dense_attention` of each request, concatenated."""
    states = [dense_attention(q, k, v, **how) for q, k, v in zip(qs, ks, vs, strict=True)]
    return np.concatenate([o for o, _ in states]), np.concatenate([lse for _, lse in states])


def assert_rivals(ours, truth, plain, dtype, what="o"):
    """Our error is at most twice that of the plain same-dtype computation, give or take two ulp."""
    ours, truth, plain = (np.asarray(x, np.float64) for x in (ours, truth, plain))
    assert ours.shape == truth.shape
    assert np.isfinite(ours).all(), f"{what} has {np.sum(~np.isfinite(ours))} non-finite elements"
    if not truth.size:
        return
    error, plain_error = np.abs(ours - truth).max(), np.abs(plain - truth).max()
    allowed = 2 * plain_error + 2 * float(jnp.finfo(dtype).eps) * np.abs(truth).max()
    assert error <= allowed, f"{what}: {error=:.3g}, {plain_error=:.3g}, {allowed=:.3g}"


def assert_lse(ours, truth):
    """lse agrees to float32 rounding; rows without keys are -inf in both."""
    ours, truth = np.asarray(ours), np.asarray(truth)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(np.isneginf(ours), np.isneginf(truth))
    np.testing.assert_allclose(ours, truth, rtol=2e-5, atol=2e-5)


def same_bits(a, b) -> bool:
    """Whether two arrays are equal to the bit, NaN included."""
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


@contextlib.contextmanager
def no_compilation():
    """Fails where XLA compiles anything."""
    compiled = []

    def listen(event, duration, **kwargs):
        if "backend_compile" in event:
            compiled.append(kwargs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled, compiled
