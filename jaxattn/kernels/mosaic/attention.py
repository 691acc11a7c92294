"""FlashAttention over a work list on Hopper: prefill, append and chunks, warp-specialised (FlashAttention-3's scheme).

    x_ij = logit(<q_i, k_j>),   o_i = sum_j softmax_j(x_ij) v_j,   lse_i = log sum_j exp(x_ij)

over the keys j that query i sees. Two warpgroups of a block compute, 64 packed rows (query token x query head of one KV
group) of one work item's tile each; the third loads its queries, keys and values (`_feeding`), ahead of them also from
one item to the next; where they come row by row, a fourth one loads values, but at head_dim 256. While the tensor cores
multiply one warpgroup's scores and values, the other warpgroup takes its softmax: they take turns. Within a warpgroup
the products Q K_i^T and P_{i-1} V_{i-1} are under way together (FlashAttention-3, Shah et al. 2024, algorithm 2).

Over keys of 8 bits products are of float16: `_loading` converts keys and values, a computing warpgroup its queries
(`_queries`); scales of each token are `_token_scales`'.

Which work a block does is `_units`', what a row sees `_rows`', what is done to a score `spec.Score`'s, where keys lie
`_keys`'; what a computing warpgroup does is `_computing`'s, its scores are `_products`', the softmax is
`_online_softmax`'s, split tiles are `_splits`'; here they meet.

Axes: t query tokens, h query heads, kh KV heads, g = h // kh, d head dim, w work items, r = 64 rows, k keys of a tile.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxattn.device import num_sms
from jaxattn.kernels.mosaic import _in_line
from jaxattn.kernels.mosaic import _warpgroup as wg
from jaxattn.kernels.mosaic._computing import COMPUTING, Computing
from jaxattn.kernels.mosaic._converting import staging
from jaxattn.kernels.mosaic._elements import ROWS
from jaxattn.kernels.mosaic._feeding import feed, follow
from jaxattn.kernels.mosaic._keys import KeySource
from jaxattn.kernels.mosaic._launch import launch
from jaxattn.kernels.mosaic._loading import Queries, Stages, loaders
from jaxattn.kernels.mosaic._token_scales import TokenScales
from jaxattn.kernels.mosaic._units import FIELDS, RING, Ahead, Schedule, Statics
from jaxattn.kernels.mosaic.tiles import Config, default_config
from jaxattn.kernels.triton.keys_in_line import keys_in_line
from jaxattn.kv_cache import PagedKVCache
from jaxattn.kv_scales import FP8_DTYPES, KVScales
from jaxattn.plan import AttentionPlan
from jaxattn.spec import Score

# Units, for each multiprocessor, up to which each is a block's own. So few gain nothing by being shared: 1 x 512 and
# 512 on 32768 in benchmarks/results/h100_sweeps_mosaic.txt. Where to draw the line was not measured.
UNITS_UNDRAWN = 2


def _attention_kernel(
    q_ref,  # [t * h, d]
    k_ref,  # as `KeySource.arrays` says
    v_ref,
    items_ref,  # int32 [w, 10]
    num_items_ref,  # int32 [1]
    indices_ref,  # int32 [capacity]; None for contiguous keys
    page_range_ref,  # int32 [2], as in the plan; likewise
    sinks_ref,  # float32 [h] or None
    k_scale_ref,  # float32 [1] or [kh], what keys are multiplied by; or of tokens, as `TokenScales`; or None
    v_scale_ref,  # likewise
    counts_ref,  # int32, zeros: the arrivals of `Partials`, then what `Schedule` counts; None where neither is needed
    o_ref,  # [t * h, d]
    lse_ref,  # float32 [t * h]
    o_partial_ref,
    lse_partial_ref,
    q_smem,  # [buffers, 2, r, d]
    q_full,
    q_empty,
    k_smem,  # [stages, k, d]
    k_full,
    k_empty,
    v_smem,
    v_full,
    v_empty,
    rings_smem,  # of `_converting`, for K and V; None where they are not converted
    scales_smem,  # of `TokenScales`, or None
    scales_empty,
    turn,
    row_smem,  # float32 [2, 128]: a number a row, between layouts
    absent_smem,  # float32 [2, 128]: -inf for the keys of a tile that are not in the cache, 0 for others; or None
    numbers_smem,  # int32 [1 + 2, 1]: `Schedule`'s number, and `Partials`' of each computing warpgroup
    units_smem,  # int32 [RING, FIELDS]
    told,
    *,
    static: Statics,
):
    warpgroup = lax.axis_index("warpgroup")
    schedule = Schedule(
        static,
        items_ref,
        num_items_ref,
        page_range_ref,
        counts_ref,
        numbers_smem.at[0],
        units_smem,
        told,
    )
    queries = Queries(q_smem, q_full, q_empty)
    keys = Stages(k_smem, k_full, k_empty)
    values = Stages(v_smem, v_full, v_empty)
    scales = None
    if static.source.scales_per_token:
        scales = TokenScales(scales_smem, None, scales_empty, k_scale_ref, v_scale_ref)
        k_scale_ref = v_scale_ref = None

    first, *second = loaders(
        static.source,
        static.config.loaders,
        k_ref,
        v_ref,
        keys,
        values,
        rings_smem,
        scales,
        # 1% to 2% faster; over pages as much slower (`benchmarks/results/h200_sweeps_mosaic.txt`, 13.).
        values_first=static.ahead.draw and not static.source.by_page,
    )

    @pl.when(warpgroup == COMPUTING)
    def _():
        feed(static, schedule, queries, first, q_ref, indices_ref)

    if second:
        pl.when(warpgroup == COMPUTING + 1)(lambda: follow(static, schedule, *second, indices_ref))

    @pl.when(warpgroup < COMPUTING)
    def _():
        absent = None if absent_smem is None else absent_smem.at[warpgroup]
        partials = None
        if o_partial_ref is not None:
            partials = dict(o_ref=o_partial_ref, lse_ref=lse_partial_ref, arrivals_ref=counts_ref)
        computing = Computing(
            static,
            warpgroup,
            schedule,
            queries,
            keys,
            values,
            scales,
            turn,
            row_smem.at[warpgroup],
            numbers_smem.at[1 + warpgroup],
            absent,
            indices_ref,
            sinks_ref,
            k_scale_ref,
            v_scale_ref,
            o_ref,
            lse_ref,
            partials,
        )
        computing.run()


def paged_attention(
    q: jax.Array,
    cache: PagedKVCache,
    plan: AttentionPlan,
    sinks: jax.Array | None,
    score_mods: tuple[()],
    *,
    score: Score,
    out_dtype: jax.typing.DTypeLike,
    name: str,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention over a cache, for what `serves.why_not_attention` has nothing against.

    Args:
      q: [t, h, d], float16 or bfloat16.
      cache: pages of K and V, of one head_dim, in q's dtype or float8.
      plan: of tiles of 128 rows, without mask bits and spans.
      sinks: float32 [h] or None.
      score_mods: none.
      score: what is done to scores.
      out_dtype: q's.
      name: the kernel's, in profiles.

    Returns:
      (o [t, h, d], lse float32 [t, h]).
    """
    plan = plan.for_lone_programs()
    d, laid = q.shape[-1], _in_line.pays(cache.arrays[-1], plan)
    config_of = functools.partial(default_config, d, plan.spec.visible.width)
    narrow = cache.is_fp8 and not laid
    source = KeySource.of_cache(cache, (config or config_of(narrow=narrow)).block_kv)
    arrays, scales = source.arrays(cache.arrays[0], cache.arrays[-1]), _flat(cache.scales)
    if laid and not source.in_boxes:
        lines = keys_in_line(cache, plan, q.dtype, name=name)
        source, arrays = source.laid(), (lines.k[None], lines.v[None])
        scales = scales if lines.scales is None else (lines.scales, None)
    config = config or config_of(rows=not source.in_boxes, narrow=narrow)
    how: dict[str, Any] = dict(score=score, name=name, config=config)
    return _attention(q, arrays, source, scales, plan, sinks, **how)


