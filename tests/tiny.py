"""Tiny random models, and their logits through the paged cache a piece at a time."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import device_array, i32

import jaxattn as ja
from jaxattn.models import decoder
from jaxattn.models.config import DecoderConfig
from jaxattn.models.feed_forward import Gated
from jaxattn.models.layer_spec import LayerSpec
from jaxattn.models.linear import Source
from jaxattn.models.rope_scaling import Llama3, RopeConfig
from jaxattn.models.weights import Params, sources
from jaxattn.page_rings import allocate_pages, pages_of

ROPE = RopeConfig(10000.0, Llama3(4.0, 1.0, 4.0, 32))
CONFIG = DecoderConfig(
    vocab_size=256,
    hidden_size=64,
    num_qo_heads=6,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    max_position_embeddings=256,
    layers=(LayerSpec(Gated(96), ROPE),) * 2,
)


def random_params(config: DecoderConfig, dtype=jnp.float32, seed=0) -> Params:
    """Weights that give logits of order one; norms and biases are not trivial."""
    rng = np.random.default_rng(seed)

    def weight(source: Source) -> jax.Array:
        name = source.tensors[0][0]
        values = rng.standard_normal(source.shape)
        if name.endswith("norm.weight"):
            values = 1 + values / 8
        elif "embed" not in name:
            values /= np.sqrt(source.shape[-1])
        return device_array(values.astype(np.float32), source.dtype or dtype)

    return jax.tree.map(weight, sources(config))


def random_prompts(lengths, vocab_size=256, seed=0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


def paged_logits(
    params, config, requests, *, piece=None, decode=False, page_size=5, kv_dtype=None, backend=None
) -> list[np.ndarray]:
    """Logits [t_i, vocab] of each request's tokens, which pass through the paged cache together.

    Every round appends up to `piece` tokens of each request (default: all of them), by prefill, or,
    for `decode`, one by one. Layers that see a window have rings of pages, no larger than that needs.
    """
    lengths = [len(tokens) for tokens in requests]
    piece = 1 if decode else piece or max(lengths)
    width = -(-max(lengths) // page_size)
    owned = [[pages_of(n, page_size, w, min(piece, n)) for n in lengths] for w in config.windows]
    num_pages = [sum(pages) + 2 for pages in owned]
    block_tables = tuple(
        device_array(allocate_pages(lengths, page_size, n, max_pages=width, owned=pages))
        for n, pages in zip(num_pages, owned)
    )
    dtype = kv_dtype or params.embed_tokens.dtype
    caches = decoder.empty_caches(config, num_pages, page_size, dtype)
    # What no request owns must not matter.
    caches = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), caches)
    cos_sin_caches = decoder.rope_tables(config, max(lengths))
    capacity = len(requests) if decode else sum(min(piece, length) for length in lengths)
    run = jax.jit(
        _round,
        static_argnames=("config", "decode", "page_size", "backend"),
        # XLA rounds where the program says: on a GPU it would else carry 16-bit sums from layer to layer in float32.
        compiler_options={"xla_allow_excess_precision": False},
    )

    logits = [np.zeros((0, config.vocab_size), np.float32) for _ in requests]
    for begin in range(0, max(lengths), piece):
        parts = [tokens[begin : begin + piece] for tokens in requests]
        if decode:  # row i is request i's; a finished request is an empty one
            flat = [part[0] if part else 0 for part in parts]
            first_row = range(len(parts))
        else:
            flat = sum(parts, [])
            first_row = np.cumsum([0, *map(len, parts)])[:-1]
        tokens = i32(flat + [0] * (capacity - len(flat)))
        new = i32([len(part) for part in parts])
        kv_len = i32([begin + len(part) if part else 0 for part in parts])
        out, caches = run(
            params,
            tokens,
            new,
            kv_len,
            block_tables,
            caches,
            cos_sin_caches,
            config=config,
            decode=decode,
            page_size=page_size,
            backend=backend,
        )
        for i, (row, part) in enumerate(zip(first_row, parts, strict=True)):
            logits[i] = np.concatenate([logits[i], np.asarray(out)[row : row + len(part)]])
    return logits


def _round(
    params, tokens, new, kv_len, block_tables, caches, cos_sin_caches,
    *, config, decode, page_size, backend,
):  # fmt: skip
    rows = jnp.arange(tokens.size, dtype=jnp.int32)
    if decode:
        indptr = None
        positions, requests = jnp.maximum(kv_len - 1, 0), jnp.where(new > 0, rows, -1)
    else:
        indptr = jnp.pad(jnp.cumsum(new, dtype=jnp.int32), (1, 0))
        requests, positions = ja.get_batch_indices_positions(indptr, kv_len, tokens.size)
    batch = decoder.make_batch(
        config,
        tokens,
        positions,
        requests,
        block_tables,
        kv_len,
        page_size=page_size,
        qo_indptr=indptr,
    )
    return decoder.forward(params, config, batch, caches, cos_sin_caches, rows, backend=backend)


# The config.json of a tiny Llama.
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
