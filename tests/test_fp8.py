"""FP8 caches: what is stored, and attention over it against float64 on the numbers that the cache stands for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_rivals,
    dense_batch,
    device_array,
    i32s,
    make_paged,
    rounded,
    same_bits,
    with_scales,
)
from jax.sharding import PartitionSpec as P
from rowwise import assert_no_copy, compile_in_place, make_append, two_devices
from test_variants import LENS, QO_LENS, check, splits_of
from variants import Variant, pairwise

import jaxattn as ja
from jaxattn import device
from jaxattn.kv_scales import MIN_SCALE

BACKENDS = ["interpret", "xla"]
E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
f16, bf16, f32 = jnp.float16, jnp.bfloat16, jnp.float32


# Attention.

PAIRS = list(
    pairwise(
        kv_dtype=[E4M3, E5M2],
        scales=[None, "tensor", "head", "token"],
        op=["decode", "prefill"],
        what=[
            Variant(causal=True),
            Variant(causal=True, window_left=33, sinks=True),
            Variant(causal=True, soft_cap=4.0),
            Variant(causal=True, alibi=True, sinks=True),
            Variant(causal=True, score_mod=True, window_left=130),
            Variant(mask="random", sinks=True),
            Variant(mask="blocks", soft_cap=8.0),
            Variant(causal=True, spans=True),
        ],
        page_size=[1, 5, 16, 64],
        layout=["NHD", "HND", "NHD combined", "HND combined"],
        head_dim=[(64, 64), (72, 72), (128, 64), (128, 63)],
        group=[1, 3, 8],
        dtype=[bf16, f16, f32],
        out_dtype=[None, f32],
        splits=[None, dict(fixed_split_size=1), dict(disable_split_kv=True)],
    )
)


def run_pair(case, backend, lens=LENS, qo_lens=QO_LENS):
    what, d = case["what"], case["head_dim"]
    if case["op"] == "decode":
        what = dataclasses.replace(what, causal=False, mask=None, spans=False)
    layout = case["layout"] if d[0] == d[1] else case["layout"].split()[0]
    rest = {k: v for k, v in case.items() if k not in ("what", "layout")}
    rest["splits"] = splits_of(case)
    check(what, qo_lens, lens, backend=backend, layout=layout, num_sms=16, **rest)


@pytest.mark.slow
@pytest.mark.parametrize("case", PAIRS, ids=lambda case: f"{case['op']}-{case['scales']}")
def test_options_combine(case):
    run_pair(case, "interpret")


@pytest.mark.parametrize("case", PAIRS[::4], ids=lambda case: f"{case['op']}-{case['scales']}")
def test_options_combine_in_the_reference(case):
    run_pair(case, "xla")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow if i % 3 else ()) for i, case in enumerate(PAIRS)],
    ids=lambda case: f"{case['op']}-{case['scales']}",
)
def test_options_combine_gpu(case):
    run_pair(case, None, [*LENS, 3000], [*QO_LENS, 200])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scales", [None, "head", "token"])
@pytest.mark.parametrize("op,layout", [("decode", "NHD"), ("prefill", "HND combined")])
def test_attention(op, layout, scales, backend):
    check(
        Variant(causal=op == "prefill"), QO_LENS, LENS, backend=backend, op=op, scales=scales,
        layout=layout, kv_dtype=E4M3, dtype=bf16, num_sms=24, group=4,
    )  # fmt: skip


FEW = [(1, 3, "NHD"), (1, 8, "HND combined"), (2, 1, "NHD combined"), (3, 5, "HND")]


def few_tokens_a_page(page_size, kh, layout, backend):
    """Programs of decode read scales from lines that a kernel lays before."""
    lens = [0, 1, page_size, page_size + 1, 63, 64, 65, 300, 700]
    for what in (Variant(), Variant(window_left=70, sinks=True)):
        check(
            what, None, lens, backend=backend, op="decode", scales="token", layout=layout, kh=kh,
            page_size=page_size, kv_dtype=E4M3, dtype=bf16, num_sms=24,
        )  # fmt: skip


@pytest.mark.parametrize("page_size,kh,layout", FEW)
def test_few_tokens_a_page(page_size, kh, layout):
    few_tokens_a_page(page_size, kh, layout, "interpret")


@pytest.mark.gpu
@pytest.mark.parametrize("page_size,kh,layout", FEW[:2])
def test_few_tokens_a_page_gpu(page_size, kh, layout):
    few_tokens_a_page(page_size, kh, layout, None)


@pytest.mark.parametrize(
    "page_size,entries,expected", [(1, 0, True), (3, 0, True), (4, 0, False), (1, 100, False)]
)
def test_scales_lie_in_lines_where_pages_are_small_and_tables_short(page_size, entries, expected):
    paged = make_paged([40], page_size=page_size, dtype=E4M3, spare_entries=entries)
    paged = with_scales(paged, "token")
    plan = ja.plan_decode(paged.table, num_qo_heads=4, num_kv_heads=2)
    q = jnp.zeros((1, 4, 64), bf16)
    attend = lambda q: ja.paged_decode(q, paged.cache, plan, backend="interpret")
    assert ("paged_decode_scales" in str(jax.make_jaxpr(attend)(q))) == expected


def wild(
    kind,
    op,
    backend,
    dtype=bf16,
    kv_dtype=E4M3,
    lens=(40, 300, 0, 17),
    new=5,
    out_dtype=f32,
    sms=16,
):
    """Scales from 1e-6 to 1e6 by head, q the other way round; each head is judged by itself."""
    kh, group, d = 4, 4, 64
    heads = [np.float32([1e-6, 1e6, 1.0, 1e-3]), np.float32([1e6, 1e-6, 1e-6, 1e3])]
    paged = make_paged(lens, page_size=16, num_kv_heads=kh, head_dim=d, dtype=kv_dtype)
    paged = with_scales(paged, kind, heads=heads)
    qo_lens = [1] * len(lens) if op == "decode" else [min(n, new) for n in lens]
    rng = np.random.default_rng(0)
    # float16 holds no query of 1e6: there, only the small ones.
    smallest = 1.0 if dtype == f16 else 1e-6
    size = 1 / np.maximum(np.repeat(heads[0], group), smallest)[None, :, None]
    q = rng.standard_normal((sum(qo_lens), kh * group, d)) * size
    q = rounded(q.astype(np.float32), dtype)
    options = dict(num_qo_heads=kh * group, num_kv_heads=kh, num_sms=sms)
    how = dict(backend=backend, return_lse=True, out_dtype=out_dtype)
    indptr = np.cumsum([0, *qo_lens])

    @jax.jit
    def run(q, cache, table):
        if op == "decode":
            return ja.paged_decode(q, cache, ja.plan_decode(table, **options), **how)
        plan = ja.plan_prefill(i32s(*indptr), table, num_qo_tokens=len(q), **options)
        return ja.paged_prefill(q, cache, plan, **how)

    o, lse = run(device_array(q, dtype), paged.cache, paged.table)
    parts = [q[a:b] for a, b in zip(indptr, indptr[1:], strict=False)]
    args = dict(sm_scale=d**-0.5, causal=True)
    truth, truth_lse = dense_batch(parts, paged.k, paged.v, dtype=np.float64, **args)
    plain, _ = dense_batch(parts, paged.k, paged.v, dtype=dtype, score_dtype=f32, **args)
    seen = np.isfinite(truth_lse)
    np.testing.assert_allclose(np.asarray(lse)[seen], truth_lse[seen], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(np.isneginf(np.asarray(lse)), ~seen)
    for head in range(kh * group):
        assert_rivals(o[:, head], truth[:, head], plain[:, head], dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["head", "token"])
@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_scales_of_any_size(op, kind, backend):
    wild(kind, op, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [bf16, f32])
@pytest.mark.parametrize("kv_dtype", [E4M3, E5M2])
@pytest.mark.parametrize("kind", ["head", "token"])
@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_scales_of_any_size_gpu(op, kind, kv_dtype, dtype):
    wild(kind, op, None, dtype, kv_dtype, (40, 3000, 0, 17))


def far_apart(backend, op="decode"):
    """Values of each token's own scale, from 1e-6 to 1e6 within a head; and a sink far above all logits."""
    n, d = 64, 64
    paged = make_paged([n], page_size=16, num_kv_heads=1, head_dim=d, dtype=E4M3)
    scale = (10.0 ** np.linspace(-6, 6, n)).astype(np.float32)[:, None]
    paged = with_scales(paged, "token")
    pages = np.full((paged.cache.num_pages, 16, 1), np.nan, np.float32)
    indices = np.asarray(paged.table.indices)
    pages[indices[np.arange(n) // 16], np.arange(n) % 16] = scale
    stored = make_paged([n], page_size=16, num_kv_heads=1, head_dim=d, dtype=E4M3)
    k, v = stored.k[0].astype(np.float64), stored.v[0] * scale[..., None].astype(np.float64)
    scales = ja.KVScales(jnp.ones(pages.shape, f32), device_array(pages))
    cache = dataclasses.replace(stored.cache, scales=scales)
    # Logits that undo the scales: every token counts.
    bias = device_array([1.0], f32)
    mod = lambda s, i, j, head, b: s * b - (j.astype(f32) / (n - 1) - 0.5) * 12 * np.log(10)
    q = np.random.default_rng(1).standard_normal((1, 1, d)).astype(np.float32)
    q = rounded(q, bf16)
    x = np.einsum("hd,nd->n", q[0].astype(np.float64), k[:, 0]) * d**-0.5
    x -= (np.arange(n) / (n - 1) - 0.5) * 12 * np.log(10)
    sink = x.max() + 20

    @jax.jit
    def attend(q, sinks):
        plan = ja.plan_decode(paged.table, num_qo_heads=1, num_kv_heads=1, num_sms=4)
        how = dict(score_mod=mod, score_mod_arrays=[bias], backend=backend, out_dtype=f32)
        return ja.paged_decode(q, cache, plan, sinks=sinks, **how)

    for sinks in (None, device_array([sink], f32)):
        logits = x if sinks is None else np.append(x, sink)
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        truth = (weights[:n, None] * v[:, 0]).sum(axis=0)
        o = attend(device_array(q, bf16), sinks)
        size = np.abs(weights[:n, None] * v[:, 0]).max()
        np.testing.assert_allclose(np.asarray(o[0, 0]), truth, atol=3e-3 * size)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_far_apart_within_a_head(backend):
    far_apart(backend)


@pytest.mark.gpu
def test_scales_far_apart_within_a_head_gpu():
    far_apart(None)


def many(tokens, table, backend, **how):
    """Attention of `tokens` queries of each request, all of which see all of its keys: q, cache to o float32."""
    indptr = i32s(*(tokens * np.arange(table.indptr.size)))

    @functools.partial(jax.jit, static_argnames="sm_scale")
    def attend(q, cache, sm_scale):
        if tokens == 1:
            plan = ja.plan_decode(table, **how)
            return ja.paged_decode(
                q, cache, plan, sm_scale=sm_scale, backend=backend, out_dtype=f32
            )
        tall = dict(num_qo_tokens=q.shape[0], causal=False, **how)
        plan = ja.plan_prefill(indptr, table, **tall)
        return ja.paged_prefill(q, cache, plan, sm_scale=sm_scale, backend=backend)

    return lambda q, cache, sm_scale: np.asarray(attend(q, cache, sm_scale), np.float32)


def long_tail(backend, tokens=1):
    """One key outweighs each of the others by e^17 and has no value: what is left is theirs, below float16's normal
    numbers."""
    n, d = 1000, 64
    k, v = np.zeros((n, 1, d), np.float32), np.ones((n, 1, d), np.float32)
    k[0, 0, 0], v[0] = 17, 0
    cache = ja.PagedKVCache(tuple(device_array(x)[None].astype(E4M3) for x in (k, v)))
    q = jnp.zeros((tokens, 1, d), bf16).at[:, 0, 0].set(1)
    table = ja.PageTable(i32s(0, 1), i32s(0), i32s(n), n)
    run = many(tokens, table, backend, num_qo_heads=1, num_kv_heads=1, disable_split_kv=True)
    stored = float(np.asarray(cache.k[0, 0, 0, 0]).astype(np.float32))
    rest = (n - 1) * np.exp(-stored)
    o = run(q, cache, 1.0)
    # Of many queries, the output has 8 bits.
    rtol = 2e-3 if tokens == 1 else 2**-8
    np.testing.assert_allclose(o[:, 0], np.full((tokens, d), rest / (1 + rest)), rtol=rtol)


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_weights_are_not_lost(backend):
    long_tail(backend)


@pytest.mark.gpu
def test_small_weights_are_not_lost_gpu():
    long_tail(None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_of_zero_is_a_vector_of_zeros(backend):
    """As others write it: no append does."""
    paged = with_scales(make_paged([20], page_size=4, num_kv_heads=1, dtype=E4M3), "token")
    page = int(paged.table.indices[2])
    scales = paged.cache.scales
    zero = ja.KVScales(scales.k.at[page, 1].set(0), scales.v.at[page, 1].set(0))
    data = [x.at[page, 1].set(0) for x in paged.cache.data]
    plan = ja.plan_decode(paged.table, num_qo_heads=2, num_kv_heads=1, num_sms=2)
    q = jnp.ones((1, 2, 64), bf16)
    o, want = (
        ja.paged_decode(q, ja.PagedKVCache(tuple(data), "NHD", s), plan, backend=backend)
        for s in (zero, scales)
    )
    assert np.isfinite(np.asarray(o, np.float32)).all()
    np.testing.assert_allclose(np.asarray(o, np.float32), np.asarray(want, np.float32), rtol=1e-2)


def extremes(backend, tokens=1):
    """What float16 does not hold: queries from 1e-30 to 1e30 and rows of zeros, beside each other in one tile; NaN."""
    paged = make_paged([50, 30], page_size=16, num_kv_heads=1, head_dim=64, dtype=E5M2)
    size = np.float32([1e-30, 1e30, 0, 1])[None, :, None]
    q = np.random.default_rng(0).standard_normal((2 * tokens, 4, 64)).astype(np.float32) * size
    q = rounded(q, bf16)
    attend = many(tokens, paged.table, backend, num_qo_heads=4, num_kv_heads=1, num_sms=4)

    def run(q, cache=paged.cache, sm_scale=1.0):
        return attend(device_array(q, bf16), cache, sm_scale)

    o = run(q)
    # With a scale that makes logits of order 1 of each.
    for head, sm_scale in ((0, 1.0), (1, 1e-30), (2, 1.0), (3, 1.0)):
        parts = q.reshape(2, tokens, 4, 64)
        truth, _ = dense_batch(
            parts, paged.k, paged.v, sm_scale=sm_scale, causal=False, dtype=np.float64
        )
        rtol = 1e-7 if tokens == 1 else 2**-8  # of many queries, the output has 8 bits
        got = run(q, sm_scale=sm_scale)[:, head]
        np.testing.assert_allclose(got, truth[:, head], atol=2e-3, rtol=rtol)
    # A query's NaN or infinity is its own row's.
    q[0, 3, 5] = np.nan
    q[tokens, 3, 5] = np.inf
    assert same_bits(run(q)[:, :3], o[:, :3])
    assert np.isnan(run(q)[0, 3]).all()
    # NaN of a request's own value or key stays its own.
    page = int(paged.table.indices[int(paged.table.indptr[1])])
    for at in (0, 1):
        data = list(paged.cache.data)
        data[at] = data[at].at[page, 3, 0, 7].set(jnp.nan)
        bad = run(q, dataclasses.replace(paged.cache, data=tuple(data)))
        assert np.isnan(bad[tokens, 0]).any()
        assert same_bits(bad[:tokens, :3], o[:tokens, :3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_queries_and_nan(backend):
    extremes(backend)


@pytest.mark.gpu
def test_extreme_queries_and_nan_gpu():
    extremes(None)


def scales_that_are_no_numbers(backend, dtype):
    """A scale that is NaN or infinite spoils the rows that see its token, and no other."""
    paged = with_scales(make_paged([50, 30], page_size=16, num_kv_heads=2, dtype=E4M3), "token")
    d = paged.cache.k.shape[-1]
    q = device_array(np.random.default_rng(0).standard_normal((2, 4, d)), dtype)
    plan = ja.plan_decode(paged.table, num_qo_heads=4, num_kv_heads=2, window_left=20, num_sms=4)
    # The second request's last token but one, which is seen, and its second, before the window; of the second head.
    first, second = (int(paged.table.indices[int(paged.table.indptr[1]) + i]) for i in (0, 1))
    seen, unseen = (second, 12, 1), (first, 1, 1)

    @jax.jit
    def run(scales):
        cache = dataclasses.replace(paged.cache, scales=scales)
        return ja.paged_decode(q, cache, plan, backend=backend, out_dtype=f32)

    own = paged.cache.scales
    o = np.asarray(run(own))
    for name, bad in (("k", np.nan), ("v", np.nan), ("v", np.inf)):
        at_seen, at_unseen = (
            np.array(run(dataclasses.replace(own, **{name: getattr(own, name).at[at].set(bad)})))
            for at in (seen, unseen)
        )
        assert same_bits(at_unseen, o)
        assert not np.isfinite(at_seen[1, 2:]).any()
        at_seen[1, 2:] = o[1, 2:]
        assert same_bits(at_seen, o)


@pytest.mark.parametrize("backend,dtype", [("interpret", bf16), ("interpret", f32), ("xla", bf16)])
def test_scales_that_are_no_numbers(backend, dtype):
    scales_that_are_no_numbers(backend, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [bf16, f32])
def test_scales_that_are_no_numbers_gpu(dtype):
    scales_that_are_no_numbers(None, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", [E4M3, E5M2])
def test_every_fp8_number_is_itself_gpu(kv_dtype):
    """A value of each bit pattern, through both ways to float16: NaN is NaN, and all others are exact."""
    bits = np.arange(256, dtype=np.uint8)
    numbers = bits.view(jnp.dtype(kv_dtype)).astype(np.float32)
    v = device_array(np.tile(bits.view(jnp.dtype(kv_dtype)), (1, 1, 1)).reshape(1, 1, 1, 256))
    table = ja.PageTable(i32s(0, 1), i32s(0), i32s(1), 1)
    cache = ja.PagedKVCache((jnp.zeros_like(v), v))
    plan = ja.plan_decode(table, num_qo_heads=1, num_kv_heads=1)
    o = ja.paged_decode(jnp.ones((1, 1, 256), bf16), cache, plan, out_dtype=f32)
    np.testing.assert_allclose(np.asarray(o[0, 0]), numbers, rtol=1e-6)
    rows = 64
    plan = ja.plan_prefill(
        i32s(0, rows), table, num_qo_tokens=rows, num_qo_heads=1, num_kv_heads=1, causal=False
    )
    o = ja.paged_prefill(jnp.ones((rows, 1, 256), bf16), cache, plan, out_dtype=f32)
    np.testing.assert_allclose(np.asarray(o[-1, 0]), numbers, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scales", [None, ja.KVScales.of(0.5, [2.0, 3.0])])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_contiguous_keys(layout, scales, backend):
    rng = np.random.default_rng(0)
    q = rounded(rng.standard_normal((20, 4, 64), np.float32), bf16)
    k, v = (rounded(rng.standard_normal((20, 2, 64), np.float32), E4M3) for _ in "kv")
    plan = ja.plan_ragged_prefill(
        i32s(0, 20), i32s(0, 20), num_qo_tokens=20, num_qo_heads=4, num_kv_heads=2
    )
    stored = [device_array(x, E4M3) for x in (k, v)]
    if layout == "HND":
        stored = [x.swapaxes(0, 1) for x in stored]
    o = ja.ragged_prefill(
        device_array(q, bf16), *stored, plan, kv_layout=layout, kv_scales=scales,
        backend=backend,
    )  # fmt: skip
    if scales is not None:
        k, v = (
            x * np.broadcast_to(np.asarray(s), 2)[:, None]
            for x, s in ((k, scales.k), (v, scales.v))
        )
    how = dict(sm_scale=0.125, causal=True)
    truth, _ = dense_batch([q], [k], [v], dtype=np.float64, **how)
    plain, _ = dense_batch([q], [k], [v], dtype=bf16, score_dtype=f32, **how)
    assert_rivals(o, truth, plain, bf16)


@pytest.mark.gpu
@pytest.mark.parametrize("scales", ["tensor", "token"])
def test_attention_makes_no_copy_of_the_cache_gpu(scales):
    pages = 4096
    given = scales if scales == "token" else ja.KVScales.of(1.0, 1.0)
    cache = ja.PagedKVCache.zeros(pages, 16, 8, 128, E4M3, scales=given)
    table = ja.PageTable.from_block_table(jnp.zeros((4, 8), jnp.int32), i32s(1, 2, 3, 100), 16)

    def decode(q, cache, table):
        return ja.paged_decode(q, cache, ja.plan_decode(table, num_qo_heads=32, num_kv_heads=8))

    compiled = jax.jit(decode).lower(jnp.zeros((4, 32, 128), bf16), cache, table).compile()
    assert 8 * compiled.memory_analysis().temp_size_in_bytes < cache.k.nbytes


@pytest.mark.gpu
@pytest.mark.parametrize("size, combined", [(2**31, False), (2**32, False), (2**32, True)])
def test_more_than_2_to_the_31_elements_gpu(size, combined, gpu_memory):
    """Pages from the end of the pool, appended and attended to, with scales per token: up to 2^31, and from 2^32 on."""
    gpu_memory(14)
    page_size, kh, d = 16, 8, 256
    num_pages = size // ((1 + combined) * page_size * kh * d) + 9 * (size > 2**31)
    cache = ja.PagedKVCache.zeros(
        num_pages, page_size, kh, d, E4M3, combined=combined, scales="token"
    )
    n = 100
    pages = num_pages - 1 - np.arange(7, dtype=np.int32)
    table = ja.PageTable.from_block_table(device_array(pages)[None], i32s(n), page_size)
    rng = np.random.default_rng(0)
    k, v = (device_array(rng.standard_normal((n, kh, d), np.float32), bf16) for _ in "kv")
    q = device_array(rng.standard_normal((1, 16, d), np.float32), bf16)

    def step(q, k, v, cache):
        at = jnp.zeros(n, jnp.int32), jnp.arange(n, dtype=jnp.int32)
        cache = ja.append_paged_kv_cache(k, v, *at, cache, table)
        plan = ja.plan_decode(table, num_qo_heads=16, num_kv_heads=kh)
        return ja.paged_decode(q, cache, plan, out_dtype=f32), cache

    o, _ = jax.jit(step, donate_argnums=3)(q, k, v, cache)
    few = ja.PagedKVCache.zeros(7, page_size, kh, d, E4M3, scales="token")
    near = ja.PageTable.from_block_table(jnp.arange(7, dtype=jnp.int32)[None], i32s(n), page_size)
    at = jnp.zeros(n, jnp.int32), jnp.arange(n, dtype=jnp.int32)
    few = ja.append_paged_kv_cache(k, v, *at, few, near, backend="xla")
    plan = ja.plan_decode(near, num_qo_heads=16, num_kv_heads=kh)
    want = ja.paged_decode(q, few, plan, out_dtype=f32, backend="xla")
    np.testing.assert_allclose(np.asarray(o), np.asarray(want), atol=2e-3)


def heads_of_zeros(backend):
    """What a calibration by largest magnitudes gives for a head of zeros: a scale of 0."""
    scales = ja.KVScales(jnp.float32([0.5, 0.0]), jnp.float32([0.0, 0.25]))
    cache = ja.PagedKVCache.zeros(4, 16, 2, 64, E4M3, scales=scales)
    table = ja.PageTable.from_block_table(jnp.int32([[2, 0]]), i32s(20), 16)
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((20, 2, 64)).astype(np.float32) for _ in "kv")
    k[:, 1], v[:, 0] = 0, 0
    at = jnp.zeros(20, jnp.int32), jnp.arange(20, dtype=jnp.int32)
    cache = ja.append_paged_kv_cache(
        device_array(k), device_array(v), *at, cache, table, backend=backend
    )
    assert not np.isnan(np.asarray(cache.k, np.float32)).any()
    plan = ja.plan_decode(table, num_qo_heads=4, num_kv_heads=2, num_sms=2)
    q = device_array(rng.standard_normal((1, 4, 64)), bf16)
    o = np.asarray(ja.paged_decode(q, cache, plan, backend=backend, out_dtype=f32))
    np.testing.assert_array_equal(o[0, :2], 0)
    # Without keys all values weigh the same.
    want = 0.25 * np.asarray(cache.v, np.float32)[[2, 0]].reshape(32, 2, 64)[:20, 1].mean(0)
    np.testing.assert_allclose(o[0, 2:], np.stack([want, want]), atol=2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_of_zeros(backend):
    heads_of_zeros(backend)


@pytest.mark.gpu
def test_heads_of_zeros_gpu():
    heads_of_zeros(None)


def test_what_the_lowering_would_count_wrong_is_an_error():
    """It has offsets of 32 bits up to 2^32 bytes, but signed ones: beyond 2^31 elements of 8 bits they are negative."""
    cache = jax.eval_shape(lambda: ja.PagedKVCache.zeros(2**17, 16, 8, 256, E5M2))
    table = jax.eval_shape(
        lambda: ja.PageTable.from_block_table(jnp.zeros((1, 7), jnp.int32), i32s(100), 16)
    )

    def step(q, cache, table):
        plan = ja.plan_decode(table, num_qo_heads=16, num_kv_heads=8)
        return ja.paged_decode(q, cache, plan)

    q = jax.ShapeDtypeStruct((1, 16, 256), bf16)
    with pytest.raises(NotImplementedError, match="more than 2\\^32"):
        jax.jit(step).trace(q, cache, table).lower(lowering_platforms=("cuda",))


# Appending.


def stored_by_hand(x, kind, scale, dtype):
    """(stored numbers, scales) of vectors float32 [t, kh, d], by NumPy."""
    most = np.float32(jnp.finfo(dtype).max)
    if kind == "token":
        finite = np.where(np.isfinite(x), np.abs(x), 0).max(axis=-1)
        scale = np.maximum(finite * np.float32(1 / float(most)), np.float32(MIN_SCALE))
    inverse = np.float32(1) / np.broadcast_to(np.float32(scale), x.shape[:-1])
    y = x if kind == "none" else x * inverse[..., None]
    return np.clip(y, -most, most).astype(jnp.dtype(dtype)), scale


def check_append(kind, dtype, layout, combined, token_dtype, backend, exact=True):
    kh, d, page_size = 3, 80, 5
    case = make_append(
        page_size=page_size, kv_heads=kh, d=d, token_dtype=token_dtype, dtype=dtype,
        layout=layout, combined=combined,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    key, value = (
        x * device_array(10.0 ** rng.uniform(-4, 4, (x.shape[0], kh, 1)), f32).astype(token_dtype)
        for x in (case.key, case.value)
    )
    # Zeros, NaN, infinity, what only saturates.
    key = key.at[0, 0].set(0).at[1, 1, 3].set(jnp.nan).at[2, 2, 4].set(-jnp.inf)
    value = value.at[0, 2].set(0).at[1, 0, 5].set(3e4).at[2, 0].set(jnp.inf)
    given = {
        "none": None, "tensor": ja.KVScales.of(0.25, 8), "head": ja.KVScales.of([1, 0.1, 30], [2, 3, 4]),
        "token": None,
    }[kind]  # fmt: skip
    if kind == "token":
        shape = case.cache.k.shape[:-1]
        given = ja.KVScales(*(jnp.full(shape, jnp.nan, f32) for _ in "kv"))
    cache = dataclasses.replace(case.cache, scales=given)
    cache.check()
    case = dataclasses.replace(case, key=key, value=value, cache=cache)
    got = jax.jit(ja.append_paged_kv_cache, static_argnames="backend")(*case.args, backend=backend)
    assert (got.layout, got.dtype, got.combined) == (layout, dtype, combined)

    indptr, indices = np.asarray(case.table.indptr), np.asarray(case.table.indices)
    batch, position = np.asarray(case.batch_indices), np.asarray(case.positions)
    used = batch >= 0
    page = indices[indptr[batch[used]] + position[used] // page_size]
    slot = position[used] % page_size
    whole = [np.array(x) for x in (cache.k, cache.v)]
    for i, (x, pages, mine) in enumerate(zip((key, value), whole, (got.k, got.v), strict=True)):
        scale = None if given is None else np.asarray((given.k, given.v)[i])
        x = np.asarray(x).astype(np.float32)[used]
        numbers, scale = stored_by_hand(x, kind, scale, dtype)
        numbers_of = pages if layout == "NHD" else pages.swapaxes(1, 2)
        numbers_of[page, slot] = numbers
        mine = np.asarray(mine)
        off = mine.view(np.uint8) != pages.view(np.uint8)
        nan = np.isnan(mine.astype(np.float32)) & np.isnan(pages.astype(np.float32))
        if exact:
            assert not (off & ~nan).any()
        else:  # a GPU's division is a rounding off: a number halfway between two may fall on either side
            apart = mine.astype(np.float32) - pages.astype(np.float32)
            assert (off & ~nan).mean() < 1e-3
            assert np.all(
                np.abs(apart[off & ~nan]) <= 0.25 * np.abs(pages.astype(np.float32)[off & ~nan])
            )
        if kind == "token":
            want = np.full(cache.k.shape[:-1], np.nan, np.float32)
            (want if layout == "NHD" else want.swapaxes(1, 2))[page, slot] = scale
            mine = np.asarray((got.k_scale, got.v_scale)[i])
            np.testing.assert_allclose(mine, want, rtol=1e-6)
        elif given is not None:
            assert same_bits((got.k_scale, got.v_scale)[i], scale)


APPENDS = [
    ("none", E4M3, "NHD", False, bf16),
    ("tensor", E5M2, "HND", True, f16),
    ("head", E4M3, "HND", False, f32),
    ("head", E5M2, "NHD", True, bf16),
    ("token", E4M3, "NHD", False, bf16),
    ("token", E5M2, "HND", True, f32),
    ("token", E4M3, "NHD", True, f16),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind,dtype,layout,combined,token_dtype", APPENDS)
def test_append(kind, dtype, layout, combined, token_dtype, backend):
    check_append(kind, dtype, layout, combined, token_dtype, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("kind,dtype,layout,combined,token_dtype", APPENDS)
def test_append_gpu(kind, dtype, layout, combined, token_dtype):
    check_append(kind, dtype, layout, combined, token_dtype, None, exact=False)


def check_rope_append(scales, backend, exact):
    """The fused kernel stores what the parts store: rope, then append."""
    kh, h, d = 2, 4, 64
    case = make_append(page_size=16, kv_heads=kh, d=d, dtype=E4M3, token_dtype=f32)
    given = {
        "token": ja.KVScales(*(jnp.ones(case.cache.k.shape[:-1], f32) for _ in "kv")),
        "head": ja.KVScales.of([0.01, 0.02], [0.5, 0.004]),
    }[scales]
    cache = dataclasses.replace(case.cache, scales=given)
    t = case.key.shape[0]
    q = device_array(np.random.default_rng(5).standard_normal((t, h, d), np.float32))
    angle = np.arange(64)[:, None] * 10.0 ** -np.linspace(0, 2, 24)[None, :]
    rope = device_array(np.concatenate([np.cos(angle), np.sin(angle)], axis=1), f32)
    where = case.batch_indices, case.positions
    got_q, got = ja.rope_append_paged_kv_cache(
        (q, case.key, case.value), *where, rope, cache, case.table, backend=backend
    )
    turned_q, turned_k = ja.apply_rope_with_cos_sin_cache(
        case.positions, q, case.key, d, rope, backend=backend
    )
    want = ja.append_paged_kv_cache(
        turned_k, case.value, *where, cache, case.table, backend=backend
    )
    np.testing.assert_allclose(np.asarray(got_q), np.asarray(turned_q), atol=1e-6)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        is_scale = a.dtype == f32
        a, b = (np.asarray(x.astype(f32)) for x in (a, b))
        if exact:
            np.testing.assert_array_equal(a, b)
        elif is_scale:
            np.testing.assert_allclose(a, b, rtol=1e-5)
        else:
            written = ~np.isnan(b)
            np.testing.assert_array_equal(np.isnan(a), ~written)
            assert (a != b)[written].mean() < 1e-3
            np.testing.assert_allclose(a[written], b[written], rtol=0.25, atol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scales", ["head", "token"])
def test_rope_append(scales, backend):
    check_rope_append(scales, backend, exact=True)


@pytest.mark.gpu
@pytest.mark.parametrize("scales", ["head", "token"])
def test_rope_append_gpu(scales):
    check_rope_append(scales, None, exact=False)


@pytest.mark.parametrize("combined", [False, True])
@pytest.mark.parametrize("scales", ["tensor", "token"])
def test_donated_cache_is_written_in_place(scales, combined):
    case = make_append(dtype=E4M3, page_size=16, num_pages=4096, combined=combined)
    given = ja.KVScales.of(1.0, 1.0)
    if scales == "token":
        given = ja.KVScales(*(jnp.ones(case.cache.k.shape[:-1], f32) for _ in "kv"))
    case = dataclasses.replace(case, cache=dataclasses.replace(case.cache, scales=given))
    compiled = compile_in_place(ja.append_paged_kv_cache, (4,), *case.args)
    if jax.default_backend() == "gpu":
        assert_no_copy(compiled)


# As a pytree.


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms(backend):
    """Layers by vmap and scan, KV heads on two devices: scales go with their pages."""
    case = make_append(dtype=E4M3, d=32, page_size=4)
    pages = ja.KVScales(*(jnp.ones(case.cache.k.shape[:-1], f32) for _ in "kv"))
    key, value, *where, cache, table = dataclasses.replace(
        case, cache=dataclasses.replace(case.cache, scales=pages)
    ).args

    @jax.jit
    def step(q, key, value, cache):
        heads = cache.num_kv_heads
        cache = ja.append_paged_kv_cache(key, value, *where, cache, table, backend=backend)
        plan = ja.plan_decode(
            table, page_size=4, num_qo_heads=2 * heads, num_kv_heads=heads, num_sms=2
        )
        return ja.paged_decode(q, cache, plan, backend=backend), cache

    q = jnp.ones((table.batch_size, 4, 32), bf16)
    layers = jax.tree.map(lambda x: jnp.stack([x, x]), (q, key, value, cache))
    o, want = step(q, key, value, cache)
    for results in (
        jax.vmap(step)(*layers),
        jax.lax.scan(lambda c, x: (c, step(*x)), 0, layers)[1],
    ):
        assert same_bits(results[0][1].astype(f32), o.astype(f32))
        for a, b in zip(jax.tree.leaves(results[1]), jax.tree.leaves(want), strict=True):
            assert same_bits(a[1], b)
    if jax.device_count() > 1:
        heads, by_page = P(None, "x"), P(None, None, "x")
        sharded = jax.shard_map(
            step, mesh=two_devices(), in_specs=(heads, heads, heads, by_page),
            out_specs=(heads, by_page), check_vma=backend != "interpret",
        )  # fmt: skip
        shared, cache = jax.jit(sharded)(q, key, value, cache)
        np.testing.assert_allclose(
            np.asarray(shared.astype(f32)), np.asarray(o.astype(f32)), atol=1e-2
        )
        assert same_bits(cache.k_scale, want.k_scale)


def test_gradients_of_queries_are_the_references():
    paged = with_scales(make_paged([20], page_size=16, dtype=E4M3, head_dim=64), "token")
    plan = ja.plan_decode(paged.table, num_qo_heads=4, num_kv_heads=2)
    q = device_array(np.random.default_rng(0).standard_normal((1, 4, 64), np.float32))

    def loss(q, backend):
        return (ja.paged_decode(q, paged.cache, plan, backend=backend) ** 2).sum()

    ours, want = (jax.grad(loss)(q, backend) for backend in BACKENDS)
    assert np.abs(np.asarray(want)).max() > 0
    np.testing.assert_allclose(np.asarray(ours), np.asarray(want), rtol=1e-3, atol=1e-4)


def test_a_gpu_that_cannot_convert_e4m3_is_named(monkeypatch):
    class Old:
        platform, compute_capability, device_kind = "gpu", "8.0", "NVIDIA A100"

    monkeypatch.setattr(device, "_target", Old)
    device.check_fp8(jnp.dtype(E5M2))
    device.check_fp8(jnp.dtype(bf16))
    with pytest.raises(NotImplementedError, match="8.9 .*; NVIDIA A100 has 8.0: use float8_e5m2"):
        device.check_fp8(jnp.dtype(E4M3))
    Old.compute_capability = "8.9"
    device.check_fp8(jnp.dtype(E4M3))


def zeros(**how):
    return ja.PagedKVCache.zeros(3, 4, 2, 8, **how)


@pytest.mark.parametrize(
    "error,message,make",
    [
        (ValueError, "scales must be one of 'token'", lambda: zeros(dtype=E4M3, scales="head")),
        (TypeError, "scales per token are those of a float8", lambda: zeros(scales="token")),
        (TypeError, "scales must be KVScales", lambda: zeros(dtype=E4M3, scales=(1.0, 1.0))),
        (
            ValueError,
            r"k_scale must have shape \[2\]",
            lambda: zeros(dtype=E4M3, scales=ja.KVScales.of([1, 2, 3], 1)),
        ),
        (
            ValueError,
            r"v_scale must have shape \[3, 4, 2\]",
            lambda: zeros(dtype=E4M3, scales=ja.KVScales(jnp.ones((3, 4, 2)), jnp.ones(2))),
        ),
        (
            ValueError,
            r"k_scale must have shape \[3, 4, 2\]; got \[\]",
            lambda: zeros(dtype=E4M3, scales=ja.KVScales.of(1, jnp.ones((3, 4, 2)))),
        ),
        (
            ValueError,
            "k_scale must be positive and finite",
            lambda: zeros(dtype=E4M3, scales=ja.KVScales(*np.float32([-1, 1]))),
        ),
        (
            TypeError,
            "k_scale must be a float32 array; got bfloat16: use KVScales.of",
            lambda: zeros(dtype=E4M3, scales=ja.KVScales(jnp.ones((), bf16), jnp.ones(()))),
        ),
        (
            TypeError,
            "v_scale must be a float32 array; got float: use KVScales.of",
            lambda: zeros(dtype=E4M3, scales=ja.KVScales(jnp.ones(()), 1.0)),
        ),
        (
            ValueError,
            "to_dense must be of a cache without scales",
            lambda: zeros(dtype=E4M3, scales="token").to_dense(1),
        ),
        (TypeError, "must be one of .*float8_e5m2; got float8", lambda: zeros(dtype=jnp.float8_e4m3b11fnuz)),
        (
            ValueError,
            "kv_scales of contiguous keys",
            lambda: ja.ragged_prefill(
                jnp.ones((1, 2, 8)), jnp.ones((1, 2, 8)), jnp.ones((1, 2, 8)),
                ja.plan_ragged_prefill(
                    i32s(0, 1), i32s(0, 1), num_qo_tokens=1, num_qo_heads=2, num_kv_heads=2
                ),
                kv_scales=ja.KVScales(jnp.ones((1, 2)), jnp.ones((1, 2))),
            ),
        ),
    ],
)  # fmt: skip
def test_errors(error, message, make):
    with pytest.raises(error, match=message):
        make()
