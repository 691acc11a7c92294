"""Checkpoints good and bad: files, shards, dtypes, biases, and tensors that nobody uses."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import HF

from jaxattn.models import llama


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
