"""Merging attention states, the outputs and logsumexps (v_i, s_i) of disjoint sets of keys:

    s = log sum_i exp(s_i),   v = sum_i exp(s_i - s) v_i

A state with s_i = -inf is empty: it contributes nothing, whatever its v_i holds, and where all are
empty v = 0 and s = -inf. `merge_states` takes a dense array of states, `merge_state` two arrays of
states; `merge_rows` is the part of a kernel that both `merge_states` and split attention share.
Logarithms are natural or base 2.

Axes: n rows (tokens), h query heads, d head dim.
Grid: merge_states (n * h / block_rows), merge_state (n * h / BLOCK_ROWS).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxattn.kernels.triton._launch import Out, launch
from jaxattn.kernels.triton._rows import divmod_by, pow2

# Rows of two states a program merges: 2048 elements of each at head_dim 128, 16 a thread.
BLOCK_ROWS = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """The tile of `merge_states`."""

    block_rows: int
    block_states: int  # a power of two, as block_rows
    num_warps: int


def default_config(num_states: int, head_dim: int) -> Config:
    """The tile for so many states a row."""
    # One warp, 64 elements a thread. H200, 8 states of 32768 rows: 22.6 us, four warps 26.2 to 29.3; 16 states of
    # 1024 rows: 3.3 and 3.6; 2 states of 131072 rows: 28.5 and 28.4.
    block_states = min(pow2(num_states), max(1, 4096 // pow2(head_dim)))
    row = block_states * pow2(head_dim)
    if row <= 2048:
        return Config(2048 // row, block_states, num_warps=1)
    # 64 states of 1024 rows: 8.2 us; a row at a time 9.2, and with all states at once 9.3.
    return Config(2, block_states, num_warps=2)


def _exp_log(lse_base: str):
    return (jnp.exp, jnp.log) if lse_base == "ln" else (jnp.exp2, jnp.log2)


def merge_rows(
    v_ref,  # [rows, d]
    s_ref,  # [rows]
    first: jax.Array,  # int32 [r]
    stride: int,
    count: int | jax.Array,
    *,
    block: int,
    lse_base: str = "ln",
    empty_may_hold_anything: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """For each of r rows, merges the states in rows `first + i * stride`, 0 <= i < count, `block` at a time.

    Returns (v float32 [r, pow2(d)], s float32 [r]).
    """
    exp, log = _exp_log(lse_base)
    d = v_ref.shape[1]
    dims = jnp.arange(pow2(d), dtype=jnp.int32)

    def step(i, carry):
        peak, total, acc = carry
        state = i * block + jnp.arange(block, dtype=jnp.int32)
        valid = jnp.broadcast_to((state < count)[:, None], (block, first.size))
        row = first[None, :] + (state * stride)[:, None]
        s = plgpu.load(s_ref.at[row], mask=valid, other=-jnp.inf).astype(jnp.float32)
        inside = valid[:, :, None] & (dims < d)[None, None, :]
        v = plgpu.load(v_ref.at[row[:, :, None], dims[None, None, :]], mask=inside, other=0.0)
        v = v.astype(jnp.float32)
        if empty_may_hold_anything:  # 0 * NaN is NaN
            v = jnp.where((s == -jnp.inf)[:, :, None], 0.0, v)
        new_peak = jnp.maximum(peak, jnp.max(s, axis=0))
        # Without any state yet the peak is -inf, and -inf - -inf is NaN: shift by 0 there instead.
        shift = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
        weights, rescale = exp(s - shift[None, :]), exp(peak - shift)
        total = total * rescale + jnp.sum(weights, axis=0)
        acc = acc * rescale[:, None] + jnp.sum(weights[:, :, None] * v, axis=0)
        return new_peak, total, acc

    peak = jnp.full(first.shape, -jnp.inf, jnp.float32)
    init = peak, jnp.zeros_like(peak), jnp.zeros((*first.shape, *dims.shape), jnp.float32)
    peak, total, acc = jax.lax.fori_loop(0, (count + block - 1) // block, step, init)
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    return acc / total[:, None], jnp.where(empty, -jnp.inf, log(total) + peak)


def _merge_states_kernel(
    v_ref,  # [n * states * h, d]
    s_ref,  # [n * states * h]
    v_out_ref,  # [n * h, d]
    s_out_ref,  # float32 [n * h]
    *,
    num_states: int,
    num_heads: int,
    config: Config,
    lse_base: str,
):
    num_rows, d = v_out_ref.shape
    out_row = pl.program_id(0) * config.block_rows + jnp.arange(config.block_rows, dtype=jnp.int32)
    exists = out_row < num_rows
    row, head = divmod_by(jnp.where(exists, out_row, 0), num_heads)
    v, s = merge_rows(
        v_ref,
        s_ref,
        row * (num_states * num_heads) + head,
        num_heads,
        num_states,
        block=config.block_states,
        lse_base=lse_base,
    )
    dims = jnp.arange(v.shape[1], dtype=jnp.int32)[None, :]
    inside = exists[:, None] & (dims < d)
    plgpu.store(v_out_ref.at[out_row[:, None], dims], v.astype(v_out_ref.dtype), mask=inside)
    plgpu.store(s_out_ref.at[out_row], s, mask=exists)


def merge_states(
    v: jax.Array, s: jax.Array, *, lse_base: str, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """v [n, states, h, d], s [n, states, h] -> (v [n, h, d], s float32 [n, h])."""
    n, num_states, h, d = v.shape
    config = default_config(num_states, d)
    merged = launch(
        functools.partial(
            _merge_states_kernel,
            num_states=num_states,
            num_heads=h,
            config=config,
            lse_base=lse_base,
        ),
        dict(v_ref=v.reshape(-1, d), s_ref=s.reshape(-1)),
        dict(v_out_ref=Out((n * h, d), v.dtype), s_out_ref=Out((n * h,), jnp.float32)),
        name="jaxattn_merge_states",
        grid=(pl.cdiv(n * h, config.block_rows),),
        num_warps=config.num_warps,
        num_stages=1,
        interpret=interpret,
    )
    return merged["v_out_ref"].reshape(n, h, d), merged["s_out_ref"].reshape(n, h)


def _merge_state_kernel(
    v_a_ref,  # [n * h, d]
    s_a_ref,  # [n * h]
    v_b_ref,  # [n * h, d]
    s_b_ref,  # [n * h]
    mask_ref,  # bool [n]; None: all
    v_ref,  # [n * h, d]
    s_ref,  # float32 [n * h]
    *,
    num_heads: int,
    lse_base: str,
):
    exp, log = _exp_log(lse_base)
    num_rows, d = v_ref.shape
    row = pl.program_id(0) * BLOCK_ROWS + jnp.arange(BLOCK_ROWS, dtype=jnp.int32)
    dims = jnp.arange(pow2(d), dtype=jnp.int32)
    chosen = row < num_rows
    if mask_ref is not None:
        chosen &= plgpu.load(mask_ref.at[row // num_heads], mask=chosen, other=False)
    at = row[:, None], dims[None, :]
    inside = chosen[:, None] & (dims < d)[None, :]

    s_a, s_b = (
        plgpu.load(ref.at[row], mask=chosen, other=-jnp.inf).astype(jnp.float32)
        for ref in (s_a_ref, s_b_ref)
    )
    v_a, v_b = (plgpu.load(ref.at[at], mask=inside, other=0.0) for ref in (v_a_ref, v_b_ref))
    peak = jnp.maximum(s_a, s_b)
    # Where both are empty, -inf - -inf is NaN: shift by 0 there instead.
    shift = jnp.where(peak == -jnp.inf, 0.0, peak)
    weight_a, weight_b = exp(s_a - shift), exp(s_b - shift)
    total = weight_a + weight_b
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    # 0 * NaN is NaN: what an empty state holds is cleared.
    v_a = jnp.where((s_a == -jnp.inf)[:, None], 0.0, v_a.astype(jnp.float32))
    v_b = jnp.where((s_b == -jnp.inf)[:, None], 0.0, v_b.astype(jnp.float32))
    v = (weight_a / total)[:, None] * v_a + (weight_b / total)[:, None] * v_b
    plgpu.store(v_ref.at[at], v.astype(v_ref.dtype), mask=inside)
    plgpu.store(s_ref.at[row], jnp.where(empty, -jnp.inf, log(total) + peak), mask=chosen)


def merge_state(
    v_a: jax.Array,
    s_a: jax.Array,
    v_b: jax.Array,
    s_b: jax.Array,
    mask: jax.Array | None = None,
    *,
    in_place: bool,
    lse_base: str,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """v [n, h, d], s [n, h] -> (v [n, h, d], s float32 [n, h]).

    In place the results alias v_a and s_a (then float32), and the rows that `mask` (bool [n])
    leaves out stay as they are.
    """
    n, h, d = v_a.shape
    merged = launch(
        functools.partial(_merge_state_kernel, num_heads=h, lse_base=lse_base),
        dict(
            v_a_ref=v_a.reshape(-1, d),
            s_a_ref=s_a.reshape(-1),
            v_b_ref=v_b.reshape(-1, d),
            s_b_ref=s_b.reshape(-1),
            mask_ref=mask,
        ),
        dict(v_ref=Out((n * h, d), v_a.dtype), s_ref=Out((n * h,), jnp.float32)),
        name="jaxattn_merge_state",
        grid=(pl.cdiv(n * h, BLOCK_ROWS),),
        num_warps=4,
        num_stages=1,
        interpret=interpret,
        aliases=dict(v_a_ref="v_ref", s_a_ref="s_ref") if in_place else None,
    )
    return merged["v_ref"].reshape(n, h, d), merged["s_ref"].reshape(n, h)
