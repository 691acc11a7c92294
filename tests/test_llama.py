"""The decoder against plain dense attention, and checkpoints good and bad.

The oracle is `dense_logits` of the demo, which knows neither pages nor kernels.
"""

import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIG, paged_logits, random_params, random_prompts

import jaxattn as ja
from examples.demo import dense_logits
from jaxattn.models import llama
from jaxattn.models.feed_forward import Gated
from jaxattn.models.layer_spec import LayerSpec
from jaxattn.models.rope_scaling import Linear, Llama3, RopeConfig

QWEN3_LIKE = dataclasses.replace(
    CONFIG,
    layers=(LayerSpec(Gated(96, bias=True), RopeConfig(1e6)),) * 2,
    head_dim=32,
    tie_word_embeddings=True,
    qkv_bias=True,
    o_bias=True,
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


@pytest.mark.slow
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
        plain = dense_logits(params, config, jnp.asarray(tokens, jnp.int32), jnp.bfloat16)
        error, plain_error = np.abs(ours[i] - truth[i]).max(), np.abs(plain - truth[i]).max()
        assert error <= 2 * plain_error, f"{error=:.3g}, {plain_error=:.3g}"


def test_config_of_a_llama():
    config = llama.LlamaConfig.from_hf({**HF, "eos_token_id": [2, 3]})
    assert config.head_dim == 4
    assert config.layers == (LayerSpec(Gated(24), RopeConfig(5e5)),) * 2
    assert config.eos_token_ids == (2, 3)
    assert config.windows == (None,) and not config.qkv_bias and not config.qk_norm
    old = {key: HF[key] for key in HF if key not in ("num_key_value_heads", "rope_theta")}
    assert llama.LlamaConfig.from_hf(old).num_kv_heads == 4
    assert llama.LlamaConfig.from_hf(old).ropes == (RopeConfig(10000.0),)


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
    assert config.ropes == (RopeConfig(5e5, Llama3(8.0, 1.0, 4.0, 32)),)
    linear = llama.LlamaConfig.from_hf({**HF, key: {"type": "linear", "factor": 2.0}})
    assert linear.ropes == (RopeConfig(5e5, Linear(2.0)),)
    newer = llama.LlamaConfig.from_hf({**HF, key: {"rope_type": "default", "rope_theta": 7.0}})
    assert newer.ropes == (RopeConfig(7.0),)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ValueError, "'GPT2LMHeadModel'; supported: Llama"),
        ({"architectures": None}, ValueError, "unknown architecture None"),
        ({"architectures": ["A", "B"]}, ValueError, "unknown architecture 'A', 'B'"),
        ({"architectures": "Llama"}, ValueError, "architectures .* a list of strings; got 'Llama'"),
        ({"model_type": "qwen2"}, ValueError, "same model; got 'LlamaForCausalLM' and 'qwen2'"),
        ({"hidden_size": None}, ValueError, "config.json has no 'hidden_size'"),
        ({"hidden_size": "256"}, ValueError, "hidden_size .* a positive integer; got '256'"),
        ({"hidden_size": 256.0}, ValueError, "hidden_size .* a positive integer; got 256.0"),
        ({"num_key_value_heads": 0}, ValueError, "num_key_value_heads .* positive integer; got 0"),
        ({"head_dim": 0}, ValueError, "head_dim .* a positive integer; got 0"),
        ({"head_dim": 5}, ValueError, "rotary_dim must be even"),
        ({"hidden_size": 18}, ValueError, "'head_dim' where num_attention_heads does not divide"),
        ({"num_hidden_layers": True}, ValueError, "num_hidden_layers .* integer; got True"),
        ({"rms_norm_eps": "1e-5"}, ValueError, "rms_norm_eps .* a positive number; got '1e-5'"),
        ({"rope_theta": 0}, ValueError, "rope_theta .* a positive number; got 0"),
        ({"tie_word_embeddings": 1}, ValueError, "tie_word_embeddings .* true or false; got 1"),
        ({"eos_token_id": 2.0}, ValueError, "eos_token_id .* a token id, or a list .*; got 2.0"),
        ({"eos_token_id": [2, -1]}, ValueError, r"eos_token_id .*; got \[2, -1\]"),
        (
            {"attention_bias": True, "bias": False},
            ValueError,
            "the same; got attention_bias=True and bias=False",
        ),
        ({"num_key_value_heads": 3}, ValueError, "multiple of num_kv_heads"),
        ({"hidden_act": "gelu"}, NotImplementedError, "hidden_act='gelu' is not built"),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            NotImplementedError,
            "quantization_config=.* is not built",
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
            NotImplementedError,
            "rope_type='dynamic' is not built; supported: 'default', 'linear', 'llama3', 'yarn', 'longrope'",
        ),
        ({"rope_scaling": {"type": "linear"}}, ValueError, "rope_scaling has no 'factor'"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            NotImplementedError,
            "partial_rotary_factor=0.5 is not built",
        ),
        ({"rope_scaling": {"factor": 4.0}}, ValueError, "rope_scaling has no 'rope_type'"),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 4.0}},
            ValueError,
            "must be the same; got 'llama3', 'linear'",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "factor": 4.0}},
            NotImplementedError,
            "rope_parameters has entries .*: factor=4.0 is not built",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 4.0, "attention_factor": 1.2}},
            NotImplementedError,
            "attention_factor=1.2 is not built",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": "4"}},
            ValueError,
            "factor in rope_scaling must be a positive number; got '4'",
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                }
            },
            ValueError,
            "low_freq_factor must be less than high_freq_factor; got 4.0, 4.0",
        ),
        ({"rope_scaling": 4.0}, ValueError, "rope_scaling in config.json must be an object"),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 4.0},
                "rope_parameters": {"type": "linear", "factor": 2.0},
            },
            ValueError,
            "must not differ",
        ),
        (
            {"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}}},
            ValueError,
            "has no settings for 'full_attention', which some layers are",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "rope_theta": 1e4}},
            NotImplementedError,
            "rope_theta=10000.0 is not built",
        ),
    ],
)
def test_config_errors(change, error, message):
    with pytest.raises(error, match=message):
        llama.LlamaConfig.from_hf({**HF, **change})


