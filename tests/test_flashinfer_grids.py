"""The grids of FlashInfer's own tests of windows, caps, ALiBi, sinks and masks, on a GPU, against float64.

Each is the full product of the values that tell FlashInfer's cases apart: lengths, batches, windows, caps, heads. Where
the keys are many, a request's last tokens stand for all of them: the dense computation of the others would take longer
than the kernels of all grids.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from flashinfer_cases import check_variant, indptr_of, normal, table_of
from helpers import device_array, make_paged
from variants import Variant

from jaxattn import flashinfer

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
grid = pytest.mark.parametrize
DENSE = 2**25  # scores of a dense computation


def sampled(qo_len, kv_len, num_qo_heads):
    """How many of the last tokens to compare; None for all."""
    most = max(DENSE // (kv_len * num_qo_heads), 1)
    return None if qo_len <= most else most


# test_sliding_window.py


@grid("seq_len", [1, 3, 19, 99, 199, 1177, 1999])
@grid("window_left", [3, 13, 23, 37, 43])
@grid("num_kv_heads", [1, 4])
@grid("num_qo_heads", [4, 8])
@grid("head_dim", [64, 128, 256, 512])
def test_window_of_a_single_decode(seq_len, window_left, num_kv_heads, num_qo_heads, head_dim):
    heads = (num_qo_heads, num_kv_heads, head_dim)
    check_variant("single decode", Variant(window_left=window_left), [1], [seq_len], heads=heads)


@grid("batch_size", [1, 3, 13, 32])
@grid("kv_len", [1, 3, 99, 199, 1999])
@grid("window_left", [33, 533])
@grid("num_kv_heads", [1, 4])
@grid("head_dim", [64, 128, 256, 512])
@grid("page_size", [1, 16])
def test_window_of_a_batch_decode(
    batch_size, kv_len, window_left, num_kv_heads, head_dim, page_size
):
    check_variant(
        "decode",
        Variant(window_left=window_left),
        [1] * batch_size,
        [kv_len] * batch_size,
        heads=(8, num_kv_heads, head_dim),
        page_size=page_size,
    )


@grid("batch_size", [12, 17, 30])
@grid("kv_len", [54, 397, 1177])
@grid("qo_len", [1, 37, 47])
@grid("window_left", [13, 33, 111])
@grid("num_kv_heads", [1, 4, 8])
@grid("page_size", [1, 16])
def test_window_of_a_paged_prefill(
    batch_size, kv_len, qo_len, window_left, num_kv_heads, page_size
):
    check_variant(
        "paged",
        Variant(causal=True, window_left=window_left),
        [qo_len] * batch_size,
        [kv_len] * batch_size,
        heads=(8, num_kv_heads, 128),
        page_size=page_size,
    )


@grid("batch_size", [12, 17])
@grid("kv_len", [54, 397])
@grid("qo_len", [37, 47])
@grid("window_left", [13, 33])
@grid("num_kv_heads", [1, 4, 8])
def test_window_of_a_ragged_prefill(batch_size, kv_len, qo_len, window_left, num_kv_heads):
    variant = Variant(causal=True, window_left=window_left)
    lens = [qo_len] * batch_size, [kv_len] * batch_size
    check_variant("ragged", variant, *lens, heads=(8, num_kv_heads, 128))


# test_logits_cap.py


@grid("seq_len", [1, 9, 81, 729, 33001])
@grid("num_heads", [4, 8, 32])
@grid("head_dim", [128, 256])
@grid("soft_cap", [1.0, 30.0, 50.0])
def test_cap_of_a_single_decode(seq_len, num_heads, head_dim, soft_cap):
    heads = (num_heads, num_heads, head_dim)
    check_variant("single decode", Variant(soft_cap=soft_cap), [1], [seq_len], heads=heads)


@grid("qo_len", [1, 17, 81, 987])
@grid("kv_len", [1, 17, 81, 987, 31111])
@grid("num_heads", [4, 8, 32])
@grid("head_dim", [128, 256])
@grid("soft_cap", [1.0, 30.0, 50.0])
def test_cap_of_a_single_prefill(qo_len, kv_len, num_heads, head_dim, soft_cap):
    check_variant(
        "single prefill",
        Variant(soft_cap=soft_cap),
        [qo_len],
        [kv_len],
        heads=(num_heads, num_heads, head_dim),
        last=sampled(qo_len, kv_len, num_heads),
    )


# test_alibi.py


@grid("seq_len", [1, 9, 81, 729])
@grid("num_heads", [4, 8, 32])
@grid("head_dim", [128, 256])
def test_alibi_of_a_single_decode(seq_len, num_heads, head_dim):
    heads = (num_heads, num_heads, head_dim)
    check_variant("single decode", Variant(alibi=True), [1], [seq_len], heads=heads)


@grid("qo_len", [1, 17, 81, 987])
@grid("kv_len", [1, 17, 81, 987])
@grid("num_heads", [4, 8, 32])
@grid("head_dim", [128, 256])
@grid("causal", [False, True])
def test_alibi_of_a_single_prefill(qo_len, kv_len, num_heads, head_dim, causal):
    if causal and kv_len < qo_len:
        pytest.skip("a causal prefill needs as many keys as queries")
    heads = (num_heads, num_heads, head_dim)
    variant = Variant(causal=causal, alibi=True)
    check_variant("single prefill", variant, [qo_len], [kv_len], heads=heads)


# test_attention_sink.py


@grid("dtype", [jnp.float16, jnp.bfloat16])
@grid("batch_size", [1, 4, 16])
@grid("seq_len", [1, 4, 16, 128])
@grid("num_kv_heads", [8, 32])
@grid("window_left", [None, 128])
@grid("causal", [False, True])
@grid("new", ["all", "one", "some"])
def test_sinks(dtype, batch_size, seq_len, num_kv_heads, window_left, causal, new):
    """Whole prefills, decodes and chunks."""
    qo_len = dict(all=seq_len, one=1, some=-(-seq_len // 2))[new]
    check_variant(
        "sink",
        Variant(causal=causal, window_left=window_left, sinks=True),
        [qo_len] * batch_size,
        [seq_len] * batch_size,
        heads=(32, num_kv_heads, 128),
        page_size=1,
        dtype=dtype,
    )


# The masks of test_batch_prefill_kernels.py


def same_as_causal(batch_size, qo_len, kv_len, heads, surface, page_size=1, **how):
    """A lower triangle as a mask, and causal=True."""
    h, kh, d = heads
    paged = make_paged(
        [kv_len] * batch_size,
        page_size=page_size,
        num_kv_heads=kh,
        head_dim=d,
        dtype=jnp.float16,
    )
    _, q = normal((batch_size * qo_len, h, d), jnp.float16)
    mask = np.tri(qo_len, kv_len, kv_len - qo_len, dtype=bool)
    indptr = indptr_of([qo_len] * batch_size)
    results = []
    for see in (dict(causal=True), dict(custom_mask=np.tile(mask.ravel(), batch_size))):
        if surface == "paged":
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(None)
            wrapper.plan(indptr, *table_of(paged), h, kh, d, page_size, **see, **how)
            kv = (paged.cache.data,)
        else:
            wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(None)
            wrapper.plan(indptr, indptr_of([kv_len] * batch_size), h, kh, d, **see, **how)
            kv = (device_array(np.concatenate(x).astype(q.dtype)) for x in (paged.k, paged.v))
        results.append(wrapper.run_return_lse(q, *kv))
    for causal, masked in zip(*results, strict=True):
        np.testing.assert_allclose(
            np.asarray(masked, np.float32), np.asarray(causal, np.float32), rtol=1e-3, atol=1e-3
        )


@grid("batch_size", [12, 17, 128])
@grid("kv_len", [54, 97, 512, 2048])
@grid("qo_len", [37, 17, 127, 577])
@grid("page_size", [1, 16])
@grid("num_qo_heads", [4, 32])
@grid("head_dim", [128, 256])
def test_mask_of_a_paged_prefill(batch_size, kv_len, qo_len, page_size, num_qo_heads, head_dim):
    if kv_len < qo_len:
        pytest.skip("FlashInfer's test has no rows without keys")
    same_as_causal(batch_size, qo_len, kv_len, (num_qo_heads, 4, head_dim), "paged", page_size)


@grid("batch_size", [12, 17, 128])
@grid("kv_len", [54, 97, 512, 2048])
@grid("qo_len", [37, 17, 127, 577])
@grid("num_qo_heads", [4, 32])
@grid("head_dim", [128, 256])
@grid("pos_encoding_mode", ["NONE", "ALIBI"])
@grid("logits_soft_cap", [0.0, 30.0])
def test_mask_of_a_ragged_prefill(
    batch_size, kv_len, qo_len, num_qo_heads, head_dim, pos_encoding_mode, logits_soft_cap
):
    if kv_len < qo_len:
        pytest.skip("FlashInfer's test has no rows without keys")
    how = dict(pos_encoding_mode=pos_encoding_mode, logits_soft_cap=logits_soft_cap)
    same_as_causal(batch_size, qo_len, kv_len, (num_qo_heads, 4, head_dim), "ragged", **how)
