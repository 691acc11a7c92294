"""Tiny random models, and their logits through the paged cache a piece at a time."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxattn as ja
from jaxattn.models import llama

CONFIG = llama.LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_qo_heads=6,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    max_position_embeddings=256,
    rope=llama.RopeConfig(10000.0, 4.0, 1.0, 4.0, 32),
)


def random_params(config: llama.LlamaConfig, dtype=jnp.float32, seed=0) -> llama.Params:
    """Weights that give logits of order one; norms and biases are not trivial."""
    rng = np.random.default_rng(seed)

    def weight(source: llama.Source) -> jax.Array:
        (name, shape), *more = source.tensors
        values = rng.standard_normal((shape[0] + sum(s[0] for _, s in more), *shape[1:]))
        if name.endswith("norm.weight"):
            values = 1 + values / 8
        elif "embed" not in name:
            values /= np.sqrt(shape[-1])
        return jnp.asarray(values.astype(np.float32)).astype(dtype)

    return jax.tree.map(weight, llama.sources(config))


def random_prompts(lengths, vocab_size=256, seed=0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


def paged_logits(
    params, config, requests, *, piece=None, decode=False, page_size=5, kv_dtype=None, backend=None
) -> list[np.ndarray]:
    """Logits [t_i, vocab] of each request's tokens, which pass through the paged cache together.

    Every round appends up to `piece` tokens of each request (default: all of them), by prefill, or,
    for `decode`, one by one.
    """
    lengths = [len(tokens) for tokens in requests]
    piece = 1 if decode else piece or max(lengths)
    width = -(-max(lengths) // page_size)
    pages = np.random.default_rng(0).permutation(len(requests) * width + 2)
    block_table = jnp.asarray(pages[:-2].reshape(len(requests), width), jnp.int32)
    dtype = kv_dtype or params.embed_tokens.dtype
    caches = llama.empty_caches(config, len(pages), page_size, dtype)
    # What no request owns must not matter.
    caches = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), caches)
    cos_sin_cache = llama.rope_table(config, max(lengths))
    capacity = len(requests) if decode else sum(min(piece, length) for length in lengths)
    run = jax.jit(_round, static_argnames=("config", "decode", "page_size", "backend"))

    logits = [np.zeros((0, config.vocab_size), np.float32) for _ in requests]
    for begin in range(0, max(lengths), piece):
        parts = [tokens[begin : begin + piece] for tokens in requests]
        if decode:  # row i is request i's; a finished request is an empty one
            flat = [part[0] if part else 0 for part in parts]
            first_row = range(len(parts))
        else:
            flat = sum(parts, [])
            first_row = np.cumsum([0, *map(len, parts)])[:-1]
        tokens = jnp.asarray(flat + [0] * (capacity - len(flat)), jnp.int32)
        new = jnp.asarray([len(part) for part in parts], jnp.int32)
        kv_len = jnp.asarray([begin + len(part) if part else 0 for part in parts], jnp.int32)
        out, caches = run(
            params,
            tokens,
            new,
            kv_len,
            block_table,
            caches,
            cos_sin_cache,
            config=config,
            decode=decode,
            page_size=page_size,
            backend=backend,
        )
        for i, (row, part) in enumerate(zip(first_row, parts, strict=True)):
            logits[i] = np.concatenate([logits[i], np.asarray(out)[row : row + len(part)]])
    return logits


def _round(
    params, tokens, new, kv_len, block_table, caches, cos_sin_cache,
    *, config, decode, page_size, backend,
):  # fmt: skip
    table = ja.PageTable.from_block_table(block_table, kv_len, page_size)
    heads = dict(
        page_size=page_size, num_qo_heads=config.num_qo_heads, num_kv_heads=config.num_kv_heads
    )
    rows = jnp.arange(tokens.size, dtype=jnp.int32)
    if decode:
        plan = ja.plan_decode(table, **heads)
        positions, requests = jnp.maximum(kv_len - 1, 0), jnp.where(new > 0, rows, -1)
    else:
        indptr = jnp.pad(jnp.cumsum(new, dtype=jnp.int32), (1, 0))
        plan = ja.plan_prefill(indptr, table, num_qo_tokens=tokens.size, **heads)
        requests, positions = ja.get_batch_indices_positions(indptr, kv_len, tokens.size)
    batch = llama.Batch(tokens, positions, requests, table, plan)
    return llama.forward(params, config, batch, caches, cos_sin_cache, rows, backend=backend)
