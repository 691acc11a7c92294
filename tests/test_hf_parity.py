"""Parity with Hugging Face's models, on checkpoints that transformers saved."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import paged_logits, random_prompts

from jaxattn.generate import Sizes, generate
from jaxattn.generator import Generator
from jaxattn.models.config import DecoderConfig
from jaxattn.models.weights import load

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what these libraries warn of on import is theirs
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=256,
    hidden_size=96,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.1,
    eos_token_id=None,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)


def _phi3(original):
    rng = np.random.default_rng(0)
    short, long = (rng.uniform(1, most, 4).tolist() for most in (2, 40))
    return transformers.Phi3Config(
        **SIZES,
        pad_token_id=None,
        sliding_window=37,
        original_max_position_embeddings=original,
        rope_parameters=dict(
            rope_type="longrope",
            rope_theta=1e4,
            short_factor=short,
            long_factor=long,
            partial_rotary_factor=0.5,
        ),
    )


MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **SIZES, head_dim=32, rope_parameters=LLAMA3, tie_word_embeddings=True
        )
    ),
    "llama_with_biases": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, head_dim=16, attention_bias=True, mlp_bias=True)
    ),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SIZES, head_dim=32, sliding_window=16)
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            **SIZES, head_dim=16, use_sliding_window=True, sliding_window=23, max_window_layers=1
        )
    ),
    # A dense layer, one of experts that are slow to agree (weights that do not add up to 1), a window.
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **SIZES,
            num_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=40,
            decoder_sparse_step=2,
            use_sliding_window=True,
            sliding_window=30,
        )
    ),
    "gpt_oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            **SIZES | dict(num_key_value_heads=3, max_position_embeddings=4096),
            head_dim=32,
            num_local_experts=6,
            num_experts_per_tok=2,
            sliding_window=14,
            swiglu_limit=0.5,
        )
    ),
    # Fused projections; a part of each head turns, by the factors of short contexts.
    "phi3": lambda: transformers.Phi3ForCausalLM(_phi3(original=256)),
    # Caps low enough to bend, an untied head, an odd number of KV heads, windows on the even layers.
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            **SIZES | dict(num_key_value_heads=3, tie_word_embeddings=False),
            head_dim=32,
            sliding_window=12,
            query_pre_attn_scalar=48,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        )
    ),
    # Two rotary embeddings, the global one scaled; every third layer is global.
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **SIZES | dict(num_hidden_layers=4),
            head_dim=16,
            sliding_window=9,
            sliding_window_pattern=3,
            query_pre_attn_scalar=24,
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e5),
                sliding_attention=dict(rope_type="default", rope_theta=1e3),
            ),
        )
    ),
}


NEEDED = ("architectures", "vocab_size", "hidden_size", "intermediate_size")
NEEDED += ("num_hidden_layers", "num_attention_heads")
ALL_DEFAULT = ("Gemma2", "Gemma3", "Qwen3Moe", "GptOss", "Phi3")


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3", *ALL_DEFAULT])
def test_their_configs_are_understood(name, tmp_path):
    theirs = getattr(transformers, f"{name}{'Text' * (name == 'Gemma3')}Config")()
    theirs.architectures = [f"{name}ForCausalLM"]
    theirs.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    config = DecoderConfig.from_hf(theirs.to_dict())
    assert config == DecoderConfig.from_hf(raw)
    assert config.num_kv_heads == theirs.num_key_value_heads
    assert config == DecoderConfig.from_hf(raw | {"architectures": None})
    windows = {"Mistral": (4096,), "Gemma2": (None, 4096), "Gemma3": (None, 4096)}
    windows |= {"GptOss": (None, 128)}
    assert config.windows == windows.get(name, (None,))
    # What a file leaves out is what they take it for, also where all is left out that may be.
    few = NEEDED[: 1 if name in ALL_DEFAULT else None]
    assert config == DecoderConfig.from_hf({key: raw[key] for key in few})
    for key in set(raw) - set(few) - {"layer_types", "rope_parameters"}:
        assert config == DecoderConfig.from_hf({k: v for k, v in raw.items() if k != key}), key


@pytest.fixture(scope="module", params=MODELS)
def models(request, tmp_path_factory):
    """(transformers' model, config, params) of one checkpoint."""
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    with torch.no_grad():  # transformers starts with norms of one and biases of zero
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, max_shard_size="100KB" if "qwen" in request.param else "1GB")
    assert (folder / "model.safetensors.index.json").exists() == ("qwen" in request.param)
    return model, *load(folder)


@torch.no_grad()
def theirs(model, tokens) -> np.ndarray:
    return model(torch.tensor([tokens])).logits[0].numpy()


@pytest.mark.parametrize(
    "how",
    [dict(), dict(piece=7), dict(decode=True)],
    ids=["prefill", "chunked_prefill", "decode"],
)
def test_logits(models, how):
    model, config, params = models
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    requests = random_prompts([3, 50, 17])
    logits = paged_logits(params, config, requests, **how)
    for ours, tokens in zip(logits, requests, strict=True):
        np.testing.assert_allclose(ours, theirs(model, tokens), atol=1e-4, rtol=0)


def test_greedy_tokens(models):
    model, config, params = models
    prompts = random_prompts([5, 70, 18])
    new = generate(params, config, prompts, max_new_tokens=64, prefill_chunk=13).tokens
    # If each token is their choice after the same tokens before it, theirs are the same.
    for prompt, tokens in zip(prompts, new, strict=True):
        logits = theirs(model, prompt + tokens[:-1])[len(prompt) - 1 :]
        assert logits.argmax(axis=-1).tolist() == tokens


def test_experts_may_be_stacked(tmp_path):
    model = MODELS["qwen3_moe"]()
    model.save_pretrained(tmp_path / "apart")
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    (apart, ours), (stacked, theirs) = (load(tmp_path / name) for name in ("apart", "stacked"))
    assert not apart.layers[1].feed_forward.stacked and stacked.layers[1].feed_forward.stacked
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_longrope_beyond_the_original_context(tmp_path):
    """Requests that outgrow 40 tokens take the long factors from their first token on, in every call."""
    torch.manual_seed(0)
    model = transformers.Phi3ForCausalLM(_phi3(original=40)).eval()
    model.save_pretrained(tmp_path)
    config, params = load(tmp_path)
    requests = random_prompts([41, 60])
    logits = paged_logits(params, config, requests, piece=9)
    for ours, tokens in zip(logits, requests, strict=True):
        np.testing.assert_allclose(ours, theirs(model, tokens), atol=1e-4, rtol=0)

    generator = Generator(params, config, Sizes(num_pages=16, max_context=128))
    for new in (4, 64, 4):  # within the original context, beyond it, and within it again
        (tokens,) = generator.generate([requests[0][:33]], max_new_tokens=new).tokens
        logits = theirs(model, requests[0][:33] + tokens[:-1])
        assert logits[32:].argmax(axis=-1).tolist() == tokens


def test_the_text_model_of_one_that_takes_images(tmp_path):
    torch.manual_seed(0)
    text = SIZES | dict(head_dim=16, sliding_window=9, layer_types=None)
    text |= dict(num_hidden_layers=1, query_pre_attn_scalar=24)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, image_size=28)
    model = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config=text, vision_config=vision | dict(num_attention_heads=2, patch_size=14)
        )
    ).eval()
    model.save_pretrained(tmp_path)
    config, params = load(tmp_path)
    (tokens,) = requests = random_prompts([30])
    (ours,) = paged_logits(params, config, requests)
    np.testing.assert_allclose(ours, theirs(model, tokens), atol=1e-4, rtol=0)
