"""The decoder against plain dense attention.

The oracle is `dense_logits` of the demo, which knows neither pages nor kernels.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import i32
from tiny import CONFIG, paged_logits, random_params, random_prompts

import jaxattn as ja
from examples.demo import dense_logits
from jaxattn.models import llama
from jaxattn.models.feed_forward import Gated
from jaxattn.models.layer_spec import LayerSpec
from jaxattn.models.rope_scaling import RopeConfig

QWEN3_LIKE = dataclasses.replace(
    CONFIG,
    layers=(LayerSpec(Gated(96, bias=True), RopeConfig(1e6)),) * 2,
    head_dim=32,
    tie_word_embeddings=True,
    qkv_bias=True,
    o_bias=True,
    qk_norm=True,
)


@pytest.mark.parametrize("config", [CONFIG, QWEN3_LIKE], ids=["llama3_rope", "norms_and_biases"])
@pytest.mark.parametrize(
    "how",
    [dict(page_size=16), dict(piece=7), dict(decode=True), dict(decode=True, page_size=1)],
    ids=["prefill", "chunked", "decode", "decode_page_1"],
)
def test_logits_are_dense_attentions(config, how):
    params = random_params(config)
    requests = random_prompts([1, 40, 16])
    logits = paged_logits(params, config, requests, **how)
    for ours, tokens in zip(logits, requests, strict=True):
        truth = dense_logits(params, config, i32(tokens), jnp.float32)
        np.testing.assert_allclose(ours, truth, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_logits_in_float16():
    params = random_params(CONFIG, jnp.float16)
    (tokens,) = requests = random_prompts([20])
    (ours,) = paged_logits(params, CONFIG, requests)
    truth, plain = (
        dense_logits(params, CONFIG, i32(tokens), dtype) for dtype in (jnp.float32, jnp.float16)
    )
    assert np.abs(ours - truth).max() <= 2 * np.abs(plain - truth).max()


def test_prefill_and_decode_step_want_their_own_plan():
    params = random_params(CONFIG)
    caches = llama.empty_caches(CONFIG, 2, 4, jnp.float32)
    one = jnp.zeros(1, jnp.int32)
    table = ja.PageTable.from_block_table(one[:, None], one + 1, 4)
    heads = dict(page_size=4, num_qo_heads=6, num_kv_heads=2)
    decode = llama.Batch(one, one, one, (table,), (ja.plan_decode(table, **heads),))
    prefill_plan = ja.plan_prefill(jnp.arange(2, dtype=jnp.int32), table, num_qo_tokens=1, **heads)
    prefill = decode._replace(plans=(prefill_plan,))
    cos_sin_cache = llama.rope_table(CONFIG, 4)
    with pytest.raises(
        TypeError, match="prefill needs a plan from plan_prefill; got one of plan_decode"
    ):
        llama.prefill(params, CONFIG, decode, caches, cos_sin_cache)
    with pytest.raises(
        TypeError, match="decode_step needs a plan from plan_decode; got one of plan_prefill"
    ):
        llama.decode_step(params, CONFIG, prefill, caches, cos_sin_cache)
    by_prefill, _ = llama.prefill(params, CONFIG, prefill, caches, cos_sin_cache)
    by_decode, _ = llama.decode_step(params, CONFIG, decode, caches, cos_sin_cache)
    np.testing.assert_allclose(by_prefill, by_decode, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "how", [dict(), dict(piece=100), dict(decode=True)], ids=["prefill", "chunked", "decode"]
)
@pytest.mark.parametrize("group", [3, 8])
def test_triton_bf16_logits_rival_the_plain_computation(how, group):
    config = dataclasses.replace(
        QWEN3_LIKE,
        hidden_size=512,
        layers=(LayerSpec(Gated(1024, bias=True), RopeConfig(1e6)),) * 2,
        num_qo_heads=2 * group,
        head_dim=128,
        max_position_embeddings=1024,
    )
    params = random_params(config, jnp.bfloat16)
    requests = random_prompts([300, 1, 77])
    ours = paged_logits(params, config, requests, page_size=16, backend="triton", **how)
    exact = jax.tree.map(lambda weight: weight.astype(jnp.float32), params)
    truth = paged_logits(exact, config, requests, page_size=16, backend="xla", **how)
    for i, tokens in enumerate(requests):
        plain = dense_logits(params, config, i32(tokens), jnp.bfloat16)
        error, plain_error = np.abs(ours[i] - truth[i]).max(), np.abs(plain - truth[i]).max()
        assert error <= 2 * plain_error, f"{error=:.3g}, {plain_error=:.3g}"


def nll(logits, tokens):
    """Mean negative log-likelihood of each token after those before it, in nats."""
    shifted = logits[:-1] - logits[:-1].max(axis=1, keepdims=True)
    log_probability = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return -log_probability[np.arange(len(tokens) - 1), tokens[1:]].mean()


@pytest.mark.parametrize(
    ("kv_dtype", "distance"), [(jnp.float8_e4m3fn, 0.03), (jnp.float8_e5m2, 0.06)]
)
@pytest.mark.parametrize("decode", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_fp8_cache_keeps_the_logits(decode, kv_dtype, distance):
    """Logits stay within 3% (e5m2: 6%) of their own size, tokens within 0.01 nats, of a cache of the weights' dtype.

    The tokens are the model's own choice, so that it has something to be sure of.
    """
    params = random_params(CONFIG, jnp.bfloat16)
    requests = random_prompts([60, 41])
    for _ in range(2):
        logits = paged_logits(params, CONFIG, requests, piece=30)
        requests = [
            [x[0], *np.argmax(y[:-1], axis=1).tolist()]
            for x, y in zip(requests, logits, strict=True)
        ]
    how = dict(decode=decode, piece=30)
    plain = paged_logits(params, CONFIG, requests, **how)
    ours = paged_logits(params, CONFIG, requests, kv_dtype=kv_dtype, **how)
    for a, b, tokens in zip(ours, plain, requests, strict=True):
        off = np.sqrt(np.mean((a - b) ** 2)) / np.std(b)
        assert 0 < off < distance
        assert abs(nll(a, tokens) - nll(b, tokens)) < 0.01
