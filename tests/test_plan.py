"""Plans: every row meets every key it sees exactly once, within capacities that shapes alone fix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import i32

import jaxattn as ja
from jaxattn import dense, prefill_plan
from jaxattn.decode_plan import MAX_IN_ONE_PROGRAM, decode_plan
from jaxattn.plan import MAX_FEW_ROWS, Splits
from jaxattn.spec import AttentionSpec, Visible
from jaxattn.work_list import KV_BLOCK, MAX_PAIRWISE, Keys, WorkItem

NUM_SMS = 132
DECODE_STATICS = ["page_size", "num_qo_heads", "num_kv_heads", "num_sms"]
DECODE_STATICS += ["fixed_split_size", "disable_split_kv"]
plan_decode = jax.jit(ja.plan_decode, static_argnames=DECODE_STATICS)
plan_prefill = jax.jit(
    ja.plan_prefill, static_argnames=[*DECODE_STATICS, "num_qo_tokens", "causal"]
)


def table_of(kv_lens, page_size):
    counts = [-(-n // page_size) for n in kv_lens]
    indptr = i32(np.concatenate([[0], np.cumsum(counts)]))
    last = [n - (c - 1) * page_size if c else 0 for n, c in zip(kv_lens, counts, strict=True)]
    indices = jnp.zeros(max(sum(counts), 1), jnp.int32)
    return ja.PageTable(indptr, indices, i32(last))


def items_of(plan):
    return [WorkItem(*row) for row in np.asarray(plan.items)]


def check_coverage(plan, keys_of_row, split_size=None):
    """The items of each tile cut the keys its rows see; partial states have slots of their own."""
    tiles = {}
    for item in items_of(plan):
        assert item.num_splits >= 1
        if item.row_end > item.row_begin:
            tiles.setdefault((item.row_begin, item.row_end), []).append(item)
    rows = sorted(r for begin, end in tiles for r in range(begin, end))
    assert rows == list(range(len(keys_of_row))), "each packed row lies in exactly one tile"
    slots = []
    for (begin, end), pieces in tiles.items():
        assert end - begin <= plan.block_rows
        pieces.sort(key=lambda item: item.kv_begin)
        assert pieces[0].kv_begin == 0
        for a, b in zip(pieces, pieces[1:], strict=False):
            assert a.kv_end == b.kv_begin and a.kv_end > a.kv_begin
            assert a.kv_end % (split_size or KV_BLOCK) == 0
        assert pieces[-1].kv_end == max(keys_of_row[begin:end])
        assert [p.split for p in pieces] == list(range(len(pieces)))
        assert {p.num_splits for p in pieces} == {len(pieces)}
        assert len({p.slot for p in pieces}) == 1
        if len(pieces) > 1:
            slots += [p.slot + p.split for p in pieces]
    assert len(slots) == len(set(slots)) and all(0 <= s < plan.num_slots for s in slots)


DECODE_LENGTHS = {
    "uniform": [8192] * 64,
    "skew": [100_000] + [50] * 63,
    "one long": [131_072],
    "edges": [0, 1, 127, 128, 129, 0, 4097],
    "nothing": [0, 0, 0],
    "random": np.random.default_rng(0).integers(0, 20_000, 100).tolist(),
}


@pytest.mark.parametrize("lengths", DECODE_LENGTHS.values(), ids=DECODE_LENGTHS.keys())
@pytest.mark.parametrize("heads,kv_heads", [(32, 8), (32, 32), (8, 1), (21, 3), (71, 1)])
def test_decode_plan(lengths, heads, kv_heads):
    plan = plan_decode(
        table_of(lengths, 16),
        page_size=16,
        num_qo_heads=heads,
        num_kv_heads=kv_heads,
        num_sms=NUM_SMS,
    )
    group = heads // kv_heads
    check_coverage(plan, np.repeat(lengths, group))
    np.testing.assert_array_equal(plan.kv_len, lengths)


@pytest.mark.parametrize("lengths", DECODE_LENGTHS.values(), ids=DECODE_LENGTHS.keys())
def test_decode_plan_fills_the_gpu(lengths):
    """No program has more than one and a half fair shares of the keys, and a block, whatever the mix."""
    kv_heads = 8
    plan = plan_decode(
        table_of(lengths, 1), page_size=1, num_qo_heads=32, num_kv_heads=kv_heads, num_sms=NUM_SMS
    )
    few = len(lengths) * kv_heads <= NUM_SMS
    assert plan.programs_per_sm == (2 if few else 4)
    fill = plan.programs_per_sm * NUM_SMS / kv_heads
    # Splits of one block need two.
    assert plan.items.shape[0] >= len(lengths) + fill * (plan.page_indices.size > KV_BLOCK)
    share = max(sum(-(-n // KV_BLOCK) for n in lengths) / fill, 1) + 1
    longest = max(item.kv_end - item.kv_begin for item in items_of(plan))
    assert longest <= (1.5 * share + 1) * KV_BLOCK


def test_slots_are_as_many_as_can_be_needed():
    """Tiles of three blocks where a share is two: each takes two slots, and no mix of lengths takes more."""
    plan = plan_decode(
        table_of([3 * KV_BLOCK] * 8, 16), page_size=16, num_qo_heads=1, num_kv_heads=1, num_sms=3
    )
    check_coverage(plan, np.full(8, 3 * KV_BLOCK))
    assert all(item.num_splits == 2 for item in items_of(plan) if item.row_end > item.row_begin)
    assert plan.num_slots == 16


@pytest.mark.parametrize("tall,blocks", [(False, 1), (True, 5)])
def test_what_is_never_split_has_no_slots(tall, blocks):
    """Where a table has no room for a tile that would be split; one key more, and one is."""
    how = dict(page_size=1, num_qo_heads=4, num_kv_heads=1, num_sms=NUM_SMS)
    for keys, splits in ((blocks * KV_BLOCK, 1), (blocks * KV_BLOCK + 1, 2)):
        table = table_of([keys], 1)
        if tall:
            q = dict(qo_indptr=i32([0, 128]), num_qo_tokens=128)
            plan = plan_prefill(page_table=table, causal=False, **q, **how)
        else:
            plan = plan_decode(table, **how)
        assert (plan.block_rows > MAX_FEW_ROWS) == tall
        assert max(item.num_splits for item in items_of(plan)) == splits
        assert bool(plan.num_slots) == (splits > 1)


@pytest.mark.parametrize("queries,blocks", [(1, 1), (40, 5)])
def test_dense_calls_of_few_keys_have_no_slots(queries, blocks):
    """However many requests there are: none has more keys than the arrays' S."""
    for keys, slots in ((blocks * KV_BLOCK, False), (blocks * KV_BLOCK + 1, True)):
        batch = dense._Batch(3, queries, keys, AttentionSpec(4, 1), {})
        calls = [
            functools.partial(batch.plan, padded=False),
            functools.partial(batch.plan_mask, jnp.ones((3, queries, keys), bool)),
        ]
        if queries > 1:
            calls.append(functools.partial(batch.plan, padded=True))
            calls.append(functools.partial(batch.plan_key_mask, jnp.ones((3, keys), bool)))
        plans = [jax.eval_shape(call) for call in calls]
        assert [bool(plan.num_slots) for plan in plans] == [slots] * len(plans)