@pytest.mark.parametrize(
    "entry",
    [
        {"attn_logit_softcapping": 50.0},
        {"final_logit_softcapping": 30.0},
        {"logit_scale": 0.0625},
        {"attention_multiplier": 0.0078125},
        {"num_local_experts": 8},
        {"num_experts": 8},
        {"no_rope_layers": [1, 0]},
        {"clip_qkv": 8.0},
        {"is_causal": False},
        {"use_qk_norm": True},
        {"rope_interleaved": True},
        {"original_max_position_embeddings": 32},
        {"auto_map": {"AutoModelForCausalLM": "modeling.Other"}},
        {"an_entry_of_next_year": False},
    ],
    ids=lambda entry: next(iter(entry)),
)
def test_entries_that_are_not_understood_are_refused_by_name(entry):
    ((name, value),) = entry.items()
    with pytest.raises(NotImplementedError, match=rf"{name}={re.escape(repr(value))} is not built"):
        llama.LlamaConfig.from_hf(HF | entry)
    # One that says nothing is none.
    assert llama.LlamaConfig.from_hf(HF | {name: None}) == llama.LlamaConfig.from_hf(HF)


def test_every_entry_that_is_not_understood_is_named():
    with pytest.raises(NotImplementedError, match="clip_qkv=8.0 .*, is_causal=False .*: True"):
        llama.LlamaConfig.from_hf({**HF, "clip_qkv": 8.0, "is_causal": False})


def test_entries_that_change_nothing_pass():
    harmless = dict(use_cache=False, torch_dtype="bfloat16", pretraining_tp=2, id2label={0: "A"})
    neutral = dict(is_causal=True, logit_scale=1, use_qk_norm=False, pruned_heads={})
    plain = llama.LlamaConfig.from_hf(HF)
    assert llama.LlamaConfig.from_hf({**HF, **harmless, **neutral}) == plain
    with pytest.raises(NotImplementedError, match="logit_scale=True"):
        llama.LlamaConfig.from_hf({**HF, "logit_scale": True})


