"""JAX's own attention for decode: `jax.experimental.pallas.ops.gpu.paged_attention`, and over dense caches
`jax.nn.dot_product_attention`, which is XLA's.

The paged one wants head-major pages, a dense block table and scaled queries: all prepared outside the timed call.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.cases import Attention, Case
from benchmarks.inputs import AttentionInputs
from benchmarks.providers.jaxattn import dense_decode
from benchmarks.timing import Call

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

MAX_SPLITS, BLOCK_TOKENS, MIN_BLOCK_TOKENS = 16, 128, 16


def versions() -> dict[str, str]:
    return {}


def build(case: Case, inputs: Any) -> dict[str, Callable[[], Call]]:
    if not (isinstance(case, Attention) and case.op.startswith("decode") and case.is_plain):
        return {}
    if case.page_size is None:
        return {"jax-nn": lambda: dense_decode(case, inputs, jax.nn.dot_product_attention)}
    if case.op != "decode":
        return {}
    if jax.default_backend() != "gpu":
        return {}
    return {"jax": lambda: _decode(case, inputs)}


def _decode(case: Attention, x: AttentionInputs) -> Call:
    cache, p = x.caches[0], x.caches[0].page_size
    longest = max(case.kv_lens)
    # Its default of 16 splits, fewer where a split would be shorter than a tensor-core tile.
    splits = MAX_SPLITS
    while splits > 1 and longest // splits < MIN_BLOCK_TOKENS:
        splits //= 2
    block_pages = max(1, min(BLOCK_TOKENS, longest // splits) // p)
    width = -(-longest // (p * splits * block_pages)) * splits * block_pages
    table = jnp.maximum(x.pages.table.to_block_table(width), 0)
    k, v = (jnp.transpose(pages, (2, 0, 1, 3)) for pages in cache.arrays)
    q = (x.q.astype(jnp.float32) / math.sqrt(cache.head_dim)).astype(x.q.dtype)
    lengths = jnp.asarray(case.kv_lens, jnp.int32)

    def run():
        return (
            paged_attention(
                q, k, v, table, lengths, k_splits=splits, pages_per_compute_block=block_pages
            ),
        )

    return Call(run)