def contiguous_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_scales: KVScales | None,
    plan: AttentionPlan,
    sinks: jax.Array | None,
    score_mods: tuple[()],
    *,
    kv_layout: str,
    score: Score,
    out_dtype: jax.typing.DTypeLike,
    name: str,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention over contiguous k, v [tokens, kh, d] ("NHD") or [kh, tokens, d] ("HND"), as `paged_attention`."""
    plan = plan.for_lone_programs()
    d, tokens = q.shape[-1], k.shape[0 if kv_layout == "NHD" else 1]
    narrow = k.dtype.name in FP8_DTYPES
    config_of = functools.partial(default_config, d, plan.spec.visible.width, narrow=narrow)
    block = (config or config_of()).block_kv
    source = KeySource.contiguous(tokens, plan.num_kv_heads, kv_layout, block, narrow)
    config = config or config_of(rows=not source.in_boxes)
    arrays = source.arrays(k, v)
    how: dict[str, Any] = dict(score=score, name=name, config=config)
    return _attention(q, arrays, source, _flat(kv_scales), plan, sinks, **how)


def _flat(scales: KVScales | None) -> tuple[jax.Array | None, jax.Array | None]:
    """As the kernel's k_scale_ref and v_scale_ref."""
    return (None, None) if scales is None else (scales.k.reshape(-1), scales.v.reshape(-1))


