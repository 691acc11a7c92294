"""FlashInfer's attention classes and functions: same names, arguments, order and defaults.

For those who port. A wrapper keeps a plan and calls `paged_decode`, `paged_prefill` or
`ragged_prefill`. It differs from FlashInfer in what JAX arrays are:

- Results are returned. `out` and `lse` cannot be written and raise NotImplementedError.
- `plan` reads no device value. Index arrays may live on the host (numpy, lists) or on the device,
  int32 either way; those on the host are also checked: indptr's order, enough indices and key rows,
  and the rows of q.
- Shapes are compiled. Indices are padded to a power of two, so that growing lengths seldom
  recompile; with `use_cuda_graph=True` the buffers' lengths are capacities, and `jax.jit` over them
  stands in for the graph: other lengths, and fewer requests, never recompile the attention.

Accepted for source compatibility, without a meaning under XLA: the workspace (any value, None
included; XLA allocates scratch memory), the contents of CUDA-graph buffers, `use_tensor_cores`
(always used), `non_blocking` (nothing blocks), `enable_pdl`, and hints that restate the index
arrays: `seq_lens`, `seq_lens_q`, `block_tables`, `max_token_per_sequence`, `max_sequence_kv`,
`uniform_q_len`. `rope_scale` and `rope_theta` only mean something with a `pos_encoding_mode` that
is not built. One kernel serves all cases: `backend` is "auto" or "fa2". Every other option raises
NotImplementedError unless it is off.

lse is in base 2, as FlashInfer's; `lse_base="ln"` gives the natural log of the functional surface.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxattn.attention import paged_decode, paged_prefill, ragged_prefill
from jaxattn.checks import (
    FLOAT_DTYPES,
    check_choice,
    check_heads,
    check_index,
    check_positive,
    check_scale,
    check_shape,
)
from jaxattn.kv_cache import LAYOUTS, PagedKVCache, PageTable
from jaxattn.plan import (
    AttentionPlan,
    plan_decode,
    plan_prefill,
    plan_ragged_prefill,
)

Plan = AttentionPlan
Indices = Array | np.ndarray | Sequence[int]

# What leaves an option off, where None does not (or not alone).
OFF: dict[str, Any] = {
    "window_left": -1,
    "window_right": 0,
    "logits_soft_cap": 0,
    "token_pos_in_items_len": 0,
    "q_len_per_req": 1,
    "o_scale": 1,
    "lse_layout": "NH",
}


# Compiled once for all wrappers.
_HEADS = ("num_qo_heads", "num_kv_heads")
_SPLITS = ("fixed_split_size", "disable_split_kv")
_plan_decode = jax.jit(plan_decode, static_argnames=("page_size", *_SPLITS, *_HEADS))


_ROWS = ("num_qo_tokens", "causal", *_HEADS)
_plan_prefill = jax.jit(plan_prefill, static_argnames=("page_size", *_SPLITS, *_ROWS))
_plan_ragged_prefill = jax.jit(plan_ragged_prefill, static_argnames=("disable_split_kv", *_ROWS))


@functools.partial(jax.jit, static_argnames=("op", "kv_layout", "sm_scale", "lse_base"))
def _attend(
    op: Callable[..., Any],
    q: Array,
    kv: Any,
    plan: Plan,
    v_scale: ArrayLike | None,
    *,
    kv_layout: str,
    sm_scale: float,
    lse_base: str | None,
) -> Any:
    """The op on what its wrapper was given; without an lse_base, o alone."""
    if op is ragged_prefill:
        op = functools.partial(op, q, *kv, plan, kv_layout=kv_layout)
    else:
        # Outside of jit, a page axis that is missing would cost a copy of the cache.
        is_cache = isinstance(kv, PagedKVCache)
        cache = kv if is_cache else PagedKVCache.from_flashinfer(kv, kv_layout)
        op = functools.partial(op, q, cache, plan)
    o, lse = op(sm_scale=sm_scale, return_lse=True)
    if v_scale is not None:
        o = (o.astype(jnp.float32) * v_scale).astype(o.dtype)
    if lse_base is None:
        return o
    return o, lse if lse_base == "ln" else lse * jnp.float32(1 / math.log(2))


@dataclasses.dataclass
class _Planned:
    """What `plan` keeps for `run`."""

    make: Callable[[int], Plan]  # the plan for a number of rows of q
    rows: int | None  # rows that q must have; None: only a qo_indptr on the device knows
    num_qo_heads: int
    head_dim: int
    dtype: jnp.dtype
    sm_scale: float
    made: tuple[int, Plan] | None = None

    def plan(self, rows: int) -> Plan:
        if self.made is not None and self.made[0] == rows:
            return self.made[1]
        plan = self.make(rows)
        # Made within a caller's jit from arrays outside of it, a plan must not outlive that trace.
        if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(plan)):
            self.made = rows, plan
        return plan


class _BatchWrapper:
    """The capacities of a wrapper, and the plan it keeps."""

    _max_batch_size: int | None = None  # None: as large as the batch
    _max_num_pages: int | None = None
    _max_rows: int | None = None  # what q is padded to
    _planned: _Planned | None = None

    def __init__(self, kv_layout: str, backend: str, **refused: Any):
        _check_layout(kv_layout)
        _check_backend(backend)
        _refuse(**refused)
        self._kv_layout = kv_layout

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether capacities are fixed."""
        return self._max_batch_size is not None

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

    def _fit_indptr(self, name: str, indptr: Any, batch_size: int) -> Any:
        """A checked indptr, padded with requests of length 0."""
        indptr = _index(name, indptr, batch_size + 1)
        if isinstance(indptr, np.ndarray) and (indptr[:1].any() or (np.diff(indptr) < 0).any()):
            raise ValueError(f"{name} must start at 0 and not decrease; got {indptr}")
        most = self._max_batch_size
        if most is None:
            return indptr
        if batch_size > most:
            raise ValueError(
                f"{name} holds {batch_size} requests, more than the batch size fixed at {most}: "
                "make a wrapper with larger buffers"
            )
        return _pad(indptr, most + 1, "edge")

    def _fit_table(
        self, prefix: str, indptr: Any, indices: Any, last_page_len: Any, page_size: int
    ) -> PageTable:
        """A checked page table, padded to the capacities."""
        check_positive(page_size=page_size)
        last_page_len = _index(f"{prefix}last_page_len", last_page_len, "batch_size")
        indptr = self._fit_indptr(f"{prefix}indptr", indptr, len(last_page_len))
        indices = _index(f"{prefix}indices", indices, "num_pages")
        num_pages, most = len(indices), self._max_num_pages
        if isinstance(indptr, np.ndarray) and indptr[-1] > num_pages:
            raise ValueError(
                f"{prefix}indices must have {prefix}indptr[-1]={indptr[-1]} elements; "
                f"got {num_pages}"
            )
        if most is not None and num_pages > most:
            raise ValueError(
                f"{prefix}indices holds {num_pages} pages, more than the number fixed at {most}: "
                "make a wrapper with a larger buffer"
            )
        return PageTable(
            indptr,
            _pad(indices, _power_of_two(num_pages) if most is None else most),
            _pad(last_page_len, len(indptr) - 1),
        )

    def _keep(
        self,
        make: Callable[[int], Plan],
        rows: int | None,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: jnp.dtype,
        sm_scale: float | None,
    ) -> None:
        check_heads(num_qo_heads, num_kv_heads)
        check_positive(head_dim=head_dim)
        planned = _Planned(
            make, rows, num_qo_heads, head_dim, dtype, check_scale(sm_scale, head_dim)
        )
        if rows is not None:
            capacity = rows if self._max_rows is None else self._max_rows
            if rows > capacity:
                raise ValueError(
                    f"qo_indptr[-1]={rows} must not exceed that of the first plan, {capacity}, "
                    "which fixed the capacity (use_cuda_graph=True)"
                )
            planned.made = capacity, make(capacity)
            if self.is_cuda_graph_enabled:
                self._max_rows = capacity
        self._planned = planned

    def _run(
        self,
        op: Callable[..., Any],
        q: Array,
        kv: Any,
        args: tuple[Any, ...],
        *,
        q_scale: float | None,
        k_scale: float | None,
        v_scale: ArrayLike | None,
        return_lse: bool,
        lse_base: str,
        out: Any,
        lse: Any,
        **refused: Any,
    ) -> Any:
        _refuse_outputs(out=out, lse=lse)
        if args:
            raise NotImplementedError(
                "positional arguments after the keys are for custom kernels, which are not built; "
                f"got {len(args)}"
            )
        _refuse(**refused)
        planned = self._planned
        if planned is None:
            raise RuntimeError(f"{type(self).__name__}.run needs a plan: call plan(...) first")
        check_shape("q", q, ("rows", planned.num_qo_heads, planned.head_dim))
        for name, x in [("q", q), *(("kv", x) for x in jax.tree.leaves(kv))]:
            if x.dtype != planned.dtype:
                raise ValueError(
                    f"{name} must be {planned.dtype}, the {name}_data_type of plan; got {x.dtype}: "
                    f"cast it, or call plan(..., {name}_data_type={x.dtype.name!r})"
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
        result = _attend(
            op,
            _pad(q, capacity),
            kv,
            planned.plan(capacity),
            _check_scalar("v_scale", v_scale),
            kv_layout=self._kv_layout,
            sm_scale=_fold(planned.sm_scale, q_scale=q_scale, k_scale=k_scale),
            lse_base=_check_lse_base(lse_base) if return_lse else None,
        )
        return result if rows == capacity else jax.tree.map(lambda x: x[:rows], result)


class BatchDecodeWithPagedKVCacheWrapper(_BatchWrapper):
    """Attention of one query token per request over its paged keys, as FlashInfer's class.

    The module's docstring says which arguments mean what here.

    Args:
      float_workspace_buffer: anything; XLA needs no workspace.
      kv_layout: "NHD" or "HND", the axes of the cache.
      use_cuda_graph: fixes capacities: the batch size by `len(paged_kv_last_page_len_buffer)` and
        the number of page indices by `len(paged_kv_indices_buffer)`. Smaller batches are padded
        with requests of length 0.
      backend: "auto" or "fa2".

    Raises:
      KeyError: an unknown kv_layout.
      ValueError: use_cuda_graph without a buffer, or `len(paged_kv_indptr_buffer)` is not the batch
        size + 1.
      NotImplementedError: an option that is not built.
    """

    def __init__(
        self,
        float_workspace_buffer: Any,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: ArrayLike | None = None,
        paged_kv_indices_buffer: ArrayLike | None = None,
        paged_kv_last_page_len_buffer: ArrayLike | None = None,
        backend: str = "auto",
        jit_args: Any = None,
    ):
        super().__init__(kv_layout, backend, jit_args=jit_args)
        if use_cuda_graph:
            self._fix_capacity(
                paged_kv_indptr_buffer=paged_kv_indptr_buffer,
                paged_kv_indices_buffer=paged_kv_indices_buffer,
                paged_kv_last_page_len_buffer=paged_kv_last_page_len_buffer,
            )
            self._max_rows = self._max_batch_size

    def plan(
        self,
        indptr: Indices,
        indices: Indices,
        last_page_len: Indices,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: DTypeLike | None = "float16",
        kv_data_type: DTypeLike | None = None,
        o_data_type: DTypeLike | None = None,
        data_type: DTypeLike | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: ArrayLike | None = None,
        seq_lens: ArrayLike | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
        *,
        window_right: int = 0,
        is_causal: bool | None = None,
    ) -> None:
        """Plans a step; one plan serves all layers.

        Args:
          indptr: int32 [batch_size + 1]; request i owns pages `indices[indptr[i]:indptr[i + 1]]`.
          indices: int32 [indptr[-1]] or longer.
          last_page_len: int32 [batch_size], tokens in each request's last page.
          num_qo_heads, num_kv_heads, head_dim, page_size: of q and the cache.
          q_data_type: dtype of q, by default float16 as in FlashInfer; kv_data_type and o_data_type
            follow it.
          data_type: the kv_data_type where that is None; also the q_data_type where that is None.
          sm_scale: default 1 / sqrt(head_dim).
          fixed_split_size, disable_split_kv: as for `plan_decode`, the size in pages; not both.

        Raises:
          ValueError, TypeError: arrays or sizes that do not fit each other or the fixed capacities.
          KeyError: an unknown pos_encoding_mode.
          NotImplementedError: an option that is not built.
        """
        if q_len_per_req < 1:
            raise ValueError(f"q_len_per_req must be at least 1; got {q_len_per_req}")
        _check_pos_encoding(pos_encoding_mode)
        _refuse(
            window_left=window_left,
            window_right=window_right,
            logits_soft_cap=logits_soft_cap,
            q_len_per_req=q_len_per_req,
            is_causal=is_causal,
        )
        dtype = _dtype(
            data_type if q_data_type is None else q_data_type,
            data_type if kv_data_type is None else kv_data_type,
            o_data_type,
        )
        table = self._fit_table("", indptr, indices, last_page_len, page_size)
        heads = dict(num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads)
        splits = dict(fixed_split_size=fixed_split_size, disable_split_kv=disable_split_kv)
        self._keep(
            lambda _: _plan_decode(table, page_size=page_size, **splits, **heads),
            np.shape(last_page_len)[0],
            **heads,
            head_dim=head_dim,
            dtype=dtype,
            sm_scale=sm_scale,
        )

    def run(
        self,
        q: Array,
        paged_kv_cache: Any,
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: ArrayLike | None = None,
        out: None = None,
        lse: None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Any = None,
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: Any = None,
        lse_base: str = "log2",
    ) -> Any:
        """Attends, as planned.

        Args:
          q: [batch_size, num_qo_heads, head_dim]; with fixed capacities also [max_batch_size, ...],
            which saves padding q and cutting the result, each compiled anew for another batch size.
          paged_kv_cache: a tuple of 4-D arrays (k, v), or one 5-D array, in kv_layout; with
            page_size 1 the page axis may be missing. Also a `PagedKVCache`.
          q_scale, k_scale: Python numbers that multiply sm_scale; each value is compiled anew.
          v_scale: a number or scalar array that multiplies the output.
          return_lse: also return the logsumexp of the scaled scores.
          lse_base: "log2" or "ln".

        Returns:
          o, shaped and typed as q; with return_lse, (o, lse float32 [rows of q, num_qo_heads]). A
          request without keys gives 0 and -inf.

        Raises:
          RuntimeError: no plan.
          ValueError: rows, heads or dtypes other than planned, or an unknown lse_base.
          KeyError: the cache is a list.
          NotImplementedError: an option that is not built, and `out` or `lse`.
        """
        return self._run(
            paged_decode,
            q,
            paged_kv_cache,
            args,
            q_scale=q_scale,
            k_scale=k_scale,
            v_scale=v_scale,
            out=out,
            lse=lse,
            return_lse=return_lse,
            lse_base=lse_base,
            window_left=window_left,
            sinks=sinks,
            q_len_per_req=q_len_per_req,
            skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor,
            kv_cache_sf=kv_cache_sf,
        )

    run_return_lse = functools.partialmethod(run, return_lse=True)


class CUDAGraphBatchDecodeWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """The decode wrapper with fixed capacities: any lengths and any batch size run one program.

    `plan` never recompiles with index arrays on the host, nor with ones of full capacity on the
    device; `run` never with a q of max_batch_size rows. Another batch size costs only the
    compilation of a pad and a slice.

    Args:
      workspace_buffer: anything; XLA needs no workspace.
      indptr_buffer, indices_buffer, last_page_len_buffer: arrays whose lengths are the capacities:
        max_batch_size + 1, max_num_pages, max_batch_size. They are neither read nor written.
      kv_layout: "NHD" or "HND".
      max_batch_size, max_num_pages: the capacities, in place of the buffers.

    Raises:
      ValueError: neither all three buffers nor both numbers, or buffers that do not fit each other.
    """

    def __init__(
        self,
        workspace_buffer: Any,
        indptr_buffer: ArrayLike | None = None,
        indices_buffer: ArrayLike | None = None,
        last_page_len_buffer: ArrayLike | None = None,
        kv_layout: str = "NHD",
        use_tensor_cores: bool = False,
        *,
        max_batch_size: int | None = None,
        max_num_pages: int | None = None,
    ):
        buffers = (indptr_buffer, indices_buffer, last_page_len_buffer)
        given = sum(buffer is not None for buffer in buffers)
        if max_batch_size is not None and max_num_pages is not None and not given:
            check_positive(max_batch_size=max_batch_size, max_num_pages=max_num_pages)
            super().__init__(workspace_buffer, kv_layout, use_tensor_cores=use_tensor_cores)
            self._max_batch_size = self._max_rows = max_batch_size
            self._max_num_pages = max_num_pages
        elif max_batch_size is None and max_num_pages is None and given == 3:
            super().__init__(workspace_buffer, kv_layout, True, use_tensor_cores, *buffers)
        else:
            raise ValueError(
                "capacities must come from indptr_buffer, indices_buffer and last_page_len_buffer, "
                "or from max_batch_size and max_num_pages; "
                f"got {max_batch_size=}, {max_num_pages=} and {given} of 3 buffers"
            )


class BatchPrefillWithPagedKVCacheWrapper(_BatchWrapper):
    """Attention of ragged query tokens over paged keys, as FlashInfer's class.

    The module's docstring says which arguments mean what here.

    Args:
      float_workspace_buffer: anything; XLA needs no workspace.
      kv_layout: "NHD" or "HND", the axes of the cache.
      use_cuda_graph: fixes capacities: the batch size and the number of page indices by the lengths
        of the buffers, the rows of q by the first plan (or, where its qo_indptr is on the device,
        the first run).
      backend: "auto" or "fa2".

    Raises:
      KeyError: an unknown kv_layout.
      ValueError: use_cuda_graph without a buffer, or buffers that do not fit each other.
      NotImplementedError: an option that is not built.
    """

    def __init__(
        self,
        float_workspace_buffer: Any,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: ArrayLike | None = None,
        paged_kv_indptr_buf: ArrayLike | None = None,
        paged_kv_indices_buf: ArrayLike | None = None,
        paged_kv_last_page_len_buf: ArrayLike | None = None,
        custom_mask_buf: ArrayLike | None = None,
        mask_indptr_buf: ArrayLike | None = None,
        backend: str = "auto",
        jit_args: Any = None,
        jit_kwargs: Any = None,
        variant_owns_mask: bool = False,
    ):
        super().__init__(
            kv_layout,
            backend,
            custom_mask_buf=custom_mask_buf,
            mask_indptr_buf=mask_indptr_buf,
            jit_args=jit_args,
            jit_kwargs=jit_kwargs,
            variant_owns_mask=variant_owns_mask,
        )
        if use_cuda_graph:
            self._fix_capacity(
                qo_indptr_buf=qo_indptr_buf,
                paged_kv_indptr_buf=paged_kv_indptr_buf,
                paged_kv_indices_buf=paged_kv_indices_buf,
                paged_kv_last_page_len_buf=paged_kv_last_page_len_buf,
            )

    def plan(
        self,
        qo_indptr: Indices,
        paged_kv_indptr: Indices,
        paged_kv_indices: Indices,
        paged_kv_last_page_len: Indices,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: ArrayLike | None = None,
        packed_custom_mask: ArrayLike | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: DTypeLike = "float16",
        kv_data_type: DTypeLike | None = None,
        o_data_type: DTypeLike | None = None,
        non_blocking: bool = True,
        prefix_len_ptr: ArrayLike | None = None,
        token_pos_in_items_ptr: ArrayLike | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: ArrayLike | None = None,
        seq_lens: ArrayLike | None = None,
        seq_lens_q: ArrayLike | None = None,
        block_tables: ArrayLike | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        uniform_q_len: int | None = None,
    ) -> None:
        """Plans a step; one plan serves all layers.

        A qo_indptr on the device is not read back: `run` then plans for the rows q has. Rows past
        qo_indptr[-1] give 0 and lse -inf, and what qo_indptr says of rows that q lacks is cut off.

        Args:
          qo_indptr: int32 [batch_size + 1]; request i has query rows `qo_indptr[i]:qo_indptr[i +
            1]`.
          paged_kv_indptr: int32 [batch_size + 1]; its pages are
            `paged_kv_indices[paged_kv_indptr[i]:paged_kv_indptr[i + 1]]`.
          paged_kv_indices: int32 [paged_kv_indptr[-1]] or longer.
          paged_kv_last_page_len: int32 [batch_size], tokens in each request's last page.
          num_qo_heads, num_kv_heads, head_dim_qk, page_size: of q and the cache.
          causal: query j of a request sees its keys 0 .. kv_len - qo_len + j (bottom-right
            aligned).
          q_data_type: dtype of q, by default float16 as in FlashInfer; kv_data_type and o_data_type
            follow it.
          sm_scale: default 1 / sqrt(head_dim_qk).
          fixed_split_size, disable_split_kv: as for `plan_prefill`, the size in pages; not both.

        Raises:
          ValueError, TypeError: arrays or sizes that do not fit each other or the fixed capacities.
          KeyError: an unknown pos_encoding_mode.
          NotImplementedError: an option that is not built.
        """
        _check_pos_encoding(pos_encoding_mode)
        _refuse(
            head_dim_vo=None if head_dim_vo == head_dim_qk else head_dim_vo,
            custom_mask=custom_mask,
            packed_custom_mask=packed_custom_mask,
            use_fp16_qk_reduction=use_fp16_qk_reduction,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            prefix_len_ptr=prefix_len_ptr,
            token_pos_in_items_ptr=token_pos_in_items_ptr,
            token_pos_in_items_len=token_pos_in_items_len,
            max_item_len_ptr=max_item_len_ptr,
        )
        dtype = _dtype(q_data_type, kv_data_type, o_data_type)
        table = self._fit_table(
            "paged_kv_", paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size
        )
        batch_size = np.shape(paged_kv_last_page_len)[0]
        qo_indptr = self._fit_indptr("qo_indptr", qo_indptr, batch_size)
        heads = dict(num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads)
        splits = dict(fixed_split_size=fixed_split_size, disable_split_kv=disable_split_kv)
        self._keep(
            lambda rows: _plan_prefill(
                qo_indptr,
                table,
                num_qo_tokens=rows,
                page_size=page_size,
                causal=causal,
                **splits,
                **heads,
            ),
            _last(qo_indptr),
            **heads,
            head_dim=head_dim_qk,
            dtype=dtype,
            sm_scale=sm_scale,
        )

    def run(
        self,
        q: Array,
        paged_kv_cache: Any,
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: ArrayLike | None = None,
        out: None = None,
        lse: None = None,
        return_lse: bool = False,
        lse_base: str = "log2",
        lse_layout: str = "NH",
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Any = None,
        kv_cache_sf: Any = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        use_fp16_softmax: bool | None = None,
        uses_spcompress: bool | None = None,
    ) -> Any:
        """Attends, as planned.

        Args:
          q: [qo_indptr[-1], num_qo_heads, head_dim]; with fixed capacities also of the largest
            number of rows.
          paged_kv_cache, q_scale, k_scale, v_scale, return_lse, lse_base: as for the decode
            wrapper.

        Returns:
          o, shaped and typed as q; with return_lse, (o, lse float32 [rows of q, num_qo_heads]). A
          row without keys gives 0 and -inf.

        Raises: as the decode wrapper's run.
        """
        return self._run(
            paged_prefill,
            q,
            paged_kv_cache,
            args,
            q_scale=q_scale,
            k_scale=k_scale,
            v_scale=v_scale,
            out=out,
            lse=lse,
            return_lse=return_lse,
            lse_base=lse_base,
            lse_layout=lse_layout,
            window_left=window_left,
            sinks=sinks,
            kv_cache_sf=kv_cache_sf,
            skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor,
            use_fp16_softmax=use_fp16_softmax,
            uses_spcompress=uses_spcompress,
        )

    run_return_lse = functools.partialmethod(run, return_lse=True)


class BatchPrefillWithRaggedKVCacheWrapper(_BatchWrapper):
    """Attention of ragged query tokens over contiguous keys, as FlashInfer's class.

    The module's docstring says which arguments mean what here.

    Args:
      float_workspace_buffer: anything; XLA needs no workspace.
      kv_layout: "NHD" or "HND", the axes of k and v.
      use_cuda_graph: fixes capacities: the batch size by the lengths of the buffers, the rows of q
        by the first plan (or, where its qo_indptr is on the device, the first run). Those of k and
        v compile as they come.
      backend: "auto" or "fa2".

    Raises: as `BatchPrefillWithPagedKVCacheWrapper`.
    """

    _num_keys: int | None = None

    def __init__(
        self,
        float_workspace_buffer: Any,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: ArrayLike | None = None,
        kv_indptr_buf: ArrayLike | None = None,
        custom_mask_buf: ArrayLike | None = None,
        mask_indptr_buf: ArrayLike | None = None,
        backend: str = "auto",
        jit_args: Any = None,
        jit_kwargs: Any = None,
        variant_owns_mask: bool = False,
    ):
        super().__init__(
            kv_layout,
            backend,
            custom_mask_buf=custom_mask_buf,
            mask_indptr_buf=mask_indptr_buf,
            jit_args=jit_args,
            jit_kwargs=jit_kwargs,
            variant_owns_mask=variant_owns_mask,
        )
        if use_cuda_graph:
            self._fix_capacity(qo_indptr_buf=qo_indptr_buf, kv_indptr_buf=kv_indptr_buf)

    def plan(
        self,
        qo_indptr: Indices,
        kv_indptr: Indices,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        custom_mask: ArrayLike | None = None,
        packed_custom_mask: ArrayLike | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: DTypeLike = "float16",
        kv_data_type: DTypeLike | None = None,
        o_data_type: DTypeLike | None = None,
        non_blocking: bool = True,
        prefix_len_ptr: ArrayLike | None = None,
        token_pos_in_items_ptr: ArrayLike | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: ArrayLike | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        seq_lens: ArrayLike | None = None,
        seq_lens_q: ArrayLike | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        v_indptr: ArrayLike | None = None,
        o_indptr: ArrayLike | None = None,
        uniform_q_len: int | None = None,
    ) -> None:
        """Plans a step, as `BatchPrefillWithPagedKVCacheWrapper.plan`; note the order of the
        arguments.

        Args:
          kv_indptr: int32 [batch_size + 1]; request i has key rows `kv_indptr[i]:kv_indptr[i + 1]`.
        """
        _check_pos_encoding(pos_encoding_mode)
        _refuse(
            head_dim_vo=None if head_dim_vo == head_dim_qk else head_dim_vo,
            custom_mask=custom_mask,
            packed_custom_mask=packed_custom_mask,
            use_fp16_qk_reduction=use_fp16_qk_reduction,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            prefix_len_ptr=prefix_len_ptr,
            token_pos_in_items_ptr=token_pos_in_items_ptr,
            token_pos_in_items_len=token_pos_in_items_len,
            max_item_len_ptr=max_item_len_ptr,
            fixed_split_size=fixed_split_size,
            v_indptr=v_indptr,
            o_indptr=o_indptr,
        )
        dtype = _dtype(q_data_type, kv_data_type, o_data_type)
        batch_size = len(_index("kv_indptr", kv_indptr, "batch_size + 1")) - 1
        qo_indptr = self._fit_indptr("qo_indptr", qo_indptr, batch_size)
        kv_indptr = self._fit_indptr("kv_indptr", kv_indptr, batch_size)
        heads = dict(num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads)
        self._keep(
            lambda rows: _plan_ragged_prefill(
                qo_indptr,
                kv_indptr,
                num_qo_tokens=rows,
                causal=causal,
                disable_split_kv=disable_split_kv,
                **heads,
            ),
            _last(qo_indptr),
            **heads,
            head_dim=head_dim_qk,
            dtype=dtype,
            sm_scale=sm_scale,
        )
        self._num_keys = _last(kv_indptr)

    def run(
        self,
        q: Array,
        k: Array,
        v: Array,
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: ArrayLike | None = None,
        o_scale: float | None = None,
        out: None = None,
        lse: None = None,
        return_lse: bool = False,
        lse_base: str = "log2",
        lse_layout: str = "NH",
        enable_pdl: bool | None = None,
        kv_cache_sf: Any = None,
    ) -> Any:
        """Attends, as planned.

        Args:
          q: [qo_indptr[-1], num_qo_heads, head_dim]; with fixed capacities also of the largest
            number of rows.
          k, v: [kv_indptr[-1] or more, num_kv_heads, head_dim], or with the first two axes swapped
            for "HND".
          q_scale, k_scale, v_scale, return_lse, lse_base: as for the decode wrapper.

        Returns, raises: as `BatchPrefillWithPagedKVCacheWrapper.run`.
        """
        check_shape("k", k, ("num_kv_tokens", "num_kv_heads", "head_dim"))
        num_keys = k.shape[self._kv_layout.index("N")]
        if self._num_keys is not None and num_keys < self._num_keys:
            raise ValueError(
                f"k ({self._kv_layout}) must have at least kv_indptr[-1]={self._num_keys} rows; "
                f"got {num_keys}"
            )
        return self._run(
            ragged_prefill,
            q,
            (k, v),
            args,
            q_scale=q_scale,
            k_scale=k_scale,
            v_scale=v_scale,
            out=out,
            lse=lse,
            return_lse=return_lse,
            lse_base=lse_base,
            lse_layout=lse_layout,
            o_scale=o_scale,
            kv_cache_sf=kv_cache_sf,
        )

    run_return_lse = functools.partialmethod(run, return_lse=True)


def single_prefill_with_kv_cache(
    q: Array,
    k: Array,
    v: Array,
    scale_q: Any = None,
    scale_k: Any = None,
    scale_v: Any = None,
    o_dtype: DTypeLike | None = None,
    custom_mask: ArrayLike | None = None,
    packed_custom_mask: ArrayLike | None = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    kv_cache_sf: Any = None,
    k_scale: float | None = None,
    v_scale: ArrayLike | None = None,
    *,
    lse_base: str = "log2",
) -> Any:
    """Attention of one request's queries over its contiguous keys, as FlashInfer's function.

    Args:
      q: [qo_len, num_qo_heads, head_dim]; float16, bfloat16 or float32.
      k, v: [kv_len, num_kv_heads, head_dim] ("NHD") or [num_kv_heads, kv_len, head_dim] ("HND"),
        q's dtype.
      causal: query i sees keys 0 .. kv_len - qo_len + i; needs kv_len >= qo_len.
      sm_scale: default 1 / sqrt(head_dim).
      return_lse: also return the logsumexp of the scaled scores.
      k_scale: a Python number that multiplies sm_scale.
      v_scale: a number or scalar array that multiplies the output.
      lse_base: "log2" or "ln".

    Returns:
      o, shaped and typed as q; with return_lse, (o, lse float32 [qo_len, num_qo_heads]).

    Raises:
      KeyError: an unknown kv_layout or pos_encoding_mode.
      ValueError, TypeError: shapes or dtypes that do not fit; causal with fewer keys than queries.
      NotImplementedError: an option that is not built.
    """
    _check_layout(kv_layout)
    _check_pos_encoding(pos_encoding_mode)
    _check_backend(backend)
    _refuse(
        scale_q=scale_q,
        scale_k=scale_k,
        scale_v=scale_v,
        o_dtype=None if o_dtype is None or jnp.dtype(o_dtype) == q.dtype else o_dtype,
        custom_mask=custom_mask,
        packed_custom_mask=packed_custom_mask,
        use_fp16_qk_reduction=use_fp16_qk_reduction,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        kv_cache_sf=kv_cache_sf,
    )
    check_shape("q", q, ("qo_len", "num_qo_heads", "head_dim"))
    check_shape("k", k, ("kv_len", "num_kv_heads", q.shape[-1]))
    qo_len, num_qo_heads, head_dim = q.shape
    kv_len, num_kv_heads = (k.shape[kv_layout.index(axis)] for axis in "NH")
    if causal and kv_len < qo_len:
        raise ValueError(
            f"a causal prefill needs at least as many keys as queries; got {kv_len=}, {qo_len=}"
        )
    plan = _plan_ragged_prefill(
        np.array([0, qo_len], np.int32),
        np.array([0, kv_len], np.int32),
        num_qo_tokens=qo_len,
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        causal=causal,
    )
    return _attend(
        ragged_prefill,
        q,
        (k, v),
        plan,
        _check_scalar("v_scale", v_scale),
        kv_layout=kv_layout,
        sm_scale=_fold(check_scale(sm_scale, head_dim), k_scale=k_scale),
        lse_base=_check_lse_base(lse_base) if return_lse else None,
    )


single_prefill_with_kv_cache_return_lse = functools.partial(
    single_prefill_with_kv_cache, return_lse=True
)


def single_decode_with_kv_cache(
    q: Array,
    k: Array,
    v: Array,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: ArrayLike | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    return_lse: bool = False,
    *,
    lse_base: str = "log2",
) -> Any:
    """Attention of one query token over its contiguous keys, as FlashInfer's function.

    Args:
      q: [num_qo_heads, head_dim]; float16, bfloat16 or float32.
      k, v: [kv_len, num_kv_heads, head_dim] ("NHD") or [num_kv_heads, kv_len, head_dim] ("HND"),
        q's dtype.
      q_scale, k_scale: Python numbers that multiply sm_scale.
      The rest: as for `single_prefill_with_kv_cache`.

    Returns:
      o, shaped and typed as q; with return_lse, (o, lse float32 [num_qo_heads]).

    Raises: as `single_prefill_with_kv_cache`.
    """
    check_shape("q", q, ("num_qo_heads", "head_dim"))
    result = single_prefill_with_kv_cache(
        q[None],
        k,
        v,
        kv_layout=kv_layout,
        pos_encoding_mode=pos_encoding_mode,
        sm_scale=_fold(check_scale(sm_scale, q.shape[-1]), q_scale=q_scale),
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        return_lse=return_lse,
        k_scale=k_scale,
        v_scale=v_scale,
        lse_base=lse_base,
    )
    return jax.tree.map(lambda x: x[0], result)


def _refuse(**options: Any) -> None:
    """Raises NotImplementedError, naming the first option that is not off."""
    for name, value in options.items():
        plain = isinstance(value, bool | int | float | str)
        if value is None or value is False or plain and value == OFF.get(name):
            continue
        shown = repr(value) if plain else type(value).__name__
        raise NotImplementedError(f"{name}={shown} is not built yet: leave {name} at its default")


def _refuse_outputs(**outputs: Any) -> None:
    for name, value in outputs.items():
        if value is not None:
            raise NotImplementedError(
                f"{name} cannot be written, as JAX arrays are immutable: use what run returns, "
                "and to reuse memory donate buffers to the jit-compiled function around it"
            )


def _check_layout(kv_layout: str) -> None:
    if kv_layout not in LAYOUTS:
        raise KeyError(f"kv_layout must be 'NHD' or 'HND'; got {kv_layout!r}")


def _check_pos_encoding(mode: str) -> None:
    if mode not in ("NONE", "ROPE_LLAMA", "ALIBI"):
        raise KeyError(f"pos_encoding_mode must be 'NONE', 'ROPE_LLAMA' or 'ALIBI'; got {mode!r}")
    if mode != "NONE":
        raise NotImplementedError(
            f"pos_encoding_mode={mode!r} is not built yet: "
            "rotate q and k with apply_rope, and append k rotated"
        )


def _check_backend(backend: str) -> None:
    if backend not in ("auto", "fa2"):
        raise NotImplementedError(
            f"{backend=} is not built: one FlashAttention-2 kernel serves all cases; "
            "use 'auto' or 'fa2'"
        )


def _check_lse_base(lse_base: str) -> str:
    check_choice("lse_base", lse_base, ("log2", "ln"))
    return lse_base


def _check_scalar(name: str, x: Any) -> Any:
    if np.shape(x) != ():
        raise ValueError(f"{name} must be a number or an array of shape []; got {np.shape(x)}")
    return x


def _fold(sm_scale: float, **scales: float | None) -> float:
    """sm_scale times the scales of q and k, which are part of the compiled program."""
    for name, scale in scales.items():
        if isinstance(scale, jax.Array):
            raise TypeError(f"{name} must be a Python number, known at compile time; got an array")
        sm_scale *= 1.0 if scale is None else float(scale)
    return sm_scale


def _dtype(q: Any, kv: Any, o: Any) -> jnp.dtype:
    """The one dtype of q, keys, values and output."""
    names = {"q_data_type": q, "kv_data_type": q if kv is None else kv}
    names["o_data_type"] = q if o is None else o
    dtypes = {}
    for name, value in names.items():
        try:
            # jnp.dtype(None) is a float.
            dtypes[name] = jnp.dtype("None" if value is None else value)
        except TypeError:
            raise TypeError(
                f"{name} must be a dtype or its name, such as 'bfloat16'; got {value!r}"
            ) from None
        if dtypes[name].name not in FLOAT_DTYPES:
            raise NotImplementedError(
                f"{name}={dtypes[name].name!r} is not built yet: "
                f"use one of {', '.join(FLOAT_DTYPES)}"
            )
    if len(set(dtypes.values())) > 1:
        came = ", ".join(f"{name}={dtype.name!r}" for name, dtype in dtypes.items())
        raise NotImplementedError(
            f"mixed dtypes are not built yet: {came}. "
            "data_type sets only the kv_data_type: set q_data_type too"
        )
    return dtypes["q_data_type"]


def _index(name: str, x: Any, size: int | str) -> Any:
    """A checked index array, where it is; Python integers become int32 on the host."""
    if not isinstance(x, jax.Array | np.ndarray):
        x = np.asarray(x)
        if x.dtype.kind == "i" or not x.size:
            x = x.astype(np.int32)
    check_index(name, x, size)
    return x


def _last(indptr: Any) -> int | None:
    """The last element of an indptr on the host."""
    return int(indptr[-1]) if isinstance(indptr, np.ndarray) else None


def _power_of_two(n: int) -> int:
    """The next power of two, at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def _pad(x: Any, size: int, mode: str = "constant") -> Any:
    """x with its first axis padded, on the host or on the device, where it is."""
    if x.shape[0] == size:
        return x
    widths = [(0, size - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
    return (jnp if isinstance(x, jax.Array) else np).pad(x, widths, mode=mode)
