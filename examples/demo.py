"""A small random model from checkpoint to text, and the same tokens by dense attention.

    python examples/demo.py [folder]

Writes a checkpoint in Hugging Face's format (a Llama with random weights), loads it the way a user
would, continues prompts of different lengths through the paged cache, and judges each new token by
a plain decoder below: dense float32 attention, no pages, no kernels. Exits with 1 on disagreement.
"""

import dataclasses
import functools
import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.generate import generate
from jaxattn.models.config import DecoderConfig
from jaxattn.models.rope_scaling import Llama3, RopeConfig
from jaxattn.models.weights import Params, load, sources

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "tie_word_embeddings": False,
    "eos_token_id": None,
}

PROMPTS = {  # prompt: new tokens
    "Pages": 48,
    "A cache is a pool of pages, and a request owns some of them, in any order.": 64,
    "One page. " * 40: 32,
    "The last page may be partly filled, ": 1,
}


def main(folder: Path) -> int:
    write_checkpoint(folder)
    device = jax.devices()[0]
    dtype = jnp.bfloat16 if device.platform == "gpu" else jnp.float32
    print(f"A random Llama in {folder}/, {dtype.__name__} on {device.device_kind}")

    config, params = load(folder, dtype)
    tokenizer = read_tokenizer(folder)
    prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    run = functools.partial(
        generate, params, config, prompts, max_new_tokens=list(PROMPTS.values()), prefill_chunk=64
    )
    first, result = run(), run()  # the first compiles, and loads the programs onto the device

    agree = True
    for prompt, new in zip(prompts, result.tokens, strict=True):
        same, gap, allowed = judge(params, config, prompt, new)
        agree &= gap <= allowed
        print(
            f"{len(prompt):4} prompt tokens, {len(new):2} new: dense attention picks {same} of them"
            + (f"; the others' logits are {gap:.2g} short of its own" if same < len(new) else "")
            + f" (allowed: {allowed:.2g})"
        )
        print(f"     {tokenizer.decode(new)[:60]!r}")
    print(dataclasses.replace(result, compile_s=first.compile_s).summary())
    print("Paged and dense attention agree." if agree else "Paged and dense attention DISAGREE.")
    return 0 if agree else 1


def judge(
    params: Params, config: DecoderConfig, prompt: list[int], new: list[int]
) -> tuple[int, float, float]:
    """Compares greedy tokens with what dense attention picks after the same tokens.

    Returns:
      how many of `new` dense float32 attention picks too; how far the logit of any other lies below
      the dense maximum; and how far it may. In float32 that is 1e-4. In bfloat16 two logits may
      trade places if both are off by the error e that dense attention itself makes in bfloat16:
      it is 2 e, with e measured here as the largest error of any logit.
    """
    tokens = jnp.asarray(prompt + new[:-1], jnp.int32)
    after = slice(len(prompt) - 1, None)
    dtype = params.embed_tokens.dtype
    exact = np.asarray(dense_logits(params, config, tokens, jnp.float32))[after]
    chosen = exact[np.arange(len(new)), new]
    allowed = 1e-4
    if dtype != jnp.float32:
        rounded = np.asarray(dense_logits(params, config, tokens, dtype))[after]
        allowed = 2 * float(np.abs(rounded - exact).max())
    same = exact.argmax(axis=-1) == np.asarray(new)
    return int(same.sum()), float((exact.max(axis=-1) - chosen).max()), allowed


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def dense_logits(
    params: Params, config: DecoderConfig, tokens: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """Logits float32 [t, vocab] of one request by a plain decoder that rounds to dtype."""
    t, d, kh = tokens.shape[0], config.head_dim, config.num_kv_heads
    group = config.num_qo_heads // kh
    params = jax.tree.map(lambda weight: weight.astype(dtype), params)
    matmul = functools.partial(jnp.einsum, precision="highest")

    def linear(x, layer):
        y = matmul("ti,oi->to", x, layer.weight)
        return y if layer.bias is None else y + layer.bias[None, :]

    def norm(x, weight):
        x32 = x.astype(jnp.float32)
        mean = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        normed = x32 / jnp.sqrt(mean + config.rms_norm_eps)
        return (normed * weight.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(
            dtype
        )

    def rotate(x, rope):
        angle = jnp.arange(t, dtype=jnp.float32)[:, None] * frequencies(rope, d)[None, :]
        cos, sin = jnp.cos(angle)[:, None, :], jnp.sin(angle)[:, None, :]
        x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(dtype)

    x = params.embed_tokens[tokens]
    for spec, layer in zip(config.layers, params.layers, strict=True):
        qkv = linear(norm(x, layer.input_norm), layer.qkv_proj).reshape(t, -1, d)
        q, k, v = jnp.split(qkv, (group * kh, group * kh + kh), axis=1)
        if layer.q_norm is not None:
            q, k = norm(q, layer.q_norm), norm(k, layer.k_norm)
        q, k = rotate(q, spec.rope), jnp.repeat(rotate(k, spec.rope), group, axis=1)
        scores = matmul("thd,shd->hts", q, k).astype(jnp.float32) / math.sqrt(d)
        causal = jnp.tril(jnp.ones((t, t), bool))[None, :, :]
        p = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1).astype(dtype)
        o = matmul("hts,shd->thd", p, jnp.repeat(v, group, axis=1))
        x = x + linear(o.reshape(t, -1), layer.o_proj)
        gate_up_proj, down_proj = layer.feed_forward
        gate, up = jnp.split(linear(norm(x, layer.feed_forward_norm), gate_up_proj), 2, axis=1)
        x = x + linear(jax.nn.silu(gate) * up, down_proj)
    head = params.embed_tokens if params.lm_head is None else params.lm_head
    return matmul("ti,oi->to", norm(x, params.norm), head).astype(jnp.float32)


def frequencies(rope: RopeConfig, d: int) -> jax.Array:
    """Rotary frequencies [d / 2], with Llama 3.1's scaling of the long wavelengths."""
    freq = rope.rope_theta ** (-np.arange(0, d, 2, dtype=np.float64) / d)
    if isinstance(scaling := rope.scaling, Llama3):
        turns = scaling.old_context_len * freq / (2 * np.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        freq *= smooth + (1 - smooth) / scaling.factor
    return jnp.asarray(freq, jnp.float32)


def write_checkpoint(folder: Path, config: dict = CONFIG, seed: int = 0) -> None:
    """Writes config.json, model.safetensors (random, bfloat16) and tokenizer.json."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {**config, "vocab_size": tokenizer.get_vocab_size()}
    (folder / "config.json").write_text(json.dumps(config, indent=2))

    rng = np.random.default_rng(seed)
    weights = {}
    for source in jax.tree.leaves(sources(DecoderConfig.from_hf(config))):
        for name, shape in source.tensors:
            values = rng.standard_normal(shape, np.float32)
            if name.endswith("norm.weight"):
                values = 1 + values / 8
            elif name.endswith("proj.weight") or name == "lm_head.weight":
                values /= math.sqrt(shape[-1])
            weights[name] = values.astype(jnp.bfloat16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def train_tokenizer():
    """A byte-level BPE tokenizer, trained on this file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    return tokenizer


def read_tokenizer(folder: Path):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output")))