def test_model_type_names_the_architecture():
    named = {key: HF[key] for key in HF if key != "architectures"}
    qwen3 = {"architectures": ["Qwen3ForCausalLM"]}
    assert llama.LlamaConfig.from_hf(named | {"model_type": "llama"}) == llama.LlamaConfig.from_hf(
        HF
    )
    assert llama.LlamaConfig.from_hf(
        {**named, "architectures": None, "model_type": "qwen3"}
    ) == llama.LlamaConfig.from_hf(HF | qwen3)


PUBLISHED = {  # what the models' config.json hold, transformers 4's style
    "llama2_7b": dict(
        _name_or_path="meta-llama/Llama-2-7b-hf", architectures=["LlamaForCausalLM"],
        bos_token_id=1, eos_token_id=2, hidden_act="silu", hidden_size=4096,
        initializer_range=0.02, intermediate_size=11008, max_position_embeddings=4096,
        model_type="llama", num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32,
        pad_token_id=0, pretraining_tp=1, rms_norm_eps=1e-05, rope_scaling=None,
        tie_word_embeddings=False, torch_dtype="float16", transformers_version="4.31.0.dev0",
        use_cache=True, vocab_size=32000,
    ),
    "llama3.2_1b": dict(
        architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0,
        bos_token_id=128000, eos_token_id=[128001, 128008, 128009], head_dim=64,
        hidden_act="silu", hidden_size=2048, initializer_range=0.02, intermediate_size=8192,
        max_position_embeddings=131072, mlp_bias=False, model_type="llama",
        num_attention_heads=32, num_hidden_layers=16, num_key_value_heads=8, pretraining_tp=1,
        rms_norm_eps=1e-05,
        rope_scaling=dict(
            factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0,
            original_max_position_embeddings=8192, rope_type="llama3",
        ),
        rope_theta=500000.0, tie_word_embeddings=True, torch_dtype="bfloat16",
        transformers_version="4.45.0.dev0", use_cache=True, vocab_size=128256,
    ),
    "mistral_7b_v0.1": dict(
        architectures=["MistralForCausalLM"], bos_token_id=1, eos_token_id=2, hidden_act="silu",
        hidden_size=4096, initializer_range=0.02, intermediate_size=14336,
        max_position_embeddings=32768, model_type="mistral", num_attention_heads=32,
        num_hidden_layers=32, num_key_value_heads=8, rms_norm_eps=1e-05, rope_theta=10000.0,
        sliding_window=4096, tie_word_embeddings=False, torch_dtype="bfloat16",
        transformers_version="4.34.0.dev0", use_cache=True, vocab_size=32000,
    ),
    "mistral_nemo": dict(
        architectures=["MistralForCausalLM"], attention_dropout=0.0, bos_token_id=1,
        eos_token_id=2, head_dim=128, hidden_act="silu", hidden_size=5120,
        initializer_range=0.02, intermediate_size=14336, max_position_embeddings=131072,
        model_type="mistral", num_attention_heads=32, num_hidden_layers=40,
        num_key_value_heads=8, rms_norm_eps=1e-05, rope_theta=1000000.0, sliding_window=None,
        tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.43.0.dev0",
        use_cache=True, vocab_size=131072,
    ),
    "qwen2.5_7b": dict(
        architectures=["Qwen2ForCausalLM"], attention_dropout=0.0, bos_token_id=151643,
        eos_token_id=151643, hidden_act="silu", hidden_size=3584, initializer_range=0.02,
        intermediate_size=18944, max_position_embeddings=131072, max_window_layers=28,
        model_type="qwen2", num_attention_heads=28, num_hidden_layers=28, num_key_value_heads=4,
        rms_norm_eps=1e-06, rope_theta=1000000.0, sliding_window=131072,
        tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.40.1",
        use_cache=True, use_mrope=False, use_sliding_window=False, vocab_size=152064,
    ),
    "qwen3_8b": dict(
        architectures=["Qwen3ForCausalLM"], attention_bias=False, attention_dropout=0.0,
        bos_token_id=151643, eos_token_id=151645, head_dim=128, hidden_act="silu",
        hidden_size=4096, initializer_range=0.02, intermediate_size=12288,
        max_position_embeddings=40960, max_window_layers=36, model_type="qwen3",
        num_attention_heads=32, num_hidden_layers=36, num_key_value_heads=8, rms_norm_eps=1e-06,
        rope_scaling=None, rope_theta=1000000, sliding_window=None, tie_word_embeddings=False,
        torch_dtype="bfloat16", transformers_version="4.51.0", use_cache=True,
        use_sliding_window=False, vocab_size=151936,
    ),
}  # fmt: skip


