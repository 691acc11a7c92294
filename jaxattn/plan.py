"""Plans: from lengths, page tables and what a query sees to a work list for the attention kernel.

All in jnp, so also inside jit; nothing is read on the host. Attention work is a list of tiles, each up to `block_rows`
packed rows (query token x query head of one KV group) of one request, against the union of the keys that its rows see;
`work_list` cuts the tiles into equal shares. Decode is the case of one query token a request.

Axes: b requests, t query tokens, w work items.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxattn.checks import (
    check_host_indptr,
    check_index,
    check_int32,
    check_positive,
    check_shape,
    copied_from_host,
)
from jaxattn.device import num_sms as default_num_sms
from jaxattn.dispatch import dispatch
from jaxattn.kernels.triton.one_program import in_one_program
from jaxattn.kv_cache import PageTable
from jaxattn.operands import MaskBits
from jaxattn.spec import AttentionSpec, Visible
from jaxattn.visits import PlannedMask, find_visits
from jaxattn.work_list import (
    KV_BLOCK,
    ByComparison,
    Keys,
    Splitting,
    Tiles,
    WorkItem,
    aligned,
    expand,
    list_items,
    make_work_list,
)

# Of a tile; 16 is the least that mma.sync takes, 64 the least that wgmma does.
MIN_ROWS, MID_ROWS, MAX_ROWS = 16, 64, 128
MAX_FEW_ROWS = 32  # tiles up to here only wait for memory
MAX_IN_ONE_PROGRAM = 512  # requests, each of which every entry is compared with


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """What the attention ops read: lengths, pages and a work list. A pytree; one plan serves all layers of a step.

    Attributes:
      qo_indptr: int32 [b + 1], query tokens of request i are `qo_indptr[i]:qo_indptr[i + 1]`; None for decode, where
        token i is request i's only one.
      page_indices: int32 [capacity], page ids of all requests; None for contiguous keys.
      page_range: int32 [2], the smallest and the largest page id that a query may see; a negative one counts as
        2^31 - 1, which no cache has. None for contiguous keys.
      page_start: int32 [b], each request's first entry in page_indices, or its first row of contiguous keys.
      kv_len: int32 [b], tokens of each request, its new ones included: its last query token stands at kv_len - 1.
      kv_end: int32 [b], keys of each request that have a page: kv_len, unless the table is too short for it.
      items: int32 [w, 10], a `WorkItem` a row.
      num_items: int32 [1], how many of them are used, the first ones; None for decode.
      limits: int32 [t, 2], the keys `limits[i, 0] .. limits[i, 1] - 1` are those that query token i sees; None where
        `spec.visible` says it for all.
      mask: bits that say it besides, or None.
    """

    qo_indptr: Array | None
    page_indices: Array | None
    page_range: Array | None
    page_start: Array
    kv_len: Array
    kv_end: Array
    items: Array
    num_items: Array | None
    limits: Array | None
    mask: PlannedMask | None
    spec: AttentionSpec = dataclasses.field(metadata=dict(static=True))
    page_size: int = dataclasses.field(metadata=dict(static=True))
    num_qo_tokens: int = dataclasses.field(metadata=dict(static=True))
    block_rows: int = dataclasses.field(metadata=dict(static=True))
    programs_per_sm: int = dataclasses.field(metadata=dict(static=True))  # meant to run at once
    num_slots: int = dataclasses.field(metadata=dict(static=True))  # capacity for partial states

    @property
    def is_decode(self) -> bool:
        """Whether it is `plan_decode`'s."""
        return self.qo_indptr is None

    @property
    def batch_size(self) -> int:
        return self.kv_len.shape[0]

    @property
    def num_qo_heads(self) -> int:
        return self.spec.num_qo_heads

    @property
    def num_kv_heads(self) -> int:
        return self.spec.num_kv_heads

    def query_bounds(self) -> Array:
        """`qo_indptr`, decode's as well."""
        if self.qo_indptr is None:
            return jnp.arange(self.batch_size + 1, dtype=jnp.int32)
        return self.qo_indptr


