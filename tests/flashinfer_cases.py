"""What the tests of the FlashInfer-shaped surface share: index arrays as they arrive, and each entry point run under a
variant and held against the dense float64 computation of `variants`."""

import math
from unittest import mock

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import variants
from helpers import assert_lse, assert_rivals, dense_batch, device_array, make_paged, rounded
from variants import attend, masks_of, operands, seen

from jaxattn import flashinfer

GROUP, NUM_KV_HEADS, HEAD_DIM = 2, 2, 64
NUM_QO_HEADS = GROUP * NUM_KV_HEADS
HEADS = (NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM)

# How index arrays arrive.
METADATA = {
    "numpy": np.asarray,
    "lists": lambda x: np.asarray(x).tolist(),
    "device": jnp.asarray,
}


def indptr_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def normal(shape, dtype, seed=1):
    """Numbers that the dtype holds, as float32 in numpy and as an array of that dtype."""
    x = helpers.normal(np.random.default_rng(seed), shape, dtype)
    return x.astype(np.float32), device_array(x)


def table_of(paged, as_metadata=np.asarray):
    """FlashInfer's three index arrays; indices without the nonsense that fills their capacity."""
    indices = np.asarray(paged.table.indices)[: np.asarray(paged.table.indptr)[-1]]
    return [as_metadata(x) for x in (paged.table.indptr, indices, paged.table.last_page_len)]


def paged_case(kv_lens, page_size, layout, combined, dtype):
    """Requests, and their cache as FlashInfer takes it: pages of one token have no page axis."""
    paged = make_paged(
        kv_lens,
        page_size=page_size,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=dtype,
        layout=layout,
        combined=combined,
    )
    data = paged.cache.data
    if page_size == 1:
        data = jax.tree.map(lambda x: jnp.squeeze(x, -3 if layout == "NHD" else -2), data)
    return paged, data


def check(result, qs, ks, vs, dtype, *, causal, lse_base="log2", sm_scale=HEAD_DIM**-0.5):
    """`result` is (o, lse) of the requests, and 0, -inf in the rows after theirs."""
    o, lse = result
    how = dict(sm_scale=sm_scale, causal=causal)
    truth, truth_lse = dense_batch(qs, ks, vs, dtype=np.float64, **how)
    plain, _ = dense_batch(qs, ks, vs, dtype=dtype, **how)
    rows = len(truth)
    assert o.dtype == dtype and lse.shape == o.shape[:2]
    assert_rivals(o[:rows], truth, plain, dtype)
    assert_lse(lse[:rows], truth_lse if lse_base == "ln" else truth_lse / np.log(2))
    np.testing.assert_array_equal(np.asarray(o[rows:], np.float32), 0)
    np.testing.assert_array_equal(np.asarray(lse[rows:]), -np.inf)


def slopes_of(num_heads):
    """ALiBi's slopes as its authors' code has them: of n heads the powers of 2^(-8/n), else every other of twice n."""
    n = 2 ** math.floor(math.log2(num_heads))
    own = [2 ** (-8 * k / n) for k in range(1, n + 1)]
    return own if n == num_heads else own + slopes_of(2 * n)[::2][: num_heads - n]


def dense(variant, qs, ks, vs, sees, **how):
    """`variants.attend` of each request with ALiBi's own slopes: (o, lse), one request after the other."""

    def with_slopes(variant, num_heads):
        sinks, _, tilt = operands(variant, num_heads)
        return sinks, np.array(slopes_of(num_heads), np.float32), tilt

    sm_scale = qs[0].shape[-1] ** -0.5
    with mock.patch.object(variants, "operands", with_slopes):
        states = [
            attend(variant, q, k, v, see, sm_scale=sm_scale, **how)
            for q, k, v, see in zip(qs, ks, vs, sees, strict=True)
        ]
    return np.concatenate([o for o, _ in states]), np.concatenate([lse for _, lse in states])


def assert_dense(result, variant, qs, ks, vs, sees, dtype, out_dtype=None, last=None):
    """(o, lse in base 2) is the dense computation's; `last`: of the last so many tokens of each request only."""
    o, lse = result
    at = np.concatenate([np.arange(len(q)) >= len(q) - (last or len(q)) for q in qs])
    qs, sees = ([x[-last:] if last else x for x in xs] for xs in (qs, sees))
    assert o.dtype == (out_dtype or dtype) and o.shape[:2] == lse.shape
    if jnp.finfo(o.dtype).eps < jnp.finfo(dtype).eps:
        # Not rounded to the inputs' dtype on its way.
        assert (np.asarray(o) != rounded(np.asarray(o), dtype)).any()
    coarser = max(dtype, o.dtype, key=lambda x: jnp.finfo(x).eps)
    truth, truth_lse = dense(variant, qs, ks, vs, sees)
    plain, _ = dense(variant, qs, ks, vs, sees, dtype=coarser, score_dtype=jnp.float32)
    o, lse = np.asarray(o, np.float32)[: len(at)][at], np.asarray(lse)[: len(at)][at]
    assert_rivals(o, truth, plain, coarser)
    if variant.soft_cap and dtype != jnp.float32 and jax.default_backend() == "gpu":
        # The hardware's tanh, whose relative error is 2^-11.
        np.testing.assert_allclose(lse, truth_lse / np.log(2), atol=min(variant.soft_cap, 8) * 1e-3)
    else:
        assert_lse(lse, (truth_lse / np.log(2)).astype(np.float32))


