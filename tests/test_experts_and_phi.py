"""Configs and checkpoints of Qwen3-MoE, gpt-oss and Phi, as published and as transformers 5 writes them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxattn.models.config import DecoderConfig
from jaxattn.models.feed_forward import Gated
from jaxattn.models.moe import ClampedSwiglu
from jaxattn.models.rope_scaling import LongRope, RopeConfig, Yarn
from jaxattn.models.stored_experts import GptOssExperts, Qwen3Experts
from jaxattn.models.weights import load, sources

YARN = dict(
    rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
    original_max_position_embeddings=4096,
)  # fmt: skip
GPT_OSS = dict(
    architectures=["GptOssForCausalLM"], model_type="gpt_oss", attention_bias=True, attention_dropout=0.0,
    eos_token_id=200002, experts_per_token=4, head_dim=64, hidden_act="silu", hidden_size=2880,
    initial_context_length=4096, initializer_range=0.02, intermediate_size=2880,
    layer_types=["sliding_attention", "full_attention"] * 12, max_position_embeddings=131072,
    num_attention_heads=64, num_experts_per_tok=4, num_hidden_layers=24, num_key_value_heads=8,
    num_local_experts=32, output_router_logits=False, pad_token_id=199999,
    quantization_config=dict(
        modules_to_not_convert=["model.layers.*.self_attn", "lm_head"], quant_method="mxfp4"
    ),
    rms_norm_eps=1e-5, rope_scaling=YARN, rope_theta=150000, router_aux_loss_coef=0.9, sliding_window=128,
    swiglu_limit=7.0, tie_word_embeddings=False, use_cache=True, vocab_size=201088,
)  # fmt: skip
QWEN3_MOE = dict(
    architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", attention_bias=False, decoder_sparse_step=1,
    eos_token_id=151645, head_dim=128, hidden_act="silu", hidden_size=2048, intermediate_size=6144,
    max_position_embeddings=40960, max_window_layers=48, mlp_only_layers=[], moe_intermediate_size=768,
    norm_topk_prob=True, num_attention_heads=32, num_experts=128, num_experts_per_tok=8,
    num_hidden_layers=48, num_key_value_heads=4, output_router_logits=False, rms_norm_eps=1e-6,
    rope_scaling=None, rope_theta=1000000.0, router_aux_loss_coef=0.001, sliding_window=None,
    tie_word_embeddings=False, use_sliding_window=False, vocab_size=151936,
)  # fmt: skip
FACTORS = dict(short_factor=[1.0] * 48, long_factor=[1, 1.1182, *[32.0] * 46])
PHI4_MINI = dict(
    architectures=["Phi3ForCausalLM"], model_type="phi3", attention_bias=False, attention_dropout=0.0,
    auto_map=dict(AutoConfig="configuration_phi3.Phi3Config", AutoTokenizer="Xenova/gpt-4o"),
    bos_token_id=199999, embd_pdrop=0.0, eos_token_id=199999, full_attn_mod=1, hidden_act="silu", hidden_size=3072,
    initializer_range=0.02, intermediate_size=8192, interpolate_factor=1, lm_head_bias=False,
    max_position_embeddings=131072, mlp_bias=False, num_attention_heads=24, num_hidden_layers=32,
    num_key_value_heads=8, original_max_position_embeddings=4096, partial_rotary_factor=0.75, resid_pdrop=0.0,
    rms_norm_eps=1e-5, rope_scaling=dict(type="longrope", **FACTORS), rope_theta=10000.0, sliding_window=262144,
    tie_word_embeddings=True, vocab_size=200064,
)  # fmt: skip


def without(raw, *names, **more):
    return {name: value for name, value in raw.items() if name not in names} | more


def test_what_qwen3_coder_says_beside():
    more = dict(qkv_bias=False, shared_expert_intermediate_size=0, use_qk_norm=True)
    assert DecoderConfig.from_hf(QWEN3_MOE | more) == DecoderConfig.from_hf(QWEN3_MOE)


def test_gpt_oss_as_published():
    config = DecoderConfig.from_hf(GPT_OSS)
    experts = GptOssExperts(32, 4, 2880, activation=ClampedSwiglu(1.702, 7.0), mxfp4=True)
    rope = RopeConfig(150000.0, Yarn(32.0, 4096, 32.0, 1.0, truncate=False))
    assert {layer.feed_forward for layer in config.layers} == {experts}
    assert [layer.window for layer in config.layers] == [128, None] * 12
    assert config.ropes == (rope,) and config.sinks and config.qkv_bias and config.o_bias
    assert (config.num_qo_heads, config.num_kv_heads, config.head_dim) == (64, 8, 64)

    newer = without(
        GPT_OSS, "rope_scaling", "rope_theta", "experts_per_token", "initial_context_length"
    )
    newer |= dict(rope_parameters=dict(YARN, rope_theta=150000.0), swiglu_alpha=1.702)
    assert DecoderConfig.from_hf(newer) == config
    # What transformers takes where an entry is missing.
    fewer = without(
        GPT_OSS,
        "rope_scaling",
        "rope_theta",
        "layer_types",
        "sliding_window",
        "swiglu_limit",
        "head_dim",
    )
    assert DecoderConfig.from_hf(without(fewer, "attention_bias", "rms_norm_eps")) == config
    # The tensors say whether they are MXFP4.
    plain = DecoderConfig.from_hf(GPT_OSS, ["model.layers.0.mlp.experts.gate_up_proj"])
    assert not plain.layers[0].feed_forward.mxfp4


def test_qwen3_moe_as_published():
    config = DecoderConfig.from_hf(QWEN3_MOE)
    experts = Qwen3Experts(128, 8, 768, normalized=True)
    assert {layer.feed_forward for layer in config.layers} == {experts}
    assert config.qk_norm and config.windows == (None,) and config.ropes == (RopeConfig(1e6),)
    newer = without(QWEN3_MOE, "rope_theta", "rope_scaling", "num_experts", "max_window_layers")
    newer |= dict(num_local_experts=128, rope_parameters=dict(rope_type="default", rope_theta=1e6))
    assert DecoderConfig.from_hf(newer) == config

    mixed = QWEN3_MOE | dict(
        num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3], norm_topk_prob=None
    )
    layers = [layer.feed_forward for layer in DecoderConfig.from_hf(mixed).layers]
    experts = Qwen3Experts(128, 8, 768, normalized=False)
    assert layers == [Gated(6144), experts, Gated(6144), Gated(6144), Gated(6144), experts]


def test_phi_as_published():
    config = DecoderConfig.from_hf(PHI4_MINI)
    factors = [tuple(map(float, FACTORS[f"{x}_factor"])) for x in ("short", "long")]
    assert config.ropes == (RopeConfig(10000.0, LongRope(32.0, 4096, *factors), 96),)
    assert config.windows == (262144,) and config.tie_word_embeddings and config.fused_qkv
    assert {layer.feed_forward for layer in config.layers} == {Gated(8192, fused=True)}
    inside = dict(FACTORS, rope_type="longrope", rope_theta=1e4, partial_rotary_factor=0.75)
    newer = without(
        PHI4_MINI, "rope_scaling", "rope_theta", "partial_rotary_factor", rope_parameters=inside
    )
    assert DecoderConfig.from_hf(newer) == config
    older = PHI4_MINI | dict(
        rope_scaling=dict(type="su", **FACTORS)
    )  # and "yarn" is Phi's name for it too
    assert DecoderConfig.from_hf(older) == config
    plain = DecoderConfig.from_hf(PHI4_MINI | dict(rope_scaling=None, sliding_window=2047))
    assert plain.ropes == (RopeConfig(10000.0, None, 96),) and plain.windows == (2047,)


@pytest.mark.parametrize(
    "error, message, raw, change",
    [
        (NotImplementedError, "quant_method='fp8'", GPT_OSS, dict(quantization_config=dict(quant_method="fp8"))),
        (
            NotImplementedError, "group_size=64",
            GPT_OSS, dict(quantization_config=dict(quant_method="mxfp4", group_size=64)),
        ),
        (NotImplementedError, "quantization_config", QWEN3_MOE, dict(quantization_config=dict(quant_method="mxfp4"))),
        (ValueError, "num_experts_per_tok and experts_per_token", GPT_OSS, dict(experts_per_token=2)),
        (ValueError, "multiples of 32 where weights are MXFP4", GPT_OSS, dict(intermediate_size=2896)),
        (NotImplementedError, "hidden_act='gelu'", GPT_OSS, dict(hidden_act="gelu")),
        (ValueError, "experts_per_token=33", GPT_OSS, dict(num_experts_per_tok=33, experts_per_token=33)),
        (ValueError, "beta_fast must be at least", GPT_OSS, dict(rope_scaling=dict(YARN, beta_fast=0.5))),
        (NotImplementedError, "ramp=3", GPT_OSS, dict(rope_scaling=dict(YARN, ramp=3))),
        (ValueError, "rope_scaling has no 'factor'", GPT_OSS, dict(rope_scaling=dict(rope_type="yarn"))),
        (ValueError, "one number of experts", QWEN3_MOE, dict(num_local_experts=64)),
        (NotImplementedError, "shared_experts=1", QWEN3_MOE, dict(shared_experts=1)),
        (NotImplementedError, "use_qk_norm=False", QWEN3_MOE, dict(use_qk_norm=False)),
        (NotImplementedError, "expert_intermediate_size=9", QWEN3_MOE, dict(shared_expert_intermediate_size=9)),
        (ValueError, "mlp_only_layers .* list of integers", QWEN3_MOE, dict(mlp_only_layers=[-1])),
        (NotImplementedError, "partial_rotary_factor=0.5", QWEN3_MOE, dict(partial_rotary_factor=0.5)),
        (ValueError, "short_factor must have .* 64 numbers; got 48", PHI4_MINI, dict(partial_rotary_factor=1.0)),
        (ValueError, "rotary_dim must be even", PHI4_MINI, dict(partial_rotary_factor=0.51)),
        (NotImplementedError, "rope_type='linear'", PHI4_MINI, dict(rope_scaling=dict(type="linear", factor=2.0))),
        (
            ValueError, "original_max_position_embeddings .* got 4096 and 8192", PHI4_MINI,
            dict(rope_scaling=dict(type="longrope", original_max_position_embeddings=8192, **FACTORS)),
        ),
        (NotImplementedError, "auto_map to .*Mine", PHI4_MINI, dict(auto_map=dict(AutoConfig="a.MineConfig"))),
        (NotImplementedError, "lm_head_bias=True", PHI4_MINI, dict(lm_head_bias=True)),
    ],
)  # fmt: skip
def test_what_would_be_another_model_is_refused(error, message, raw, change):
    with pytest.raises(error, match=message):
        DecoderConfig.from_hf(raw | change)


# The elements E2M1, by their four bits.
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
E2M1 += [-x for x in E2M1]

TINY = GPT_OSS | dict(
    hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    head_dim=16, num_local_experts=3, num_experts_per_tok=2, experts_per_token=2, vocab_size=40,
    layer_types=["full_attention"], eos_token_id=1,
)  # fmt: skip


def test_mxfp4_is_dequantised_while_loading(tmp_path):
    rng = np.random.default_rng(0)
    prefix, e, hidden, inner = "model.layers.0.mlp.experts.", 3, 64, 32
    plain, packed = {}, {}
    for name, out, size in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
        nibbles = rng.integers(0, 16, (e, out, size // 32, 16, 2))
        scales = rng.integers(120, 130, (e, out, size // 32))
        low, high = nibbles[..., 0], nibbles[..., 1]
        packed[f"{prefix}{name}_blocks"] = (low + 16 * high).astype(np.uint8)
        packed[f"{prefix}{name}_scales"] = scales.astype(np.uint8)
        values = np.take(E2M1, nibbles) * np.exp2(scales - 127.0)[..., None, None]
        stored = values.reshape(e, out, size).swapaxes(1, 2)  # bf16 checkpoints are [e, in, out]
        plain[prefix + name] = np.ascontiguousarray(stored, jnp.bfloat16)
    config = DecoderConfig.from_hf(TINY, plain)
    others = {
        name: rng.standard_normal(shape).astype(jnp.bfloat16)
        for source in jax.tree.leaves(sources(config))
        for name, shape in source.tensors
        if name not in plain
    }
    trees = []
    for i, experts in enumerate((plain, packed)):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(TINY))
        save_file(others | experts, folder / "model.safetensors")
        loaded, params = load(folder)
        assert loaded.layers[0].feed_forward.mxfp4 == (experts is packed)
        trees.append(params)
    jax.tree.map(np.testing.assert_array_equal, *trees)

    # Gates and ups come in turn, and are stacked here.
    weights = trees[1].layers[0].feed_forward
    stored = plain[prefix + "gate_up_proj"]
    np.testing.assert_array_equal(weights.gate_up_proj.weight[2, 5], stored[2, :, 10])
    np.testing.assert_array_equal(weights.gate_up_proj.weight[2, inner + 5], stored[2, :, 11])
    bias = others[prefix + "gate_up_proj_bias"]
    np.testing.assert_array_equal(weights.gate_up_proj.bias[1, inner + 5], bias[1, 11])
    np.testing.assert_array_equal(
        weights.down_proj.weight[1, 7], plain[prefix + "down_proj"][1, :, 7]
    )

    save_file(
        others | packed | {f"{prefix}down_proj_scales": np.ones((e, hidden, 1), np.int8)},
        folder / "model.safetensors",
    )
    with pytest.raises(TypeError, match="down_proj_scales' must be one of uint8; got int8"):
        load(folder)