def plan_decode(
    page_table: PageTable,
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    page_size: int | None = None,
    window_left: int | None = None,
    fixed_split_size: int | None = None,
    disable_split_kv: bool = False,
    num_sms: int | None = None,
) -> AttentionPlan:
    """Plans one decode step: each request attends with one query token, its last, to its keys.

    Args:
      page_table: the pages of b requests; shapes fix capacities, contents are free.
      num_qo_heads, num_kv_heads: heads of q and of the cache (of one shard, under shard_map).
      page_size: tokens a page; default: the table's.
      window_left: keys that a query sees before its own position, besides its own; None or -1: all. Pages behind the
        window are not read, and their entries in the table may hold anything.
      fixed_split_size: cut the keys of every request into splits of so many pages. A request's output is then
        bitwise the same whatever the batch around it; without it, splits depend on the batch's lengths.
      disable_split_kv: never split. A request's output does not depend on the batch around it then either.
      num_sms: multiprocessors to fill; default: the device's.

    Returns:
      A plan for `paged_decode`, valid for every layer that shares this page table and window.

    Raises:
      ValueError, TypeError: shapes, dtypes, head counts or a window that do not fit.
    """
    page_table, page_size = _checked(page_table, page_size)
    return decode_plan(
        *Keys.of(page_table, page_size).as_function(),
        AttentionSpec(num_qo_heads, num_kv_heads, Visible.of(False, window_left)),
        Splits(fixed_split_size, disable_split_kv, page_size),
        num_sms or default_num_sms(),
    )


