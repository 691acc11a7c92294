"""Keys and values laid in a line before the Hopper kernel: when, what the line holds, and on a GPU the same data and
oracle as without."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import device_array, make_paged, with_scales
from test_mosaic import (
    E4M3,
    E5M2,
    JAX_0_11,
    VARIANTS,
    absent_pages,
    any_size,
    beyond_2_31,
    check_stored,
    every_number,
    far_apart,
    i32,
    on_hopper,
)
from variants import Variant

import jaxattn as ja
from jaxattn.kernels.mosaic import _in_line, serves
from jaxattn.kernels.triton.keys_in_line import keys_in_line
from jaxattn.work_list import WorkItem


@pytest.mark.parametrize(
    "changed, want",
    [
        ({}, True),
        (dict(qo_len=4095), False),  # too few tiles of queries read a key
        (dict(batch=16, qo_len=128, dtype=E4M3), True),  # 4 tiles of 4 heads
        (dict(batch=17, qo_len=127, dtype=E4M3), False),
        (dict(heads=(4, 4), qo_len=2048, dtype=E4M3), True),
        (dict(heads=(4, 4), qo_len=2047, dtype=E4M3, room=9), False),
        (dict(heads=(32, 2), batch=2, qo_len=1024), True),
        (dict(d=256, batch=4, qo_len=512), True),
        (dict(d=256, batch=5, qo_len=511), False),
        (dict(qo_len=2047, dtype=E4M3), False),  # too few tokens
        (dict(qo_len=2047, dtype=E4M3, room=8), False),
        (dict(qo_len=512, room=32, dtype=E4M3), True),  # few queries, but room for many keys
        (dict(batch=2, room=4), True),
        (dict(batch=2, room=5), False),  # some may have many keys and few queries
        (dict(room=128), True),
        (dict(room=129), False),  # so much memory for so few queries
        (dict(pages=4095), False),  # the line would take more than the cache
        (dict(window_left=4095, qo_len=8192), True),
        (dict(window_left=4094, qo_len=8192), False),
        (dict(window_left=127, dtype=E4M3), True),
        (dict(window_left=126, dtype=E4M3), False),
        (dict(window_left=126, dtype=E4M3, causal=False), True),  # no bound to the right
        (dict(dtype=E4M3, pages=2**22), True),
        (dict(dtype=E4M3, pages=2**22 + 1), False),
        (dict(dtype=E4M3, pages=2**23 + 1), True),
        (dict(contiguous=True, dtype=E5M2), False),
    ],
)
def test_when_keys_are_laid_in_a_line(changed, want):
    how = dict(qo_len=4096, heads=(16, 4), room=1, dtype=jnp.bfloat16, batch=1, window_left=None)
    how |= dict(contiguous=False, d=128, causal=True) | changed
    tokens = how["batch"] * how["qo_len"]
    kv_heads = how["heads"][1]
    room = tokens * how["room"]
    pages = how.get("pages", room)

    def plan():
        indptr = jnp.arange(how["batch"] + 1, dtype=jnp.int32) * how["qo_len"]
        of = dict(num_qo_tokens=tokens, num_qo_heads=how["heads"][0], num_kv_heads=kv_heads)
        of |= dict(window_left=how["window_left"], num_sms=8)
        if how["contiguous"]:
            return ja.plan_ragged_prefill(indptr, indptr, causal=how["causal"], **of)
        indices = jnp.zeros(room, jnp.int32)
        table = ja.PageTable(indptr, indices, jnp.ones(how["batch"], jnp.int32), 1)
        return ja.plan_prefill(indptr, table, causal=how["causal"], **of)

    shape = (room,) if how["contiguous"] else (pages, 1)
    values = jax.ShapeDtypeStruct((*shape, kv_heads, how["d"]), how["dtype"])
    assert _in_line.pays(values, jax.eval_shape(plan)) == want


@pytest.mark.parametrize("page_size", [1, 5, 64])
@pytest.mark.parametrize("layout, combined", [("NHD", False), ("HND", True)])
@pytest.mark.parametrize("scales", [None, "head", "token"])
@pytest.mark.parametrize("window_left", [None, 20])
def test_a_line_holds_the_tokens_of_the_table(page_size, layout, combined, scales, window_left):
    """Against NumPy: permuted pages, some of them not in the cache; scales that no token owns are not finite."""
    kv_lens, qo_lens = [400, 1, 0, 64, 700], [150, 0, 0, 64, 70]
    shape = dict(page_size=page_size, num_kv_heads=2, head_dim=64, dtype=E4M3, layout=layout)
    paged = make_paged(kv_lens, combined=combined, **shape)
    cache = (with_scales(paged, scales) if scales else paged).cache
    indices = np.asarray(paged.table.indices).copy()
    indices[::3] = np.resize([-1, cache.num_pages, 2**31 - 1, -(2**31)], indices[::3].size)
    plan = ja.plan_prefill(
        i32(np.concatenate([[0], np.cumsum(qo_lens)])),
        ja.PageTable(paged.table.indptr, i32(indices), paged.table.last_page_len, page_size),
        num_qo_tokens=sum(qo_lens),
        num_qo_heads=8,
        num_kv_heads=2,
        window_left=window_left,
    )
    lines = keys_in_line(cache, plan, jnp.bfloat16, name="test", interpret=True)
    room = lines.k.shape[0]
    assert room % 128 == 0 and room >= indices.size * page_size
    there = (indices >= 0) & (indices < cache.num_pages)
    exists = np.repeat(there, page_size)

    def of_table(pages):
        """float32 [tokens, kh, ...] in the order of the table's entries, from pages as the cache has them."""
        pages = np.asarray(pages, np.float32)
        pages = pages if layout == "NHD" else np.swapaxes(pages, 1, 2)
        tokens = pages[np.where(there, indices, 0)]
        return tokens.reshape(-1, *tokens.shape[2:])

    def agree(line, want):
        line = np.asarray(line, np.float32)
        start = np.asarray(paged.table.indptr) * page_size
        first = 250 - window_left if window_left else 0
        # Also what comes before the first key that is seen, and behind the last, in the tiles that they lie in.
        for request, begin in [(0, max(first - 72, 0)), (3, 0), (4, 0)]:
            own = slice(start[request] + begin, start[request] + kv_lens[request] + 64)
            np.testing.assert_allclose(line[own], want[own][: len(line[own])], rtol=1e-6)

    pad = [(0, 64), (0, 0)]
    for line, pages in ((lines.k, cache.k), (lines.v, cache.v)):
        want = np.where(exists[:, None, None], of_table(pages), 0)
        agree(line, np.pad(want, [*pad, (0, 0)]))
    assert (lines.scales is not None) == (scales == "token")
    if lines.scales is not None:
        k_scale, v_scale = (of_table(x) for x in (cache.scales.k, cache.scales.v))
        positive = exists[:, None] & (v_scale > 0)
        wanted = (
            (np.where(exists[:, None], k_scale, 1.0), 1.0),
            (np.where(exists[:, None], np.log2(v_scale), -np.inf), -np.inf),
            (np.where(positive, 1 / v_scale, 0.0), 0.0),
        )
        for line, (want, absent) in zip(lines.scales, wanted, strict=True):
            agree(line.T, np.pad(want, pad, constant_values=absent))


