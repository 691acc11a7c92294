"""A decoder on jaxattn's ops: pure functions over a tree of weights; the config says what each layer does.

    x = embed(tokens)
    each layer:  x += norm'(o_proj(attention(rope(qkv_proj(norm(x))))))
                 x += norm'(feed_forward(norm(x)))
    logits = lm_head(norm(x))

norm' is there in some models only. A sum and the norm that follows it are one op, so the code carries pairs
(normed, residual) and a layer ends with the next layer's norm. Prefill and decode are one `forward` over ragged tokens;
the plan says which attention runs. Layers that see a window have page tables, and caches, of their own.

Axes: t tokens, b requests, h query heads, kh KV heads, d head dim.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxattn.append import rope_append_paged_kv_cache
from jaxattn.attention import paged_decode, paged_prefill
from jaxattn.checks import check_positive
from jaxattn.decode_plan import plan_decode
from jaxattn.kv_cache import PagedKVCache
from jaxattn.kv_scales import FP8_DTYPES
from jaxattn.models.config import DecoderConfig
from jaxattn.models.layer_spec import LayerSpec
from jaxattn.models.linear import matmul
from jaxattn.models.weights import Layer, Params
from jaxattn.norm import fused_add_rmsnorm, rmsnorm
from jaxattn.page_table import PageTable
from jaxattn.plan import AttentionPlan
from jaxattn.prefill_plan import plan_prefill
from jaxattn.rope import precompute_freqs_cis

Caches = tuple[PagedKVCache, ...]


def empty_caches(
    config: DecoderConfig,
    num_pages: int | Sequence[int],
    page_size: int,
    dtype: jax.typing.DTypeLike,
) -> Caches:
    """One empty cache per layer.

    Args:
      config: from `load`.
      num_pages: of every layer's cache, or, for each of `config.windows`, of its layers'.
      page_size: tokens a page.
      dtype: the weights', or a float8, then with a scale for each token and head.

    Raises:
      ValueError: not one number of pages for each window, or one that is not positive.
    """
    windows = config.windows
    counts = list(num_pages) if isinstance(num_pages, Sequence) else [num_pages] * len(windows)
    _check_kinds(config, num_pages=counts)
    scales = "token" if jnp.dtype(dtype).name in FP8_DTYPES else None
    page = (page_size, config.num_kv_heads, config.head_dim)
    pages = dict(zip(windows, counts))
    return tuple(
        PagedKVCache.zeros(pages[layer.window], *page, dtype, scales=scales)
        for layer in config.layers
    )


def check_context(config: DecoderConfig, max_context: int) -> None:
    """Raises ValueError unless the model was made for requests of up to `max_context` tokens."""
    check_positive(max_context=max_context)
    if max_context > config.max_position_embeddings:
        raise ValueError(
            f"a context of {max_context} tokens exceeds {config.max_position_embeddings=}: "
            "shorten the prompt or generate fewer tokens"
        )


def rope_tables(
    config: DecoderConfig, max_context: int, *, longest: int | None = None
) -> tuple[Array, ...]:
    """Cosines and sines of positions 0 .. max_context - 1.

    Args:
      config: from `load`.
      max_context: positions.
      longest: tokens of the longest context that will use the tables; default max_context. LongRoPE has other
        frequencies for contexts beyond the length that its model began with, and keys in a cache keep theirs.

    Returns:
      float32 [max_context, rotary_dim] for each of `config.ropes`.

    Raises:
      ValueError: as `check_context`.
    """
    check_context(config, max_context)

    def table(frequencies: Any, factor: float) -> Array:
        return factor * precompute_freqs_cis(config.head_dim, max_context, frequencies=frequencies)

    of_context = config.head_dim, longest or max_context
    return tuple(table(*rope.frequencies(*of_context)) for rope in config.ropes)


class Batch(NamedTuple):
    """What one call of the model works on: ragged tokens, and the pages they belong to. `make_batch` makes one."""

    tokens: Array  # int32 [t]
    positions: Array  # int32 [t], each token's position in its request
    batch_indices: Array  # int32 [t], each token's request; -1 for padding, which is not appended
    # For each of `config.windows`: the pages of b requests, these tokens already counted,
    page_tables: tuple[PageTable, ...]
    plans: tuple[AttentionPlan, ...]  # and its plan; for decode's, token i is request i's only one

    @property
    def is_decode(self) -> bool:
        return self.plans[0].is_decode


def make_batch(
    config: DecoderConfig,
    tokens: Array,
    positions: Array,
    batch_indices: Array,
    block_tables: Sequence[Array],
    kv_len: Array,
    *,
    page_size: int,
    qo_indptr: Array | None = None,
) -> Batch:
    """A `Batch` with a page table and a plan for each window: what the layers of a step share.

    Args:
      config: from `load`.
      tokens, positions, batch_indices: int32 [t].
      block_tables: int32 [b, w] for each of `config.windows`: row i names request i's pages in order. Pages that lie
        behind the window of a request's first token in the batch are not read, and their entries may name others'.
      kv_len: int32 [b], tokens of each request, these included; 0 for one that takes no part.
      page_size: tokens a page.
      qo_indptr: int32 [b + 1], request i's tokens are `qo_indptr[i]:qo_indptr[i + 1]`; None for decode, where token i
        is request i's only one.
    """
    _check_kinds(config, block_tables=block_tables)
    plan: Any = plan_decode
    if qo_indptr is not None:
        plan = functools.partial(plan_prefill, qo_indptr, num_qo_tokens=tokens.shape[0])
    tables = [PageTable.from_block_table(table, kv_len, page_size) for table in block_tables]
    heads = dict(num_qo_heads=config.num_qo_heads, num_kv_heads=config.num_kv_heads)
    plans = [
        plan(page_table=table, window_left=_window_left(window), **heads)
        for table, window in zip(tables, config.windows, strict=True)
    ]
    return Batch(tokens, positions, batch_indices, tuple(tables), tuple(plans))


def _window_left(window: int | None) -> int | None:
    """A plan counts the keys before a query's own position."""
    return None if window is None else window - 1