def one_kernels_plan_is_xlas(kernel, lengths, group, window_left, splits):
    """To the integer, of the lengths as they come and of nonsense in them."""
    b = len(lengths)
    rng = np.random.default_rng(b)
    start = i32(rng.integers(0, 1000, b))
    kv_len = i32(lengths)
    kv_end = jnp.maximum(kv_len - i32(rng.integers(0, 2, b) * 40), 0)
    keys = Keys(jnp.zeros(max(sum(lengths) // 16, 1) + b, jnp.int32), start, kv_len, kv_end, 16)
    spec = AttentionSpec(2 * group, 2, Visible.of(False, window_left))

    @functools.partial(jax.jit, static_argnums=0)
    def items(backend, *lengths):
        keys_of, _ = keys.as_function()
        return decode_plan(keys_of, lengths, spec, splits, NUM_SMS, backend).items

    _, arrays = keys.as_function()
    for given in (arrays, (start, kv_len - 7, jnp.maximum(kv_end, 2**31 - 200))):
        np.testing.assert_array_equal(items(kernel, *given), items("xla", *given))


KERNEL_CASES = [
    # lengths, group, window_left, splits
    ([4096], 4, None, Splits()),
    ([0, 1, 15, 16, 17, 100_000, 5], 3, None, Splits()),
    ([128 * i for i in range(33)], 1, 1000, Splits()),
    ([300, 0, 9000], 40, None, Splits(5, page_size=16)),
    ([300, 0, 9000], 8, 31, Splits(disabled=True)),
]


@pytest.mark.parametrize("case", range(len(KERNEL_CASES)))
def test_one_kernels_plan_is_xlas_interpreted(case):
    one_kernels_plan_is_xlas("interpret", *KERNEL_CASES[case])


@pytest.mark.gpu
@pytest.mark.parametrize("case", range(len(KERNEL_CASES) + 1))
def test_one_kernels_plan_is_xlas_gpu(case):
    rng = np.random.default_rng(0)
    many = (rng.geometric(1 / 2000, MAX_IN_ONE_PROGRAM).tolist(), 4, None, Splits())
    one_kernels_plan_is_xlas("triton", *[*KERNEL_CASES, many][case])


def test_groups_of_one_have_four_programs():
    heads = dict(num_qo_heads=32, num_kv_heads=32)
    plan = plan_decode(table_of([4096] * 4, 16), page_size=16, num_sms=NUM_SMS, **heads)
    assert plan.programs_per_sm == 4


@pytest.mark.parametrize("page_size,pages", [(1, 300), (16, 8), (16, 3), (256, 1)])
@pytest.mark.parametrize("heads,kv_heads", [(8, 2), (71, 1)])
def test_fixed_splits(page_size, pages, heads, kv_heads):
    """Splits of so many pages; those of a request do not depend on the others."""
    size = page_size * pages
    lengths = [0, 1, size - 1, size, size + 1, 3 * size, 2 * size + 1, 5 * size]
    how = dict(page_size=page_size, num_qo_heads=heads, num_kv_heads=kv_heads, num_sms=NUM_SMS)
    plan = plan_decode(table_of(lengths, page_size), **how, fixed_split_size=pages)
    check_coverage(plan, np.repeat(lengths, heads // kv_heads), size)
    for item in items_of(plan):
        if item.num_splits > 1:
            assert item.kv_begin == item.split * size
            assert item.kv_end - item.kv_begin == size or item.split == item.num_splits - 1
    alone = plan_decode(table_of(lengths[-1:], page_size), **how, fixed_split_size=pages)
    assert alone.programs_per_sm == plan.programs_per_sm
    assert max(item.num_splits for item in items_of(alone)) == 5


def test_fixed_splits_of_prefill():
    qo_lens, kv_lens = [40, 1, 200], [300, 64, 210]
    plan = plan_prefill(
        i32(np.concatenate([[0], np.cumsum(qo_lens)])),
        table_of(kv_lens, 16),
        page_size=16,
        num_qo_tokens=sum(qo_lens),
        num_qo_heads=4,
        num_kv_heads=2,
        num_sms=NUM_SMS,
        fixed_split_size=4,
    )
    keys = [np.arange(kv - qo + 1, kv + 1) for qo, kv in zip(qo_lens, kv_lens, strict=True)]
    check_coverage(plan, np.repeat(np.concatenate(keys), 2), 64)
    assert max(item.num_splits for item in items_of(plan)) == 5


def test_no_splits():
    plan = plan_decode(
        table_of([100_000, 5], 16),
        page_size=16,
        num_qo_heads=8,
        num_kv_heads=2,
        num_sms=NUM_SMS,
        disable_split_kv=True,
    )
    check_coverage(plan, np.repeat([100_000, 5], 4))
    assert plan.num_slots == 0 and all(item.num_splits == 1 for item in items_of(plan))


@pytest.mark.parametrize("tokens,heads,splits", [(512, (32, 8), (2, 1)), (600, (16, 8), (3, 2))])
def test_programs_that_are_alone_take_fewer_splits(tokens, heads, splits, monkeypatch):
    monkeypatch.setattr(prefill_plan, "has_wgmma", lambda: True)
    n = 32_768
    h, kh = heads
    how = dict(page_size=16, num_qo_tokens=tokens, num_sms=132)
    how |= dict(num_qo_heads=h, num_kv_heads=kh)
    plan = ja.plan_prefill(i32([0, tokens]), table_of([n], 16), **how)
    for each, most in zip((plan, plan.for_lone_programs()), splits):
        assert max(item.num_splits for item in items_of(each)) == most
        check_coverage(each, np.repeat(np.arange(n - tokens + 1, n + 1), h // kh))
    whole = ja.plan_prefill(i32([0, tokens]), table_of([n], 16), disable_split_kv=True, **how)
    assert whole.lone is None and whole.for_lone_programs() is whole


PREFILL_LENGTHS = [
    ([512], [32_768]),
    ([4] * 32, [4096] * 32),
    ([0, 3, 1, 100, 50], [7, 0, 1, 100, 20]),
    ([1] * 63 + [700], [100_000] + [60] * 62 + [700]),
]


@pytest.mark.parametrize("lengths", range(4))
@pytest.mark.parametrize("heads", range(3))
def test_prefill_plan(lengths, heads):
    causal = (lengths + heads) % 2 == 0  # all lengths and all heads are seen both causal and not
    qo_lens, kv_lens = PREFILL_LENGTHS[lengths]
    heads, kv_heads = [(32, 8), (8, 8), (21, 3)][heads]
    group, padding = heads // kv_heads, 5
    plan = plan_prefill(
        i32(np.concatenate([[0], np.cumsum(qo_lens)])),
        table_of(kv_lens, 16),
        page_size=16,
        num_qo_tokens=sum(qo_lens) + padding,
        num_qo_heads=heads,
        num_kv_heads=kv_heads,
        causal=causal,
        num_sms=NUM_SMS,
    )
    keys = [
        np.clip(kv_len - qo_len + 1 + np.arange(qo_len), 0, kv_len) if causal else [kv_len] * qo_len
        for qo_len, kv_len in zip(qo_lens, kv_lens, strict=True)
    ]
    keys = np.concatenate([*keys, np.zeros(padding)]).astype(int)
    check_coverage(plan, np.repeat(keys, group))


def test_tall_tiles_share_out_several_blocks_and_come_last_first():
    """A prompt of 512: its splits are not worth their merging; its last rows, which see the most, are begun first."""
    plan = plan_prefill(
        i32([0, 512]),
        table_of([512], 16),
        page_size=16,
        num_qo_tokens=512,
        num_qo_heads=32,
        num_kv_heads=8,
        num_sms=NUM_SMS,
    )
    items = [item for item in items_of(plan) if item.row_end > item.row_begin]
    assert plan.block_rows == 128 and all(item.num_splits == 1 for item in items)
    assert [item.row_begin for item in items] == list(range(512 * 4 - 128, -1, -128))


@pytest.mark.parametrize(
    "batch,new,kv_heads,rows",
    [
        (8, 4, 8, 16),  # few programs of few rows
        (32, 4, 8, 64),
        (32, 16, 8, 64),
        (32, 17, 8, 128),
        (1, 512, 8, 128),
        (1, 256, 8, 64),  # of 128 rows they would fill half the GPU
    ],
)
def test_prefill_takes_as_many_rows_at_once_as_requests_have(batch, new, kv_heads, rows):
    how = dict(
        page_size=16,
        num_qo_tokens=batch * new,
        num_qo_heads=4 * kv_heads,
        num_kv_heads=kv_heads,
        num_sms=NUM_SMS,
    )
    qo_indptr = jnp.arange(batch + 1, dtype=jnp.int32) * new
    table = table_of([new] * batch, 16)

    def block_rows(**fixed):
        plan = functools.partial(ja.plan_prefill, **how, **fixed)
        return jax.eval_shape(plan, qo_indptr, table).block_rows  # static: nothing needs to run

    assert block_rows() == rows
    # Those of a fixed plan must not depend on the batch.
    for fixed in (dict(fixed_split_size=4), dict(disable_split_kv=True)):
        assert block_rows(**fixed) == 128


def test_more_tiles_than_are_summed_in_pairs():
    lengths = np.random.default_rng(1).integers(0, 3000, MAX_PAIRWISE + 1)
    plan = plan_decode(
        table_of(lengths, 16), page_size=16, num_qo_heads=8, num_kv_heads=1, num_sms=NUM_SMS
    )
    check_coverage(plan, np.repeat(lengths, 8))


def test_ragged_plan():
    qo, kv = [3, 0, 40], [5, 9, 30]
    plan = ja.plan_ragged_prefill(
        i32([0, 3, 3, 43]),
        i32([0, 5, 14, 44]),
        num_qo_tokens=43,
        num_qo_heads=4,
        num_kv_heads=2,
        causal=False,
    )
    check_coverage(plan, np.repeat(np.repeat(kv, qo), 2))
    np.testing.assert_array_equal(plan.page_start, [0, 5, 14])


def test_other_lengths_reuse_the_compiled_plan():
    make = jax.jit(
        lambda table: ja.plan_decode(table, page_size=16, num_qo_heads=8, num_kv_heads=2)
    )
    block_table = jnp.arange(64, dtype=jnp.int32).reshape(4, 16)
    for lengths in ([0, 0, 0, 0], [1, 256, 16, 17], [256] * 4):
        make(ja.PageTable.from_block_table(block_table, i32(lengths), 16))
    assert make._cache_size() == 1


def test_plan_under_vmap():
    tables = [table_of([30, 0, 5], 16), table_of([17, 0, 8], 16)]
    plan = lambda table: ja.plan_decode(table, page_size=16, num_qo_heads=4, num_kv_heads=2)
    both = jax.vmap(plan)(jax.tree.map(lambda a, b: jnp.stack([a, b]), *tables))
    for i, table in enumerate(tables):
        for got, want in zip(jax.tree.leaves(both), jax.tree.leaves(plan(table)), strict=True):
            np.testing.assert_array_equal(got[i], want)


def test_random_lengths_stay_within_capacities():
    """Any mix of lengths, of one compiled shape, against capacities that are not generous."""
    rng = np.random.default_rng(0)
    batch, width, page_size = 24, 64, 128
    block_table = jnp.arange(batch * width, dtype=jnp.int32).reshape(batch, width)
    make = jax.jit(
        lambda table: ja.plan_decode(
            table, page_size=page_size, num_qo_heads=2, num_kv_heads=1, num_sms=5
        )
    )
    for trial in range(40):
        lengths = rng.integers(0, width * page_size, batch)
        if trial % 4 == 1:  # one long among short ones
            lengths = np.where(np.arange(batch) == trial % batch, lengths, lengths % 300)
        elif trial % 4 == 2:  # around the blocks that splits are cut at
            lengths = rng.integers(0, 9, batch) * KV_BLOCK + rng.integers(-1, 2, batch)
        elif trial % 4 == 3:
            lengths = np.full(batch, lengths[0])
        lengths = np.clip(lengths, 0, width * page_size)
        table = ja.PageTable.from_block_table(block_table, i32(lengths), page_size)
        check_coverage(make(table), np.repeat(lengths, 2))
    assert make._cache_size() == 1


@pytest.mark.parametrize(
    "change,error,message",
    [
        (dict(num_qo_heads=6, num_kv_heads=4), ValueError, "multiple of num_kv_heads"),
        (dict(num_kv_heads=0), ValueError, "num_kv_heads must be a positive integer; got 0"),
        (dict(page_size=0), ValueError, "page_size must be a positive integer"),
        (dict(num_qo_tokens=-1), ValueError, "num_qo_tokens must be an integer of at least 0"),
        (dict(qo_indptr=jnp.zeros(2, jnp.int32)), ValueError, r"qo_indptr must have shape \[3\]"),
        (dict(qo_indptr=jnp.zeros(3)), TypeError, r"qo_indptr must be int32; got float32"),
        (dict(num_qo_tokens=2.5), ValueError, "num_qo_tokens must be an integer of at least 0"),
        (dict(num_sms=0), ValueError, "num_sms must be a positive integer; got 0"),
        (
            dict(bidirectional_spans=np.full((4, 2), 2**40)),
            TypeError,
            "bidirectional_spans must be int32; got int64",
        ),
        (dict(mask=np.zeros(4, bool)), TypeError, "mask must be MaskBits; got ndarray: make it by"),
        (
            dict(mask=ja.MaskBits(np.zeros(9, np.uint8), np.zeros(3, np.int64))),
            TypeError,
            "mask_indptr must be int32; got int64",
        ),
        (dict(fixed_split_size=0), ValueError, "fixed_split_size must be a positive integer"),
        (dict(fixed_split_size=2, disable_split_kv=True), ValueError, "choose one"),
    ],
)
def test_plan_errors(change, error, message):
    args = dict(page_size=16, num_qo_heads=4, num_kv_heads=2, num_qo_tokens=4)
    args |= dict(qo_indptr=i32([0, 1, 4]), page_table=table_of([4, 4], 16))
    with pytest.raises(error, match=message):
        ja.plan_prefill(**(args | change))


@pytest.mark.parametrize("integer", [np.int64, jnp.int32])
def test_counts_are_any_integers(integer):
    n = integer
    counts = dict(page_size=16, num_qo_heads=4, num_kv_heads=2, num_sms=3)
    given = {name: n(x) for name, x in counts.items()}
    table, rows = table_of([300, 4], 16), dict(qo_indptr=i32([0, 1, 4]))
    for plan, own in ((ja.plan_decode, {}), (ja.plan_prefill, dict(num_qo_tokens=4))):
        own_given = {name: n(x) for name, x in own.items()}
        at = dict(page_table=table) | (rows if own else {})
        want, got = plan(**at, **counts, **own), plan(**at, **given, **own_given)
        jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(
    "change,error,message",
    [
        (dict(kv_indptr=jnp.zeros((2, 2), jnp.int32)), ValueError, "kv_indptr must have shape"),
        (dict(kv_indptr=jnp.zeros(3)), TypeError, "kv_indptr must be int32; got float32"),
        (dict(qo_indptr=jnp.zeros(2, jnp.int32)), ValueError, r"qo_indptr must have shape \[3\]"),
        (dict(num_qo_heads=3), ValueError, "multiple of num_kv_heads"),
        (dict(num_qo_tokens=-1), ValueError, "num_qo_tokens must be an integer of at least 0"),
    ],
)
def test_ragged_plan_errors(change, error, message):
    indptr = i32([0, 1, 4])
    args = dict(qo_indptr=indptr, kv_indptr=indptr, num_qo_tokens=4, num_qo_heads=4, num_kv_heads=2)
    with pytest.raises(error, match=message):
        ja.plan_ragged_prefill(**(args | change))


@pytest.mark.parametrize(
    "table,error,message",
    [
        (
            lambda t: ja.PageTable(t.indptr[:-1], t.indices, t.last_page_len),
            ValueError,
            "kv_indptr",
        ),
        (
            lambda t: ja.PageTable(t.indptr, t.indices[None], t.last_page_len),
            ValueError,
            "kv_indices",
        ),
        (
            lambda t: ja.PageTable(t.indptr, t.indices, t.last_page_len.astype(jnp.float32)),
            TypeError,
            "kv_last_page_len must be int32; got float32",
        ),
    ],
)
def test_page_table_errors(table, error, message):
    with pytest.raises(error, match=message):
        ja.plan_decode(table(table_of([4, 4], 16)), page_size=16, num_qo_heads=4, num_kv_heads=2)


def test_more_keys_than_an_int32_counts():
    """Two million causal tokens: the blocks of all tiles together exceed an int32; slots stay within bounds."""
    n = i32([0, 2**21])
    how = dict(num_qo_tokens=2**21, num_qo_heads=64, num_kv_heads=4, num_sms=NUM_SMS)
    plan = jax.jit(lambda n: ja.plan_ragged_prefill(n, n, **how))(n)
    items = WorkItem(*np.asarray(plan.items).T)
    split = items.num_splits > 1
    assert (items.slot + items.split)[split].max(initial=0) < plan.num_slots


def test_slots_stay_within_bounds_where_an_indptr_decreases():
    table = ja.PageTable(*(i32(x) for x in ([0, 10, 2, 10], range(10), [16, 0, 16])), 16)
    plan = ja.plan_decode(
        table, num_qo_heads=71, num_kv_heads=1, fixed_split_size=1, num_sms=NUM_SMS
    )
    items = WorkItem(*np.asarray(plan.items).T)
    split = items.num_splits > 1
    assert (items.slot + items.split)[split].max(initial=0) < plan.num_slots


def test_windows_and_spans_of_the_largest_int32():
    table = table_of([8], 4)
    n = i32([0, 12])
    how = dict(page_size=4, num_qo_tokens=12, num_qo_heads=1, num_kv_heads=1, num_sms=1)
    for window in (2**31 - 1, 2**31, 2**40):
        plan = ja.plan_prefill(n, table, window_left=window, **how)
        assert (items_of(plan)[0].kv_begin, items_of(plan)[0].kv_end) == (0, 8)
    spans = jnp.tile(i32([[0, 2**31 - 1]]), (8, 1))
    n, how = n.at[1].set(8), how | dict(num_qo_tokens=8)
    plan = ja.plan_prefill(n, table, bidirectional_spans=spans, **how)
    np.testing.assert_array_equal(plan.limits, np.tile([[0, 8]], (8, 1)))
    with pytest.raises(ValueError, match="window_right=3 has no effect under a causal mask"):
        ja.plan_prefill(n, table, causal=True, window_right=3, **how)
    assert ja.plan_prefill(n, table, window_right=3, **how).spec.visible.window_right == 3


def test_index_arrays_on_the_host_are_checked_and_copied():
    """Whoever refills a buffer for the next step does not change the plan that was made of it."""
    rows = np.array([[3, 1], [0, 2]], np.int32)
    lens, indptr = np.array([5, 7], np.int32), np.array([0, 2, 5], np.int32)
    table = ja.PageTable.from_block_table(rows, lens, 4)
    heads = dict(num_qo_tokens=5, num_qo_heads=2, num_kv_heads=1)
    plan = ja.plan_prefill(indptr, table, **heads)
    ragged = ja.plan_ragged_prefill(indptr, indptr, **heads)
    before = jax.tree.map(lambda x: np.array(x), (plan, ragged))
    rows[:], lens[:], indptr[:] = 9, 9, 9
    jax.tree.map(np.testing.assert_array_equal, (plan, ragged), before)
    wrong = np.array([0, 2, 1], np.int32)
    with pytest.raises(ValueError, match="qo_indptr must start at 0 and not decrease"):
        ja.plan_prefill(wrong, table, **heads)
    with pytest.raises(ValueError, match="kv_indptr must start at 0 and not decrease"):
        ja.plan_ragged_prefill(np.array([0, 2, 5], np.int32), wrong, **heads)
    with pytest.raises(ValueError, match="cu_q_lens must start at 0 and not decrease"):
        ja.plan_paged_attention(
            wrong,
            np.array([5, 7], np.int32),
            np.zeros((2, 2), np.int32),
            page_size=4,
            num_q_tokens=5,
            num_qo_heads=2,
            num_kv_heads=1,
        )
