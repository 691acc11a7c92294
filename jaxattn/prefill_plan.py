"""Plans of a prefill: ragged query tokens of requests, cut into tiles of rows, against pages or contiguous keys.

Axes: b requests, t query tokens, w work items.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jaxattn.as_program import as_program
from jaxattn.checks import (
    check_host_indptr,
    check_index,
    check_int32,
    check_positive,
    check_shape,
    copied_from_host,
    integer,
)
from jaxattn.device import has_wgmma
from jaxattn.operands import MaskBits
from jaxattn.page_table import PageTable
from jaxattn.plan import (
    MAX_ROWS,
    MID_ROWS,
    MIN_ROWS,
    AttentionPlan,
    LoneItems,
    Splits,
    checked_sms,
    checked_table,
    programs_per_sm_of,
)
from jaxattn.spec import AttentionSpec, Visible
from jaxattn.visits import find_visits
from jaxattn.work_list import KV_BLOCK, Keys, Tiles, WorkList, aligned, expand, make_work_list


def plan_prefill(
    qo_indptr: Array,
    page_table: PageTable,
    *,
    num_qo_tokens: int,
    num_qo_heads: int,
    num_kv_heads: int,
    page_size: int | None = None,
    causal: bool | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    mask: MaskBits | None = None,
    bidirectional_spans: Array | None = None,
    fixed_split_size: int | None = None,
    disable_split_kv: bool = False,
    num_sms: int | None = None,
) -> AttentionPlan:
    """Plans a prefill or append: ragged query tokens against paged keys that already hold these tokens.

    The tokens of a request are its last ones: query token i of qo_len stands at position kv_len - qo_len + i. What it
    sees are the keys that all of the following admit.

    Args:
      qo_indptr: int32 [b + 1], starts at 0; query tokens of request i are `qo_indptr[i]:qo_indptr[i + 1]`.
      page_table: the pages of b requests.
      num_qo_tokens: rows of q; those from qo_indptr[b] on have no keys.
      num_qo_heads, num_kv_heads: heads of q and of the cache (of one shard, under shard_map).
      page_size: tokens a page; default: the table's.
      causal: a query sees no key behind its own position. Default: True, unless a mask or window_right is given.
      window_left: keys that a query sees before its own position, besides its own; None or -1: all. Pages behind all
        windows are not read, and their entries in the table may hold anything.
      window_right: keys that it sees behind its own position (encoders); None or -1: all.
      mask: `MaskBits`, a bit for each query and key: tree speculation, documents. Blocks of keys whose bits are all
        clear are not read; other keys must hold finite values, also where their bits are clear.
      bidirectional_spans: int32 [num_qo_tokens, 2], first and last position (inclusive) of the span of tokens that a
        query token lies in; the tokens of a span, an image's say, see each other whole, whatever causal and window
        say. A span that does not hold its own token's position, (-1, -1) say, is none.
      fixed_split_size, disable_split_kv: as for `plan_decode`. Fixed splits take memory: the plan must hold every
        tile of `num_qo_tokens` in a request that has all pages of the table.
      num_sms: multiprocessors to fill; default: the device's.

    Returns:
      A plan for `paged_prefill`, valid for every layer that shares this page table and these arguments.

    Raises:
      ValueError, TypeError: shapes, dtypes, head counts or windows that do not fit.
    """
    page_table, page_size = checked_table(page_table, page_size)
    check_index("qo_indptr", qo_indptr, page_table.batch_size + 1)
    check_host_indptr("qo_indptr", qo_indptr)
    spec = _spec(
        num_qo_heads,
        num_kv_heads,
        causal,
        window_left,
        window_right,
        mask,
        bidirectional_spans,
    )
    num_qo_tokens = integer("num_qo_tokens", num_qo_tokens, least=0)
    return _paged(
        copied_from_host(qo_indptr),
        page_table,
        *_checked(mask, bidirectional_spans, page_table.batch_size, num_qo_tokens),
        page_size=page_size,
        num_qo_tokens=num_qo_tokens,
        spec=spec,
        splits=Splits(fixed_split_size, disable_split_kv, page_size),
        num_sms=checked_sms(num_sms),
    )


def plan_ragged_prefill(
    qo_indptr: Array,
    kv_indptr: Array,
    *,
    num_qo_tokens: int,
    num_qo_heads: int,
    num_kv_heads: int,
    causal: bool | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    mask: MaskBits | None = None,
    bidirectional_spans: Array | None = None,
    disable_split_kv: bool = False,
    num_sms: int | None = None,
) -> AttentionPlan:
    """As `plan_prefill`, against contiguous keys: those of request i are rows `kv_indptr[i]:kv_indptr[i + 1]`.

    Args:
      qo_indptr, kv_indptr: int32 [b + 1], both start at 0.
    """
    check_index("kv_indptr", kv_indptr, "b + 1")
    check_index("qo_indptr", qo_indptr, kv_indptr.shape[0])
    for name, indptr in (("kv_indptr", kv_indptr), ("qo_indptr", qo_indptr)):
        check_host_indptr(name, indptr)
    check_positive(batch_size=kv_indptr.shape[0] - 1)
    qo_indptr, kv_indptr = copied_from_host(qo_indptr), copied_from_host(kv_indptr)
    spec = _spec(
        num_qo_heads,
        num_kv_heads,
        causal,
        window_left,
        window_right,
        mask,
        bidirectional_spans,
    )
    num_qo_tokens = integer("num_qo_tokens", num_qo_tokens, least=0)
    return _contiguous(
        qo_indptr,
        kv_indptr,
        *_checked(mask, bidirectional_spans, kv_indptr.shape[0] - 1, num_qo_tokens),
        num_qo_tokens=num_qo_tokens,
        spec=spec,
        splits=Splits(None, disable_split_kv),
        num_sms=checked_sms(num_sms),
    )


def _checked(
    mask: MaskBits | None, spans: Array | None, batch_size: int, num_qo_tokens: int
) -> tuple[MaskBits | None, Array | None]:
    """Both on the device. They are checked as they came: on its way into a program int64 becomes int32."""
    if mask is not None:
        if not isinstance(mask, MaskBits):
            raise TypeError(
                f"mask must be MaskBits; got {type(mask).__name__}: make it by "
                "MaskBits.of(mask, qo_indptr, kv_len)"
            )
        mask.check(batch_size)
    if spans is not None:
        check_shape("bidirectional_spans", spans, (num_qo_tokens, 2))
        check_int32("bidirectional_spans", spans)
    return jax.tree.map(copied_from_host, (mask, spans))


@as_program("page_size", "num_qo_tokens", "spec", "splits", "num_sms")
def _paged(
    qo_indptr: Array,
    page_table: PageTable,
    mask: MaskBits | None,
    spans: Array | None,
    *,
    page_size: int,
    num_qo_tokens: int,
    spec: AttentionSpec,
    splits: Splits,
    num_sms: int,
) -> AttentionPlan:
    keys = Keys.of(page_table, page_size)
    limits = _limits(qo_indptr, keys, num_qo_tokens, spec.visible, spans)
    how = (num_qo_tokens, spec, splits, num_sms)
    return prefill_plan(qo_indptr, keys, *how, mask=mask, limits=limits)


@as_program("num_qo_tokens", "spec", "splits", "num_sms")
def _contiguous(
    qo_indptr: Array,
    kv_indptr: Array,
    mask: MaskBits | None,
    spans: Array | None,
    *,
    num_qo_tokens: int,
    spec: AttentionSpec,
    splits: Splits,
    num_sms: int,
) -> AttentionPlan:
    start = jnp.maximum(kv_indptr[:-1], 0)
    kv_len = jnp.maximum(kv_indptr[1:] - start, 0)
    keys = Keys(None, start, kv_len, kv_len, 1)
    limits = _limits(qo_indptr, keys, num_qo_tokens, spec.visible, spans)
    how = (num_qo_tokens, spec, splits, num_sms)
    return prefill_plan(qo_indptr, keys, *how, mask=mask, limits=limits)


def prefill_plan(
    qo_indptr: Array,
    keys: Keys,
    num_qo_tokens: int,
    spec: AttentionSpec,
    splits: Splits,
    num_sms: int,
    *,
    mask: MaskBits | None = None,
    limits: Array | None = None,
) -> AttentionPlan:
    """`plan_prefill` of keys wherever they lie; `limits` as in `AttentionPlan`, in place of `spec.visible`."""
    batch, group = keys.kv_len.shape[0], spec.group
    block_rows = MAX_ROWS
    if splits.adaptive:
        block_rows = _rows_of_tile(num_qo_tokens * group, batch, spec.num_kv_heads, num_sms)
    tiles, request = _tiles(qo_indptr, keys, num_qo_tokens, spec, block_rows, limits)
    # What lies behind the window of a request's first query is not read; blocks of a mask are read whole.
    behind = spec.visible.begin(keys.kv_len - (qo_indptr[1:] - qo_indptr[:-1]))
    if limits is not None:
        behind = 0
    elif mask is not None:
        behind = behind // KV_BLOCK * KV_BLOCK
    visits = None
    if mask is not None:
        visits = find_visits(mask, request, tiles, qo_indptr, keys, spec, block_rows, limits)
        tiles = visits.over(tiles)

    programs_per_sm = programs_per_sm_of(
        block_rows, group, batch * spec.num_kv_heads, num_sms, splits.adaptive
    )
    # Any tile may be of the one request that has all pages.
    most_pages = 0 if keys.page_indices is None else keys.page_indices.size
    most_splits = request.size * -(-most_pages // (splits.fixed_size or 1))

    def work_of(programs: int) -> WorkList:
        fill = -(-programs * num_sms // spec.num_kv_heads)
        in_blocks = visits is not None
        how = splits.splitting(fill, most_splits, block_rows, keys.most, in_blocks)
        return make_work_list(tiles, how)

    work, lone = work_of(programs_per_sm), None
    # The Hopper kernel's programs are alone. Two splits that one program takes in turn cost it their merging. H200, 512
    # new tokens, 128 tiles: in a window of 1024 43.8 us and 28.4, of 32768 408 and 391; 1 x 1024 33.2 and 30.0.
    may_be_lone = block_rows == MAX_ROWS and mask is None and limits is None and has_wgmma()
    if may_be_lone and splits.adaptive and work.num_slots:
        fewer = work_of(1)
        lone = LoneItems(fewer.items, fewer.num_items, fewer.num_slots)
    return AttentionPlan(
        qo_indptr=qo_indptr,
        page_indices=keys.page_indices,
        page_range=keys.page_range(behind),
        page_start=keys.page_start,
        kv_len=keys.kv_len,
        kv_end=keys.kv_end,
        items=work.items,
        num_items=work.num_items,
        limits=limits,
        mask=None if visits is None else visits.planned(work.owner),
        spec=spec,
        page_size=keys.page_size,
        num_qo_tokens=num_qo_tokens,
        block_rows=block_rows,
        programs_per_sm=programs_per_sm,
        num_slots=work.num_slots,
        lone=lone,
    )


def _tiles(
    qo_indptr: Array,
    keys: Keys,
    num_qo_tokens: int,
    spec: AttentionSpec,
    block_rows: int,
    limits: Array | None,
) -> tuple[Tiles, Array]:
    """The tiles of a prefill, and the request of each; batch_size stands for none."""
    group = spec.group
    # Query rows that no request owns are one more request, without keys.
    bounds = jnp.clip(qo_indptr, 0, num_qo_tokens)
    begin, end = bounds, jnp.append(bounds[1:], jnp.int32(num_qo_tokens))
    counts = jnp.maximum(-(-(end - begin) * group // block_rows), 0)
    capacity = num_qo_tokens * group // block_rows + begin.size
    request, nth, used = expand(counts, capacity)
    row_begin = begin[request] * group + nth * block_rows
    row_end = jnp.where(used, jnp.minimum(row_begin + block_rows, end[request] * group), row_begin)
    first, last = row_begin // group, (row_end - 1) // group  # tokens

    def of_tile(x: Array, at: Array = request) -> Array:
        return jnp.append(x, jnp.int32(0))[at]

    # The last query of a request stands at its last token, also where q ends before it.
    q_position = of_tile(keys.kv_len) - of_tile(qo_indptr[1:])
    kv_end = of_tile(keys.kv_end)
    if limits is None:
        kv_begin, stop = spec.visible.some(first + q_position, last + q_position, kv_end)
    else:
        token = first[:, None] + jnp.arange(-(-block_rows // group) + 1, dtype=jnp.int32)[None, :]
        seen = limits.at[jnp.minimum(token, last[:, None])].get(mode="clip")
        kv_begin, stop = seen[..., 0].min(axis=1), seen[..., 1].max(axis=1)
    tiles = Tiles(
        row_begin=row_begin,
        row_end=row_end,
        q_position=q_position,
        page_start=of_tile(keys.page_start),
        kv_begin=aligned(kv_begin, keys.page_size, row_begin.shape),
        kv_end=jnp.where(used, stop, 0),
        own_end=kv_end,
    )
    return tiles, request


def _limits(
    qo_indptr: Array, keys: Keys, num_qo_tokens: int, visible: Visible, spans: Array | None
) -> Array | None:
    """int32 [t, 2], as `AttentionPlan.limits`: what is visible to a token, and the span that it lies in."""
    if spans is None:
        return None
    token = jnp.arange(num_qo_tokens, dtype=jnp.int32)
    request = jnp.searchsorted(qo_indptr[1:], token, side="right").astype(jnp.int32)

    def of_token(x: Array) -> Array:
        return jnp.append(x, jnp.int32(0)).at[request].get(mode="clip")

    position = token + of_token(keys.kv_len) - of_token(qo_indptr[1:])
    kv_end = of_token(keys.kv_end)
    begin, end = visible.begin(position), visible.end(position, kv_end)
    first, last = jnp.asarray(spans)[:, 0], jnp.asarray(spans)[:, 1]
    inside = (0 <= first) & (first <= position) & (position <= last)
    begin = jnp.where(inside, jnp.minimum(begin, first), begin)
    end = jnp.where(inside, jnp.maximum(end, jnp.minimum(last, kv_end - 1) + 1), end)
    return jnp.stack([jnp.minimum(begin, end), end], axis=1)


def _spec(
    num_qo_heads: int,
    num_kv_heads: int,
    causal: bool | None,
    window_left: int | None,
    window_right: int | None,
    mask: MaskBits | None,
    spans: Array | None,
) -> AttentionSpec:
    """What a prefill computes; causal unless a mask or a window to the right says what a query sees."""
    if causal is None:
        causal = mask is None and window_right in (None, -1, 0)
    visible = Visible.of(causal, window_left, window_right)
    if spans is not None and visible == Visible():
        raise ValueError(
            "bidirectional_spans widen a causal mask or a window; without either, every token sees all keys "
            "already: leave them out, or set causal=True"
        )
    return AttentionSpec(num_qo_heads, num_kv_heads, visible)


def _rows_of_tile(rows: int, batch: int, num_kv_heads: int, num_sms: int) -> int:
    """The rows of a prefill's tile, for so many rows of so many requests together.

    As many as a request has, on average; but 64 instead of 128 where those were too few programs, and 64 instead of 16
    where programs are many. H200, tiles of 64 and 128 rows:
    32 x 16 on 8192, of 64 rows each, 252 and 333 us; 32 x 24, of 96, 349 and 332. One request of few programs: 32 on
    32768 59 and 88, 256 on 4096 52 and 59, but 128 on 65536 353 and 337; of 128 programs, 512 on 32768 640 and 587.
    Tiles of 16 and 64 rows: 8 x 4 on 4096, of 16 rows each, 37.5 and 41.6; 32 x 4 129.1 and 127.5, and of a group of
    one, 4 rows each, 281 and 247.
    """
    if rows <= MIN_ROWS * batch and batch * num_kv_heads <= num_sms:
        return MIN_ROWS
    # Programs, were they to take MAX_ROWS each.
    tallest = batch * -(-rows // (MAX_ROWS * batch)) * num_kv_heads
    return MID_ROWS if rows <= MID_ROWS * batch or tallest <= num_sms // 2 else MAX_ROWS
