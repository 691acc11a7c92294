"""Causal prefill with bidirectional ranges: FlashInfer's class, whose run is given the ranges."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flashinfer_cases import assert_dense, indptr_of, normal, table_of
from helpers import (
    device_array,
    make_paged,
    no_compilation,
    same_bits,
)
from variants import Variant, spans_of

from jaxattn import flashinfer

CLASS = flashinfer.BatchPrefillWithCausalBidirectionalRangesWrapper
PLAIN = Variant()  # what is seen is given


def seen_by(ranges, t, s, causal_window_left=-1, range_window_left=-1):
    """bool [t, s], by the words of FlashInfer's docstring, for ranges that hold their token or nothing."""
    i, j = np.arange(t)[:, None] + s - t, np.arange(s)[None, :]
    causal = (j <= i) & ((causal_window_left < 0) | (i - j <= causal_window_left))
    in_range = (j >= ranges[:, :1]) & (j <= ranges[:, 1:])
    if range_window_left > 0:
        in_range &= i - j < range_window_left
    return causal | in_range


def wrapper_for(dtype=jnp.float32, **how):
    types = dict(q_data_type=dtype, kv_data_type=dtype)
    return CLASS(None, **types | dict(head_dim_qk=64, head_dim_vo=64) | how)


def case(qo_lens, kv_lens, dtype=jnp.float32, num_pages=None, rows=None):
    pages = sum(-(-n // 4) for n in kv_lens)
    spare = 3 if num_pages is None else num_pages - pages
    paged = make_paged(kv_lens, page_size=4, dtype=dtype, spare_pages=spare)
    q, q_array = normal((rows or sum(qo_lens), 4, 64), dtype)
    indptr = indptr_of(qo_lens)
    ranges = spans_of(qo_lens, kv_lens)
    return paged, np.split(q[: indptr[-1]], indptr[1:-1]), q_array, indptr, ranges


def check(result, qs, paged, qo_lens, kv_lens, indptr, ranges, dtype, *windows):
    split = np.split(ranges, indptr[1:-1])
    sees = [seen_by(r, t, s, *windows) for r, t, s in zip(split, qo_lens, kv_lens, strict=True)]
    assert_dense(result, PLAIN, qs, paged.k, paged.v, sees, dtype)


@pytest.mark.parametrize("windows", [(), (0, 2), (-5, 0)], ids=str)
def test_ranges(windows):
    """Windows of the causal part and of the ranges, which count differently, as FlashInfer's."""
    qo_lens, kv_lens = [30, 5, 0, 17], [30, 16, 5, 40]
    paged, qs, q, indptr, ranges = case(qo_lens, kv_lens)
    wrapper = wrapper_for()
    wrapper.plan(indptr, *table_of(paged), 4, 2, 64, 4)
    result = wrapper.run(q, paged.cache.data, ranges, *windows, return_lse=True)
    check(result, qs, paged, qo_lens, kv_lens, indptr, ranges, jnp.float32, *windows)


def test_other_ranges_are_another_plan():
    """One array of JAX is planned once for all layers; other ranges, and other windows, anew."""
    qo_lens, kv_lens = [12, 9], [20, 30]
    paged, qs, q, indptr, ranges = case(qo_lens, kv_lens)
    wrapper = wrapper_for()
    wrapper.plan(indptr, *table_of(paged), 4, 2, 64, 4)
    first = device_array(ranges)
    o = wrapper.run(q, paged.cache.data, first)
    plan = wrapper._planned.made[1]
    assert same_bits(wrapper.run(q, paged.cache.data, first), o)
    assert wrapper._planned.made[1] is plan
    none = np.full_like(ranges, -1)
    result = wrapper.run_return_lse(q, paged.cache.data, device_array(none), 2)
    check(result, qs, paged, qo_lens, kv_lens, indptr, none, jnp.float32, 2)
    assert same_bits(wrapper.run(q, paged.cache.data, first), o)


def test_other_ranges_never_recompile():
    buffers = [np.zeros(n, np.int32) for n in (4, 4, 32, 3)]
    names = ("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")
    graph = {f"{name}_buf": x for name, x in zip(names, buffers, strict=True)}
    wrapper = wrapper_for(jnp.bfloat16, use_cuda_graph=True, **graph)
    lens = ([8, 0, 12], [9, 4, 30]), ([1, 9], [50, 12])
    for step, (qo_lens, kv_lens) in enumerate(lens):
        paged, qs, q, indptr, ranges = case(qo_lens, kv_lens, jnp.bfloat16, 32, 20)
        table = table_of(paged)
        ranges = np.concatenate([ranges, np.full((20 - len(ranges), 2), -1, np.int32)])
        with contextlib.nullcontext() if step == 0 else no_compilation():
            wrapper.plan(indptr, *table, 4, 2, 64, 4)
            result = wrapper.run(q, paged.cache.data, ranges, return_lse=True)
        ranges = ranges[: indptr[-1]]
        check(result, qs, paged, qo_lens, kv_lens, indptr, ranges, jnp.bfloat16)


def test_inside_jit():
    """The ranges of one trace are not those of the next."""
    qo_lens, kv_lens = [12, 9], [20, 30]
    paged, qs, q, indptr, ranges = case(qo_lens, kv_lens)
    wrapper = wrapper_for()
    wrapper.plan(indptr, *table_of(paged), 4, 2, 64, 4)
    for _ in range(2):
        step = jax.jit(lambda q, data, ranges: wrapper.run_return_lse(q, data, ranges))
        result = step(q, paged.cache.data, ranges)
        check(result, qs, paged, qo_lens, kv_lens, indptr, ranges, jnp.float32)


PLAN_ERRORS = [
    (dict(custom_mask=np.ones(8, bool)), NotImplementedError, "custom_mask=.* ranges say what"),
    (dict(packed_custom_mask=np.ones(1)), NotImplementedError, "packed_custom_mask=.* ranges say"),
    (dict(causal=True), NotImplementedError, "causal=True .* is causal already"),
    (dict(window_left=3), NotImplementedError, r"window_left=3 .* run\(causal_window_left"),
    (dict(logits_soft_cap=3.0), NotImplementedError, "logits_soft_cap=3.0"),
    (dict(pos_encoding_mode="ALIBI"), NotImplementedError, "pos_encoding_mode='ALIBI'"),
    (dict(q_data_type="float16"), ValueError, "q_data_type must be float32.*; got float16"),
    (dict(o_data_type="float16"), ValueError, "o_data_type must be float32.*; got float16"),
    (dict(head_dim_qk=32), ValueError, "head_dim_qk must be 64.*; got 32: construct another"),
    (dict(head_dim_vo=32), ValueError, "head_dim_vo must be 64.*; got 32"),
]
INDPTR = np.array([0, 2, 3], np.int32)
PLAN = dict(
    qo_indptr=INDPTR,
    paged_kv_indptr=INDPTR,
    paged_kv_indices=[4, 0, 2],
    paged_kv_last_page_len=[3, 1],
    num_qo_heads=4,
    num_kv_heads=2,
    head_dim_qk=64,
    page_size=4,
)


@pytest.mark.parametrize("change,error,message", PLAN_ERRORS)
def test_plan_errors(change, error, message):
    with pytest.raises(error, match=message):
        wrapper_for().plan(**PLAN | change)


@pytest.mark.parametrize(
    "ranges,error,message",
    [
        (np.zeros((2, 2), np.int32), ValueError, r"must have shape \[3, 2\]; got \[2, 2\]"),
        (np.zeros(6, np.int32), ValueError, r"must have shape \[3, 2\]; got \[6\]"),
        (np.zeros((3, 2)), TypeError, "bidirectional_ranges must be int32; got float64"),
    ],
)
def test_run_errors(ranges, error, message):
    q, kv = jnp.zeros((3, 4, 64)), (jnp.zeros((5, 4, 2, 64)),) * 2
    wrapper = wrapper_for()
    with pytest.raises(RuntimeError, match="run needs a plan"):
        wrapper.run(q, kv, ranges)
    wrapper.plan(**PLAN)
    with pytest.raises(error, match=message):
        wrapper.run(q, kv, ranges)
