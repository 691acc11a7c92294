"""Keys that requests share, in levels: FlashInfer's class against attention over all keys of each request."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flashinfer_cases import dense, indptr_of, normal
from helpers import (
    assert_rivals,
    device_array,
    no_compilation,
    rounded,
)
from variants import Variant, seen

from jaxattn import flashinfer

PAGE_SIZE, KH, D = 4, 2, 64


class Cascade:
    """Two groups of requests: what all share, what a group shares, what each has of its own; pages in any order."""

    def __init__(self, shared, of_group, own, qo_lens, groups, num_pages, dtype):
        rng = np.random.default_rng(0)
        kv = rounded(rng.standard_normal((2, num_pages, PAGE_SIZE, KH, D), np.float32), dtype)
        order = rng.permutation(num_pages).astype(np.int32)
        self.data = tuple(device_array(x, dtype) for x in kv)
        self.tables, parts, begin = [], [], 0
        for lens in ([shared], of_group, own):
            counts = [-(-n // PAGE_SIZE) for n in lens]
            indptr = indptr_of(counts)
            indices = order[begin : begin + indptr[-1]]
            begin += indptr[-1]
            last = [n - PAGE_SIZE * max(c - 1, 0) for n, c in zip(lens, counts, strict=True)]
            self.tables.append((indptr, indices, np.array(last, np.int32)))
            pages = np.split(indices, indptr[1:-1])
            rows = zip(pages, lens, strict=True)
            parts.append([kv[:, p].reshape(2, -1, KH, D)[:, :n] for p, n in rows])
        # Request i is of group groups[i].
        every = [
            np.concatenate([parts[0][0], parts[1][g], parts[2][i]], axis=1)
            for i, g in enumerate(groups)
        ]
        self.k, self.v = ([x[j] for x in every] for j in range(2))
        tokens = [sum(t for t, g in zip(qo_lens, groups) if g == i) for i in range(2)]
        self.qo_indptrs = [indptr_of(lens) for lens in ([sum(qo_lens)], tokens, qo_lens)]

    def plan(self, wrapper, dtype, **how):
        arrays = zip(*self.tables, strict=True)
        wrapper.plan(
            self.qo_indptrs, *map(list, arrays), 4, KH, D, PAGE_SIZE, q_data_type=dtype, **how
        )


def check(o, cascade, q, qo_lens, variant, dtype):
    qs = np.split(q[: sum(qo_lens)], np.cumsum(qo_lens)[:-1])
    sees = [seen(variant, t, len(k)) for t, k in zip(qo_lens, cascade.k, strict=True)]
    requests = (variant, qs, cascade.k, cascade.v, sees)
    truth, _ = dense(*requests)
    plain, _ = dense(*requests, dtype=dtype, score_dtype=jnp.float32)
    assert o.dtype == dtype
    assert_rivals(o[: len(truth)].astype(jnp.float32), truth, plain, dtype)


def test_three_levels():
    """Other lengths never recompile; one request has no keys of its own, one group shares none."""
    buffers = [np.zeros(n, np.int32) for n in (2, 3, 5)], [np.zeros(32, np.int32)] * 3
    last = [x[1:] for x in buffers[0]]
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(
        3, None, "NHD", True, buffers[0], *buffers, last
    )
    assert wrapper.is_cuda_graph_enabled
    variant, dtype = Variant(soft_cap=5.0), jnp.bfloat16
    q, q_array = normal((12, 4, D), dtype)
    cases = ([21, [9, 0], [0, 5, 17, 8]], [4, 1, 4, 3]), ([40, [3, 12], [8, 5, 1, 2]], [2, 2, 2, 6])
    for step, (lens, qo_lens) in enumerate(cases):
        cascade = Cascade(*lens, qo_lens, [0, 0, 1, 1], 32, dtype)
        with contextlib.nullcontext() if step == 0 else no_compilation():
            cascade.plan(wrapper, dtype, logits_soft_cap=5.0)
            o = wrapper.run(q_array, cascade.data)
        check(o, cascade, q, qo_lens, variant, dtype)


def test_causal_is_the_last_level_s():
    """Inside jit, from lists."""
    qo_lens = [4, 1, 3, 2]
    cascade = Cascade(10, [5, 0], [4, 6, 3, 9], qo_lens, [0, 0, 1, 1], 32, jnp.float32)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(3, None)
    assert not wrapper.is_cuda_graph_enabled
    cascade.plan(wrapper, "float32", causal=True)
    q, q_array = normal((10, 4, D), jnp.float32)
    o = jax.jit(wrapper.forward)(q_array, cascade.data)
    check(o, cascade, q, qo_lens, Variant(causal=True), jnp.float32)
    wrapper.reset_workspace_buffer(None, [])
    wrapper.prewarm_paged_kv_stride_variant()
    assert wrapper.begin_forward.__func__ is type(wrapper).plan


def test_errors():
    kind = flashinfer.MultiLevelCascadeAttentionWrapper
    with pytest.raises(ValueError, match="num_levels must be a positive integer; got 0"):
        kind(0, None)
    with pytest.raises(ValueError, match="qo_indptr_buf must be given for each of 2 levels; got N"):
        kind(2, None, use_cuda_graph=True)
    wrapper = kind(2, None)
    table = [[[0, 1]] * 2, [[0, 1]] * 2, [[0], [1]], [[1], [1]]]
    with pytest.raises(RuntimeError, match="run needs a plan"):
        wrapper.run(jnp.ones((1, 4, D)), None)
    for change, message in (
        (dict(window_left=3), "window_left=3 .* does not know at which positions"),
        (dict(pos_encoding_mode="ALIBI"), "pos_encoding_mode='ALIBI' .* does not know"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            wrapper.plan(*table, 4, KH, D, PAGE_SIZE, **change)
    with pytest.raises(ValueError, match="paged_kv_indices must be given for each .* got 1"):
        wrapper.plan(*table[:2], [[0]], table[3], 4, KH, D, PAGE_SIZE)
