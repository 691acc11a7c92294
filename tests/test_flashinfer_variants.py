"""Windows, caps, ALiBi and sinks through FlashInfer's entry points, each alone and all together.

The whole grids of FlashInfer's own tests are in test_flashinfer_grids.py; here each entry point meets each option once,
lengths around a window's and a page's edges, and head counts on both sides of a power of two.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flashinfer_cases import (
    assert_dense,
    check_variant,
    indptr_of,
    normal,
    table_of,
)
from helpers import (
    device_array,
    make_paged,
    no_compilation,
    same_bits,
)
from variants import Variant, masks_of, operands, seen

from jaxattn import flashinfer
from jaxattn.flashinfer.logits import alibi_slopes

WINDOW, CAP, SINKS, ALIBI = (
    dict(window_left=13),
    dict(soft_cap=3.0),
    dict(sinks=True),
    dict(alibi=True),
)
CASES = [
    # surface, what, num_qo_heads, num_kv_heads, layout, dtype
    ("decode", WINDOW | SINKS, 4, 2, "NHD", jnp.float16),
    ("decode", CAP | ALIBI, 12, 2, "HND", jnp.bfloat16),
    ("paged", WINDOW | SINKS, 4, 4, "HND", jnp.bfloat16),
    ("paged", dict(causal=True) | WINDOW | CAP | SINKS | ALIBI, 6, 2, "NHD", jnp.float32),
    ("ragged", dict(causal=True) | WINDOW | CAP | ALIBI, 8, 2, "HND", jnp.float16),
    ("sink", dict(causal=True) | SINKS | WINDOW | ALIBI | CAP, 4, 1, "HND", jnp.bfloat16),
    ("single prefill", dict(causal=True) | WINDOW | CAP | ALIBI, 6, 2, "HND", jnp.float16),
    ("single decode", WINDOW | CAP | ALIBI, 12, 2, "NHD", jnp.float16),
]


@pytest.mark.parametrize(
    "surface,what,h,kh,layout,dtype", CASES, ids=lambda x: x if isinstance(x, str) else None
)
def test_options(surface, what, h, kh, layout, dtype):
    qo_lens, kv_lens = [1, 14, 5, 17, 0, 3], [1, 14, 17, 40, 9, 33]
    if "decode" in surface:
        qo_lens, kv_lens = [1] * 5, [1, 0, 13, 14, 50]
    if "single" in surface:
        qo_lens, kv_lens = qo_lens[-2:-1] if "decode" in surface else [17], kv_lens[-1:]
    how = dict(heads=(h, kh, 64), layout=layout, dtype=dtype)
    check_variant(surface, Variant(**what), qo_lens, kv_lens, **how)


def test_alibi_slopes():
    """Powers of two, and between them; none is one of its neighbours'."""
    np.testing.assert_allclose(alibi_slopes(1), [2**-8])
    np.testing.assert_allclose(alibi_slopes(4), 2.0 ** -np.array([2, 4, 6, 8]))
    np.testing.assert_allclose(alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    between = 2.0 ** -np.array([0.5, 1.5, 2.5, 3.5])
    np.testing.assert_allclose(alibi_slopes(12), [*2.0 ** -np.arange(1, 9), *between])
    assert alibi_slopes(12).dtype == np.float32
    for heads in range(1, 80):
        assert np.unique(alibi_slopes(heads)).size == heads


def test_off_is_off():
    """The values that FlashInfer takes for none give the bits of a plan without them."""
    q, k, v = (normal((6, heads, 64), jnp.float16, seed)[1] for seed, heads in enumerate((4, 2, 2)))
    plain = flashinfer.single_prefill_with_kv_cache(q, k, v)
    for off in (dict(logits_soft_cap=0), dict(logits_soft_cap=0.0, window_left=-1)):
        assert same_bits(flashinfer.single_prefill_with_kv_cache(q, k, v, **off), plain)


def decode_of(kv_lens, most, page_size=4, dtype=jnp.float16, seed=0):
    """A cache of 64 pages with requests on it, and q with the rows of `most` requests."""
    pages = sum(-(-n // page_size) for n in kv_lens)
    paged = make_paged(kv_lens, page_size=page_size, dtype=dtype, spare_pages=64 - pages, seed=seed)
    return paged, *normal((most, 4, 64), dtype)


def test_other_lengths_never_recompile():
    """With fixed capacities, and every option that a step can have; sinks are data too."""
    most, variant = 5, Variant(window_left=9, soft_cap=3.0, alibi=True, sinks=True)
    wrapper = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(
        None, max_batch_size=most, max_num_pages=64
    )
    how = dict(window_left=9, logits_soft_cap=3.0, pos_encoding_mode="ALIBI")
    sinks = device_array(operands(variant, 4)[0])
    for step, kv_lens in enumerate(([20, 0, 33, 1, 7], [1, 2, 3, 4, 5], [60, 1])):
        paged, q, q_array = decode_of(kv_lens, most)

        table = table_of(paged)
        with contextlib.nullcontext() if step == 0 else no_compilation():
            wrapper.plan(*table, 4, 2, 64, 4, **how)
            result = wrapper.run(q_array, paged.cache.data, sinks=sinks, return_lse=True)
        sees = [seen(variant, 1, n) for n in kv_lens]
        qs = list(q[: len(kv_lens), None])
        assert_dense(result, variant, qs, paged.k, paged.v, sees, jnp.float16)
    # A row that no request owns has its sink.
    np.testing.assert_allclose(result[1][len(kv_lens) :], np.tile(sinks / np.log(2), (3, 1)), 1e-6)


def test_inside_jit():
    """plan and run within a caller's program, with a mask, and the window's value said again to run."""
    variant = Variant(mask="random", window_left=9, sinks=True)
    kv_lens, qo_lens = [20, 3, 33], [4, 3, 7]
    paged = make_paged(kv_lens, page_size=4, dtype=jnp.float32)
    q, q_array = normal((sum(qo_lens), 4, 64), jnp.float32)
    masks = masks_of(variant, qo_lens, kv_lens)
    sinks = device_array(operands(variant, 4)[0])

    @jax.jit
    def step(q, data, qo_indptr, table, mask, sinks):
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(None)
        how = dict(custom_mask=mask, window_left=9, q_data_type="float32")
        wrapper.plan(qo_indptr, *table, 4, 2, 64, 4, **how)
        return wrapper.run(q, data, window_left=9, sinks=sinks, return_lse=True)

    indptr, flat = indptr_of(qo_lens), np.concatenate([m.ravel() for m in masks])
    result = step(q_array, paged.cache.data, indptr, table_of(paged, jnp.asarray), flat, sinks)
    sees = [seen(variant, *case) for case in zip(qo_lens, kv_lens, masks, strict=True)]
    qs = np.split(q, indptr[1:-1])
    assert_dense(result, variant, qs, paged.k, paged.v, sees, jnp.float32)


SINK_ERRORS = [
    (
        dict(q_data_type="float16"),
        "q_data_type must be bfloat16, as .* constructed with; got float16",
    ),
    (dict(head_dim_qk=128), "head_dim_qk must be 64"),
    (dict(window_left=3), "window_left >= 0 must be False, as .* constructed with; got True"),
    (dict(pos_encoding_mode="ALIBI"), "pos_encoding_mode must be NONE"),
]


@pytest.mark.parametrize("change,message", SINK_ERRORS)
def test_the_sink_class_plans_what_it_was_constructed_for(change, message):
    wrapper = flashinfer.BatchAttentionWithAttentionSinkWrapper(
        None, head_dim_qk=64, head_dim_vo=64
    )
    names = ("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")
    table = dict(zip(names, ([0, 1], [0, 1], [0], [1]), strict=True))
    sizes = dict(num_qo_heads=4, num_kv_heads=2, head_dim_qk=64, page_size=4)
    with pytest.raises(ValueError, match=message):
        wrapper.plan(**table | sizes | dict(q_data_type="bfloat16") | change)
