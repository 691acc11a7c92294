"""paged_decode, paged_prefill and ragged_prefill against dense float32 attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Paged, assert_lse, assert_rivals, dense_batch, make_paged, rounded, same_bits
from jax.sharding import PartitionSpec as P

import jaxattn as ja
from jaxattn.kernels import attention as kernel
from jaxattn.plan import WorkItem

BACKENDS = ["interpret", "xla"]

# The same computation in another program: a float32 difference may tip a bfloat16 rounding.
ONE_ULP = dict(rtol=2**-7, atol=1e-5)


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

    o, lse = decode(jnp.asarray(q).astype(dtype), cache, paged.table)
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

    o, lse = prefill(jnp.asarray(q).astype(dtype), jnp.asarray(qo_indptr), cache, paged.table)
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
    [(4, 64, jnp.bfloat16), (7, 80, jnp.float32), (71, 64, jnp.bfloat16), (40, 256, jnp.float32)],
)
def test_splits(splits, group, head_dim, dtype):
    paged = make_paged(edge_lengths(16), page_size=16, head_dim=head_dim, dtype=dtype)
    check_decode(paged, dtype, group=group, backend="interpret", **splits)


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
    block_table = jnp.asarray(block_table, jnp.int32)
    kv_len = jnp.asarray(lengths, jnp.int32)
    table = ja.PageTable.from_block_table(block_table, kv_len, page_size)
    cache = ja.PagedKVCache.zeros(len(lengths) * width, page_size, kh, d, jnp.bfloat16)
    indptr = jnp.asarray(np.concatenate([[0], np.cumsum(lengths)]), jnp.int32)
    where = ja.get_batch_indices_positions(indptr, kv_len, sum(lengths))
    k, v = (jnp.asarray(np.concatenate(x)).astype(jnp.bfloat16) for x in zip(*rows, strict=True))
    cache = ja.append_paged_kv_cache(k, v, *where, cache, table)
    plan = ja.plan_decode(
        table,
        page_size=page_size,
        num_qo_heads=kh * group,
        num_kv_heads=kh,
        fixed_split_size=pages,
    )
    q = jnp.asarray(q).astype(jnp.bfloat16)
    o, lse = ja.paged_decode(q, cache, plan, return_lse=True, backend=backend)
    return o[0], lse[0]


def check_batch_invariance(own, batches, **how):
    alone = decode_among([own], **how)
    for others in batches:
        for got, want in zip(decode_among([own, *others], **how), alone, strict=True):
            assert same_bits(got, want)


def test_fixed_splits_do_not_see_the_batch():
    """The same bits alone, among short requests and beside one that is much longer."""
    check_batch_invariance(333, [[1, 64, 65], [900], [0] * 40], backend="interpret")


@pytest.mark.parametrize("splits", [dict(fixed_split_size=3), dict(disable_split_kv=True)])
def test_prefill_does_not_see_the_batch_either(splits):
    paged = make_paged([300, 5, 200], page_size=16)
    cache, table = paged.cache, paged.table
    kh, d = cache.num_kv_heads, cache.head_dim
    q = jnp.asarray(np.random.default_rng(0).standard_normal((60, 4 * kh, d), np.float32))
    q = q.astype(cache.dtype)
    alone = ja.PageTable(table.indptr[:2], table.indices, table.last_page_len[:1])
    outputs = []
    for pages, qo_indptr in ((table, [0, 3, 4, 60]), (alone, [0, 3])):
        plan = ja.plan_prefill(
            jnp.asarray(qo_indptr, jnp.int32),
            pages,
            page_size=16,
            num_qo_tokens=qo_indptr[-1],
            num_qo_heads=4 * kh,
            num_kv_heads=kh,
            **splits,
        )
        rows = q[: qo_indptr[-1]]
        outputs.append(ja.paged_prefill(rows, cache, plan, return_lse=True, backend="interpret"))
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_paged_prefill_of_few_rows(backend):
    """Speculative verification: few rows a request, in the smallest tile where programs are few."""
    for kv_heads, rows in ((1, 16), (2, 64)):
        paged = make_paged([300, 2, 0, 77], page_size=16, num_kv_heads=kv_heads)
        how = dict(group=3, num_sms=4)
        check_prefill(paged, [3, 2, 1, 1], jnp.bfloat16, backend=backend, causal=True, **how)
        plan = ja.plan_prefill(
            jnp.asarray([0, 3, 5, 6, 7], jnp.int32),
            paged.table,
            page_size=16,
            num_qo_tokens=10,
            num_qo_heads=3 * kv_heads,
            num_kv_heads=kv_heads,
            num_sms=4,
        )
        assert plan.block_rows == rows


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
    qo_indptr, kv_indptr = (
        jnp.asarray(np.concatenate([[0], np.cumsum(x)]), jnp.int32) for x in (qo_lens, kv_lens)
    )
    plan = ja.plan_ragged_prefill(
        qo_indptr,
        kv_indptr,
        num_qo_tokens=q.shape[0],
        num_qo_heads=kh * group,
        num_kv_heads=kh,
        causal=causal,
    )
    as_layout = (lambda x: x.swapaxes(0, 1)) if layout == "HND" else (lambda x: x)
    o, lse = ja.ragged_prefill(
        jnp.asarray(q).astype(dtype),
        jnp.asarray(as_layout(k)).astype(dtype),
        jnp.asarray(as_layout(v)).astype(dtype),
        plan,
        kv_layout=layout,
        return_lse=True,
        backend=backend,
    )
    cuts = np.cumsum(kv_lens)
    ks, vs = np.split(k, cuts)[:-1], np.split(v, cuts)[:-1]
    compare_prefill(o, lse, q, qo_lens, ks, vs, dtype, d**-0.5, causal)


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_shared_pages(backend):
    """Two requests share a prefix; each equals itself alone."""
    paged = make_paged([48, 64], page_size=16, seed=7)
    indices = np.asarray(paged.table.indices).copy()
    indices[3:5] = indices[0:2]  # request 1's first two pages are request 0's
    table = ja.PageTable(paged.table.indptr, jnp.asarray(indices), paged.table.last_page_len)
    paged.k[1][:32], paged.v[1][:32] = paged.k[0][:32], paged.v[0][:32]
    shared = Paged(paged.cache, table, paged.k, paged.v)
    check_decode(shared, jnp.bfloat16, group=4, backend=backend)
    check_prefill(shared, [48, 7], jnp.bfloat16, group=4, backend=backend, causal=True)


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
            jnp.asarray([0, 8, 10, 10], jnp.int32),
            one_long.table,
            num_qo_tokens=13,
            num_kv_heads=1,
            **heads,
        ),
        ja.plan_decode(fixed.table, num_kv_heads=2, fixed_split_size=1, **heads),
    ]
    most = [int(plan.items[:, WorkItem._fields.index("num_splits")].max()) for plan in plans]
    assert list(zip(most, teams)) == [(42, 16), (11, 8), (102, 96)]


@pytest.mark.parametrize("wgmma", [True, False])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("new,rows", [(1, 16), (9, 64), (33, 128)])
def test_merging_reads_no_rows_beyond_its_tile(new, rows, head_dim, wgmma):
    paged = make_paged([100], page_size=16)
    how = dict(page_size=16, num_qo_tokens=new, num_qo_heads=4, num_kv_heads=1, num_sms=2)
    plan = ja.plan_prefill(jnp.asarray([0, new], jnp.int32), paged.table, **how)
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


def decode_arguments(kv_lens, *, group=2, batch_seed=0, **how):
    paged = make_paged(kv_lens, page_size=16, **how)
    rng = np.random.default_rng(batch_seed)
    shape = (len(kv_lens), paged.cache.num_kv_heads * group, paged.cache.head_dim)
    q = jnp.asarray(rng.standard_normal(shape, np.float32)).astype(paged.cache.dtype)
    return q, paged.cache, paged.table


@functools.partial(jax.jit, static_argnames="backend")
def decode(q, cache, table, backend="interpret"):
    plan = ja.plan_decode(
        table,
        page_size=cache.page_size,
        num_qo_heads=q.shape[-2],
        num_kv_heads=cache.num_kv_heads,
        fixed_split_size=1,  # so that short requests have splits to merge
    )
    return ja.paged_decode(q, cache, plan, return_lse=True, backend=backend)


def test_page_order_changes_nothing():
    """The same tokens on other pages give the same bits."""
    q, cache, table = decode_arguments([40, 17, 300])
    order = np.random.default_rng(5).permutation(cache.num_pages)
    moved = ja.PagedKVCache(tuple(x[np.argsort(order)] for x in cache.data))
    indices = np.asarray(table.indices)
    indices = np.where(indices < cache.num_pages, order[np.minimum(indices, order.size - 1)], 0)
    other = ja.PageTable(table.indptr, jnp.asarray(indices, jnp.int32), table.last_page_len)
    for a, b in zip(decode(q, cache, table), decode(q, moved, other), strict=True):
        assert same_bits(a, b)


def test_decode_is_the_last_row_of_prefill():
    """To the bit or nearly, where both take the same tile: that of few rows and few programs."""
    q, cache, table = decode_arguments([33, 1, 200], num_kv_heads=1)
    heads = dict(num_qo_heads=q.shape[1], num_kv_heads=cache.num_kv_heads)
    qo_indptr = jnp.arange(4, dtype=jnp.int32)
    prefill = ja.plan_prefill(qo_indptr, table, page_size=16, num_qo_tokens=3, **heads)
    decode = ja.plan_decode(table, page_size=16, **heads)
    assert prefill.block_rows == decode.block_rows
    how = dict(return_lse=True, backend="interpret")
    ours = ja.paged_prefill(q, cache, prefill, **how)
    for a, b in zip(ours, ja.paged_decode(q, cache, decode, **how), strict=True):
        np.testing.assert_allclose(
            np.asarray(a.astype(jnp.float32)), np.asarray(b.astype(jnp.float32)), atol=1e-6
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap(backend):
    a, b = (decode_arguments([33, 0, 200], seed=seed, batch_seed=seed) for seed in (0, 1))
    stacked = jax.tree.map(lambda x, y: jnp.stack([x, y]), a, b)
    o, lse = jax.vmap(lambda q, cache, table: decode(q, cache, table, backend))(*stacked)
    for i, one in enumerate((a, b)):
        want_o, want_lse = decode(*one, backend)
        np.testing.assert_allclose(
            np.asarray(o[i].astype(jnp.float32)),
            np.asarray(want_o.astype(jnp.float32)),
            **ONE_ULP,
        )
        np.testing.assert_allclose(np.asarray(lse[i]), np.asarray(want_lse), rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_prefill(backend):
    @jax.jit
    def prefill(q, cache, table):
        plan = ja.plan_prefill(
            jnp.asarray([0, 2, 5], jnp.int32),
            table,
            page_size=16,
            num_qo_tokens=q.shape[0],
            num_qo_heads=q.shape[1],
            num_kv_heads=cache.num_kv_heads,
        )
        return ja.paged_prefill(q, cache, plan, backend=backend).astype(jnp.float32)

    _, cache, table = decode_arguments([33, 20])
    q = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 4, 64), np.float32))
    q = q.astype(cache.dtype)
    o = jax.vmap(prefill, in_axes=(0, None, None))(q, cache, table)
    for i in range(2):
        np.testing.assert_allclose(
            np.asarray(o[i]), np.asarray(prefill(q[i], cache, table)), **ONE_ULP
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_scan_and_while(backend):
    """The plan is made inside the loop, from lengths that the loop carries."""
    q, cache, _ = decode_arguments([64, 64])
    block_table = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)
    cache = ja.PagedKVCache(tuple(jnp.nan_to_num(x) for x in cache.data))

    def step(kv_len):
        table = ja.PageTable.from_block_table(block_table, kv_len, 16)
        return decode(q, cache, table, backend)[0].astype(jnp.float32)

    start = jnp.asarray([0, 7], jnp.int32)
    _, outs = jax.jit(lambda: jax.lax.scan(lambda n, _: (n + 1, step(n)), start, length=3))()
    for i in range(3):
        np.testing.assert_allclose(np.asarray(outs[i]), np.asarray(step(start + i)), **ONE_ULP)
    _, last = jax.lax.while_loop(
        lambda c: c[0][0] < 3, lambda c: (c[0] + 1, step(c[0])), (start, jnp.zeros_like(outs[0]))
    )
    np.testing.assert_allclose(np.asarray(last), np.asarray(outs[2]), **ONE_ULP)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shard_map_over_kv_heads(backend):
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    q, cache, table = decode_arguments([33, 0, 200])
    mesh = jax.make_mesh((2,), ("kv",), axis_types=(jax.sharding.AxisType.Auto,))
    kv = P(None, None, "kv")
    sharded = jax.shard_map(
        lambda q, cache, table: decode(q, cache, table, backend),
        mesh=mesh,
        in_specs=(P(None, "kv"), kv, P()),
        out_specs=P(None, "kv"),
        check_vma=backend != "interpret",  # Pallas's interpreter cannot follow varying axes
    )
    for a, b in zip(
        jax.jit(sharded)(q, cache, table), decode(q, cache, table, backend), strict=True
    ):
        np.testing.assert_allclose(
            np.asarray(a.astype(jnp.float32)), np.asarray(b.astype(jnp.float32)), **ONE_ULP
        )


def prefill_arguments(*, group=2):
    """Queries and keys of two requests, the second's first rows without keys, and a padding row."""
    _, cache, table = decode_arguments([33, 3])
    rng = np.random.default_rng(4)
    kh, d = cache.num_kv_heads, cache.head_dim
    q, k, v = (
        jnp.asarray(rng.standard_normal((n, heads, d), np.float32)).astype(cache.dtype)
        for n, heads in ((10, kh * group), (40, kh), (40, kh))
    )
    return q, jnp.asarray([0, 4, 9], jnp.int32), cache, table, k, v


