"""Windows, caps, sinks, ALiBi, score mods, masks and spans, alone and together, against a dense float64 computation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_lse,
    assert_rivals,
    device_array,
    i32,
    make_paged,
    rounded,
    same_bits,
    with_scales,
)
from variants import (
    Variant,
    attend,
    masks_of,
    options,
    pairwise,
    seen,
    spans_of,
    tilted,
)

import jaxattn as ja
from jaxattn.operands import MaskBits

BACKENDS = ["interpret", "xla"]


def check(
    variant,
    qo_lens,
    kv_lens,
    *,
    backend,
    op="prefill",
    page_size=16,
    kh=2,
    group=2,
    head_dim=(64, 64),
    dtype=jnp.float32,
    kv_dtype=None,
    scales=None,
    layout="NHD",
    splits=None,
    out_dtype=None,
    num_sms=None,
    padding=2,
    hide=True,
):
    """An op under a variant against the dense computation; keys that nobody sees are NaN and on no page."""
    d, dv = head_dim
    h = kh * group
    if op == "decode":
        qo_lens, padding = [1] * len(kv_lens), 0
    paged = make_paged(
        kv_lens,
        page_size=page_size,
        num_kv_heads=kh,
        head_dim=d,
        head_dim_v=dv,
        dtype=kv_dtype or dtype,
        layout=layout.split()[0],
        combined="combined" in layout,
    )
    if scales:
        paged = with_scales(paged, scales)
    total = sum(qo_lens)
    rng = np.random.default_rng(1)
    q = rounded(rng.standard_normal((total + padding, h, d), np.float32), dtype)
    qo_indptr = np.concatenate([[0], np.cumsum(qo_lens)])
    masks = masks_of(variant, qo_lens, kv_lens) if variant.mask else [None] * len(qo_lens)
    spans = spans_of(qo_lens, kv_lens) if variant.spans else None
    sees, truths, plains = [], [], []
    apart = dataclasses.replace(variant, mask=None)  # blocks of a mask are read whole
    for r, (t, s) in enumerate(zip(qo_lens, kv_lens, strict=True)):
        begin, end = qo_indptr[r : r + 2]
        own = None if spans is None else spans[begin:end]
        sees.append(seen(apart, t, s, None, own))
        one = (q[begin:end], paged.k[r], paged.v[r], seen(variant, t, s, masks[r], own))
        truths.append(attend(variant, *one, sm_scale=d**-0.5))
        plains.append(
            attend(variant, *one, sm_scale=d**-0.5, dtype=dtype, score_dtype=jnp.float32)[0]
        )
    cache, table = (
        hidden(paged, sees, page_size)
        if hide and op != "ragged"
        else (
            paged.cache,
            paged.table,
        )
    )
    how = options(variant, h) | dict(backend=backend, return_lse=True, out_dtype=out_dtype)
    heads = dict(num_qo_heads=h, num_kv_heads=kh, num_sms=num_sms) | (splits or {})
    what = dict(window_left=variant.window_left)
    prefill = what | dict(num_qo_tokens=total + padding, window_right=variant.window_right)
    if variant.mask:
        bits = np.concatenate([m.ravel() for m in masks])
        prefill |= dict(mask=MaskBits.of(device_array(bits), i32(qo_indptr), i32(kv_lens)))
        prefill |= dict(causal=variant.causal)
    else:
        prefill |= dict(causal=variant.causal)
    if variant.spans:
        rows = np.concatenate([spans, np.full((padding, 2), -1, np.int32)])
        prefill |= dict(bidirectional_spans=i32(rows))
    qj = device_array(q, dtype)

    @jax.jit
    def run(q, cache, table, kv):
        if op == "decode":
            return ja.paged_decode(q, cache, ja.plan_decode(table, **heads, **what), **how)
        if op == "prefill":
            plan = ja.plan_prefill(i32(qo_indptr), table, **heads, **prefill)
            return ja.paged_prefill(q, cache, plan, **how)
        kv_indptr = i32(np.concatenate([[0], np.cumsum(kv_lens)]))
        plan = ja.plan_ragged_prefill(i32(qo_indptr), kv_indptr, **heads, **prefill)
        return ja.ragged_prefill(q, *kv, plan, kv_layout=layout.split()[0], **how)

    kv = [np.concatenate(x).astype(kv_dtype or dtype) for x in (paged.k, paged.v)]
    if layout == "HND":
        kv = [x.swapaxes(0, 1) for x in kv]
    o, lse = jax.tree.map(np.asarray, run(qj, cache, table, [device_array(x) for x in kv]))
    truth, plain = np.concatenate([o for o, _ in truths]), np.concatenate(plains)
    assert o.dtype == (out_dtype or dtype)
    # The hardware's tanh, and a score in float32: not what rounding to 16 bits hides entirely.
    assert_rivals(o[:total], truth, plain, dtype)
    truth_lse = np.concatenate([lse for _, lse in truths])
    if variant.soft_cap and dtype != jnp.float32 and backend is None:
        np.testing.assert_allclose(lse[:total], truth_lse, atol=variant.soft_cap * 1e-3)
    else:
        assert_lse(lse[:total], truth_lse.astype(np.float32))
    np.testing.assert_array_equal(o[total:].astype(np.float32), 0.0)
    no_keys = options(variant, h).get("sinks", jnp.full(h, -jnp.inf))
    np.testing.assert_allclose(lse[total:], np.tile(no_keys, (padding, 1)), rtol=1e-6)


def hidden(paged, sees, page_size):
    """The cache with NaN in every page behind the windows, and a table that no longer names them."""
    indices = np.asarray(paged.table.indices).copy()
    indptr = np.asarray(paged.table.indptr)
    arrays = [np.array(x) for x in paged.cache.arrays]
    for r, see in enumerate(sees):
        used = np.flatnonzero(see.any(axis=0))
        for page in range(min(used, default=0) // page_size):
            at = indptr[r] + page
            for x in arrays:
                x[indices[at]] = np.nan
            indices[at] = [-1, 10**6, indices[0]][page % 3]
    data = [device_array(x) for x in arrays]
    data = data[0] if paged.cache.combined else tuple(data)
    cache = dataclasses.replace(paged.cache, data=data)
    table = ja.PageTable(paged.table.indptr, i32(indices), paged.table.last_page_len, page_size)
    return cache, table


LENS = [0, 1, 15, 16, 17, 50, 300, 700]
QO_LENS = [0, 1, 3, 16, 17, 40, 5, 33]

ONE_AT_A_TIME = {
    "window": Variant(causal=True, window_left=33),
    "window of one": Variant(causal=True, window_left=0),
    "encoder window": Variant(window_left=20, window_right=9),
    "cap": Variant(causal=True, soft_cap=5.0),
    "sinks": Variant(causal=True, sinks=True),
    "alibi": Variant(causal=True, alibi=True),
    "score mod": Variant(causal=True, score_mod=True),
    "random mask": Variant(mask="random"),
    "tree": Variant(mask="tree"),
    "blocks": Variant(mask="blocks"),
    "spans": Variant(causal=True, spans=True),
    "spans in a window": Variant(causal=True, window_left=10, spans=True),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", ONE_AT_A_TIME.values(), ids=ONE_AT_A_TIME.keys())
def test_prefill(variant, backend):
    check(variant, QO_LENS, LENS, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "variant",
    [
        Variant(window_left=100, sinks=True),
        Variant(window_left=7),
        Variant(soft_cap=5.0, alibi=True),
        Variant(score_mod=True, sinks=True),
    ],
)
def test_decode(variant, backend):
    check(variant, None, LENS, backend=backend, op="decode", num_sms=24)


# Any two choices meet: of what is computed, of how it is stored, of how it is split.
PAIRS = list(
    pairwise(
        op=["decode", "prefill", "ragged"],
        window=[None, 7, 130],
        soft_cap=[None, 8.0],
        sinks=[False, True],
        mod=[None, "alibi", "score_mod"],
        see=["causal", "random", "blocks", "spans", "all"],
        page_size=[1, 5, 16, 64],
        layout=["NHD", "HND", "NHD combined"],
        head_dim=[(64, 64), (72, 72), (192, 128), (128, 64)],
        group=[1, 3, 8],
        splits=[None, dict(fixed_split_size=1), dict(disable_split_kv=True)],
        dtype=[jnp.float32, jnp.bfloat16],
    )
)


def splits_of(case):
    """Those of a pair: one page each, but of prefill at least 16 tokens, since interpreted items run one by one."""
    splits, op = case["splits"], case["op"]
    if op == "decode" or not splits or "fixed_split_size" not in splits:
        return splits
    return None if op == "ragged" else dict(fixed_split_size=max(1, 16 // case["page_size"]))


def run_pair(case, backend, lens=LENS, qo_lens=QO_LENS):
    see, op = case["see"], case["op"]
    if op == "decode":
        see = "all"
    d, dv = case["head_dim"]
    layout = case["layout"]
    if d != dv or op == "ragged":
        layout = layout.split()[0]
    variant = Variant(
        causal=see in ("causal", "spans"),
        window_left=case["window"],
        soft_cap=case["soft_cap"],
        sinks=case["sinks"],
        alibi=case["mod"] == "alibi",
        score_mod=case["mod"] == "score_mod",
        mask=see if see in ("random", "blocks") else None,
        spans=see == "spans",
    )
    same = {x: case[x] for x in ("op", "page_size", "group", "dtype", "head_dim")}
    same["splits"] = splits_of(case)
    check(variant, qo_lens, lens, backend=backend, layout=layout, num_sms=16, **same)


@pytest.mark.slow
@pytest.mark.parametrize("case", PAIRS, ids=lambda case: f"{case['op']}-{case['see']}")
def test_options_combine(case):
    run_pair(case, "interpret")


@pytest.mark.parametrize("case", PAIRS[::3], ids=lambda case: f"{case['op']}-{case['see']}")
def test_options_combine_in_the_reference(case):
    run_pair(case, "xla")


@pytest.mark.gpu
@pytest.mark.parametrize("case", PAIRS, ids=lambda case: f"{case['op']}-{case['see']}")
def test_options_combine_gpu(case):
    run_pair(case, None, [*LENS, 3000], [*QO_LENS, 200])


def test_a_window_cuts_the_work():
    """A long request with a window is planned as a short one: its items' keys, and no page behind them is read."""
    heads = dict(num_qo_heads=8, num_kv_heads=2, num_sms=16)
    table = ja.PageTable.from_block_table(
        jnp.arange(4 * 512, dtype=jnp.int32).reshape(4, 512), i32([8192, 5000, 100, 0]), 16
    )
    plan = ja.plan_decode(table, window_left=127, **heads)
    items = np.asarray(plan.items)
    keys = (items[:, 5] - items[:, 4]).clip(0).sum()
    assert keys <= 2 * (128 + 15) + 100
    assert items[:, 4].max() == 8192 - 128
    qo_indptr = i32([0, 8192, 8192, 8192, 8192])
    prefill = ja.plan_prefill(qo_indptr, table, num_qo_tokens=8192, window_left=127, **heads)
    items = np.asarray(prefill.items)
    tiles = 8192 * 4 // prefill.block_rows
    assert (items[:, 5] - items[:, 4]).clip(0).sum() <= tiles * (128 + prefill.block_rows // 4 + 15)


def test_clear_blocks_of_a_mask_are_not_visited():
    kv_len, new = 128 * 20, 32
    mask = np.zeros((new, kv_len), bool)
    mask[:, 128 * 3 : 128 * 5] = True
    mask[:, 128 * 9] = True
    heads = dict(num_qo_heads=4, num_kv_heads=1, num_sms=4)
    indptr = i32([0, new])
    bits = MaskBits.of(device_array(mask.ravel()), indptr, i32([kv_len]))
    table = ja.PageTable.from_block_table(i32(np.arange(kv_len // 16)[None]), i32([kv_len]), 16)
    plan = ja.plan_prefill(indptr, table, num_qo_tokens=new, mask=bits, **heads)
    assert plan.items[:, 5].max() == 3 * 128
    np.testing.assert_array_equal(plan.mask.visits[:3], [2 * 3 + 1, 2 * 4 + 1, 2 * 9])


@pytest.mark.parametrize("bitorder", ["little", "big"])
def test_packbits(bitorder):
    rng = np.random.default_rng(0)
    lens = [0, 1, 7, 8, 9, 31, 0, 64]
    x = rng.random(sum(lens)) < 0.5
    indptr = np.concatenate([[0], np.cumsum(lens)])
    bits, packed = jax.jit(lambda x, n: ja.segment_packbits(x, n, bitorder))(x, i32(indptr))
    want = [
        np.packbits(x[a:b], bitorder=bitorder) for a, b in zip(indptr, indptr[1:], strict=False)
    ]
    np.testing.assert_array_equal(packed, np.cumsum([0, *map(len, want)]))
    np.testing.assert_array_equal(bits[: packed[-1]], np.concatenate(want))
    assert not np.asarray(bits[packed[-1] :]).any()
    np.testing.assert_array_equal(
        ja.packbits(device_array(x), bitorder), np.packbits(x, bitorder=bitorder)
    )


def test_a_score_mod_is_the_library_s_own():
    """Cap and ALiBi, written as a user would, give what the options give."""
    q = device_array(np.random.default_rng(0).standard_normal((20, 4, 64), np.float32))
    k, v = q[:, :2], q[:, 2:] * 2
    plan = ja.plan_ragged_prefill(
        i32([0, 20]), i32([0, 20]), num_qo_tokens=20, num_qo_heads=4, num_kv_heads=2
    )
    slopes = device_array([0.5, 0.25, 0.125, 0.1], jnp.float32)

    def mod(score, query_position, key_position, query_head, slope):
        far = (key_position - query_position).astype(jnp.float32)
        return 3.0 * jnp.tanh(score / 3.0) + slope * far

    how = dict(return_lse=True, backend="interpret")
    ours = ja.ragged_prefill(q, k, v, plan, logits_soft_cap=3.0, alibi_slopes=slopes, **how)
    users = ja.ragged_prefill(q, k, v, plan, score_mod=mod, score_mod_arrays=[slopes], **how)
    for a, b in zip(ours, users, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_score_mod_reads_may_change_between_calls(backend):
    paged = make_paged([40, 17], page_size=16)
    plan = ja.plan_decode(paged.table, num_qo_heads=4, num_kv_heads=2)
    q = jnp.ones((2, 4, 64), jnp.bfloat16)
    factor = 1.0

    def mod(score, *_):
        return score * factor

    def attend():
        return ja.paged_decode(q, paged.cache, plan, score_mod=mod, backend=backend)

    before = attend()
    factor = 0.0
    assert not same_bits(attend(), before)
    mean = [np.repeat(v.mean(axis=0), 2, axis=0) for v in paged.v]
    np.testing.assert_allclose(attend().astype(jnp.float32), mean, atol=0.01)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_go_through_every_operand(backend):
    q = device_array(np.random.default_rng(0).standard_normal((6, 4, 64), np.float32))
    plan = ja.plan_ragged_prefill(
        i32([0, 6]), i32([0, 6]), num_qo_tokens=6, num_qo_heads=4, num_kv_heads=2
    )
    ones = jnp.ones(4, jnp.float32)

    def loss(q, sinks, slopes, a, b):
        o = ja.ragged_prefill(
            q,
            q[:, :2],
            q[:, 2:],
            plan,
            sinks=sinks,
            alibi_slopes=slopes,
            score_mod=tilted,
            score_mod_arrays=(a, b),
            backend=backend,
        )
        return (o * o).sum()

    grads = jax.grad(loss, argnums=(0, 1, 2, 3, 4))(q, ones, ones, ones, ones)
    for g in grads:
        assert np.isfinite(np.asarray(g)).all() and np.abs(np.asarray(g)).max() > 0


@pytest.mark.parametrize(
    "error,match,how",
    [
        (ValueError, "window_left must be at least 0", dict(plan=dict(window_left=-2))),
        (ValueError, "window_left must be an integer", dict(plan=dict(window_left=1.5))),
        (ValueError, "bidirectional_spans widen", dict(plan=dict(causal=False, spans=True))),
        (ValueError, "bidirectional_spans must have shape", dict(plan=dict(spans="short"))),
        (ValueError, "logits_soft_cap must be positive", dict(op=dict(logits_soft_cap=-1.0))),
        (ValueError, r"sinks must have shape \[4\]", dict(op=dict(sinks=jnp.zeros(3)))),
        (TypeError, "sinks must be float32", dict(op=dict(sinks=jnp.zeros(4, jnp.bfloat16)))),
        (TypeError, "score_mod must be a function", dict(op=dict(score_mod=3))),
        (ValueError, "score_mod_arrays are arguments", dict(op=dict(score_mod_arrays=[1]))),
        (
            ValueError,
            r"score_mod_arrays\[0\] must have shape",
            dict(op=dict(score_mod=tilted, score_mod_arrays=[jnp.zeros(2)])),
        ),
        (ValueError, "out_dtype must be one of", dict(op=dict(out_dtype=jnp.int8))),
    ],
)
def test_bad_input(error, match, how):
    spans = {True: i32(np.zeros((6, 2))), "short": i32(np.zeros((5, 2))), None: None}
    plan_how = dict(how.get("plan", {}))
    span = spans[plan_how.pop("spans", None)]
    q = jnp.ones((6, 4, 64))
    with pytest.raises(error, match=match):
        plan = ja.plan_ragged_prefill(
            i32([0, 6]),
            i32([0, 6]),
            num_qo_tokens=6,
            num_qo_heads=4,
            num_kv_heads=2,
            bidirectional_spans=span,
            **plan_how,
        )
        ja.ragged_prefill(q, q[:, :2], q[:, 2:], plan, **how.get("op", {}))