def check_variant(
    surface,
    variant,
    qo_lens,
    kv_lens,
    *,
    heads=(4, 2, 64),
    head_dim_vo=None,
    page_size=16,
    dtype=jnp.float16,
    layout="NHD",
    metadata="numpy",
    out_dtype=None,
    packed=False,
    last=None,
    plan_how=None,
):
    """One of FlashInfer's entry points under a variant.

    Args:
      surface: "decode", "paged", "ragged", "sink", "single prefill", "single decode".
      heads: num_qo_heads, num_kv_heads, head_dim.
      packed: give the mask's bits.
      last: as for `assert_dense`.
      plan_how: further arguments of the plan.
    """
    h, kh, d = heads
    to = METADATA[metadata]
    dv = head_dim_vo or d
    paged = make_paged(
        kv_lens,
        page_size=page_size,
        num_kv_heads=kh,
        head_dim=max(d, dv),
        head_dim_v=dv,
        dtype=dtype,
        layout=layout,
    )
    pages = paged.cache.k[..., :d], paged.cache.v
    ks, vs = [k[..., :d] for k in paged.k], paged.v
    qo_indptr = indptr_of(qo_lens)
    q, q_array = normal((qo_indptr[-1], h, d), dtype)
    qs = np.split(q, qo_indptr[1:-1])
    masks = masks_of(variant, qo_lens, kv_lens) if variant.mask else [None] * len(qo_lens)
    sees = [seen(variant, *case) for case in zip(qo_lens, kv_lens, masks, strict=True)]
    contiguous = [device_array(np.concatenate(x).astype(jnp.dtype(dtype))) for x in (ks, vs)]
    if layout == "HND":
        contiguous = [jnp.swapaxes(x, 0, 1) for x in contiguous]

    how = dict(
        pos_encoding_mode="ALIBI" if variant.alibi else "NONE",
        window_left=-1 if variant.window_left is None else variant.window_left,
        logits_soft_cap=variant.soft_cap,
    )
    if surface not in ("decode", "single decode"):
        how |= dict(causal=variant.causal)
    if variant.mask and packed:
        bits = [np.packbits(m, bitorder="little") for m in masks]
        how |= dict(packed_custom_mask=to(np.concatenate(bits)))
    elif variant.mask and surface == "single prefill":
        how |= dict(custom_mask=to(masks[0]))
    elif variant.mask:
        how |= dict(custom_mask=to(np.concatenate([m.ravel() for m in masks])))
    sinks = device_array(operands(variant, h)[0])
    run_how = dict(return_lse=True) | (dict(sinks=sinks) if variant.sinks else {})
    types = dict(q_data_type=dtype, o_data_type=out_dtype)
    sizes = (h, kh, d, page_size)
    plan_how = plan_how or {}
    if surface == "decode":
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(None, layout)
        wrapper.plan(*table_of(paged, to), *sizes, **types, **how, **plan_how)
        result = wrapper.run(q_array, pages, **run_how)
    elif surface == "paged":
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(None, layout)
        types |= dict(head_dim_vo=head_dim_vo)
        wrapper.plan(to(qo_indptr), *table_of(paged, to), *sizes, **types, **how, **plan_how)
        result = wrapper.run(q_array, pages, **run_how)
    elif surface == "sink":
        wrapper = flashinfer.BatchAttentionWithAttentionSinkWrapper(
            None,
            layout,
            pos_encoding_mode=how["pos_encoding_mode"],
            q_data_type=dtype,
            kv_data_type=dtype,
            head_dim_qk=d,
            head_dim_vo=dv,
            window_left=how["window_left"],
        )
        types |= dict(head_dim_vo=head_dim_vo)
        # The scale of run counts.
        wrapper.plan(
            to(qo_indptr), *table_of(paged, to), *sizes, sm_scale=9.0, **types, **how, **plan_how
        )
        result = wrapper.run(q_array, pages, sinks, d**-0.5, return_lse=True)
    elif surface == "ragged":
        wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(None, layout)
        types |= dict(head_dim_vo=head_dim_vo)
        indptrs = to(qo_indptr), to(indptr_of(kv_lens))
        wrapper.plan(*indptrs, h, kh, d, **types, **how, **plan_how)
        result = wrapper.run(q_array, *contiguous, return_lse=True)
    elif surface == "single prefill":
        result = flashinfer.single_prefill_with_kv_cache(
            q_array, *contiguous, kv_layout=layout, return_lse=True, o_dtype=out_dtype, **how
        )
    else:
        o, lse = flashinfer.single_decode_with_kv_cache(
            q_array[0], *contiguous, kv_layout=layout, return_lse=True, **how
        )
        result = o[None], lse[None]
    assert_dense(result, variant, qs, ks, vs, sees, dtype, out_dtype, last)
