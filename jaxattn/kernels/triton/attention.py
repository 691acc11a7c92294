"""FlashAttention-2 over a work list: prefill, append and split-K decode, which is a prefill of one token a request.

    x_ij = logit(<q_i, k_j>),   o_i = sum_j softmax_j(x_ij) v_j,   lse_i = log sum_j exp(x_ij)

over the keys j that query i sees. A program takes one work item of the plan: up to `block_rows` packed rows (query
token x query head of one KV group, so that one K tile serves the whole group) against the item's keys. A whole tile
writes the output; a split one leaves its state to `_split_merge`.

What a row sees is `_limits`', what is done to a score `spec.Score`'s and the score mods', where keys lie `_keys`', and
what starts, carries and ends a softmax `_online_softmax`'s; here they meet.

Axes: t query tokens, h query heads, kh KV heads, g = h // kh, d head dim, dv that of V, w work items, r rows of a
program, of which `parts` share a plan's tile where registers hold no whole one.
Grid: (kh, w, parts), KV heads fastest: neighbours read one page together.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxattn.device import check_fp8, has_wgmma
from jaxattn.kernels._float16 import HEADROOM
from jaxattn.kernels.triton._float16 import in_float16, paired
from jaxattn.kernels.triton._keys import Keys, KeySource, load_rows
from jaxattn.kernels.triton._launch import Out, launch
from jaxattn.kernels.triton._limits import Bits, RowLimits, token_and_row
from jaxattn.kernels.triton._merge_apart import Apart, merge_apart
from jaxattn.kernels.triton._online_softmax import OnlineSoftmax
from jaxattn.kernels.triton._rows import divmod_by, pow2
from jaxattn.kernels.triton._scales_in_line import scales_in_line
from jaxattn.kernels.triton._split_merge import Merging, Partials
from jaxattn.kernels.triton.tiles import Config, default_config
from jaxattn.kv_cache import PagedKVCache, RowStrides
from jaxattn.kv_scales import FP8_DTYPES, SMALLEST, KVScales
from jaxattn.operands import ScoreMod, may_be_kept, modified
from jaxattn.plan import MAX_FEW_ROWS, MID_ROWS, AttentionPlan
from jaxattn.spec import AttentionSpec, Score
from jaxattn.visits import MaskItem, PlannedMask
from jaxattn.work_list import WorkItem


@dataclasses.dataclass(frozen=True)
class Statics:
    """What the kernel is compiled for."""

    spec: AttentionSpec
    score: Score
    source: KeySource
    softmax: OnlineSoftmax
    config: Config
    parts: int
    merging: Merging | Apart | None  # None: no tile is split


def _attention_kernel(
    q_ref,  # [t * h, d]
    k_ref,  # [num_rows, d]
    v_ref,  # [num_rows, dv]
    items_ref,  # int32 [w, 10]
    indices_ref,  # int32 [capacity]; None for contiguous keys
    page_range_ref,  # int32 [2], as in the plan; likewise
    limits_ref,  # int32 [t, 2] or None
    mask_refs: PlannedMask | None,
    sinks_ref,  # float32 [h] or None
    score_mods: Sequence[ScoreMod],  # of refs [h]
    scale_refs: KVScales | None,  # as in `Keys`
    no_arrivals_ref,  # the zeros that are arrivals_ref's memory, or None
    o_ref,  # [t * h, dv]
    lse_ref,  # float32 [t * h]
    o_partial_ref,  # as in `Partials`, or None where no tile is split
    lse_partial_ref,
    arrivals_ref,
    *,
    static: Statics,
):
    spec, softmax, config, parts = static.spec, static.softmax, static.config, static.parts
    head, work, part = (pl.program_id(i) for i in range(3))
    group, block_rows, block_kv = spec.group, config.block_rows, config.block_kv
    tall = block_rows > MAX_FEW_ROWS

    def read_item():
        item = WorkItem.read(items_ref, work)
        if parts == 1:
            return item
        begin = item.row_begin + part * block_rows
        end = jnp.minimum(item.row_end, begin + block_rows)
        # A part without rows needs no keys.
        kv_end = jnp.where(begin < end, item.kv_end, item.kv_begin)
        return item._replace(row_begin=begin, row_end=end, kv_end=kv_end)

    # 1. The rows of this program.
    item = read_item()
    r = jnp.arange(block_rows, dtype=jnp.int32)
    token, q_row = token_and_row(spec, head, item.row_begin + r)
    owned = item.row_begin + r < item.row_end
    d = q_ref.shape[1]
    cols = jnp.arange(pow2(d), dtype=jnp.int32)
    inside = owned[:, None] & (cols < d)[None, :]
    q = load_rows(q_ref, jnp.where(owned, q_row, 0), cols, inside)
    query_head = head * group + divmod_by(item.row_begin + r, group)[1]

    def per_head(ref, other=0.0):
        return plgpu.load(ref.at[query_head], mask=owned, other=other)

    # 2. The keys, and which of them a row sees.
    num_pages = static.source.num_pages
    lowest: jax.Array | int = 0
    if num_pages is not None:
        lowest, highest = page_range_ref[0], page_range_ref[1]
    keys = Keys(static.source, k_ref, v_ref, scale_refs, indices_ref, item.page_start, head, lowest)
    bits = None
    kv_end = item.kv_end
    if mask_refs is not None:
        mask_item = (mask_refs.items[work, i] for i in range(len(MaskItem._fields)))
        bits = Bits(mask_refs.mask, mask_refs.visits, MaskItem(*mask_item))
        kv_end = bits.item.kv_end
    if not static.source.paged:
        kv_end = jnp.minimum(kv_end, k_ref.shape[0] // spec.num_kv_heads - item.page_start)
    if limits_ref is None:
        first, last = item.row_begin // group, (item.row_end - 1) // group
        limits = RowLimits.by_position(
            spec.visible,
            token + item.q_position,
            first + item.q_position,
            last + item.q_position,
            kv_end,
            # A tall tile without the comparison spills.
            compare=tall,
        )
    else:
        limits = RowLimits.by_list(limits_ref, token, owned, kv_end)

    if num_pages is not None:
        # Where a page in use is not in the cache, no tile goes unmasked.
        plain_end = jnp.where(highest < num_pages, limits.plain_end, 0)
        limits = dataclasses.replace(limits, plain_end=plain_end)

    def masked(s, position):
        key = keys.tokens(position)
        exist = keys.exist(position, limits.first_begin, kv_end)
        seen = jnp.broadcast_to(exist[None, :], s.shape)
        for more in (limits.seen(key), None if bits is None else bits.seen(token, key)):
            seen = seen if more is None else seen & more
        return jnp.where(seen, s, -jnp.inf)

    arrays = [[per_head(ref)[:, None] for ref in mod.arrays] for mod in score_mods]

    # What float16 takes from q, and what a head's keys are scaled by, goes into the exponent; where something comes in
    # between, into the scores.
    row_scale, v_scale = keys.row_scales()
    if q.dtype != static.source.dtype:
        q, power = in_float16(q)
        # Not 0, which times the -inf of a masked score is NaN.
        row_scale = power if row_scale is None else jnp.maximum(power * row_scale, SMALLEST)
    in_exponent = not (static.score.soft_cap or score_mods)
    if row_scale is not None and in_exponent:
        softmax = dataclasses.replace(softmax, row_scale=row_scale)

    def score(s, k_scale, position):
        tanh = functools.partial(softmax.tanh, dtype=q_ref.dtype)
        if row_scale is not None and not in_exponent:
            s = s * row_scale.reshape(-1, 1)
        if k_scale is not None:
            s = s * k_scale[None, :]
        if not score_mods:
            return static.score(s, tanh)
        at = (token + item.q_position)[:, None], keys.tokens(position)[None, :]
        x = static.score.logit(s, tanh)
        return modified(score_mods, x, *at, query_head[:, None], arrays)

    def step(i, state):
        position: jax.Array = item.kv_begin + i * block_kv
        plain: jax.Array | bool = True
        if bits is not None:
            position, all_set = bits.visit(position)
            plain = all_set
        tile = keys.load(position, limits.first_begin, kv_end)
        s = score(softmax.dot(q, tile.k, trans_b=True), tile.k_scale, position)
        s = softmax.with_value_scales(s, tile.v_scale, tile.v[0].dtype)
        # Most tiles are seen in full by every row.
        plain = plain & limits.all_see(position, block_kv)
        s = jax.lax.cond(plain, lambda s, _: s, masked, s, position)
        return softmax.update(state, s, tile.v, tile.v_scale)

    # 3. The softmax over them. A sink is a logit that the first split has seen before, or, in float16, sees at last.
    def sink():
        return jnp.where(item.split == 0, per_head(sinks_ref, -jnp.inf), -jnp.inf)

    late_sink = sinks_ref is not None and softmax.headroom > 0
    before = sink() if sinks_ref is not None and not late_sink else None
    dv = o_ref.shape[1]
    v_parts = 1 if static.source.v_pairs is None else 2
    state = softmax.init(block_rows, block_kv, pow2(dv), before, parts=v_parts)
    num_tiles = (jnp.minimum(item.kv_end, kv_end) - item.kv_begin + block_kv - 1) // block_kv
    if bits is not None:
        num_tiles = (item.kv_end - item.kv_begin) // block_kv
    if num_pages is not None:
        num_tiles = jnp.where(lowest < num_pages, num_tiles, 0)
    o, lse = softmax.finalize(jax.lax.fori_loop(0, num_tiles, step, state), v_scale)
    if late_sink:
        o, lse = softmax.with_logit(o, lse, sink())

    # 4. A whole tile is the answer; a split one is a partial state.
    # Read again, the item's fields leave the loop above the registers that its rows would take there.
    item = read_item()
    cols = jnp.arange(pow2(dv), dtype=jnp.int32)

    def store_at(o_ref, lse_ref, row, r, o, lse, chosen):
        owned = (item.row_begin + r < item.row_end) & chosen
        inside = owned[:, None] & (cols < dv)[None, :]
        plgpu.store(o_ref.at[row[:, None], cols[None, :]], o.astype(o_ref.dtype), mask=inside)
        plgpu.store(lse_ref.at[row], lse, mask=owned)

    def store(r, o, lse, chosen=True):
        row = token_and_row(spec, head, item.row_begin + r)[1]
        store_at(o_ref, lse_ref, row, r, o, lse, chosen)

    store(r, o, lse, item.num_splits == 1)
    merging = static.merging
    if merging is None:
        return

    @pl.when(item.num_splits > 1)
    def _():
        partials = Partials(
            o_partial_ref,
            lse_partial_ref,
            arrivals_ref,
            column=head * parts + part,
            columns=spec.num_kv_heads * parts,
            block_rows=block_rows,
            store_at=store_at,
        )
        partials.leave(item, item.split, r, o, lse)
        if isinstance(merging, Merging):
            barrier = (lambda: None) if softmax.interpret else plgpu.debug_barrier
            partials.merge(item, merging, store, barrier)


def paged_attention(
    q: jax.Array,
    cache: PagedKVCache,
    plan: AttentionPlan,
    sinks: jax.Array | None,
    score_mods: Sequence[ScoreMod],
    *,
    score: Score,
    out_dtype: jax.typing.DTypeLike,
    name: str,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Attention over a paged cache: (o [t, h, dv] in out_dtype, lse float32 [t, h], natural log)."""
    rows = [x.reshape(-1, x.shape[-1]) for x in cache.arrays]
    return _attention(
        q,
        (rows[0], rows[-1]),
        (cache.row_strides, cache.num_pages),
        cache.scales,
        plan,
        sinks,
        score_mods,
        score=score,
        out_dtype=out_dtype,
        name=name,
        interpret=interpret,
    )