def forward(
    params: Params,
    config: DecoderConfig,
    batch: Batch,
    caches: Caches,
    cos_sin_caches: tuple[Array, ...],
    rows: Array,
    *,
    backend: str | None = None,
) -> tuple[Array, Caches]:
    """Appends a batch's tokens to the caches and computes the logits that follow some of them.

    Args:
      params, config: from `load`.
      batch: t tokens of b requests.
      caches: one per layer, from `empty_caches`; updated in place where donated.
      cos_sin_caches: from `rope_tables`.
      rows: int32 [r], the tokens whose logits are wanted.
      backend: "triton", "xla", "interpret" or None, for every op.

    Returns:
      (logits float32 [r, vocab], caches).

    Raises:
      ValueError: page tables, plans or rope tables that are not one for each kind of layer, or a plan whose window is
        not that of its layers.
    """
    _check_kinds(config, page_tables=batch.page_tables, plans=batch.plans)
    for window, plan in zip(config.windows, batch.plans):
        got = plan.spec.visible.window_left
        if got != _window_left(window):
            raise ValueError(
                f"the plans of a batch must be for config.windows, {config.windows}; that of {window} has "
                f"window_left={got}: use make_batch"
            )
    of_window = dict(zip(config.windows, zip(batch.page_tables, batch.plans)))
    of_rope = dict(zip(config.ropes, cos_sin_caches, strict=True))

    residual = params.embed_tokens[batch.tokens]
    if config.embedding_scale is not None:
        residual = residual * jnp.asarray(config.embedding_scale, residual.dtype)
    x = rmsnorm(residual, params.layers[0].input_norm, config.rms_norm_eps, backend=backend)
    next_norms = [layer.input_norm for layer in params.layers[1:]] + [params.norm]
    updated = []
    for spec, layer, next_norm, cache in zip(
        config.layers, params.layers, next_norms, caches, strict=True
    ):
        page_table, plan = of_window[spec.window]
        of_tokens = _OfTokens(
            batch.batch_indices, batch.positions, page_table, plan, of_rope[spec.rope]
        )
        x, residual, cache = _layer(
            layer, next_norm, x, residual, of_tokens, cache, spec, config, backend
        )
        updated.append(cache)
    head = params.embed_tokens if params.lm_head is None else params.lm_head
    logits = matmul(x[rows], head, jnp.float32)
    if cap := config.logits_soft_cap:
        logits = cap * jnp.tanh(logits / cap)
    return logits, tuple(updated)


