"""Several query tokens a request in the decode class, V's head_dim and dtype of the output of their own."""

import contextlib

import jax.numpy as jnp
import pytest
from flashinfer_cases import assert_dense, check_variant, normal, table_of
from helpers import (
    make_paged,
    no_compilation,
)
from variants import Variant, seen

from jaxattn import flashinfer

CAUSAL = Variant(causal=True)


@pytest.mark.parametrize(
    "surface,head_dim,head_dim_vo,dtype,out_dtype,layout",
    [
        ("decode", 64, None, jnp.bfloat16, jnp.float32, "NHD"),
        ("paged", 64, 128, jnp.float32, jnp.bfloat16, "HND"),
        ("ragged", 192, 128, jnp.bfloat16, None, "NHD"),
        ("sink", 512, 256, jnp.bfloat16, None, "NHD"),
        ("single prefill", 128, 64, jnp.float16, jnp.float32, "HND"),
        ("single decode", 64, 96, jnp.float16, None, "NHD"),
    ],
)
def test_output(surface, head_dim, head_dim_vo, dtype, out_dtype, layout):
    decode = "decode" in surface
    variant = Variant(causal=not decode, sinks=surface == "sink")
    lens = ([1], [20]) if decode else ([5], [20])
    how = dict(heads=(4, 2, head_dim), head_dim_vo=head_dim_vo, dtype=dtype, layout=layout)
    check_variant(surface, variant, *lens, **how, out_dtype=out_dtype)


@pytest.mark.parametrize(
    "variant,plan_how,metadata",
    [
        (Variant(causal=True), {}, "numpy"),
        (Variant(window_left=5, window_right=1, sinks=True), dict(window_right=1), "device"),
        (Variant(alibi=True), dict(window_right=-1, is_causal=True), "lists"),
    ],
    ids=["causal", "windows", "all keys"],
)
def test_several_tokens_a_request(variant, plan_how, metadata):
    kv_lens = [3, 20, 33]
    how = dict(plan_how=dict(q_len_per_req=3, **plan_how), metadata=metadata)
    check_variant("decode", variant, [3] * 3, kv_lens, **how)


@pytest.mark.parametrize("is_causal", [True, False])
def test_one_token_has_no_keys_behind_it(is_causal):
    how = dict(window_right=-1 if is_causal else 5, is_causal=is_causal)
    check_variant("decode", Variant(window_left=4), [1, 1], [3, 20], plan_how=how)


def test_several_tokens_never_recompile():
    most, q_len = 3, 2
    wrapper = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(
        None, max_batch_size=most, max_num_pages=32
    )
    q, q_array = normal((most * q_len, 4, 64), jnp.float16)
    for step, kv_lens in enumerate(([20, 2, 33], [7, 30], [0, 9, 60])):
        pages = sum(-(-n // 4) for n in kv_lens)
        paged = make_paged(kv_lens, page_size=4, dtype=jnp.float16, spare_pages=32 - pages)
        table = table_of(paged)
        with contextlib.nullcontext() if step == 0 else no_compilation():
            wrapper.plan(*table, 4, 2, 64, 4, q_len_per_req=q_len)
            o, lse = wrapper.run(q_array, paged.cache.data, q_len_per_req=q_len, return_lse=True)
        qs = [q[q_len * i :][:q_len] for i in range(len(kv_lens))]
        sees = [seen(CAUSAL, q_len, n) for n in kv_lens]
        assert_dense((o, lse), CAUSAL, qs, paged.k, paged.v, sees, jnp.float16)
        rows = q_len * len(kv_lens)
        assert not o[rows:].any() and jnp.isneginf(lse[rows:]).all()
    with pytest.raises(ValueError, match="q_len_per_req must be that of the first plan, 2, .* 3"):
        wrapper.plan(*table, 4, 2, 64, 4, q_len_per_req=3)