def contiguous_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scales: KVScales | None,
    plan: AttentionPlan,
    sinks: jax.Array | None,
    score_mods: Sequence[ScoreMod],
    *,
    kv_layout: str,
    score: Score,
    out_dtype: jax.typing.DTypeLike,
    name: str,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Attention over contiguous k, v [tokens, kh, d] ("NHD") or [kh, tokens, d] ("HND"), as `paged_attention`."""
    a, b, _ = k.shape
    slot, head = (b, 1) if kv_layout == "NHD" else (1, b)
    return _attention(
        q,
        (k.reshape(a * b, k.shape[-1]), v.reshape(a * b, v.shape[-1])),
        (RowStrides(page=0, slot=slot, head=head, value=0), None),
        scales,
        plan,
        sinks,
        score_mods,
        score=score,
        out_dtype=out_dtype,
        name=name,
        interpret=interpret,
    )


def _attention(
    q: jax.Array,
    rows: tuple[jax.Array, jax.Array],
    where: tuple[RowStrides, int | None],
    scales: KVScales | None,
    plan: AttentionPlan,
    sinks: jax.Array | None,
    score_mods: Sequence[ScoreMod],
    *,
    score: Score,
    out_dtype: jax.typing.DTypeLike,
    name: str,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Over rows of K [num_rows, d] and of V [num_rows, dv]; where: their strides, and the pages, None: contiguous."""
    t, h, d = q.shape
    (k_rows, v_rows), (strides, num_pages) = rows, where
    dv = v_rows.shape[1]
    wgmma = has_wgmma()
    fp8 = k_rows.dtype.name in FP8_DTYPES
    check_fp8(k_rows.dtype)
    # Every float8 number is one of float16.
    dtype = jnp.dtype(jnp.float16) if fp8 and q.dtype != jnp.float32 else q.dtype
    config = default_config(
        plan.block_rows,
        max(d, dv),
        dtype,
        fp8=fp8,
        group=plan.spec.group,
        programs_per_sm=plan.programs_per_sm,
        paged=num_pages is not None,
        wgmma=wgmma,
        bits=plan.mask is not None,
        width=plan.spec.visible.width,
    )
    pairs = fp8 and dv % 2 == 0 and not (wgmma and config.block_rows >= MID_ROWS)
    lines = scales_in_line(scales, plan, strides, num_pages, name=name, interpret=interpret)
    pages: Any = jax.tree.map(lambda x: x.reshape(-1), scales)
    merging: Merging | Apart | None = None
    if plan.num_slots:
        merging = Apart.of(plan, dv) or Merging.of(plan, config, dv, wgmma=wgmma, fp8=fp8)
    tall = config.block_rows > MAX_FEW_ROWS
    parts = plan.block_rows // config.block_rows
    columns = plan.num_slots * plan.num_kv_heads * parts
    o_partial = lse_partial = arrivals = None
    if merging:
        o_partial = Out((columns * config.block_rows, dv), jnp.float32)
        lse_partial = Out((columns * config.block_rows,), jnp.float32)
        arrivals = Out((columns,), jnp.int32) if isinstance(merging, Merging) else None
    out = launch(
        functools.partial(
            _attention_kernel,
            static=Statics(
                spec=plan.spec,
                score=score,
                source=KeySource(
                    strides,
                    plan.page_size,
                    num_pages,
                    config.block_kv,
                    tall or fp8,
                    dtype,
                    scales_per_token=scales is not None and scales.per_token,
                    scales_in_line=lines is not None,
                    v_pairs=v_rows.dtype if pairs else None,
                    interpret=interpret,
                ),
                softmax=OnlineSoftmax(
                    1.0 if score_mods else score.exponent_scale,
                    late_sum=not tall,
                    interpret=interpret,
                    headroom=HEADROOM if fp8 and dtype == jnp.float16 else 0,
                ),
                config=config,
                parts=parts,
                merging=merging,
            ),
        ),
        dict(
            q_ref=q.reshape(t * h, d),
            k_ref=k_rows,
            v_ref=paired(v_rows) if pairs else v_rows,
            items_ref=plan.items,
            indices_ref=plan.page_indices,
            page_range_ref=plan.page_range,
            limits_ref=plan.limits,
            mask_refs=plan.mask,
            sinks_ref=sinks,
            score_mods=tuple(score_mods),
            scale_refs=pages if lines is None else lines,
            # XLA writes the zeros of all the layers of a step in one kernel.
            no_arrivals_ref=None if arrivals is None else jnp.zeros(columns, jnp.int32),
        ),
        dict(
            o_ref=Out((t * h, dv), out_dtype),
            lse_ref=Out((t * h,), jnp.float32),
            o_partial_ref=o_partial,
            lse_partial_ref=lse_partial,
            arrivals_ref=arrivals,
        ),
        name=name,
        grid=(plan.num_kv_heads, plan.items.shape[0], parts),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
        aliases=None if arrivals is None else dict(no_arrivals_ref="arrivals_ref"),
        shared=may_be_kept(score_mods),
    )
    o, lse = out["o_ref"], out["lse_ref"]
    if isinstance(merging, Apart):
        o, lse = merge_apart(
            o,
            lse,
            out["o_partial_ref"],
            out["lse_partial_ref"],
            plan,
            merging,
            block_rows=config.block_rows,
            name=name,
            interpret=interpret,
        )
    return o.reshape(t, h, dv), lse.reshape(t, h)
