"""What the batch classes share: capacities, and the plan they keep."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxattn.checks import (
    check_array,
    check_choice,
    check_heads,
    check_host_indptr,
    check_host_page_table,
    check_positive,
    check_shape,
)
from jaxattn.flashinfer.arguments import check_layout
from jaxattn.flashinfer.index_arrays import index_array, pad, power_of_two
from jaxattn.flashinfer.logits import Logits
from jaxattn.flashinfer.masks import CustomMask
from jaxattn.flashinfer.options import flashinfer_options
from jaxattn.flashinfer.programs import Scales, attend
from jaxattn.kv_cache import PagedKVCache
from jaxattn.merge import LSE_BASES
from jaxattn.page_table import PageTable
from jaxattn.plan import AttentionPlan
from jaxattn.spec import Visible


@dataclasses.dataclass
class Planned:
    """What `plan` keeps for `run`."""

    make: Callable[[int], AttentionPlan]  # the plan for a number of rows of q
    rows: int | None  # rows that q must have; None: only a qo_indptr on the device knows
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_vo: int
    dtypes: tuple[jnp.dtype, jnp.dtype]  # of q and of keys and values
    o_dtype: jnp.dtype
    logits: Logits
    window_left: int
    check_pages: Callable[[int], None] | None  # raises where a cache has too few pages
    made: tuple[int, AttentionPlan] | None = None
    num_pages: int | None = None  # of a cache that has enough

    def check_cache(self, num_pages: int) -> None:
        """Raises ValueError where a page id that is known on the host is not in the cache."""
        if self.check_pages is not None and num_pages != self.num_pages:
            self.check_pages(num_pages)
            self.num_pages = num_pages

    def plan(self, rows: int) -> AttentionPlan:
        if self.made is not None and self.made[0] == rows:
            return self.made[1]
        plan = self.make(rows)
        # Made within a caller's jit from arrays outside of it, a plan must not outlive that trace.
        if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(plan)):
            self.made = rows, plan
        return plan


class BatchWrapper:
    """The capacities of a wrapper, and the plan it keeps."""

    _max_batch_size: int | None = None  # None: as large as the batch
    _max_num_pages: int | None = None
    _max_rows: int | None = None  # what q is padded to
    _max_mask_bytes: int | None = None
    _planned: Planned | None = None

    def __init__(self, kv_layout: str):
        check_layout(kv_layout)
        self._kv_layout = kv_layout

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether capacities are fixed."""
        return self._max_batch_size is not None

    @property
    def resolved_backend(self) -> str:
        """ "fa2": one kernel serves all cases."""
        return "fa2"

    def end_forward(self) -> None:
        """Nothing, as in FlashInfer: a plan is kept until the next."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: FlashInfer's older `run`, whose arguments overrule the plan's, defaults included."""
        raise NotImplementedError(
            f"{type(self).__name__}.forward would overrule what was planned: give causal, sm_scale "
            "and the other options to plan(...), then call run(...), or run_return_lse(...)"
        )

    forward_return_lse = forward

    @flashinfer_options()
    def reset_workspace_buffer(
        self, float_workspace_buffer: Any, int_workspace_buffer: Any
    ) -> None:
        """Nothing: there is no workspace to replace."""

    def workspace_size(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """(0, 0), the bytes of FlashInfer's two workspaces that a plan with these arguments needs."""
        return 0, 0

    @flashinfer_options()
    def prewarm_paged_kv_stride_variant(self, variant: str = "independent") -> None:
        """Nothing: there is one variant, which `run` compiles."""

    def _fix_capacity(self, **buffers: Any) -> None:
        """Takes capacities from the lengths of CUDA-graph buffers, an indptr first."""
        for name, buffer in buffers.items():
            if not hasattr(buffer, "__len__"):
                raise ValueError(
                    f"{name} must be an array with use_cuda_graph=True; got {type(buffer).__name__}"
                )
        first = next(iter(buffers))
        batch_size = len(buffers[first]) - 1
        for name, buffer in buffers.items():
            if "indices" in name:
                self._max_num_pages = len(buffer)
                continue
            want = batch_size if "last_page_len" in name else batch_size + 1
            if len(buffer) != want:
                raise ValueError(
                    f"{name} must have {want} elements, as {first} gives {batch_size=}; "
                    f"got {len(buffer)}"
                )
        self._max_batch_size = batch_size

    def _fix_mask_capacity(self, custom_mask_buf: Any, mask_indptr_buf: Any) -> None:
        """Takes the capacity for masks from CUDA-graph buffers, which may both be missing."""
        if custom_mask_buf is None and mask_indptr_buf is None:
            return
        if not (hasattr(custom_mask_buf, "__len__") and hasattr(mask_indptr_buf, "__len__")):
            raise ValueError(
                "custom_mask_buf and mask_indptr_buf must both be arrays, or both be left out; got "
                f"{type(custom_mask_buf).__name__} and {type(mask_indptr_buf).__name__}"
            )
        assert self._max_batch_size is not None
        if len(mask_indptr_buf) != self._max_batch_size + 1:
            raise ValueError(
                f"mask_indptr_buf must have {self._max_batch_size + 1} elements, as the indptr "
                f"buffers; got {len(mask_indptr_buf)}"
            )
        self._max_mask_bytes = len(custom_mask_buf)

    def _fit_mask(
        self, custom_mask: Any, packed_custom_mask: Any, qo_indptr: Any, kv_len: Any
    ) -> CustomMask | None:
        """A checked mask, padded to the capacity."""
        given = custom_mask is not None or packed_custom_mask is not None
        if given and self.is_cuda_graph_enabled and self._max_mask_bytes is None:
            raise ValueError(
                "a mask needs custom_mask_buf and mask_indptr_buf with use_cuda_graph=True: they "
                "fix its capacity"
            )
        return CustomMask.of(
            custom_mask, packed_custom_mask, qo_indptr, kv_len, self._max_mask_bytes
        )

    def _fit_indptr(self, name: str, indptr: Any, batch_size: int) -> Any:
        """A checked indptr, padded with requests of length 0."""
        indptr = index_array(name, indptr, batch_size + 1)
        check_host_indptr(name, indptr)
        most = self._max_batch_size
        if most is None:
            return indptr
        if batch_size > most:
            raise ValueError(
                f"{name} holds {batch_size} requests, more than the batch size fixed at {most}: "
                "make a wrapper with larger buffers"
            )
        return pad(indptr, most + 1, "edge")

    def _fit_table(
        self, prefix: str, indptr: Any, indices: Any, last_page_len: Any, page_size: int
    ) -> tuple[PageTable, Callable[[int], None]]:
        """A checked page table, padded to the capacities; and its check for a number of pages."""
        check_positive(page_size=page_size)
        last_page_len = index_array(f"{prefix}last_page_len", last_page_len, "batch_size")
        indptr = self._fit_indptr(f"{prefix}indptr", indptr, len(last_page_len))
        last_page_len = pad(last_page_len, len(indptr) - 1)
        indices = index_array(f"{prefix}indices", indices, "num_pages")
        num_pages, most = len(indices), self._max_num_pages
        if most is not None and num_pages > most:
            raise ValueError(
                f"{prefix}indices holds {num_pages} pages, more than the number fixed at {most}: "
                "make a wrapper with a larger buffer"
            )
        check_pages = functools.partial(
            check_host_page_table, indptr, indices, last_page_len, page_size, prefix=prefix
        )
        check_pages()
        capacity = power_of_two(num_pages) if most is None else most
        table = PageTable(indptr, pad(indices, capacity), last_page_len, page_size)
        return table, check_pages

    def _keep(
        self,
        make: Callable[[int], AttentionPlan],
        rows: int | None,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtypes: tuple[jnp.dtype, jnp.dtype],
        o_dtype: jnp.dtype,
        logits: Logits,
        *,
        head_dim_vo: int | None = None,
        window_left: int = -1,
        check_pages: Callable[[int], None] | None = None,
        now: bool = True,
    ) -> None:
        """Keeps a plan for `run`; `now`: makes it, where the rows of q are known."""
        head_dim_vo = head_dim if head_dim_vo is None else head_dim_vo
        check_heads(num_qo_heads, num_kv_heads)
        check_positive(head_dim_vo=head_dim_vo)
        Visible.of(False, window_left)
        planned = Planned(
            make,
            rows,
            num_qo_heads,
            num_kv_heads,
            head_dim,
            head_dim_vo,
            dtypes,
            o_dtype,
            logits,
            window_left,
            check_pages,
        )
        if rows is not None:
            capacity = rows if self._max_rows is None else self._max_rows
            if rows > capacity:
                raise ValueError(
                    f"qo_indptr[-1]={rows} must not exceed that of the first plan, {capacity}, "
                    "which fixed the capacity (use_cuda_graph=True)"
                )
            if now:
                planned.made = capacity, make(capacity)
            if self.is_cuda_graph_enabled:
                self._max_rows = capacity
        self._planned = planned

    def _check_planned(self) -> Planned:
        if self._planned is None:
            raise RuntimeError(f"{type(self).__name__}.run needs a plan: call plan(...) first")
        return self._planned

    def _run(
        self,
        op: Callable[..., Any],
        q: Array,
        kv: Any,
        *,
        q_scale: ArrayLike | None,
        k_scale: ArrayLike | None,
        v_scale: ArrayLike | None,
        return_lse: bool,
        lse_base: str,
        window_left: int | None = None,
        sinks: Array | None = None,
        sm_scale: float | None = None,
    ) -> Any:
        """Attends; an sm_scale takes the place of the plan's."""
        check_choice("lse_base", lse_base, LSE_BASES)
        planned = self._check_planned()
        if window_left is not None and window_left != planned.window_left:
            raise ValueError(
                f"window_left must be that of plan, {planned.window_left}, or None; got "
                f"{window_left}: call plan(..., window_left={window_left})"
            )
        check_shape("q", q, ("rows", planned.num_qo_heads, planned.head_dim))
        is_cache = isinstance(kv, PagedKVCache)
        arrays = kv.arrays if is_cache else jax.tree.leaves(kv)
        for name, xs, dtype in zip(("q", "kv"), ([q], arrays), planned.dtypes):
            for x in xs:
                check_array(name, x)
                if x.dtype != dtype:
                    raise ValueError(
                        f"{name} must be {dtype}, the {name}_data_type of plan; got {x.dtype}: "
                        f"cast it, or call plan(..., {name}_data_type={x.dtype.name!r})"
                    )
        scales = Scales(q_scale, k_scale, v_scale)
        scales.check(planned.num_qo_heads, planned.num_kv_heads)
        if is_cache and kv.scales is not None and (k_scale is not None or v_scale is not None):
            raise ValueError(
                "k_scale and v_scale must be None for a cache that has scales: give them in one place"
            )
        for x in arrays[:1]:
            if x.ndim:  # pages are the first axis of every form of a cache
                planned.check_cache(x.shape[0])
        for x in arrays[-1:]:
            if x.ndim and x.shape[-1] != planned.head_dim_vo:
                raise ValueError(
                    f"v must have head_dim {planned.head_dim_vo}, as planned; got {x.shape[-1]}"
                )
        rows, most = q.shape[0], self._max_rows
        if planned.rows is not None:
            fits = rows in (planned.rows, most)
        else:
            fits = most is None or rows <= most
        if not fits:
            raise ValueError(
                f"q must have as many rows as planned ({planned.rows}), or the largest number "
                f"planned for ({most}); got {rows}"
            )
        if self.is_cuda_graph_enabled and most is None:
            self._max_rows = most = rows
        capacity = rows if most is None else most
        result = attend(
            op,
            pad(q, capacity),
            kv,
            planned.plan(capacity),
            sinks,
            scales,
            kv_layout=self._kv_layout,
            logits=planned.logits.scaled(sm_scale),
            out_dtype=planned.o_dtype,
            lse_base=lse_base if return_lse else None,
        )
        return result if rows == capacity else jax.tree.map(lambda x: x[:rows], result)