@pytest.mark.skipif(not JAX_0_11, reason="the lowering's modules are those of JAX 0.11")
@pytest.mark.parametrize("page_size", [1, 5, 12, 16, 256])
@pytest.mark.parametrize(
    "kv_lens, qo_lens, more, window_left",
    [
        ([6000], [2048], 152, 1023),  # rows of q that no request owns, also read a tile each
        ([6000], [2048], 152, 127),
        ([600, 3000], [0, 2048], 152, None),
        ([3000, 0, 700], [1000, 40, 300], 0, 300),
        ([130, 1, 0, 300, 1000], [130, 1, 0, 257, 300], 3, None),
    ],
)
def test_all_that_is_read_of_a_line_was_laid(page_size, kv_lens, qo_lens, more, window_left):
    """Of every tile of every item; a weight of 0 times what nobody wrote may be NaN."""
    from jaxattn.kernels.mosaic._keys import KeySource

    shape = dict(page_size=page_size, num_kv_heads=1, head_dim=64, dtype=E4M3)
    paged = with_scales(make_paged(kv_lens, **shape, spare_entries=700 // page_size), "token")
    plan = ja.plan_prefill(
        i32(np.concatenate([[0], np.cumsum(qo_lens)])),
        paged.table,
        num_qo_tokens=sum(qo_lens) + more,
        num_qo_heads=4,
        num_kv_heads=1,
        window_left=window_left,
        num_sms=8,
    )
    lines = keys_in_line(paged.cache, plan, jnp.bfloat16, name="test", interpret=True)
    parts = np.asarray(lines.scales[2, 0])
    visible = plan.spec.visible
    for block in (64, 128):
        source = KeySource.of_cache(paged.cache, block).laid()
        for i in range(int(plan.num_items[0])):
            item = WorkItem(*(x[i] for x in plan.items.T))
            first = item.row_begin // 4 + item.q_position
            span = source.span(item, jnp.maximum(visible.begin(first), 0), tuple(plan.page_range))
            begin = int(source.first_row(item.page_start) + span.origin)
            assert begin >= 0 and begin % 8 == 0
            assert np.isfinite(parts[begin : begin + int(span.tiles) * block]).all()


def test_a_line_of_one_request_holds_what_it_sees_alone():
    """A table with room for 60 pages, of which a request has 20, and its window sees the last ones."""
    paged = make_paged([640], page_size=32, dtype=E4M3, spare_entries=40)
    plan = ja.plan_prefill(
        i32([0, 100]),
        paged.table,
        num_qo_tokens=100,
        num_qo_heads=8,
        num_kv_heads=2,
        window_left=50,
    )
    lines = keys_in_line(paged.cache, plan, jnp.float16, name="test", interpret=True)
    laid = np.isfinite(np.asarray(lines.v, np.float32)).all(axis=(1, 2))
    assert lines.v.shape[0] == 1920
    np.testing.assert_array_equal(np.flatnonzero(laid), np.arange(384, 768))


@pytest.fixture
def in_line(monkeypatch):
    """On Hopper, keys are laid in a line wherever they can be, however short the prompts; and some were."""
    if not on_hopper():
        pytest.skip(f"the Hopper kernel does not run here: {serves.why_not()}")
    from jaxattn.kernels.mosaic import attention

    for module in (_in_line, serves):
        monkeypatch.setattr(module, "pays", lambda *_: True)
    laid = []
    lay = lambda *args, **how: laid.append(1) or keys_in_line(*args, **how)
    monkeypatch.setattr(attention, "keys_in_line", lay)
    yield
    assert laid


IN_LINE_CASES = [
    # page_size, of the cache, of q, scales, layout, head_dim
    (1, jnp.bfloat16, jnp.bfloat16, None, "NHD", 128, Variant(causal=True)),
    (12, jnp.bfloat16, jnp.bfloat16, None, "NHD combined", 128, Variant()),
    (5, E4M3, jnp.bfloat16, "token", "HND combined", 128, VARIANTS[2]),
    (16, E4M3, jnp.float16, "head", "NHD combined", 128, VARIANTS[3]),
    (1, E5M2, jnp.bfloat16, None, "HND", 64, VARIANTS[1]),
    (16, E4M3, jnp.bfloat16, "token", "NHD", 256, VARIANTS[4]),
    (256, E5M2, jnp.float16, "tensor", "HND", 64, VARIANTS[5]),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", IN_LINE_CASES)
def test_in_line_gpu(in_line, case):
    check_stored(*case)


@pytest.mark.gpu
def test_scales_of_any_size_in_line_gpu(in_line):
    any_size("token")


@pytest.mark.gpu
def test_scales_far_apart_in_line_gpu(in_line):
    far_apart("mosaic")


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", [E4M3, E5M2])
def test_every_fp8_number_is_itself_in_line_gpu(in_line, kv_dtype):
    every_number(kv_dtype, jnp.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size, dtype, scales", [(1, jnp.bfloat16, None), (16, E4M3, "token")])
def test_absent_pages_in_line_gpu(in_line, page_size, dtype, scales):
    absent_pages(page_size, dtype, scales)


@pytest.mark.gpu
def test_a_line_from_a_cache_beyond_2_31_elements_gpu(gpu_memory, in_line):
    gpu_memory(14)
    beyond_2_31(1)


@pytest.mark.gpu
def test_pages_behind_a_window_may_be_others_in_line_gpu(in_line):
    """A box begins with up to 7 tokens before the first that is seen: pages that by now hold NaN."""
    kv_lens, qo_lens, window = [500, 301], [203, 150], 64
    paged = make_paged(kv_lens, page_size=1, num_kv_heads=2, head_dim=128)
    table, q = paged.table, np.random.default_rng(1).standard_normal((353, 8, 128))
    indices = np.asarray(table.indices).copy()
    unowned = np.setdiff1d(np.arange(paged.cache.num_pages), indices[: sum(kv_lens)])[0]
    for start, kv, qo in zip(np.asarray(table.indptr), kv_lens, qo_lens, strict=False):
        indices[start : start + kv - qo - window] = unowned

    @functools.partial(jax.jit, static_argnames="backend")
    def attend(q, indices, backend):
        of = ja.PageTable(table.indptr, indices, table.last_page_len, 1)
        heads = dict(num_qo_heads=8, num_kv_heads=2, num_sms=2)
        plan = ja.plan_prefill(
            i32([0, 203, 353]), of, num_qo_tokens=353, window_left=window, **heads
        )
        return ja.paged_prefill(q, paged.cache, plan, backend=backend).astype(jnp.float32)

    q = device_array(q, jnp.bfloat16)
    o, want = attend(q, i32(indices), "mosaic"), attend(q, table.indices, "xla")
    np.testing.assert_allclose(o, want, atol=0.02, rtol=0.02)
