"""FlashInfer's custom masks: bools and bits, what goes before what, capacities; and the functions that pack bits."""

import contextlib

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
    i32,
    make_paged,
    no_compilation,
    same_bits,
)
from variants import Variant, masks_of, seen

from jaxattn import flashinfer

# Masks of no whole bytes, of requests without tokens and without keys.
QO_LENS, KV_LENS = [3, 0, 17, 5, 2], [9, 4, 40, 0, 13]

CASES = [
    # surface, what, packed, metadata, layout
    ("paged", dict(mask="random", window_left=6, alibi=True), True, "device", "HND"),
    ("ragged", dict(mask="random", soft_cap=3.0), False, "device", "HND"),
    ("sink", dict(mask="tree", sinks=True), False, "lists", "NHD"),
    ("single prefill", dict(mask="blocks", window_left=6), True, "numpy", "NHD"),
]


@pytest.mark.parametrize(
    "surface,what,packed,metadata,layout", CASES, ids=lambda x: x if isinstance(x, str) else None
)
def test_masks(surface, what, packed, metadata, layout):
    lens = ([17], [43]) if "single" in surface else (QO_LENS, KV_LENS)
    how = dict(packed=packed, metadata=metadata, layout=layout, dtype=jnp.bfloat16)
    check_variant(surface, Variant(**what), *lens, **how)


def test_precedence():
    """Bits go before bools, bools before causal, which then asks for nothing, not even enough keys."""
    q, k, v = (normal((9, heads, 64), jnp.float32, seed)[1] for seed, heads in enumerate((4, 2, 2)))
    k, v = k[:7], v[:7]
    one, other = masks_of(Variant(mask="random"), [9, 9], [7, 7])
    single = flashinfer.single_prefill_with_kv_cache
    bools = single(q, k, v, custom_mask=one, causal=True)
    bits = flashinfer.packbits(device_array(one.ravel()), "little")
    assert same_bits(
        single(q, k, v, packed_custom_mask=bits, custom_mask=other, causal=True), bools
    )
    assert not same_bits(single(q, k, v, custom_mask=other, causal=True), bools)


def test_other_masks_never_recompile():
    """With fixed capacities: other lengths and other masks are data, in bools (of pages here) and in bits."""
    page_size, max_bytes = 4, 100
    indices = [np.zeros(n, np.int32) for n in (4, 4, 64, 3)]
    masks_of_graph = np.zeros(max_bytes, np.uint8), np.zeros(4, np.int32)
    paged_wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        None, "NHD", True, *indices, *masks_of_graph
    )
    ragged_wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(
        None, "NHD", True, *indices[:2], *masks_of_graph
    )
    variant = Variant(mask="random")
    q, q_array = normal((20, 4, 64), jnp.float16)
    for step, (qo_lens, kv_lens) in enumerate((([8, 0, 12], [9, 4, 30]), ([1, 2], [50, 9]))):
        pages = sum(-(-n // page_size) for n in kv_lens)
        paged = make_paged(kv_lens, page_size=page_size, dtype=jnp.float16, spare_pages=64 - pages)
        masks = masks_of(variant, qo_lens, kv_lens)
        bools = np.concatenate([m.ravel() for m in masks])
        bits = np.concatenate([np.packbits(m, bitorder="little") for m in masks])
        bits = np.append(bits, np.zeros(3, np.uint8))  # to spare, as those packed inside jit have
        k, v = (np.zeros((80, 2, 64), np.float16) for _ in range(2))
        k[: sum(kv_lens)], v[: sum(kv_lens)] = np.concatenate(paged.k), np.concatenate(paged.v)
        k, v = device_array(k), device_array(v)
        table, indptr = table_of(paged), indptr_of(qo_lens)
        with contextlib.nullcontext() if step == 0 else no_compilation():
            paged_wrapper.plan(indptr, *table, 4, 2, 64, page_size, custom_mask=bools)
            of_pages = paged_wrapper.run_return_lse(q_array, paged.cache.data)
            ragged_wrapper.plan(indptr, indptr_of(kv_lens), 4, 2, 64, packed_custom_mask=bits)
            of_rows = ragged_wrapper.run_return_lse(q_array, k, v)
        sees = [seen(variant, *case) for case in zip(qo_lens, kv_lens, masks, strict=True)]
        qs = np.split(q[: indptr[-1]], indptr[1:-1])
        for result in (of_pages, of_rows):
            assert_dense(result, variant, qs, paged.k, paged.v, sees, jnp.float16)


def test_a_refilled_buffer_is_not_read_again():
    mask = np.ones(6, bool)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(None)
    wrapper.plan(i32([0, 2]), [0, 3], 4, 2, 64, custom_mask=mask)
    mask[:] = False
    q, k, v = (jnp.ones((n, h, 64), jnp.float16) for n, h in ((2, 4), (3, 2), (3, 2)))
    np.testing.assert_array_equal(np.asarray(wrapper.run(q, k, v)), 1)


def graph_wrapper(**mask_buffers):
    indptrs = dict(qo_indptr_buf=np.zeros(3, np.int32), kv_indptr_buf=np.zeros(3, np.int32))
    return flashinfer.BatchPrefillWithRaggedKVCacheWrapper(
        None, use_cuda_graph=True, **indptrs, **mask_buffers
    )


def test_capacity_errors():
    bytes_of, indptr = np.zeros(4, np.uint8), np.zeros(3, np.int32)
    for buffers in (dict(custom_mask_buf=bytes_of), dict(mask_indptr_buf=indptr)):
        with pytest.raises(ValueError, match="custom_mask_buf and mask_indptr_buf must both be"):
            graph_wrapper(**buffers)
    with pytest.raises(ValueError, match="mask_indptr_buf must have 3 elements.*; got 2"):
        graph_wrapper(custom_mask_buf=bytes_of, mask_indptr_buf=indptr[:2])
    plan = ([0, 3, 4], [0, 11, 20], 4, 2, 64)
    with pytest.raises(ValueError, match="a mask needs custom_mask_buf and mask_indptr_buf"):
        graph_wrapper().plan(*plan, custom_mask=np.ones(42, bool))
    wrapper = graph_wrapper(custom_mask_buf=bytes_of, mask_indptr_buf=indptr)
    with pytest.raises(ValueError, match="custom_mask has 42 elements, more than the 32 that"):
        wrapper.plan(*plan, custom_mask=np.ones(42, bool))
    with pytest.raises(ValueError, match="packed_custom_mask has 7 elements, more than the 4"):
        wrapper.plan(*plan, packed_custom_mask=np.ones(7, np.uint8))


@pytest.mark.parametrize("bitorder", [{}, dict(bitorder="little"), dict(bitorder="big")])
def test_packing(bitorder):
    """FlashInfer's default is the highest bit first, as NumPy's."""
    lens = [4, 3, 0, 9, 16]
    indptr = indptr_of(lens)
    x = np.random.default_rng(0).random(indptr[-1]) < 0.5
    np.testing.assert_array_equal(
        flashinfer.packbits(device_array(x), **bitorder), np.packbits(x, **bitorder)
    )
    bits, of = flashinfer.segment_packbits(device_array(x), device_array(indptr), **bitorder)
    want = [np.packbits(part, **bitorder) for part in np.split(x, indptr[1:-1])]
    np.testing.assert_array_equal(of, indptr_of([len(part) for part in want]))
    np.testing.assert_array_equal(bits[: of[-1]], np.concatenate(want))
