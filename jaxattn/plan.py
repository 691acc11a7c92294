"""What a plan holds: from lengths, page tables and what a query sees to a work list for the attention kernel.

All in jnp, so also inside jit; nothing is read on the host. Attention work is a list of tiles, each up to `block_rows`
packed rows (query token x query head of one KV group) of one request, against the union of the keys that its rows see;
`work_list` cuts the tiles into equal shares. `decode_plan` and `prefill_plan` make plans.

Axes: b requests, t query tokens, w work items.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from jaxattn.checks import check_positive, integer
from jaxattn.device import num_sms as default_num_sms
from jaxattn.page_table import PageTable
from jaxattn.spec import AttentionSpec
from jaxattn.visits import PlannedMask
from jaxattn.work_list import KV_BLOCK, Splitting, may_split

# Of a tile; 16 is the least that mma.sync takes, 64 the least that wgmma does.
MIN_ROWS, MID_ROWS, MAX_ROWS = 16, 64, 128
MAX_FEW_ROWS = 32  # tiles up to here only wait for memory
# The width of a window up to which a tile of rows sees so few keys that kernels take them 64 at a time, not 128. Of 128
# keys that is faster by a quarter, of 256 by 3% at head_dim 64 and slower by 3% at 128, in between not measured.
SHORT_WINDOW = 192


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoneItems:
    """The items of a plan for programs that have a multiprocessor to themselves; fields as in `AttentionPlan`."""

    items: Array
    num_items: Array
    num_slots: int = dataclasses.field(metadata=dict(static=True))


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
      lone: the items where a kernel runs one program on a multiprocessor, which takes fewer and larger ones; None: the
        same.
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
    lone: LoneItems | None = None

    def for_lone_programs(self) -> "AttentionPlan":
        """This plan with the items `lone`."""
        if (lone := self.lone) is None:
            return self
        return dataclasses.replace(
            self,
            items=lone.items,
            num_items=lone.num_items,
            num_slots=lone.num_slots,
            lone=None,
        )

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
            size = integer("fixed_split_size", self.fixed_size)
            object.__setattr__(self, "fixed_size", size)
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
        self,
        fill: int,
        most: int,
        block_rows: int,
        most_keys: int | None,
        in_blocks: bool = False,
    ) -> Splitting:
        """How tiles of at most most_keys are cut; in_blocks: in whole blocks, those that mask bits make them visit.

        Where there is nothing to cut, kernels need no memory for splits, and none that holds zeros at first.
        """
        tall = block_rows > MAX_FEW_ROWS
        whole = self.disabled or (
            self.adaptive and most_keys is not None and not may_split(most_keys, tall)
        )
        size = 0 if whole else self.fixed_size and self.fixed_size * self.page_size
        if size and in_blocks:
            size = -(-size // KV_BLOCK) * KV_BLOCK
        return Splitting(fill, size, most, tall)


def checked_table(page_table: PageTable, page_size: int | None) -> tuple[PageTable, int]:
    """The table on the device, with at least one entry; its page size."""
    page_table.check()
    page_table = page_table.with_page_size(page_size)
    check_positive(batch_size=page_table.batch_size)
    page_table = page_table.padded()
    assert page_table.page_size is not None
    return page_table, page_table.page_size


def checked_sms(num_sms: int | None) -> int:
    """The multiprocessors to fill: the device's, unless given."""
    return default_num_sms() if num_sms is None else integer("num_sms", num_sms)


def programs_per_sm_of(
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