@pytest.mark.parametrize("raw", PUBLISHED.values(), ids=PUBLISHED)
def test_published_configs_are_understood(raw):
    config = llama.LlamaConfig.from_hf(raw)
    name, theta = raw["architectures"][0], raw.get("rope_theta", 10000.0)
    assert config.head_dim == raw.get("head_dim", 128)
    (rope,) = config.ropes
    assert rope.rope_theta == theta
    assert isinstance(rope.scaling, Llama3) == bool(raw.get("rope_scaling"))
    assert config.qkv_bias == name.startswith("Qwen2") and not config.o_bias
    assert config.qk_norm == name.startswith("Qwen3")
    assert config.windows == ((4096,) if raw.get("sliding_window") == 4096 else (None,))


def test_rope_settings_by_layer_type():
    settings = {"rope_type": "llama3", "rope_theta": 1e6, "factor": 8.0, "low_freq_factor": 1.0}
    settings |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    other = {"rope_type": "default", "rope_theta": 1e4}
    nested = {"full_attention": settings, "sliding_attention": other}
    config = llama.LlamaConfig.from_hf({**HF, "rope_parameters": nested})
    assert config.ropes == (RopeConfig(1e6, Llama3(8.0, 1.0, 4.0, 32)),)
    layers = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 32}
    config = llama.LlamaConfig.from_hf({**HF, **layers, "rope_parameters": nested})
    assert config.ropes == (RopeConfig(1e4),)
    layers = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 32}
    config = llama.LlamaConfig.from_hf({**HF, **layers, "rope_parameters": nested})
    assert config.ropes == (RopeConfig(1e6, Llama3(8.0, 1.0, 4.0, 32)), RopeConfig(1e4))
    nested = dict.fromkeys(("full_attention", "sliding_attention"), settings)
    config = llama.LlamaConfig.from_hf({**HF, **layers, "rope_parameters": nested})
    assert config.ropes == (RopeConfig(1e6, Llama3(8.0, 1.0, 4.0, 32)),)


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
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "sliding_window": 32,
                "use_sliding_window": True,
                "max_window_layers": 1,
            },
            32,
        ),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "sliding_window": 32,
                "use_sliding_window": False,
                "max_window_layers": None,
            },
            None,
        ),
        ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}, 32),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "layer_types": ["sliding_attention", "full_attention"],
                "sliding_window": 32,
            },
            32,
        ),
        (
            {
                "architectures": ["MistralForCausalLM"],
                "layer_types": ["full_attention", "full_attention"],
                "sliding_window": 32,
            },
            None,
        ),
        ({"sliding_window": 32, "use_sliding_window": False}, None),
    ],
)
def test_which_layers_slide(change, window):
    config = llama.LlamaConfig.from_hf({**HF, **change})
    assert (set(config.windows) - {None}) == ({window} - {None})
    kinds = change.get("layer_types")
    if kinds:
        expected = [window if kind == "sliding_attention" else None for kind in kinds]
        assert [layer.window for layer in config.layers] == expected


