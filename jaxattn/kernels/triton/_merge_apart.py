"""Split tiles that a kernel of its own merges: few tall ones, of whose rows each split's program takes a share.

The last program of a tile would merge all of its rows alone (`_split_merge`).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxattn.device import num_sms
from jaxattn.kernels.triton._launch import launch, like
from jaxattn.kernels.triton._limits import token_and_row
from jaxattn.kernels.triton._rows import divmod_by, pow2
from jaxattn.kernels.triton.merge import merge_rows
from jaxattn.plan import MID_ROWS, AttentionPlan
from jaxattn.spec import AttentionSpec
from jaxattn.work_list import WorkItem


@dataclasses.dataclass(frozen=True)
class Apart:
    """What a program merges at once."""

    rows: int
    states: int

    @classmethod
    def of(cls, plan: AttentionPlan, head_dim: int) -> "Apart | None":
        """None where the last program of a tile merges."""
        group = plan.num_qo_heads // plan.num_kv_heads
        tiles = max(plan.batch_size, plan.num_qo_tokens * group // MID_ROWS)
        few = tiles * plan.num_kv_heads <= num_sms() // 4
        if not few or plan.block_rows != MID_ROWS or plan.is_decode:
            return None
        # Of many keys they have 8 splits and more, and 64 rows are long for one program: 16 on 16384, 32 splits,
        # 35.4 us by the last program and 25.4 apart; 16 on 4096, 8 splits, 18.5 and 15.7; of 4 splits there is no
        # difference. A decode's splits may be fixed, such a prefill's are not.
        return cls(4, min(16, 2048 // pow2(head_dim)))


def _merge_kernel(
    items_ref,  # int32 [w, 10]
    o_partial_ref,  # as in `Partials`
    lse_partial_ref,
    whole_o_ref,  # o_ref's memory, with the tiles that are not split
    whole_lse_ref,
    o_ref,  # [t * h, dv]
    lse_ref,  # float32 [t * h]
    *,
    spec: AttentionSpec,
    apart: Apart,
    block_rows: int,
    parts: int,
):
    """Each split's program merges a share of its tile's rows. Grid: (kh * parts, w), as `Partials.column` and items."""
    column, work = pl.program_id(0), pl.program_id(1)
    item = WorkItem.read(items_ref, work)
    head, part = divmod_by(column, parts)
    columns = spec.num_kv_heads * parts
    begin = item.row_begin + part * block_rows
    num_rows = jnp.clip(item.row_end - begin, 0, block_rows)
    share = (num_rows + item.num_splits - 1) // item.num_splits
    first = item.split * share
    end = jnp.minimum(first + share, num_rows)

    def some_rows(i, _):
        r = first + i * apart.rows + jnp.arange(apart.rows, dtype=jnp.int32)
        mine = r < end
        o, lse = merge_rows(
            o_partial_ref,
            lse_partial_ref,
            (item.slot * columns + column) * block_rows + jnp.where(mine, r, first),
            columns * block_rows,
            item.num_splits,
            block=apart.states,
            empty_may_hold_anything=False,
        )
        _, row = token_and_row(spec, head, begin + r)
        cols = jnp.arange(o.shape[1], dtype=jnp.int32)
        inside = mine[:, None] & (cols < o_ref.shape[1])[None, :]
        plgpu.store(o_ref.at[row[:, None], cols[None, :]], o.astype(o_ref.dtype), mask=inside)
        plgpu.store(lse_ref.at[row], lse, mask=mine)

    @pl.when(item.num_splits > 1)
    def _():
        jax.lax.fori_loop(0, (end - first + apart.rows - 1) // apart.rows, some_rows, None)


def merge_apart(
    o: jax.Array,
    lse: jax.Array,
    o_partial: jax.Array,
    lse_partial: jax.Array,
    plan: AttentionPlan,
    apart: Apart,
    *,
    block_rows: int,
    name: str,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """(o [t * h, dv], lse [t * h]) with the rows of split tiles, whose states the partial ones are."""
    parts = plan.block_rows // block_rows
    merged = launch(
        functools.partial(
            _merge_kernel, spec=plan.spec, apart=apart, block_rows=block_rows, parts=parts
        ),
        dict(
            items_ref=plan.items,
            o_partial_ref=o_partial,
            lse_partial_ref=lse_partial,
            whole_o_ref=o,
            whole_lse_ref=lse,
        ),
        dict(o_ref=like(o), lse_ref=like(lse)),
        name=f"{name}_merge",
        grid=(plan.num_kv_heads * parts, plan.items.shape[0]),
        num_warps=4,
        num_stages=1,
        interpret=interpret,
        aliases=dict(whole_o_ref="o_ref", whole_lse_ref="lse_ref"),
    )
    return merged["o_ref"], merged["lse_ref"]
