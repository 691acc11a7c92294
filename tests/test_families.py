"""What `config.json` says of Gemma and of windows, in both of transformers' styles, and what is refused by name.

Llama's entries, and what all families share, are tested in test_llama_config.py and test_checkpoints.py;
transformers' defaults in test_hf_parity.py.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import demo
from jaxattn.generate import main
from jaxattn.models.config import DecoderConfig
from jaxattn.models.feed_forward import Gated
from jaxattn.models.layer_spec import LayerSpec
from jaxattn.models.rope_scaling import Linear, RopeConfig
from jaxattn.models.weights import load, sources

GEMMA2_9B = dict(
    architectures=["Gemma2ForCausalLM"], attention_bias=False, attention_dropout=0.0,
    attn_logit_softcapping=50.0, bos_token_id=2, cache_implementation="hybrid", eos_token_id=1,
    final_logit_softcapping=30.0, head_dim=256, hidden_act="gelu_pytorch_tanh",
    hidden_activation="gelu_pytorch_tanh", hidden_size=3584, initializer_range=0.02,
    intermediate_size=14336, max_position_embeddings=8192, model_type="gemma2",
    num_attention_heads=16, num_hidden_layers=42, num_key_value_heads=8, pad_token_id=0,
    query_pre_attn_scalar=256, rms_norm_eps=1e-06, rope_theta=10000.0, sliding_window=4096,
    sliding_window_size=4096, torch_dtype="float32", transformers_version="4.42.0.dev0",
    use_cache=True, vocab_size=256000,
)  # fmt: skip
GEMMA3_1B = dict(
    architectures=["Gemma3ForCausalLM"], attention_bias=False, attention_dropout=0.0,
    attn_logit_softcapping=None, bos_token_id=2, cache_implementation="hybrid",
    eos_token_id=[1, 106], final_logit_softcapping=None, head_dim=256,
    hidden_activation="gelu_pytorch_tanh", hidden_size=1152, initializer_range=0.02,
    intermediate_size=6912, max_position_embeddings=32768, model_type="gemma3_text",
    num_attention_heads=4, num_hidden_layers=26, num_key_value_heads=1, pad_token_id=0,
    query_pre_attn_scalar=256, rms_norm_eps=1e-06, rope_local_base_freq=10000, rope_scaling=None,
    rope_theta=1000000, sliding_window=512, sliding_window_pattern=6, torch_dtype="bfloat16",
    transformers_version="4.50.0.dev0", use_cache=True, vocab_size=262144,
)  # fmt: skip
GEMMA3_27B = dict(
    architectures=["Gemma3ForConditionalGeneration"], boi_token_index=255999,
    eoi_token_index=256000, eos_token_id=[1, 106], image_token_index=262144,
    initializer_range=0.02, mm_tokens_per_image=256, model_type="gemma3",
    text_config=dict(
        head_dim=128, hidden_size=5376, intermediate_size=21504, model_type="gemma3_text",
        num_attention_heads=32, num_hidden_layers=62, num_key_value_heads=16,
        query_pre_attn_scalar=168, rope_scaling=dict(factor=8.0, rope_type="linear"),
        sliding_window=1024,
    ),
    torch_dtype="bfloat16", transformers_version="4.50.0.dev0", vision_config=dict(image_size=896),
)  # fmt: skip


def test_gemma_2_as_it_was_published():
    mlp = Gated(14336, "gelu_pytorch_tanh")
    local, full = LayerSpec(mlp, RopeConfig(1e4), 4096), LayerSpec(mlp, RopeConfig(1e4))
    assert DecoderConfig.from_hf(GEMMA2_9B) == DecoderConfig(
        vocab_size=256000,
        hidden_size=3584,
        num_qo_heads=16,
        num_kv_heads=8,
        head_dim=256,
        rms_norm_eps=1e-6,
        max_position_embeddings=8192,
        layers=(local, full) * 21,
        tie_word_embeddings=True,
        norm_after=True,
        unit_offset=True,
        sm_scale=1 / 16,
        attention_soft_cap=50.0,
        logits_soft_cap=30.0,
        embedding_scale=3584**0.5,
        eos_token_ids=(1,),
    )


def test_gemma_3_as_it_was_published():
    small, large = DecoderConfig.from_hf(GEMMA3_1B), DecoderConfig.from_hf(GEMMA3_27B)
    local, full = RopeConfig(1e4), RopeConfig(1e6)
    windows = [512] * 5 + [None]
    assert [layer.window for layer in small.layers] == windows * 4 + [512] * 2
    assert {layer.rope for layer in small.layers if layer.window} == {local}
    assert {layer.rope for layer in small.layers if not layer.window} == {full}
    assert small.qk_norm and small.unit_offset and small.norm_after and small.tie_word_embeddings
    assert small.attention_soft_cap is small.logits_soft_cap is None
    # The model with images: its text model, by transformers' defaults where it says nothing.
    assert large.num_layers == 62 and large.windows == (None, 1024)
    assert large.ropes == (local, RopeConfig(1e6, Linear(8.0)))
    assert large.sm_scale == 168**-0.5 and large.vocab_size == 262208
    assert large.eos_token_ids == (1, 106) and large.tie_word_embeddings


def test_entries_that_change_nothing_pass_beside_a_text_config_too():
    full = GEMMA3_27B | dict(is_encoder_decoder=False, add_cross_attention=False, pruned_heads={})
    assert DecoderConfig.from_hf(full) == DecoderConfig.from_hf(GEMMA3_27B)


def test_both_styles_of_transformers_say_the_same():
    old = ("rope_local_base_freq", "rope_scaling", "rope_theta", "sliding_window_pattern")
    new = {key: value for key, value in GEMMA3_1B.items() if key not in old}
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 5
    new |= dict(
        layer_types=kinds[:26],
        _sliding_window_pattern=6,
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", rope_theta=1e6, factor=4.0),
            sliding_attention=dict(rope_type="default", rope_theta=1e4),
        ),
        use_bidirectional_attention=False,
        dtype="bfloat16",
    )
    scaled = GEMMA3_1B | dict(rope_scaling=dict(rope_type="linear", factor=4.0))
    assert DecoderConfig.from_hf(new) == DecoderConfig.from_hf(scaled)
    # A kind of layer without settings has transformers' own.
    del new["rope_parameters"]["sliding_attention"]
    assert DecoderConfig.from_hf(new) == DecoderConfig.from_hf(scaled)


@pytest.mark.parametrize(
    ("base", "change", "error", "message"),
    [
        (
            GEMMA3_1B,
            {"use_bidirectional_attention": True},
            NotImplementedError,
            "use_bidirectional_attention=True is not built",
        ),
        (
            GEMMA3_1B,
            {"attn_logit_softcapping": 50.0},
            NotImplementedError,
            "attn_logit_softcapping=50.0 is not built",
        ),
        (
            GEMMA2_9B,
            {"hidden_activation": "relu", "hidden_act": None},
            NotImplementedError,
            "hidden_activation='relu' is not built; supported: 'silu', 'gelu_pytorch_tanh'",
        ),
        (GEMMA2_9B, {"hidden_act": "silu"}, ValueError, "must be the same; got .*'hidden_act'"),
        (GEMMA2_9B, {"query_pre_attn_scalar": 0}, ValueError, "a positive number; got 0"),
        (GEMMA2_9B, {"final_logit_softcapping": "30"}, ValueError, "a positive number; got '30'"),
        (GEMMA3_1B, {"sliding_window": None}, ValueError, "its 22 sliding layers need"),
        (
            GEMMA2_9B,
            {"rope_local_base_freq": 1e4},
            NotImplementedError,
            "rope_local_base_freq=10000.0 is not built",
        ),
        (GEMMA2_9B, {"sliding_window_size": 512}, ValueError, "the same; got 4096 and 512"),
        (GEMMA2_9B, {"layer_types": ["full_attention"]}, ValueError, "must have 42 items"),
        (
            GEMMA3_1B,
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            ValueError,
            "must be settings of 'full_attention' and of 'sliding_attention'",
        ),
        (
            GEMMA3_1B,
            {"layer_types": ["full_attention"] * 26},
            ValueError,
            "sliding_window_pattern=6 and layer_types in config.json contradict",
        ),
        (
            GEMMA3_1B,
            {"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}},
            NotImplementedError,
            "rope_type='dynamic' is not built",
        ),
        (GEMMA3_1B, {"model_type": "gemma3n_text"}, ValueError, "the same model"),
        (GEMMA3_27B, {"text_config": None}, ValueError, "config.json has no 'text_config'"),
        (GEMMA3_27B, {"model_type": "gemma3_text"}, ValueError, "and a text_config of model_type"),
        (
            GEMMA3_27B,
            {"text_config": {"model_type": "gemma3n_text"}},
            ValueError,
            "got .*'gemma3n_text'",
        ),
        (
            GEMMA3_27B,
            {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}},
            ValueError,
            "tie_word_embeddings=True in config.json and False in its text_config",
        ),
        (GEMMA3_27B, {"is_encoder_decoder": True}, NotImplementedError, "is_encoder_decoder=True"),
        (GEMMA3_27B, {"audio_config": {}}, NotImplementedError, "audio_config={} is not built"),
        (
            GEMMA3_27B,
            {"text_config": {"altup_num_inputs": 4}},
            NotImplementedError,
            "altup_num_inputs=4 is not built",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) and len(value) < 3 else "",
)
def test_what_is_refused(base, change, error, message):
    DecoderConfig.from_hf(base)
    with pytest.raises(error, match=message):
        DecoderConfig.from_hf({**base, **change})


def test_norms_of_gemma_keep_what_16_bits_would_lose(tmp_path):
    """1 + w in float32, as transformers computes it, of weights that are stored in bfloat16."""
    save_file = pytest.importorskip("safetensors.numpy").save_file
    raw = GEMMA3_1B | dict(
        vocab_size=8, hidden_size=16, intermediate_size=8, num_hidden_layers=1, head_dim=8
    )
    small = 2.0**-9
    tensors = {
        name: np.full(shape, small, jnp.bfloat16)
        for source in jax.tree.leaves(sources(DecoderConfig.from_hf(raw)))
        for name, shape in source.tensors
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    _, params = load(tmp_path)
    layer = params.layers[0]
    for norm in (params.norm, layer.input_norm, layer.q_norm, layer.feed_forward_out_norm):
        assert norm.dtype == jnp.float32 and (norm == 1 + small).all()
    assert params.embed_tokens.dtype == layer.qkv_proj.weight.dtype == jnp.bfloat16


@pytest.mark.slow
def test_the_command_runs_a_gemma(tmp_path, capsys):
    """A checkpoint with windows, from its folder to text, beyond the window."""
    pytest.importorskip("safetensors")
    pytest.importorskip("tokenizers")
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, head_dim=16)
    gemma = GEMMA2_9B | sizes | dict(num_attention_heads=2, num_key_value_heads=1, sliding_window=5)
    demo.write_checkpoint(tmp_path, gemma | dict(sliding_window_size=5, eos_token_id=None))
    arguments = ["--model", str(tmp_path), "--prompt", "A page of a window", "--page-size", "4"]
    assert main([*arguments, "--max-new-tokens", "20", "--prefill-chunk", "4"]) == 0
    streamed, progress = capsys.readouterr()
    assert len(streamed) > 1 and "decode 19 tokens at" in progress
