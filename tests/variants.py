"""Attention with every option, written apart from the library: dense, one request at a time, float64; and its cases."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
from helpers import device_array, multiply_by_group, rounded


@dataclasses.dataclass(frozen=True)
class Variant:
    """What is computed; None leaves an option off. Arrays are made from the seed by `arrays`."""

    causal: bool = False
    window_left: int | None = None
    window_right: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    alibi: bool = False
    score_mod: bool = False
    mask: str | None = None  # "random", "tree", "blocks"
    spans: bool = False


def tilted(score, query_position, key_position, query_head, a, b):
    """A user's score_mod with two arrays per head, and every argument in it."""
    far = (query_position - key_position).astype(jnp.float32)
    odd = (query_head % 2).astype(jnp.float32)
    return score * a + jnp.sin(far * 0.1) * b + 0.25 * odd


def tilted_float64(x, i, j, head, a, b):
    return x * a + np.sin((i - j) * 0.1) * b + 0.25 * (head % 2)


def operands(variant, num_heads, seed=11):
    """sinks, slopes, and the score_mod's two arrays, float32 [h] each."""
    rng = np.random.default_rng(seed)
    sinks = rng.normal(0, 2, num_heads).astype(np.float32)
    slopes = (2.0 ** -np.arange(1, num_heads + 1)).astype(np.float32) * 0.5
    tilt = [rng.normal(1, 0.3, num_heads).astype(np.float32) for _ in range(2)]
    return sinks, slopes, tilt


def options(variant, num_heads):
    """The keyword arguments of an attention op."""
    sinks, slopes, tilt = operands(variant, num_heads)
    how = dict(logits_soft_cap=variant.soft_cap)
    if variant.sinks:
        how |= dict(sinks=device_array(sinks))
    if variant.alibi:
        how |= dict(alibi_slopes=device_array(slopes))
    if variant.score_mod:
        how |= dict(score_mod=tilted, score_mod_arrays=[device_array(x) for x in tilt])
    return how


def masks_of(variant, qo_lens, kv_lens, seed=12):
    """A bool mask [qo_len, kv_len] for each request."""
    rng = np.random.default_rng(seed)
    masks = []
    for t, s in zip(qo_lens, kv_lens, strict=True):
        if variant.mask == "random":
            mask = rng.random((t, s)) < 0.5
        elif variant.mask == "tree":  # all of the prefix, some of each other
            mask = np.ones((t, s), bool)
            n = min(t, s)
            mask[:, s - n :] = np.tril(rng.random((t, n)) < 0.5, s - n)
        else:  # blocks of keys that are all clear between ones that are all set
            mask = np.zeros((t, s), bool)
            mask[:, : s // 5] = True
            mask[: t // 2, s - s // 3 :] = True
        masks.append(mask)
    return masks


def spans_of(qo_lens, kv_lens):
    """int32 [t, 2]: of each request's tokens, those from a third to two thirds lie in one span; the others in none."""
    rows = []
    for t, s in zip(qo_lens, kv_lens, strict=True):
        position = np.arange(t) + s - t
        first, last = s // 3, 2 * s // 3
        inside = (position >= first) & (position <= last)
        rows.append(np.where(inside[:, None], [first, last], [-1, -1]))
    return np.concatenate([*rows, np.zeros((0, 2))]).astype(np.int32)


def seen(variant, t, s, mask=None, spans=None):
    """bool [t, s]: which keys a request's queries, its last tokens, see."""
    i, j = np.arange(t)[:, None] + s - t, np.arange(s)[None, :]
    see = np.ones((t, s), bool)
    if variant.causal:
        see &= j <= i
    if variant.window_left is not None:
        see &= j >= i - variant.window_left
    if variant.window_right is not None:
        see &= j <= i + variant.window_right
    if spans is not None:
        first, last = spans[:, :1], spans[:, 1:]
        see |= (first <= i) & (i <= last) & (first <= j) & (j <= last)
    return see if mask is None else see & mask


def attend(variant, q, k, v, see, *, sm_scale, dtype=np.float64, score_dtype=None):
    """One request, q [t, h, d], k [s, kh, d], v [s, kh, dv], see bool [t, s]: (o, lse).

    In float64 the truth; in another dtype every intermediate is rounded to it, but scores to score_dtype.
    """
    t, h, _ = q.shape
    s, kh, dv = v.shape
    exact = np.float64 if dtype == np.float64 else np.float32
    score_dtype = score_dtype or dtype
    sinks, slopes, tilt = (np.asarray(x, exact) for x in operands(variant, h))
    used = see.any(axis=0)
    position = np.arange(s)[used]
    see, k, v = see[:, used], k[used].astype(exact), v[used].astype(exact)
    qk = multiply_by_group(q.astype(exact).swapaxes(0, 1), k.transpose(1, 2, 0))
    x = rounded(qk, score_dtype) * exact(sm_scale)
    i, j = np.arange(t)[None, :, None] + s - t, position[None, None, :]
    head = np.arange(h)[:, None, None]
    if variant.soft_cap:
        x = variant.soft_cap * np.tanh(x / variant.soft_cap)
    if variant.alibi:
        x = x + slopes[:, None, None] * (j - i)
    if variant.score_mod:
        a, b = (y[:, None, None] for y in tilt)
        x = tilted_float64(x, i, j, head, a, b)
    x = np.where(see[None], rounded(x.astype(exact), score_dtype), -np.inf)
    if variant.sinks:
        x = np.concatenate([x, np.broadcast_to(sinks[:, None, None], (h, t, 1))], axis=2)
        v = np.concatenate([v, np.zeros((1, kh, dv), exact)])
    if x.shape[2] == 0:
        return np.zeros((t, h, dv), exact), np.full((t, h), -np.inf, exact)
    peak = x.max(axis=2, keepdims=True)
    peak = np.where(np.isneginf(peak), 0, peak)
    weights = np.exp(x - peak)
    total = weights.sum(axis=2, keepdims=True)
    p = rounded(weights / np.where(total == 0, 1, total), dtype)
    o = rounded(multiply_by_group(p, v.swapaxes(0, 1)).swapaxes(0, 1), dtype)
    with np.errstate(divide="ignore"):
        return o, (np.log(total) + peak)[..., 0].T


def pairwise(**axes):
    """Few cases in which any two values of two axes meet: dicts, chosen greedily, always the same."""
    names = list(axes)
    wanted = {
        (a, x, b, y)
        for a, b in itertools.combinations(names, 2)
        for x in range(len(axes[a]))
        for y in range(len(axes[b]))
    }
    rng = np.random.default_rng(0)
    while wanted:
        best, gain = None, -1
        a, x, b, y = min(wanted)
        for _ in range(60):
            case = {name: int(rng.integers(len(axes[name]))) for name in names} | {a: x, b: y}
            pairs = {(m, case[m], n, case[n]) for m, n in itertools.combinations(names, 2)} & wanted
            if len(pairs) > gain:
                best, gain = case, len(pairs)
        wanted -= {(m, best[m], n, best[n]) for m, n in itertools.combinations(names, 2)}
        yield {name: axes[name][best[name]] for name in names}