def decode_plan(
    keys_of: Callable[..., Keys],
    lengths: Sequence[Array],
    spec: AttentionSpec,
    splits: "Splits",
    num_sms: int,
    backend: str | None = None,
) -> AttentionPlan:
    """`plan_decode` of keys wherever they lie: keys_of(*lengths), of int32 [b] each.

    On a GPU one kernel makes the work list, from the lengths as they come: XLA takes six.
    """
    keys = keys_of(*lengths)
    group, batch, page_size = spec.group, keys.kv_len.shape[0], keys.page_size
    block_rows = min(max(MIN_ROWS, 1 << (group - 1).bit_length()), MID_ROWS)
    parts = -(-group // block_rows)  # tiles of a request
    programs_per_sm = _programs_per_sm(
        block_rows, group, batch * parts * spec.num_kv_heads, num_sms, splits.adaptive
    )
    # A full split takes as many pages of the table; each tile has at most one that is not full.
    most_pages = 0 if keys.page_indices is None else keys.page_indices.size
    most = parts * (batch + most_pages // (splits.fixed_size or 1))
    fill = -(-programs_per_sm * num_sms // spec.num_kv_heads)
    how = splits.splitting(fill, most, block_rows)

    def tiles(keys: Keys) -> Tiles:
        return _decode_tiles(keys, spec, block_rows, batch)

    def by_xla(*lengths: Array) -> Array:
        return make_work_list(tiles(keys_of(*lengths)), how).items

    def some_items(entry: Array, *lengths: Array) -> WorkItem:
        return list_items(tiles(keys_of(*lengths)), how, entry, ByComparison())[0]

    by_kernel = functools.partial(
        in_one_program,
        some_items,
        num_entries=how.capacity(batch * parts),
        num_fields=len(WorkItem._fields),
        name="jaxattn_plan_decode",
    )
    if lengths and parts == 1 and batch <= MAX_IN_ONE_PROGRAM:
        items = dispatch(backend, by_kernel, by_xla, *lengths)
    else:
        items = by_xla(*lengths)
    return AttentionPlan(
        qo_indptr=None,
        page_indices=keys.page_indices,
        page_range=keys.page_range(spec.visible.begin(keys.kv_len - 1)),
        page_start=keys.page_start,
        kv_len=keys.kv_len,
        kv_end=keys.kv_end,
        items=items,
        num_items=None,
        limits=None,
        mask=None,
        spec=spec,
        page_size=page_size,
        num_qo_tokens=batch,
        block_rows=block_rows,
        programs_per_sm=programs_per_sm,
        num_slots=how.num_slots,
    )


def _decode_tiles(keys: Keys, spec: AttentionSpec, block_rows: int, batch: int) -> Tiles:
    """A request is one tile, or several where its group is larger than a tile; those of `batch` requests have rows."""
    group = spec.group
    parts = -(-group // block_rows)

    def of(x: Array) -> Array:
        return x if parts == 1 else jnp.repeat(x, parts)

    tile = jnp.arange(keys.kv_len.shape[0] * parts, dtype=jnp.int32)
    request = tile // parts
    row = request * group + tile % parts * block_rows
    end = jnp.minimum(row + block_rows, (request + 1) * group)
    position, kv_end = of(keys.kv_len) - 1, of(keys.kv_end)
    begin, stop = spec.visible.some(position, position, kv_end)
    return Tiles(
        row_begin=row,
        row_end=jnp.where(request < batch, end, row),
        q_position=position - request,
        page_start=of(keys.page_start),
        kv_begin=aligned(begin, keys.page_size, row.shape),
        kv_end=stop,
        own_end=kv_end,
    )


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
    page_table, page_size = _checked(page_table, page_size)
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
    qo_indptr, keys = copied_from_host(qo_indptr), Keys.of(page_table, page_size)
    return prefill_plan(
        qo_indptr,
        keys,
        num_qo_tokens,
        spec,
        Splits(fixed_split_size, disable_split_kv, page_size),
        num_sms or default_num_sms(),
        mask=mask,
        limits=_limits(qo_indptr, keys, num_qo_tokens, spec.visible, bidirectional_spans),
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
    start = jnp.maximum(kv_indptr[:-1], 0)
    kv_len = jnp.maximum(kv_indptr[1:] - start, 0)
    spec = _spec(
        num_qo_heads,
        num_kv_heads,
        causal,
        window_left,
        window_right,
        mask,
        bidirectional_spans,
    )
    keys = Keys(None, start, kv_len, kv_len, 1)
    return prefill_plan(
        qo_indptr,
        keys,
        num_qo_tokens,
        spec,
        Splits(None, disable_split_kv),
        num_sms or default_num_sms(),
        mask=mask,
        limits=_limits(qo_indptr, keys, num_qo_tokens, spec.visible, bidirectional_spans),
    )


def prefill_plan(
    qo_indptr: Array,
    keys: Keys,
    num_qo_tokens: int,
    spec: AttentionSpec,
    splits: "Splits",
    num_sms: int,
    *,
    mask: MaskBits | None = None,
    limits: Array | None = None,
) -> AttentionPlan:
    """`plan_prefill` of keys wherever they lie; `limits` as in `AttentionPlan`, in place of `spec.visible`."""
    if num_qo_tokens != 0:
        check_positive(num_qo_tokens=num_qo_tokens)
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

    programs_per_sm = _programs_per_sm(
        block_rows, group, batch * spec.num_kv_heads, num_sms, splits.adaptive
    )
    # Any tile may be of the one request that has all pages.
    most_pages = 0 if keys.page_indices is None else keys.page_indices.size
    most_splits = request.size * -(-most_pages // (splits.fixed_size or 1))
    fill = -(-programs_per_sm * num_sms // spec.num_kv_heads)
    work = make_work_list(
        tiles, splits.splitting(fill, most_splits, block_rows, in_blocks=visits is not None)
    )
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
    check_shape("bidirectional_spans", spans, (num_qo_tokens, 2))
    check_int32("bidirectional_spans", spans)
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


@dataclasses.dataclass(frozen=True)
class Splits:
    """A plan's arguments about splitting.

    Raises:
      ValueError: a size that is not positive, or one together with `disabled`.
    """

    fixed_size: int | None = None  # in pages
    disabled: bool = False
    page_size: int = 1

    def __post_init__(self) -> None:
        if self.fixed_size is not None:
            check_positive(fixed_split_size=self.fixed_size)
            if self.disabled:
                raise ValueError(
                    f"fixed_split_size={self.fixed_size} asks for splits and disable_split_kv=True for "
                    "none: choose one"
                )

    @property
    def adaptive(self) -> bool:
        """Whether splits depend on the batch's lengths."""
        return self.fixed_size is None and not self.disabled

    def splitting(
        self, fill: int, most: int, block_rows: int, in_blocks: bool = False
    ) -> Splitting:
        """With in_blocks, splits are of whole blocks: those that mask bits make a tile visit."""
        size = 0 if self.disabled else self.fixed_size and self.fixed_size * self.page_size
        if size and in_blocks:
            size = -(-size // KV_BLOCK) * KV_BLOCK
        return Splitting(fill, size, most, tall=block_rows > MAX_FEW_ROWS)


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


def _checked(page_table: PageTable, page_size: int | None) -> tuple[PageTable, int]:
    """The table on the device, with at least one entry; its page size."""
    page_table.check()
    page_table = page_table.with_page_size(page_size)
    check_positive(batch_size=page_table.batch_size)
    page_table = page_table.padded()
    assert page_table.page_size is not None
    return page_table, page_table.page_size


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


def _programs_per_sm(
    block_rows: int, group: int, whole_programs: int, num_sms: int, adaptive: bool
) -> int:
    """How many programs to run on a multiprocessor at once.

    Two that load two tiles of keys at a time; or, for tiles of few rows, four that load one, unless the programs of
    whole tiles are too few to fill the GPU. Where a request must not see the batch around it, they always have four.

    H200, decode, two and four: 8 x 4096 37.1 and 38.3 us, 16 x 4096 66.4 and 69.0; 12 x 3000, where the rule errs, 42.4
    and 41.1. A group of one, whose tiles are smaller, always has four: 4 x 4096 of 32/32 heads, 71.0 and 69.4.
    """
    if block_rows > MAX_FEW_ROWS or adaptive and group > 1 and whole_programs <= num_sms:
        return 2
    return 4
