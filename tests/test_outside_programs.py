"""Ops and plans that are called outside of a program: the second call compiles nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import device_array, i32, no_compilation
from rowwise import normal

import jaxattn as ja
from jaxattn import merge

HEADS = dict(num_qo_heads=4, num_kv_heads=2)
ROWS = normal((5, 64))
QUERIES, TOKENS = normal((3, 4, 16)), normal((3, 2, 16))
CACHE = ja.PagedKVCache(normal((6, 2, 4, 2, 16)))


def at(step):
    """A decode step's (table, positions), of other lengths at each step."""
    kv_len = i32([5 + step, 1, 0])
    pages = i32([[3, 1], [0, 2], [4, 5]])
    return ja.PageTable.from_block_table(pages, kv_len, 4), i32([4 + step, 0, 0])


def decode(step, backend):
    table, _ = at(step)
    return ja.paged_decode(QUERIES, CACHE, ja.plan_decode(table, **HEADS), backend=backend)


def prefill(step, backend):
    table, _ = at(step)
    plan = ja.plan_prefill(i32([0, 2 + step, 3, 3]), table, num_qo_tokens=3, **HEADS)
    return ja.paged_prefill(QUERIES, CACHE, plan, backend=backend, alibi_slopes=jnp.ones(4))


def ragged(step, backend):
    plan = ja.plan_ragged_prefill(i32([0, 1 + step, 3]), i32([0, 1, 3]), num_qo_tokens=3, **HEADS)
    return ja.ragged_prefill(QUERIES, TOKENS, TOKENS, plan, backend=backend)


def append(step, backend):
    table, positions = at(step)
    batch, _ = ja.get_batch_indices_positions(i32([0, 1, 2, 2]), table.kv_len(), 3)
    return ja.append_paged_kv_cache(
        TOKENS, TOKENS, batch, positions, CACHE, table, backend=backend
    ).data


def rope_append(step, backend):
    table, positions = at(step)
    qkv = (QUERIES, TOKENS, TOKENS)
    where = i32([0, 1, 2]), positions, ja.precompute_freqs_cis(16, 32)
    return ja.rope_append_paged_kv_cache(qkv, *where, CACHE, table, backend=backend)[0]


def model_step(step, backend):
    valid = device_array([[True], [True], [step > 0]])
    begun = ja.begin_step(
        valid, i32([4 + step, 1, 0]), i32([[3, 1], [0, 2], [4, 5]]), page_size=4, **HEADS
    )
    q, k, v = (x[:, None] for x in (QUERIES, TOKENS, TOKENS))
    return ja.attend(q, k, v, CACHE, begun, backend=backend)[0]


def dense(tokens):
    def attend(step, backend):
        q, kv = normal((2, tokens, 4, 16)), normal((2, 9, 2, 16))
        lengths = dict(key_value_seq_lengths=i32([9 - step, 4]))
        return ja.dot_product_attention(q, kv, kv, backend=backend, **lengths)

    return attend


CALLS = {
    "rmsnorm": lambda step, backend: ja.rmsnorm(ROWS + step, ROWS[0], backend=backend),
    "fused_add_rmsnorm": lambda step, backend: ja.fused_add_rmsnorm(
        ROWS, ROWS + step, ROWS[0], backend=backend
    ),
    "silu_and_mul": lambda step, backend: ja.silu_and_mul(ROWS + step, backend=backend),
    "rope": lambda step, backend: ja.apply_rope_pos_ids(
        QUERIES, TOKENS, i32([step, 1, 2]), backend=backend
    ),
    "append": append,
    "rope_append": rope_append,
    "decode": decode,
    "prefill": prefill,
    "ragged_prefill": ragged,
    "model step": model_step,
    "dense decode": dense(1),
    "dense prefill": dense(3),
    "merge_states": lambda step, backend: merge.merge_states(
        normal((3, 2, 4, 16)), normal((3, 2, 4)) + step, lse_base="ln", backend=backend
    ),
    "sampling": lambda step, backend: ja.top_k_top_p_sampling_from_logits(
        ROWS + step, 5, 0.9, jax.random.key(step), backend=backend
    ),
}


@pytest.mark.parametrize("backend", ["xla", "interpret", pytest.param(None, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_the_second_call_compiles_nothing(call, backend):
    first = jax.tree.map(np.asarray, call(0, backend))
    with no_compilation():
        second = jax.block_until_ready(call(1, backend))
    leaves = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    assert any(not np.array_equal(a, np.asarray(b)) for a, b in leaves)