def _check_kinds(config: DecoderConfig, **given: Any) -> None:
    for name, x in given.items():
        if not isinstance(x, list | tuple) or len(x) != len(config.windows):
            raise ValueError(
                f"{name} must be a tuple, one for each of config.windows, {config.windows}; got "
                f"{f'{len(x)} of them' if isinstance(x, list | tuple) else type(x).__name__}"
            )


def prefill(
    params: Params,
    config: DecoderConfig,
    batch: Batch,
    caches: Caches,
    cos_sin_caches: tuple[Array, ...],
    *,
    backend: str | None = None,
) -> tuple[Array, Caches]:
    """`forward` over prompts, or chunks of them.

    Returns:
      (logits float32 [b, vocab] after each request's last token, caches); a request without tokens
      in the batch gets logits of no meaning.
    """
    if batch.is_decode:
        raise TypeError("prefill needs a plan from plan_prefill; got one of plan_decode")
    last = jnp.maximum(batch.plans[0].query_bounds()[1:] - 1, 0)
    return forward(params, config, batch, caches, cos_sin_caches, last, backend=backend)


def decode_step(
    params: Params,
    config: DecoderConfig,
    batch: Batch,
    caches: Caches,
    cos_sin_caches: tuple[Array, ...],
    *,
    backend: str | None = None,
) -> tuple[Array, Caches]:
    """`forward` over one token of each request: logits float32 [b, vocab] after it."""
    if not batch.is_decode:
        raise TypeError("decode_step needs a plan from plan_decode; got one of plan_prefill")
    every = jnp.arange(batch.tokens.shape[0], dtype=jnp.int32)
    return forward(params, config, batch, caches, cos_sin_caches, every, backend=backend)


class _OfTokens(NamedTuple):
    """What the layers of one window and one rotary embedding share."""

    batch_indices: Array
    positions: Array
    page_table: PageTable
    plan: AttentionPlan
    cos_sin_cache: Array


# A jit of its own, so that layers that are alike are traced and lowered once, not once each.
@functools.partial(jax.jit, static_argnames=("spec", "config", "backend"))
def _layer(
    layer: Layer,
    next_norm: Array,
    x: Array,
    residual: Array,
    of_tokens: _OfTokens,
    cache: PagedKVCache,
    spec: LayerSpec,
    config: DecoderConfig,
    backend: str | None,
) -> tuple[Array, Array, PagedKVCache]:
    """One layer: (normed x, residual, cache) to the next layer's."""
    eps, plan = config.rms_norm_eps, of_tokens.plan

    def add(y: Array, residual: Array, norm_after: Array | None, norm: Array) -> tuple[Array, ...]:
        """(the norm of the sum, the sum)."""
        if norm_after is not None:
            y = rmsnorm(y, norm_after, eps, backend=backend)
        return fused_add_rmsnorm(y, residual, norm, eps, backend=backend)

    q, cache = rope_append_paged_kv_cache(
        layer.qkv_proj(x),
        of_tokens.batch_indices,
        of_tokens.positions,
        of_tokens.cos_sin_cache,
        cache,
        of_tokens.page_table,
        q_norm_weight=layer.q_norm,
        k_norm_weight=layer.k_norm,
        eps=eps,
        backend=backend,
    )
    attention: Any = paged_decode if plan.is_decode else paged_prefill
    o = attention(
        q,
        cache,
        plan,
        sm_scale=config.sm_scale,
        logits_soft_cap=config.attention_soft_cap,
        sinks=layer.sinks,
        backend=backend,
    )
    o = layer.o_proj(o.reshape(x.shape[0], -1))
    x, residual = add(o, residual, layer.attention_out_norm, layer.feed_forward_norm)
    y = spec.feed_forward(
        x, layer.feed_forward, is_token=of_tokens.batch_indices >= 0, backend=backend
    )
    x, residual = add(y, residual, layer.feed_forward_out_norm, next_norm)
    return x, residual, cache