@functools.partial(jax.jit, static_argnames="backend")
def prefills(q, qo_indptr, cache, table, k, v, backend):
    """(o, lse) over paged keys, and over as many contiguous ones."""
    heads = dict(num_qo_tokens=q.shape[0], num_qo_heads=q.shape[1], num_kv_heads=cache.num_kv_heads)
    plan = ja.plan_prefill(qo_indptr, table, page_size=cache.page_size, fixed_split_size=1, **heads)
    paged = ja.paged_prefill(q, cache, plan, return_lse=True, backend=backend)
    kv_indptr = jnp.pad(jnp.cumsum(table.kv_len(cache.page_size), dtype=jnp.int32), (1, 0))
    plan = ja.plan_ragged_prefill(qo_indptr, kv_indptr, **heads)
    return paged, ja.ragged_prefill(q, k, v, plan, return_lse=True, backend=backend)


def assert_close(ours, want):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        a, b = (np.asarray(x.astype(jnp.float32)) for x in (a, b))
        np.testing.assert_allclose(a, b, **ONE_ULP)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prefill_transforms(backend):
    """Every argument batched under vmap and scan, and lengths that a while loop carries."""
    q, qo_indptr, cache, table, k, v = prefill_arguments()
    other = (q + 1, jnp.asarray([0, 6, 6], jnp.int32), cache, table, k - 1, v + 1)
    layers = jax.tree.map(lambda *x: jnp.stack(x), (q, qo_indptr, cache, table, k, v), other)
    run = functools.partial(prefills, backend=backend)
    each = [run(*jax.tree.map(lambda x, i=i: x[i], layers)) for i in range(2)]
    want = jax.tree.map(lambda *x: jnp.stack(x), *each)
    assert not same_bits(want[0][0][0], want[0][0][1])
    assert_close(jax.vmap(run)(*layers), want)
    _, scanned = jax.lax.scan(lambda c, xs: (c, run(*xs)), 0, layers)
    assert_close(scanned, want)

    def step(carry):
        i, _ = carry
        return i + 1, run(q, jnp.asarray([0, 3, 7], jnp.int32) + i, cache, table, k, v)

    _, last = jax.lax.while_loop(lambda c: c[0] < 2, step, (jnp.int32(0), each[0]))
    assert_close(last, run(q, jnp.asarray([1, 4, 8], jnp.int32), cache, table, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_prefill_under_shard_map_over_kv_heads(backend):
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    arguments = prefill_arguments()
    heads = P(None, "kv")
    sharded = jax.shard_map(
        functools.partial(prefills, backend=backend),
        mesh=jax.make_mesh((2,), ("kv",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=(heads, P(), P(None, None, "kv"), P(), heads, heads),
        out_specs=heads,
        check_vma=backend != "interpret",  # Pallas's interpreter cannot follow varying axes
    )
    assert_close(jax.jit(sharded)(*arguments), prefills(*arguments, backend))


@pytest.mark.parametrize("backend", [None, "interpret"])
def test_gradient_is_the_references(backend):
    q, cache, table = decode_arguments([33, 0, 60], dtype=jnp.float32)
    cache = ja.PagedKVCache(tuple(jnp.nan_to_num(x) for x in cache.data))

    def loss(q, cache, backend):
        o, lse = decode(q, cache, table, backend)
        return jnp.sum(o**2) + jnp.sum(jnp.where(lse == -jnp.inf, 0.0, lse))

    ours = jax.grad(loss, argnums=(0, 1))(q, cache, backend)
    want = jax.grad(loss, argnums=(0, 1))(q, cache, "xla")
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        assert np.abs(np.asarray(b)).max() > 0
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-4, atol=2e-5)


def test_lengths_never_recompile():
    traces = []

    @jax.jit
    def step(q, cache, table):
        traces.append(1)
        return decode(q, cache, table, "xla")

    q, cache, _ = decode_arguments([64, 64])
    block_table = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)
    for lens in ([1, 64], [0, 0], [33, 16]):
        step(q, cache, ja.PageTable.from_block_table(block_table, jnp.asarray(lens), 16))
    assert len(traces) == 1 and step._cache_size() == 1


def test_prefill_lengths_never_recompile():
    q, _, cache, _, k, v = prefill_arguments()
    block_table = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)
    step = jax.jit(functools.partial(prefills, backend="xla"))
    for qo_lens, kv_lens in (([0, 0], [0, 0]), ([10, 0], [48, 1]), ([1, 4], [1, 30])):
        qo_indptr = jnp.asarray(np.concatenate([[0], np.cumsum(qo_lens)]), jnp.int32)
        kv_len = jnp.asarray(kv_lens, jnp.int32)
        step(q, qo_indptr, cache, ja.PageTable.from_block_table(block_table, kv_len, 16), k, v)
    assert step._cache_size() == 1


ERRORS = [
    (
        lambda q, c, t, p: ja.paged_decode(q[:1], c, p),
        ValueError,
        r"q must have shape \[2, 4, head",
    ),
    (lambda q, c, t, p: ja.paged_decode(q[:, :2], c, p), ValueError, "q must have shape"),
    (lambda q, c, t, p: ja.paged_decode(q[..., :32], c, p), ValueError, "must have head_dim=32"),
    (
        lambda q, c, t, p: ja.paged_decode(q.astype(jnp.float32), c, p),
        TypeError,
        "q and paged_kv_cache must have the same dtype",
    ),
    (
        lambda q, c, t, p: ja.paged_decode(q.astype(jnp.int32), c, p),
        TypeError,
        "q must be one of float16",
    ),
    (
        lambda q, c, t, p: ja.paged_decode(q, ja.PagedKVCache.zeros(4, 8, 2, 64, jnp.bfloat16), p),
        ValueError,
        "must have page_size=16, as plan; got page_size=8",
    ),
    (
        lambda q, c, t, p: ja.paged_decode(q, ja.PagedKVCache.zeros(4, 16, 4, 64, jnp.bfloat16), p),
        ValueError,
        "must have num_kv_heads=2",
    ),
    (lambda q, c, t, p: ja.paged_decode(q, c, t), TypeError, "plan must come from plan_decode"),
    (lambda q, c, t, p: ja.paged_prefill(q, c, p), TypeError, "plan must come from plan_prefill"),
    (lambda q, c, t, p: ja.paged_decode(q, c, p, sm_scale=0.0), ValueError, "must be positive"),
    (
        lambda q, c, t, p: ja.paged_decode(q, c, p, backend="cuda"),
        ValueError,
        "backend must be one of None, 'triton'",
    ),
    (
        lambda q, c, t, p: jax.jit(lambda s: ja.paged_decode(q, c, p, sm_scale=s))(1.0),
        TypeError,
        "sm_scale must be a Python float",
    ),
]


@pytest.mark.parametrize("call,error,message", ERRORS)
def test_errors(call, error, message):
    q, cache, table = decode_arguments([20, 3])
    plan = ja.plan_decode(table, page_size=16, num_qo_heads=4, num_kv_heads=2)
    with pytest.raises(error, match=message):
        call(q, cache, table, plan)


def test_plans_of_the_other_kind_of_keys_are_errors():
    q, cache, table = decode_arguments([20, 3])
    indptr = jnp.asarray([0, 1, 2], jnp.int32)
    heads = dict(num_qo_tokens=2, num_qo_heads=4, num_kv_heads=2)
    ragged = ja.plan_ragged_prefill(indptr, indptr, **heads)
    paged = ja.plan_prefill(indptr, table, page_size=16, **heads)
    with pytest.raises(ValueError, match="use plan_prefill"):
        ja.paged_prefill(q, cache, ragged)
    with pytest.raises(ValueError, match="use plan_ragged_prefill"):
        ja.ragged_prefill(q, q[:, :2], q[:, :2], paged)
    with pytest.raises(ValueError, match=r"k must have shape \[num_kv_tokens, 2, 64\]"):
        ja.ragged_prefill(q, q, q, ragged)
    with pytest.raises(ValueError, match="kv_layout must be one of"):
        ja.ragged_prefill(q, q, q, ragged, kv_layout="NDH")
    k = q[:, :2]
    with pytest.raises(ValueError, match=r"v must have shape \[2, 2, 64\]"):
        ja.ragged_prefill(q, k, k[:1], ragged)
    with pytest.raises(TypeError, match="q and k and v must have the same dtype"):
        ja.ragged_prefill(q, k, k.astype(jnp.float32), ragged)
    with pytest.raises(TypeError, match="q must be one of float16"):
        ja.ragged_prefill(q.astype(jnp.int32), k, k, ragged)
    with pytest.raises(ValueError, match=r"q must have shape \[2, 4, head_dim\]; got \[1"):
        ja.paged_prefill(q[:1], cache, paged)
    with pytest.raises(ValueError, match="must be positive"):
        ja.paged_prefill(q, cache, paged, sm_scale=-1.0)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the error of a machine without a GPU")
def test_triton_without_a_gpu_says_what_can_run():
    q, cache, table = decode_arguments([20, 3])
    with pytest.raises(ValueError, match="needs an NVIDIA GPU.*'xla', 'interpret'"):
        decode(q, cache, table, "triton")


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
        jnp.asarray([0, 1], jnp.int32),
        jnp.asarray([0, n], jnp.int32),
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


@pytest.mark.parametrize("backend", [None, "interpret"])
def test_numpy_arrays_and_x64(backend):
    """Index arrays may come from NumPy, and a program may run with 64-bit types enabled."""
    q, cache, table = decode_arguments([40, 300, 0])
    want = decode(q, cache, table, "xla")
    table = ja.PageTable(*(np.asarray(x) for x in jax.tree.leaves(table)))
    with jax.enable_x64(True):
        plan = ja.plan_decode(table, page_size=16, num_qo_heads=4, num_kv_heads=2)
        got = ja.paged_decode(q, cache, plan, return_lse=True, backend=backend)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(
            np.asarray(a.astype(jnp.float32)), np.asarray(b.astype(jnp.float32)), atol=5e-3
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_attend_to(backend):
    """No query tokens; and requests without any page or key."""
    _, cache, _ = decode_arguments([16])
    empty = jnp.zeros(0, jnp.int32)
    none = ja.PageTable(jnp.zeros(3, jnp.int32), empty, jnp.zeros(2, jnp.int32))
    q = jnp.ones((2, 4, 64), cache.dtype)
    o, lse = decode(q, cache, none, backend)
    assert not np.asarray(o.astype(jnp.float32)).any() and np.isneginf(np.asarray(lse)).all()
    heads = dict(num_qo_heads=4, num_kv_heads=2)
    indptr = jnp.zeros(3, jnp.int32)
    plan = ja.plan_prefill(indptr, none, page_size=16, num_qo_tokens=0, **heads)
    assert ja.paged_prefill(q[:0], cache, plan, backend=backend).shape == (0, 4, 64)
    plan = ja.plan_ragged_prefill(indptr, indptr, num_qo_tokens=2, **heads)
    o = ja.ragged_prefill(q, q[:0, :2], q[:0, :2], plan, backend=backend)
    assert not np.asarray(o.astype(jnp.float32)).any()


def test_rows_cut_off_from_q_move_nothing():
    """With fewer rows in q than qo_indptr speaks of, the rows that are there stay what they were."""
    _, cache, table = decode_arguments([24])
    q = jnp.asarray(np.random.default_rng(0).standard_normal((6, 4, 64)), cache.dtype)

    def prefill(q, backend):
        plan = ja.plan_prefill(
            jnp.asarray([0, 6], jnp.int32),
            table,
            page_size=16,
            num_qo_tokens=q.shape[0],
            num_qo_heads=4,
            num_kv_heads=2,
        )
        return np.asarray(ja.paged_prefill(q, cache, plan, backend=backend).astype(jnp.float32))

    for backend in BACKENDS:
        np.testing.assert_allclose(prefill(q[:3], backend), prefill(q, backend)[:3], **ONE_ULP)


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
    qo_indptr = jnp.asarray(np.concatenate([[0], np.cumsum(qo_lens)]), jnp.int32)
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
        run = jax.jit(lambda q, plan, op=op: op(q, paged.cache, plan, return_lse=True))
        qs = [jax.random.normal(jax.random.key(i), (rows, 32, 128), jnp.bfloat16) for i in (0, 1)]
        outputs = [run(qs[i % 2], plan) for i in range(40)]
        for i, q in enumerate(qs):
            # A row that had even one state of twenty wrong would be off by 5%; rounding makes it 0.3%.
            (o, lse), (want, want_lse) = outputs[i], run(q, whole)
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
def test_cache_beyond_2_31_elements_gpu():
    """Pages whose element offsets do not fit 32 bits: first, last, and around the boundary."""
    page_size, kh, d = 16, 8, 128
    num_pages = 2**31 // (page_size * kh * d) + 1000
    boundary = 2**31 // (page_size * kh * d)
    own = np.asarray([num_pages - 1, 0, boundary, boundary - 1, 5], np.int32)
    rng = np.random.default_rng(0)
    kv = rounded(rng.standard_normal((2, own.size * page_size, kh, d), np.float32), jnp.bfloat16)
    cache = ja.PagedKVCache.zeros(num_pages, page_size, kh, d, jnp.bfloat16)
    table = ja.PageTable(
        jnp.asarray([0, own.size], jnp.int32), jnp.asarray(own), jnp.asarray([page_size], jnp.int32)
    )
    tokens = np.arange(own.size * page_size, dtype=np.int32)
    append = jax.jit(ja.append_paged_kv_cache, donate_argnums=4)
    k, v = (jnp.asarray(x).astype(jnp.bfloat16) for x in kv)
    cache = append(k, v, jnp.zeros_like(tokens), jnp.asarray(tokens), cache, table)
    check_decode(Paged(cache, table, [kv[0]], [kv[1]]), jnp.bfloat16, group=4, backend=None)


def test_the_reference_takes_long_batches_in_blocks(monkeypatch):
    paged = make_paged([40, 17, 0, 90], page_size=16)
    check = functools.partial(
        check_prefill, paged, [20, 17, 0, 9], jnp.bfloat16, group=2, causal=True
    )
    monkeypatch.setattr(ja.reference, "MAX_SCORES", 16 * 1024)
    check(backend="xla")
