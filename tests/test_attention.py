"""paged_decode, paged_prefill and ragged_prefill against dense float32 attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    Paged,
    assert_lse,
    assert_rivals,
    dense_batch,
    device_array,
    i32,
    make_paged,
    rounded,
    same_bits,
)

import jaxattn as ja
from jaxattn.kernels.mosaic.tiles import default_config as hopper_config
from jaxattn.kernels.triton import _merge_apart
from jaxattn.kernels.triton import attention as kernel
from jaxattn.spec import Visible
from jaxattn.work_list import WorkItem

BACKENDS = ["interpret", "xla"]
SLOW_INTERPRETED = [pytest.param("interpret", marks=pytest.mark.slow), "xla"]


def edge_lengths(page_size):
    """The lengths at which paging code breaks, and one that is split."""
    return [0, 1, max(page_size - 1, 1), page_size, page_size + 1, 3 * page_size + 2, 700]


def check_decode(paged, dtype, *, group, backend, sm_scale=None, scale=1.0, **splits):
    cache, kh, d = paged.cache, paged.cache.num_kv_heads, paged.cache.head_dim
    b = len(paged.k)
    q = rounded(
        scale * np.random.default_rng(1).standard_normal((b, kh * group, d), np.float32), dtype
    )

    @jax.jit
    def decode(q, cache, table):
        plan = ja.plan_decode(
            table, page_size=cache.page_size, num_qo_heads=kh * group, num_kv_heads=kh, **splits
        )
        return ja.paged_decode(q, cache, plan, sm_scale=sm_scale, return_lse=True, backend=backend)

    o, lse = decode(device_array(q, dtype), cache, paged.table)
    how = dict(sm_scale=sm_scale or d**-0.5, causal=False)
    score_dtype = dtype if scale == 1.0 else jnp.float32
    truth, truth_lse = dense_batch(q[:, None], paged.k, paged.v, dtype=np.float64, **how)
    plain, _ = dense_batch(
        q[:, None], paged.k, paged.v, dtype=dtype, score_dtype=score_dtype, **how
    )
    assert o.dtype == dtype
    assert_rivals(o, truth, plain, dtype)
    assert_lse(lse, truth_lse)


def check_prefill(
    paged,
    qo_lens,
    dtype,
    *,
    group,
    backend,
    causal,
    padding=3,
    sm_scale=None,
    scale=1.0,
    **splits,
):
    cache, kh, d = paged.cache, paged.cache.num_kv_heads, paged.cache.head_dim
    h, total = kh * group, sum(qo_lens)
    q = rounded(
        scale * np.random.default_rng(2).standard_normal((total + padding, h, d), np.float32), dtype
    )
    qo_indptr = np.concatenate([[0], np.cumsum(qo_lens)]).astype(np.int32)

    @jax.jit
    def prefill(q, qo_indptr, cache, table):
        plan = ja.plan_prefill(
            qo_indptr,
            table,
            page_size=cache.page_size,
            num_qo_tokens=q.shape[0],
            num_qo_heads=h,
            num_kv_heads=kh,
            causal=causal,
            **splits,
        )
        return ja.paged_prefill(q, cache, plan, sm_scale=sm_scale, return_lse=True, backend=backend)

    o, lse = prefill(device_array(q, dtype), device_array(qo_indptr), cache, paged.table)
    score_dtype = dtype if scale == 1.0 else jnp.float32
    compare_prefill(
        o, lse, q, qo_lens, paged.k, paged.v, dtype, sm_scale or d**-0.5, causal, score_dtype
    )


def compare_prefill(o, lse, q, qo_lens, ks, vs, dtype, sm_scale, causal, score_dtype=None):
    total = sum(qo_lens)
    qs = np.split(q[:total], np.cumsum(qo_lens)[:-1])
    how = dict(sm_scale=sm_scale, causal=causal)
    truth, truth_lse = dense_batch(qs, ks, vs, dtype=np.float64, **how)
    plain, _ = dense_batch(qs, ks, vs, dtype=dtype, score_dtype=score_dtype, **how)
    assert_rivals(o[:total], truth, plain, dtype)
    assert_lse(lse[:total], truth_lse)
    np.testing.assert_array_equal(np.asarray(o[total:].astype(jnp.float32)), 0.0)
    np.testing.assert_array_equal(np.asarray(lse[total:]), -np.inf)


# Each row breaks another assumption: page sizes that are not powers of two, layouts, combined arrays, every dtype,
# head dims that need padding, and groups that do not fill a tile.
DECODE_CASES = [
    # page_size, kh, group, head_dim, dtype, layout, combined
    (1, 2, 4, 64, jnp.bfloat16, "NHD", False),
    (5, 1, 3, 64, jnp.float16, "HND", False),
    (16, 2, 1, 128, jnp.bfloat16, "NHD", True),
    (16, 1, 7, 80, jnp.bfloat16, "HND", True),
    (64, 1, 8, 96, jnp.float16, "NHD", False),
    (16, 3, 5, 64, jnp.float32, "NHD", False),
    (64, 1, 16, 256, jnp.bfloat16, "NHD", False),
    (16, 1, 20, 64, jnp.bfloat16, "NHD", False),
    (16, 1, 71, 64, jnp.bfloat16, "NHD", False),  # more heads in a group than rows in a tile
    (16, 1, 4, 256, jnp.float32, "NHD", False),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page_size,kh,group,head_dim,dtype,layout,combined", DECODE_CASES)
def test_decode(page_size, kh, group, head_dim, dtype, layout, combined, backend):
    paged = make_paged(
        edge_lengths(page_size),
        page_size=page_size,
        num_kv_heads=kh,
        head_dim=head_dim,
        dtype=dtype,
        layout=layout,
        combined=combined,
    )
    check_decode(paged, dtype, group=group, backend=backend)


# Many states a tile, more than are merged at once; tiles that fill no split; whole tiles.
SPLITS = [dict(fixed_split_size=1), dict(fixed_split_size=7), dict(disable_split_kv=True)]


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize(
    "group,head_dim,dtype",
    [
        (4, 64, jnp.bfloat16),
        (7, 80, jnp.float32),
        pytest.param(71, 64, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(40, 256, jnp.float32, marks=pytest.mark.slow),
    ],
)
def test_splits(splits, group, head_dim, dtype):
    paged = make_paged(edge_lengths(16), page_size=16, head_dim=head_dim, dtype=dtype)
    check_decode(paged, dtype, group=group, backend="interpret", **splits)


@pytest.mark.slow
@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize(
    "head_dim,dtype", [(64, jnp.bfloat16), (64, jnp.float32), (256, jnp.float32)]
)
def test_splits_of_prefill(splits, head_dim, dtype):
    """float32 shares a tile of the plan out to several programs."""
    paged = make_paged([0, 5, 100, 200], page_size=16, head_dim=head_dim, dtype=dtype)
    how = dict(group=4, backend="interpret", causal=True, **splits)
    check_prefill(paged, [2, 0, 50, 40], dtype, **how)


def decode_among(lengths, *, page_size=16, kh=2, group=4, head_dim=64, backend, pages=4):
    """(o, lse) of the first request, always the same one, in a batch of these lengths."""
    longest = max(lengths)
    rng = np.random.default_rng(7)
    d = head_dim

    def request(n, rng):
        return [rng.standard_normal((n, kh, d), np.float32) for _ in range(2)]

    own = np.random.default_rng(0)
    rows = [request(lengths[0], own), *(request(n, rng) for n in lengths[1:])]
    q = np.concatenate(
        [
            own.standard_normal((1, kh * group, d), np.float32),
            rng.standard_normal((len(lengths) - 1, kh * group, d), np.float32),
        ]
    )
    width = -(-longest // page_size)
    block_table = rng.permutation(len(lengths) * width).reshape(len(lengths), width)
    block_table = i32(block_table)
    kv_len = i32(lengths)
    table = ja.PageTable.from_block_table(block_table, kv_len, page_size)
    indptr = i32(np.concatenate([[0], np.cumsum(lengths)]))
    q, k, v = (device_array(x, jnp.bfloat16) for x in (q, *map(np.concatenate, zip(*rows))))

    @jax.jit
    def decode(q, k, v, indptr, table):
        cache = ja.PagedKVCache.zeros(len(lengths) * width, page_size, kh, d, jnp.bfloat16)
        where = ja.get_batch_indices_positions(indptr, table.kv_len(page_size), k.shape[0])
        cache = ja.append_paged_kv_cache(k, v, *where, cache, table)
        plan = ja.plan_decode(
            table,
            page_size=page_size,
            num_qo_heads=kh * group,
            num_kv_heads=kh,
            fixed_split_size=pages,
        )
        return ja.paged_decode(q, cache, plan, return_lse=True, backend=backend)

    o, lse = decode(q, k, v, indptr, table)
    return o[0], lse[0]


def check_batch_invariance(own, batches, **how):
    alone = decode_among([own], **how)
    for others in batches:
        for got, want in zip(decode_among([own, *others], **how), alone, strict=True):
            assert same_bits(got, want)


@pytest.mark.slow
def test_fixed_splits_do_not_see_the_batch():
    """The same bits alone, among short requests and beside one that is much longer."""
    check_batch_invariance(333, [[1, 64, 65], [900], [0] * 40], backend="interpret")


@pytest.mark.parametrize("splits", [dict(fixed_split_size=3), dict(disable_split_kv=True)])
def test_prefill_does_not_see_the_batch_either(splits):
    paged = make_paged([300, 5, 200], page_size=16)
    cache, table = paged.cache, paged.table
    kh, d = cache.num_kv_heads, cache.head_dim
    q = device_array(np.random.default_rng(0).standard_normal((60, 4 * kh, d), np.float32))
    q = q.astype(cache.dtype)
    alone = ja.PageTable(table.indptr[:2], table.indices, table.last_page_len[:1])

    @jax.jit
    def prefill(q, qo_indptr, table):
        heads = dict(num_qo_tokens=q.shape[0], num_qo_heads=4 * kh, num_kv_heads=kh)
        plan = ja.plan_prefill(qo_indptr, table, page_size=16, **heads, **splits)
        return ja.paged_prefill(q, cache, plan, return_lse=True, backend="interpret")

    outputs = [
        prefill(q[: qo_indptr[-1]], i32(qo_indptr), pages)
        for pages, qo_indptr in ((table, [0, 3, 4, 60]), (alone, [0, 3]))
    ]
    for among, by_itself in zip(*outputs, strict=True):
        assert same_bits(among[:3], by_itself)


PREFILL_CASES = [
    # page_size, kh, group, head_dim, dtype, layout, combined, causal
    (1, 2, 4, 64, jnp.bfloat16, "NHD", False, True),
    (5, 1, 3, 64, jnp.float16, "HND", False, True),
    (16, 2, 1, 128, jnp.bfloat16, "NHD", True, False),
    (16, 1, 7, 80, jnp.bfloat16, "HND", True, True),
    (64, 1, 8, 96, jnp.float16, "NHD", False, False),
    (16, 1, 5, 64, jnp.float32, "NHD", False, True),
    (64, 1, 2, 256, jnp.bfloat16, "NHD", False, True),
    (16, 1, 2, 256, jnp.float32, "HND", False, True),
    (5, 1, 16, 64, jnp.bfloat16, "NHD", False, True),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page_size,kh,group,head_dim,dtype,layout,combined,causal", PREFILL_CASES)
def test_paged_prefill(page_size, kh, group, head_dim, dtype, layout, combined, causal, backend):
    # No queries, no keys, one of each, more queries than keys, a long prefix with few queries.
    qo_lens = [3, 0, 1, page_size, 2 * page_size + 1, 40, 4]
    kv_lens = [0, 5, 1, page_size, page_size + 1, 40, 500]
    paged = make_paged(
        kv_lens,
        page_size=page_size,
        num_kv_heads=kh,
        head_dim=head_dim,
        dtype=dtype,
        layout=layout,
        combined=combined,
    )
    check_prefill(paged, qo_lens, dtype, group=group, backend=backend, causal=causal)


@pytest.mark.parametrize("backend", SLOW_INTERPRETED)
def test_paged_prefill_of_few_rows(backend):
    """Speculative verification: few rows a request, in the smallest tile where programs are few."""
    for kv_heads, rows in ((1, 16), (2, 64)):
        paged = make_paged([300, 2, 0, 77], page_size=16, num_kv_heads=kv_heads)
        how = dict(group=3, num_sms=4)
        check_prefill(paged, [3, 2, 1, 1], jnp.bfloat16, backend=backend, causal=True, **how)
        heads = dict(num_qo_tokens=10, num_qo_heads=3 * kv_heads, num_kv_heads=kv_heads)
        plan = functools.partial(ja.plan_prefill, page_size=16, num_sms=4, **heads)
        qo_indptr = i32([0, 3, 5, 6, 7])
        assert jax.eval_shape(plan, qo_indptr, paged.table).block_rows == rows


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_ragged_prefill(layout, causal, backend):
    dtype, kh, group, d = jnp.float16, 2, 3, 64
    qo_lens, kv_lens = [0, 3, 17, 40, 5], [4, 0, 17, 20, 130]
    rng = np.random.default_rng(3)
    spare = 4  # rows of k, v and q that no request owns
    k, v = rounded(rng.standard_normal((2, sum(kv_lens) + spare, kh, d), np.float32), dtype)
    k[-spare:], v[-spare:] = np.nan, np.nan
    q = rounded(rng.standard_normal((sum(qo_lens) + spare, kh * group, d), np.float32), dtype)
    qo_indptr, kv_indptr = (i32(np.concatenate([[0], np.cumsum(x)])) for x in (qo_lens, kv_lens))
    as_layout = (lambda x: x.swapaxes(0, 1)) if layout == "HND" else (lambda x: x)

    @jax.jit
    def prefill(q, k, v, qo_indptr, kv_indptr):
        heads = dict(num_qo_tokens=q.shape[0], num_qo_heads=kh * group, num_kv_heads=kh)
        plan = ja.plan_ragged_prefill(qo_indptr, kv_indptr, causal=causal, **heads)
        return ja.ragged_prefill(q, k, v, plan, kv_layout=layout, return_lse=True, backend=backend)

    arrays = (device_array(x.astype(dtype)) for x in (q, as_layout(k), as_layout(v)))
    o, lse = prefill(*arrays, qo_indptr, kv_indptr)
    cuts = np.cumsum(kv_lens)
    ks, vs = np.split(k, cuts)[:-1], np.split(v, cuts)[:-1]
    compare_prefill(o, lse, q, qo_lens, ks, vs, dtype, d**-0.5, causal)


@pytest.mark.parametrize("backend", SLOW_INTERPRETED)
def test_fp16_values_of_several_hundred(backend):
    """Scores reach 10^7 and values 10^3: partial sums in float16 would overflow."""
    paged = make_paged([700, 33], page_size=16, dtype=jnp.float16, scale=300.0)
    check_decode(paged, jnp.float16, group=4, backend=backend, scale=300.0)
    check_prefill(paged, [20, 33], jnp.float16, group=4, backend=backend, causal=True, scale=300.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sm_scale(backend):
    paged = make_paged([90, 5], page_size=16)
    check_decode(paged, jnp.bfloat16, group=2, backend=backend, sm_scale=0.5)
    check_prefill(paged, [9, 5], jnp.bfloat16, group=2, backend=backend, causal=True, sm_scale=0.03)


@pytest.mark.parametrize("backend", SLOW_INTERPRETED)
def test_shared_pages(backend):
    """Two requests share a prefix; each equals itself alone."""
    paged = make_paged([48, 64], page_size=16, seed=7)
    indices = np.asarray(paged.table.indices).copy()
    indices[3:5] = indices[0:2]  # request 1's first two pages are request 0's
    table = ja.PageTable(paged.table.indptr, device_array(indices), paged.table.last_page_len)
    paged.k[1][:32], paged.v[1][:32] = paged.k[0][:32], paged.v[0][:32]
    shared = Paged(paged.cache, table, paged.k, paged.v)
    check_decode(shared, jnp.bfloat16, group=4, backend=backend)
    check_prefill(shared, [48, 7], jnp.bfloat16, group=4, backend=backend, causal=True)


@pytest.mark.slow
def test_many_states_are_merged_in_teams(monkeypatch):
    """Teams, and a last one that is not full: of few programs, of fixed splits, and of rows that fill wgmma's least."""
    monkeypatch.setattr(kernel, "has_wgmma", lambda: True)
    teams = []
    of = kernel.Merging.of

    def recorded(*args, **kwargs):
        teams.append(of(*args, **kwargs).team)
        return of(*args, **kwargs)

    monkeypatch.setattr(kernel.Merging, "of", recorded)
    how = dict(backend="interpret", num_sms=132)
    block = ja.plan.KV_BLOCK
    one_long = make_paged([41 * block + 3, 20, 0], page_size=16, num_kv_heads=1, head_dim=128)
    check_decode(one_long, jnp.bfloat16, group=8, **how)
    check_prefill(one_long, [8, 2, 0], jnp.bfloat16, group=8, causal=True, **how)
    fixed = make_paged([101 * 16 + 5, 20], page_size=16)
    check_decode(fixed, jnp.bfloat16, group=4, fixed_split_size=1, **how)
    heads = dict(page_size=16, num_qo_heads=8, num_sms=132)
    plans = [
        ja.plan_decode(one_long.table, num_kv_heads=1, **heads),
        ja.plan_prefill(
            i32([0, 8, 10, 10]),
            one_long.table,
            num_qo_tokens=13,
            num_kv_heads=1,
            **heads,
        ),
        ja.plan_decode(fixed.table, num_kv_heads=2, fixed_split_size=1, **heads),
    ]
    most = [int(plan.items[:, WorkItem._fields.index("num_splits")].max()) for plan in plans]
    assert list(zip(most, teams)) == [(42, 16), (11, 8), (102, 96)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "group, head_dim, kv_lens, qo_lens, rows_and_splits",
    [
        (8, 128, [1800, 20, 0], [8, 2, 0], {(64, 4)}),
        (5, 64, [1300, 1300], [9, 1], {(45, 3), (5, 3)}),
        (1, 64, [2600, 2600], [40, 1], {(40, 5), (1, 5)}),
        (4, 136, [900], [33], {(64, 2), (4, 2)}),  # in float32 64 rows are two parts of 32
    ],
)
def test_few_tall_tiles_are_merged_by_a_kernel_of_their_own(
    monkeypatch, group, head_dim, kv_lens, qo_lens, rows_and_splits
):
    monkeypatch.setattr(_merge_apart, "num_sms", lambda: 132)
    parts = []
    merge_apart = kernel.merge_apart

    def recorded(*args, block_rows, **how):
        parts.append(ja.plan.MID_ROWS // block_rows)
        return merge_apart(*args, block_rows=block_rows, **how)

    monkeypatch.setattr(kernel, "merge_apart", recorded)
    dtype = jnp.float32 if head_dim == 136 else jnp.bfloat16
    paged = make_paged(kv_lens, page_size=16, num_kv_heads=1, head_dim=head_dim, dtype=dtype)
    check_prefill(paged, qo_lens, dtype, group=group, backend="interpret", causal=True, num_sms=132)
    assert parts == [2 if head_dim == 136 else 1]
    plan = ja.plan_prefill(
        i32(np.concatenate([[0], np.cumsum(qo_lens)])),
        paged.table,
        num_qo_tokens=sum(qo_lens) + 3,
        num_qo_heads=group,
        num_kv_heads=1,
        num_sms=132,
    )
    begin, end, splits = (
        plan.items[:, WorkItem._fields.index(name)].tolist()
        for name in ("row_begin", "row_end", "num_splits")
    )
    assert {(e - b, n) for b, e, n in zip(begin, end, splits) if n > 1} == rows_and_splits


@pytest.mark.parametrize("wgmma", [True, False])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("new,rows", [(1, 16), (9, 64), (33, 128)])
def test_merging_reads_no_rows_beyond_its_tile(new, rows, head_dim, wgmma):
    # Of so many keys that a tile may be split: else nothing is merged.
    paged = make_paged([1000], page_size=16)
    how = dict(page_size=16, num_qo_tokens=new, num_qo_heads=4, num_kv_heads=1, num_sms=2)
    plan = ja.plan_prefill(i32([0, new]), paged.table, **how)
    assert plan.block_rows == rows
    for dtype in (jnp.bfloat16, jnp.float32):
        config = kernel.default_config(
            plan.block_rows,
            head_dim,
            dtype,
            group=4,
            programs_per_sm=plan.programs_per_sm,
            paged=True,
            wgmma=wgmma,
        )
        merging = kernel.Merging.of(plan, config, head_dim, wgmma=wgmma)
        assert config.block_rows % merging.rows == 0


@pytest.mark.parametrize(
    "left, right, keys",
    [(127, 0, 64), (96, 95, 64), (191, 0, 64), (192, 0, 128), (96, 96, 128), (127, None, 128)],
)
def test_short_windows_take_fewer_keys_at_a_time(left, right, keys):
    visible = Visible(left, right)
    how = dict(group=8, programs_per_sm=2, paged=True, wgmma=True, width=visible.width)
    assert kernel.default_config(128, 64, jnp.bfloat16, **how).block_kv == keys
    assert hopper_config(64, visible.width).block_kv == keys
    assert hopper_config(64, visible.width, narrow=True).block_kv == 128


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
@pytest.mark.parametrize(
    "backend", ["interpret", "xla", pytest.param(None, marks=pytest.mark.gpu, id="gpu")]
)
def test_equal_scores_average_the_values(backend, dtype):
    """Scores of 10^6 that do not change from tile to tile: any error in rescaling would compound."""
    n, d = 4096, 64
    q = jnp.full((1, 2, d), 300.7, dtype)
    k = jnp.full((n, 1, d), 300.7, dtype)
    v = jnp.broadcast_to(jnp.linspace(-1, 1, n, dtype=dtype)[:, None, None], k.shape)
    plan = ja.plan_ragged_prefill(
        i32([0, 1]),
        i32([0, n]),
        num_qo_tokens=1,
        num_qo_heads=2,
        num_kv_heads=1,
        num_sms=1,
    )
    o, lse = ja.ragged_prefill(q, k, v, plan, return_lse=True, backend=backend)
    mean = np.asarray(v[:, 0, 0], np.float64).mean()
    np.testing.assert_allclose(np.asarray(o, np.float64), mean, atol=1e-5)
    score = float(q[0, 0, 0]) ** 2 * d * d**-0.5
    np.testing.assert_allclose(np.asarray(lse), score + np.log(n), rtol=1e-6)


# On the GPU: the same cases compiled, and real sizes.


@pytest.mark.gpu
@pytest.mark.parametrize("page_size,kh,group,head_dim,dtype,layout,combined", DECODE_CASES)
def test_decode_gpu(page_size, kh, group, head_dim, dtype, layout, combined):
    paged = make_paged(
        [*edge_lengths(page_size), 5000, 4096],
        page_size=page_size,
        num_kv_heads=kh,
        head_dim=head_dim,
        dtype=dtype,
        layout=layout,
        combined=combined,
    )
    check_decode(paged, dtype, group=group, backend=None)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size,kh,group,head_dim,dtype,layout,combined,causal", PREFILL_CASES)
def test_paged_prefill_gpu(page_size, kh, group, head_dim, dtype, layout, combined, causal):
    qo_lens = [3, 0, 1, page_size, 2 * page_size + 1, 400, 4, 129]
    kv_lens = [0, 5, 1, page_size, page_size + 1, 400, 5000, 1000]
    paged = make_paged(
        kv_lens,
        page_size=page_size,
        num_kv_heads=kh,
        head_dim=head_dim,
        dtype=dtype,
        layout=layout,
        combined=combined,
    )
    check_prefill(paged, qo_lens, dtype, group=group, backend=None, causal=causal)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("page_size", [1, 5, 16, 64])
def test_llama_shapes_gpu(page_size, dtype):
    paged = make_paged(
        [4097, 1, 0, 2047, 2048, 2049, 333],
        page_size=page_size,
        num_kv_heads=8,
        head_dim=128,
        dtype=dtype,
    )
    check_decode(paged, dtype, group=4, backend=None)
    check_prefill(paged, [4, 1, 0, 2, 4, 3, 2], dtype, group=4, backend=None, causal=True)
    check_prefill(paged, [256, 1, 0, 100, 4, 64, 333], dtype, group=4, backend=None, causal=True)


@pytest.mark.gpu
def test_fp16_values_of_several_hundred_gpu():
    paged = make_paged([700, 33], page_size=16, dtype=jnp.float16, head_dim=128, scale=300.0)
    check_decode(paged, jnp.float16, group=4, backend=None, scale=300.0)
    check_prefill(paged, [20, 33], jnp.float16, group=4, backend=None, causal=True, scale=300.0)


@pytest.mark.gpu
def test_skew_gpu():
    paged = make_paged([100_000, *[50] * 63], page_size=16, num_kv_heads=2, head_dim=128)
    check_decode(paged, jnp.bfloat16, group=4, backend=None)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "group,kh,head_dim,pages",
    [(1, 8, 128, 32), (4, 8, 128, 32), (8, 1, 64, 32), (16, 2, 256, 32), (4, 8, 128, 2)],
)
def test_fixed_splits_do_not_see_the_batch_gpu(group, kh, head_dim, pages):
    check_batch_invariance(
        5000,
        [[100, 1, 20_000], [300] * 100],
        backend=None,
        group=group,
        kh=kh,
        head_dim=head_dim,
        pages=pages,
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    "lengths,kv_heads",
    [([100_000, *[50] * 63], 8), ([8192], 8), ([3000] * 40, 8), ([100_000], 1), ([60_000, 7], 4)],
)
def test_runs_give_the_same_bits_gpu(lengths, kv_heads):
    """Whichever program of a tile comes last.

    Two inputs take turns, since a state that is read too early would be that of the run before, in the same memory.
    """
    paged = make_paged(lengths, page_size=16, num_kv_heads=kv_heads, head_dim=128)
    heads = dict(num_qo_heads=32, num_kv_heads=kv_heads)
    qo_lens = [min(n, 8) for n in lengths]
    qo_indptr = i32(np.concatenate([[0], np.cumsum(qo_lens)]))
    prefill = dict(page_size=16, num_qo_tokens=sum(qo_lens), **heads)
    for op, rows, plan, whole in (
        (
            ja.paged_decode,
            len(lengths),
            ja.plan_decode(paged.table, page_size=16, **heads),
            ja.plan_decode(paged.table, page_size=16, disable_split_kv=True, **heads),
        ),
        (
            ja.paged_prefill,
            sum(qo_lens),
            ja.plan_prefill(qo_indptr, paged.table, **prefill),
            ja.plan_prefill(qo_indptr, paged.table, disable_split_kv=True, **prefill),
        ),
    ):
        run = jax.jit(functools.partial(op, return_lse=True))
        qs = [jax.random.normal(jax.random.key(i), (rows, 32, 128), jnp.bfloat16) for i in (0, 1)]
        outputs = [run(qs[i % 2], paged.cache, plan) for i in range(40)]
        for i, q in enumerate(qs):
            # A row that had even one state of twenty wrong would be off by 5%; rounding makes it 0.3%.
            (o, lse), (want, want_lse) = outputs[i], run(q, paged.cache, whole)
            o, want = (np.asarray(x.astype(jnp.float32)) for x in (o, want))
            error = np.linalg.norm(o - want, axis=-1) / np.linalg.norm(want, axis=-1)
            assert error.max() < 1e-2
            np.testing.assert_allclose(lse, want_lse, atol=1e-3)
            for output in outputs[i + 2 :: 2]:
                assert all(map(same_bits, output, outputs[i]))


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [*SPLITS, dict(fixed_split_size=3)])
def test_splits_gpu(splits):
    paged = make_paged([*edge_lengths(16), 2500], page_size=16, num_kv_heads=8, head_dim=128)
    check_decode(paged, jnp.bfloat16, group=4, backend=None, **splits)
    qo_lens = [0, 1, 15, 10, 17, 50, 300, 200]
    how = dict(group=4, backend=None, causal=True)
    check_prefill(paged, qo_lens, jnp.bfloat16, **how, **splits)


