"""The decoder against plain dense attention, and checkpoints good and bad.

The oracle is `dense_logits` of the demo, which knows neither pages nor kernels.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIG, paged_logits, random_params, random_prompts

import jaxattn as ja
from examples.demo import dense_logits
from jaxattn.models import llama

QWEN3_LIKE = dataclasses.replace(
    CONFIG,
    rope=llama.RopeConfig(1e6),
    head_dim=32,
    tie_word_embeddings=True,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    qk_norm=True,
)

HF = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "rope_theta": 5e5,
}


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
        truth = dense_logits(params, config, jnp.asarray(tokens, jnp.int32), jnp.float32)
        np.testing.assert_allclose(ours, truth, atol=1e-4, rtol=0)


def test_logits_in_float16():
    params = random_params(CONFIG, jnp.float16)
    (tokens,) = requests = random_prompts([20])
    (ours,) = paged_logits(params, CONFIG, requests)
    truth, plain = (
        dense_logits(params, CONFIG, jnp.asarray(tokens, jnp.int32), dtype)
        for dtype in (jnp.float32, jnp.float16)
    )
    assert np.abs(ours - truth).max() <= 2 * np.abs(plain - truth).max()


def test_prefill_and_decode_step_want_their_own_plan():
    params = random_params(CONFIG)
    caches = llama.empty_caches(CONFIG, 2, 4, jnp.float32)
    one = jnp.zeros(1, jnp.int32)
    table = ja.PageTable.from_block_table(one[:, None], one + 1, 4)
    heads = dict(page_size=4, num_qo_heads=6, num_kv_heads=2)
    decode = llama.Batch(one, one, one, table, ja.plan_decode(table, **heads))
    prefill_plan = ja.plan_prefill(jnp.arange(2, dtype=jnp.int32), table, num_qo_tokens=1, **heads)
    prefill = decode._replace(plan=prefill_plan)
    cos_sin_cache = llama.rope_table(CONFIG, 4)
    with pytest.raises(TypeError, match="prefill needs a plan from plan_prefill; got one of plan_decode"):
        llama.prefill(params, CONFIG, decode, caches, cos_sin_cache)
    with pytest.raises(TypeError, match="decode_step needs a plan from plan_decode; got Prefill"):
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
        intermediate_size=1024,
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
        plain = dense_logits(params, config, jnp.asarray(tokens, jnp.int32), jnp.bfloat16)
        error, plain_error = np.abs(ours[i] - truth[i]).max(), np.abs(plain - truth[i]).max()
        assert error <= 2 * plain_error, f"{error=:.3g}, {plain_error=:.3g}"


def test_config_of_a_llama():
    config = llama.LlamaConfig.from_hf({**HF, "eos_token_id": [2, 3]})
    assert config.head_dim == 4
    assert config.rope == llama.RopeConfig(5e5)
    assert config.eos_token_ids == (2, 3)
    assert config.sliding_window is None and not config.qkv_bias and not config.qk_norm
    old = {key: HF[key] for key in HF if key not in ("num_key_value_heads", "rope_theta")}
    assert llama.LlamaConfig.from_hf(old).num_kv_heads == 4
    assert llama.LlamaConfig.from_hf(old).rope.rope_theta == 10000.0


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_rope_config_of_transformers_5_and_before(key):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    config = llama.LlamaConfig.from_hf({**HF, key: scaling})
    assert config.rope == llama.RopeConfig(5e5, 8.0, 1.0, 4.0, 32)
    linear = llama.LlamaConfig.from_hf({**HF, key: {"type": "linear", "factor": 2.0}})
    assert linear.rope == llama.RopeConfig(5e5, 2.0)
    newer = llama.LlamaConfig.from_hf({**HF, key: {"rope_type": "default", "rope_theta": 7.0}})
    assert newer.rope == llama.RopeConfig(7.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ValueError, "'GPT2LMHeadModel'; supported: Llama"),
        ({"architectures": None}, ValueError, "unknown architecture None"),
        ({"hidden_size": None}, ValueError, "config.json has no 'hidden_size'"),
        ({"num_key_value_heads": 3}, ValueError, "multiple of num_kv_heads"),
        ({"hidden_act": "gelu"}, NotImplementedError, "hidden_act='gelu' is not built"),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            NotImplementedError,
            "quantization_config=.* is not built",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            NotImplementedError,
            "rope_type='yarn' is not built; supported: 'default', 'linear', 'llama3'",
        ),
        ({"rope_scaling": {"type": "linear"}}, ValueError, "config.json has no 'factor'"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            NotImplementedError,
            "partial_rotary_factor=0.5 is not built",
        ),
    ],
)
def test_config_errors(change, error, message):
    with pytest.raises(error, match=message):
        llama.LlamaConfig.from_hf({**HF, **change})


@pytest.mark.parametrize(
    ("change", "window"),
    [
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 32}, 32),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, None),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 32}, None),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "sliding_window": 32,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            32,
        ),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "sliding_window": 32,
                "use_sliding_window": True,
                "max_window_layers": 2,
            },
            None,
        ),
    ],
)
def test_sliding_window_is_refused_where_it_would_matter(change, window):
    config = llama.LlamaConfig.from_hf({**HF, **change})
    assert config.sliding_window == window
    llama.rope_table(config, 32)
    if window is None:
        llama.rope_table(config, 64)
    else:
        with pytest.raises(NotImplementedError, match="33 tokens exceeds config.sliding_window=32"):
            llama.rope_table(config, 33)


def test_context_longer_than_the_model_was_made_for():
    with pytest.raises(ValueError, match="65 tokens exceeds config.max_position_embeddings=64"):
        llama.rope_table(llama.LlamaConfig.from_hf(HF), 65)


def write(folder, dtype=np.float32, config=HF, shards=1, without=(), change=None):
    """A checkpoint of zeros and ones; returns its tensors."""
    save_file = pytest.importorskip("safetensors.numpy").save_file
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.integers(-4, 4, shape).astype(dtype)
        for source in jax.tree.leaves(llama.sources(llama.LlamaConfig.from_hf(config)))
        for name, shape in source.tensors
        if name not in without
    }
    tensors |= change or {}
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    index = {}
    for i in range(shards):
        names = list(tensors)[i::shards]
        save_file({name: tensors[name] for name in names}, folder / f"{i}.safetensors")
        index |= dict.fromkeys(names, f"{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return tensors


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32])
def test_load(tmp_path, dtype, shards):
    tensors = write(tmp_path, dtype, shards=shards)
    calls = []
    config, params = llama.load(tmp_path, progress=lambda *args: calls.append(args))
    leaves = jax.tree.leaves(params)
    assert {x.dtype for x in leaves} == {jnp.dtype(dtype)}
    assert calls == [(i + 1, len(leaves)) for i in range(len(leaves))]
    parts = [tensors[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv"]
    np.testing.assert_array_equal(params.layers[1].qkv_proj.weight, np.concatenate(parts))
    np.testing.assert_array_equal(params.lm_head, tensors["lm_head.weight"])
    assert config == llama.LlamaConfig.from_hf(HF)


def test_load_casts_to_one_dtype(tmp_path):
    norm = np.ones(16, np.float32)
    write(tmp_path, np.float16, change={"model.norm.weight": norm})
    assert {x.dtype for x in jax.tree.leaves(llama.load(tmp_path)[1])} == {jnp.dtype("float16")}
    assert llama.load(tmp_path, jnp.bfloat16)[1].norm.dtype == jnp.bfloat16


def test_load_reads_eos_of_the_generation_config(tmp_path):
    write(tmp_path, config={**HF, "eos_token_id": 1})
    assert llama.load(tmp_path)[0].eos_token_ids == (1,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert llama.load(tmp_path)[0].eos_token_ids == (5, 6)


def test_load_errors_about_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder '.*nowhere'"):
        llama.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="config.json is missing in"):
        llama.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json' is not valid JSON"):
        llama.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object; got list"):
        llama.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(HF))
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor .*index.json is in"):
        llama.load(tmp_path)


def test_load_errors_about_weights(tmp_path):
    write(tmp_path, without=("model.norm.weight",))
    with pytest.raises(ValueError, match="has no tensor 'model.norm.weight'"):
        llama.load(tmp_path)
    write(tmp_path, change={"model.norm.weight": np.ones(15, np.float32)})
    with pytest.raises(ValueError, match=r"'model.norm.weight' must have shape \[16\].*got \[15\]"):
        llama.load(tmp_path)
    write(tmp_path, change={"model.norm.weight": np.ones(16, np.int8)})
    with pytest.raises(TypeError, match="must be one of float16, bfloat16, float32; got int8"):
        llama.load(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        llama.load(tmp_path)


def test_load_errors_about_shards(tmp_path):
    write(tmp_path, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    right = index.read_text()
    index.write_text(right.replace("1.safetensors", "0.safetensors"))
    with pytest.raises(ValueError, match="places '.*' in 0.safetensors, which does not hold it"):
        llama.load(tmp_path)
    index.write_text(right)
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="1.safetensors, which .* lists, is missing"):
        llama.load(tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match="has no 'weight_map'"):
        llama.load(tmp_path)


def test_load_without_safetensors(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(HF))
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"needs safetensors: pip install 'jaxattn\[models\]'"):
        llama.load(tmp_path)
