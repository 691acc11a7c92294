"""What a Llama's config.json says, from the settings of each family's models to what is refused."""

import re

import pytest
from tiny import HF

from jaxattn.models import llama
from jaxattn.models.feed_forward import Gated
from jaxattn.models.layer_spec import LayerSpec
from jaxattn.models.rope_scaling import Linear, Llama3, RopeConfig


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