# A program that calls it in each of its layers holds it once: it takes some ten seconds to lower and to assemble.
@functools.partial(jax.jit, static_argnames=("source", "score", "name", "config"))
def _attention(
    q: jax.Array,
    arrays: tuple[jax.Array, jax.Array],
    source: KeySource,
    scales: tuple[jax.Array | None, jax.Array | None],
    plan: AttentionPlan,
    sinks: jax.Array | None,
    *,
    score: Score,
    name: str,
    config: Config,
) -> tuple[jax.Array, jax.Array]:
    t, h, d = q.shape
    units = plan.items.shape[0] * plan.num_kv_heads
    # A block for each of few units: no draws.
    drawn = units > UNITS_UNDRAWN * num_sms()
    ahead = Ahead.of(units / num_sms(), source, config, plan.spec.visible)
    num_blocks = num_sms() if drawn else units
    columns = plan.num_slots * plan.num_kv_heads * COMPUTING
    o_partial = lse_partial = None
    if columns:
        o_partial = jax.ShapeDtypeStruct((columns * ROWS, d), jnp.float32)
        lse_partial = jax.ShapeDtypeStruct((columns * ROWS,), jnp.float32)
    counts = None
    if columns or drawn:
        counts = jax.ShapeDtypeStruct((columns + 1,), jnp.int32)

    # Queries come, and outputs leave, as q's bytes.
    dtype = jnp.float16 if source.narrow else q.dtype

    def shared(*shape):
        return plgpu.SMEM(shape, dtype, transforms=wg.TILED)

    def barriers(count, arrivals):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

    stages, keys, buffers = config.num_stages, config.block_kv, config.num_queries
    of_tokens = source.scales_per_token
    may_lack = source.paged and not of_tokens  # scales of tokens say which are not there
    out = launch(
        functools.partial(
            _attention_kernel,
            static=Statics(plan.spec, score, source, config, num_blocks, drawn, ahead),
        ),
        dict(
            q_ref=q.reshape(t * h, d),
            k_ref=arrays[0],
            v_ref=arrays[1],
            items_ref=plan.items,
            num_items_ref=plan.num_items,
            indices_ref=plan.page_indices,
            page_range_ref=plan.page_range,
            sinks_ref=sinks,
            k_scale_ref=scales[0],
            v_scale_ref=scales[1],
        ),
        dict(
            o_ref=jax.ShapeDtypeStruct((t * h, d), q.dtype),
            lse_ref=jax.ShapeDtypeStruct((t * h,), jnp.float32),
            o_partial_ref=o_partial,
            lse_partial_ref=lse_partial,
        ),
        dict(
            q_smem=shared(buffers, COMPUTING, ROWS, d),
            q_full=barriers(buffers, 1),
            q_empty=barriers(buffers, COMPUTING),
            k_smem=shared(stages, keys, d),
            k_full=barriers(stages, source.boxes_with_keys),
            k_empty=barriers(stages, COMPUTING),
            v_smem=shared(stages, keys, d),
            v_full=barriers(stages, source.boxes),
            v_empty=barriers(stages, COMPUTING),
            rings_smem=plgpu.SMEM((2, *staging(d)), jnp.int32) if source.narrow else None,
            scales_smem=plgpu.SMEM((stages, 3, keys), jnp.float32) if of_tokens else None,
            scales_empty=barriers(stages, COMPUTING) if of_tokens else None,
            turn=barriers(COMPUTING, 1),
            row_smem=plgpu.SMEM((COMPUTING, wg.THREADS), jnp.float32),
            absent_smem=plgpu.SMEM((COMPUTING, wg.THREADS), jnp.float32) if may_lack else None,
            numbers_smem=plgpu.SMEM((1 + COMPUTING, 1), jnp.int32),
            units_smem=plgpu.SMEM((RING, FIELDS), jnp.int32),
            told=barriers(RING, 1),
        ),
        dict(counts_ref=counts),
        name=name,
        num_blocks=num_blocks,
        num_warpgroups=COMPUTING + config.loaders,
    )
    return out["o_ref"].reshape(t, h, d), out["lse_ref"].reshape(t, h)
