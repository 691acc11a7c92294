"""Rotary position embedding of queries and keys in one launch (RoFormer, eq. 34):

    y1 = x1 cos - x2 sin,   y2 = x2 cos + x1 sin

for the pairs (x1, x2) of the first rotary_dim dims of every head, in float32, with the token's row
of a table of cosines and sines. The other dims are copied, or left alone in place.

Axes: t tokens, h query heads, kh KV heads, d head dim, r = rotary_dim / 2 pairs.
Grid: (t / block_tokens * head_blocks): a program rotates a block of the query heads and a block of
the KV heads of a few tokens; the blocks of a token are neighbours and share its row of the table.
"""

import functools

import jax
from jax.experimental import pallas as pl

from jaxattn.kernels.triton._heads import Heads, Rotary, default_config
from jaxattn.kernels.triton._launch import launch, like
from jaxattn.kernels.triton._rows import block_of, divmod_by, load


def _rope_kernel(
    q_ref,  # [t * h, d]
    k_ref,  # [t * kh, d]
    positions_ref,  # int32 [t]
    table_ref,  # float32 [max_position, 2 * r], cosines, then sines
    q_out_ref,  # as q_ref
    k_out_ref,  # as k_ref
    *,
    rotary: Rotary,
    block_tokens: int,
    head_blocks: int,
):
    (num_tokens,) = positions_ref.shape
    block, head_block = divmod_by(pl.program_id(0), head_blocks)
    token, exist = block_of(block, block_tokens, num_tokens)

    # Loads start in this order, and the first use of one waits for it and holds up those behind: a
    # row of the table waits for its position, so the heads go before it.
    position = load(positions_ref, token, exist)
    tiles = []
    for x_ref, y_ref in ((q_ref, q_out_ref), (k_ref, k_out_ref)):
        num_heads = x_ref.shape[0] // num_tokens
        rows = Heads.of(head_block, head_blocks, num_heads).rows(token * num_heads, exist)
        tiles.append((y_ref, rows, [rows.load(x_ref, run) for run in rotary.columns]))
    cos, sin = rotary.load_row(table_ref, position)
    for y_ref, rows, x in tiles:
        for run, y in zip(rotary.columns, rotary.turn(x, cos, sin)):
            rows.store(y_ref, run, y)


def rope(
    query: jax.Array,
    key: jax.Array,
    positions: jax.Array,
    cos_sin_cache: jax.Array,
    *,
    interleave: bool,
    in_place: bool,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """query [t, h, d], key [t, kh, d], positions int32 [t], cos_sin_cache float32 -> (query, key).

    In place, the outputs alias query and key.
    """
    t, num_heads, d = query.shape
    rotary_dim = cos_sin_cache.shape[1]
    config = default_config(t, (num_heads, key.shape[1]), d)
    rows = [x.reshape(-1, d) for x in (query, key)]
    rotated = launch(
        functools.partial(
            _rope_kernel,
            # In place, the dims that do not rotate are there already.
            rotary=Rotary(rotary_dim if in_place else d, rotary_dim, interleave),
            block_tokens=config.block_tokens,
            head_blocks=config.head_blocks,
        ),
        dict(q_ref=rows[0], k_ref=rows[1], positions_ref=positions, table_ref=cos_sin_cache),
        dict(q_out_ref=like(rows[0]), k_out_ref=like(rows[1])),
        name="jaxattn_rope",
        grid=(pl.cdiv(t, config.block_tokens) * config.head_blocks,),
        num_warps=config.num_warps,
        num_stages=1,
        interpret=interpret,
        aliases=dict(q_ref="q_out_ref", k_ref="k_out_ref") if in_place else None,
    )
    return rotated["q_out_ref"].reshape(query.shape), rotated["k_out_ref"].reshape(key.shape)