@pytest.mark.gpu
def test_cache_beyond_2_31_elements_gpu(gpu_memory):
    """Pages whose element offsets do not fit 32 bits: first, last, and around the boundary."""
    gpu_memory(9)  # K and V of 2^31 elements of 2 bytes; donated, so once
    page_size, kh, d = 16, 8, 128
    num_pages = 2**31 // (page_size * kh * d) + 1000
    boundary = 2**31 // (page_size * kh * d)
    own = np.asarray([num_pages - 1, 0, boundary, boundary - 1, 5], np.int32)
    rng = np.random.default_rng(0)
    kv = rounded(rng.standard_normal((2, own.size * page_size, kh, d), np.float32), jnp.bfloat16)
    cache = ja.PagedKVCache.zeros(num_pages, page_size, kh, d, jnp.bfloat16)
    table = ja.PageTable(i32([0, own.size]), device_array(own), i32([page_size]))
    tokens = np.arange(own.size * page_size, dtype=np.int32)
    append = jax.jit(ja.append_paged_kv_cache, donate_argnums=4)
    k, v = (device_array(x, jnp.bfloat16) for x in kv)
    cache = append(k, v, jnp.zeros_like(tokens), device_array(tokens), cache, table)
    check_decode(Paged(cache, table, [kv[0]], [kv[1]]), jnp.bfloat16, group=4, backend=None)


def test_the_reference_takes_long_batches_in_blocks(monkeypatch):
    paged = make_paged([40, 17, 0, 90], page_size=16)
    check = functools.partial(
        check_prefill, paged, [20, 17, 0, 9], jnp.bfloat16, group=2, causal=True
    )
    monkeypatch.setattr(ja.reference, "QUERY_BLOCK", 7)
    monkeypatch.setattr(ja.reference, "KEY_BLOCK", 16)
    check(backend="xla")
    monkeypatch.setattr(ja.reference, "MAX_PIECES", 2)
    check(backend="xla")