@pytest.mark.parametrize(
    ("architecture", "change", "error", "message"),
    [
        (
            "Qwen2",
            {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": None},
            ValueError,
            "no 'sliding_window', which its 2 sliding layers need",
        ),
        (
            "Qwen2",
            {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": None},
            ValueError,
            "config.json has no 'max_window_layers'",
        ),
        (
            "Qwen3",
            {
                "layer_types": ["full_attention", "sliding_attention"],
                "sliding_window": None,
            },
            ValueError,
            "no 'sliding_window', which its 1 sliding layers need",
        ),
        (
            "Qwen3",
            {
                "layer_types": ["full_attention", "sliding_attention"],
                "sliding_window": 32,
                "use_sliding_window": False,
            },
            ValueError,
            "contradict each other: 1 layers are 'sliding_attention'",
        ),
        (
            "Llama",
            {"layer_types": ["chunked_attention", "full_attention"]},
            NotImplementedError,
            "layer_types 'chunked_attention' are not built",
        ),
        ("Llama", {"layer_types": ["full_attention"]}, ValueError, "must have 2 items.* got 1"),
        ("Llama", {"sliding_window": 32}, ValueError, "does not say which layers slide"),
        ("Llama", {"use_sliding_window": True}, ValueError, "does not say which layers slide"),
        (
            "Mistral",
            {"sliding_window": 32, "use_sliding_window": False},
            ValueError,
            "use_sliding_window=False and max_window_layers=None in config.json contradict",
        ),
        (
            "Mistral",
            {"sliding_window": 32, "max_window_layers": 1},
            ValueError,
            "use_sliding_window=None and max_window_layers=1 in config.json contradict",
        ),
        (
            "Mistral",
            {"use_sliding_window": True, "sliding_window": None},
            ValueError,
            "its 2 sliding layers need",
        ),
        ("Mistral", {"sliding_window": 0}, ValueError, "a positive integer; got 0"),
    ],
)
def test_windows_that_the_entries_do_not_settle(architecture, change, error, message):
    with pytest.raises(error, match=message):
        llama.LlamaConfig.from_hf({**HF, "architectures": [f"{architecture}ForCausalLM"], **change})


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
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 32000]}')
    assert llama.load(tmp_path)[0].eos_token_ids == (5,)  # the vocabulary has no other


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
    with pytest.raises(ValueError, match="lacks tensors: model.norm.weight"):
        llama.load(tmp_path)
    write(tmp_path, change={"model.norm.weight": np.ones(15, np.float32)})
    with pytest.raises(ValueError, match=r"'model.norm.weight' must have shape \[16\].*got \[15\]"):
        llama.load(tmp_path)
    write(tmp_path, change={"model.norm.weight": np.ones(16, np.int8)})
    with pytest.raises(TypeError, match="must be one of float16, bfloat16, float32; got int8"):
        llama.load(tmp_path)
    write(tmp_path, change={"model.norm.weight": np.ones(16, jnp.float8_e4m3fn)})
    with pytest.raises(TypeError, match="must be one of float16, bfloat16, float32; got F8_E4M3"):
        llama.load(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        llama.load(tmp_path)


BIASES = {
    "q_proj": 16, "k_proj": 8, "v_proj": 8, "o_proj": 16,
    "gate_proj": 24, "up_proj": 24, "down_proj": 16,
}  # fmt: skip


def biases_of(*projections, layers=2):
    return {
        f"model.layers.{i}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}.bias": np.full(
            BIASES[name], i + 1, np.float32
        )
        for name in projections
        for i in range(layers)
    }


QKV = ("q_proj", "k_proj", "v_proj")


@pytest.mark.parametrize(
    ("architecture", "entries", "held", "used"),
    [
        ("Llama", {}, QKV, "qkv"),
        ("Llama", {}, BIASES, "qkv o mlp"),
        ("Llama", {"attention_bias": True}, (*QKV, "o_proj"), "qkv o"),
        ("Llama", {"bias": True}, (*QKV, "o_proj"), "qkv o"),
        ("Llama", {"mlp_bias": True}, ("gate_proj", "up_proj", "down_proj"), "mlp"),
        ("Mistral", {"attention_bias": True}, QKV, "qkv"),
        ("Mistral", {"attention_bias": True}, (*QKV, "o_proj"), "qkv o"),
        ("Qwen2", {}, QKV, "qkv"),
        ("Qwen2", {}, (*QKV, "o_proj"), "qkv o"),
        ("Qwen2", {"attention_bias": False}, (), ""),
    ],
)
def test_biases_of_the_file_are_used(tmp_path, architecture, entries, held, used):
    raw = {**HF, "architectures": [f"{architecture}ForCausalLM"], **entries}
    biases = biases_of(*held)
    asked = jax.tree.leaves(llama.sources(llama.LlamaConfig.from_hf(raw, biases)))
    assert {name for x in asked for name, _ in x.tensors if name.endswith("bias")} == set(biases)
    write(tmp_path, config=raw, without=tuple(biases), change=biases)
    config, params = llama.load(tmp_path)
    mlp_bias = config.layers[1].feed_forward.bias
    flags = dict(qkv=config.qkv_bias, o=config.o_bias, mlp=mlp_bias)
    assert " ".join(name for name, on in flags.items() if on) == used
    layer = params.layers[1]
    for on, linear in (
        (config.qkv_bias, layer.qkv_proj),
        (config.o_bias, layer.o_proj),
        (mlp_bias, layer.feed_forward.gate_up_proj),
        (mlp_bias, layer.feed_forward.down_proj),
    ):
        assert (linear.bias is not None) == on
        assert not on or (np.asarray(linear.bias) == 2).all()


@pytest.mark.parametrize(
    ("entries", "held", "message"),
    [
        ({"attention_bias": True}, QKV, "lacks tensors: model.layers.0.self_attn.o_proj.bias, "),
        ({"attention_bias": False}, QKV, "does not use: model.layers.0.self_attn.k_proj.bias, .*v"),
        ({"mlp_bias": False}, ("up_proj",), "does not use: model.layers.0.mlp.up_proj.bias"),
        ({}, ("q_proj",), "lacks tensors: model.layers.0.self_attn.k_proj.bias, "),
    ],
)
def test_biases_at_odds_with_the_entries(tmp_path, entries, held, message):
    # The weights without any bias, and beside them those of `held`.
    write(tmp_path, change=biases_of(*held))
    (tmp_path / "config.json").write_text(json.dumps({**HF, **entries}))
    with pytest.raises(ValueError, match=message):
        llama.load(tmp_path)
    with pytest.raises(ValueError, match=message):
        llama.read_config(tmp_path)


@pytest.mark.parametrize("shards", [1, 2])
def test_tensors_that_the_model_does_not_use_are_named(tmp_path, shards):
    norms = {
        f"model.layers.{i}.self_attn.{x}_norm.weight": np.ones(4, np.float32)
        for i in range(2)
        for x in "qk"
    }
    write(tmp_path, change=norms, shards=shards)
    with pytest.raises(ValueError, match="does not use: model.layers.0.self_attn.k_norm.weight, "):
        llama.load(tmp_path)
    write(tmp_path, config={**HF, "num_hidden_layers": 3}, shards=shards)
    (tmp_path / "config.json").write_text(json.dumps(HF))
    with pytest.raises(ValueError, match="model.layers.2.input_layernorm.weight, .* and 1 more"):
        llama.load(tmp_path)


def test_tensors_that_the_index_does_not_list_are_named(tmp_path):
    write(tmp_path, shards=2, change={"model.layers.0.self_attn.sinks": np.ones(4, np.float32)})
    index = tmp_path / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    del files["model.layers.0.self_attn.sinks"]
    index.write_text(json.dumps({"weight_map": files}))
    with pytest.raises(ValueError, match="does not use: model.layers.0.self_attn.sinks"):
        llama.load(tmp_path)


def test_rotary_frequencies_in_the_file_are_skipped(tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    write(tmp_path, change={name: np.ones(2, np.float32)})
    assert llama.load(tmp_path)[0] == llama.LlamaConfig.from_hf(HF)


def test_a_tied_head_must_be_the_embedding(tmp_path):
    tied = {**HF, "tie_word_embeddings": True}
    tensors = write(tmp_path, config=tied)
    embedding = tensors["model.embed_tokens.weight"]
    write(tmp_path, config=tied, change={"lm_head.weight": embedding})
    assert llama.load(tmp_path)[1].lm_head is None
    write(tmp_path, config=tied, change={"lm_head.weight": embedding + 1})
    with pytest.raises(ValueError, match="which differ: set tie_word_embeddings to false"):
        llama.load(tmp_path)


def test_load_refuses_another_dtype(tmp_path):
    write(tmp_path)
    with pytest.raises(TypeError, match="dtype must be one of .*; got int8"):
        llama.load(tmp_path, np.int8)


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
