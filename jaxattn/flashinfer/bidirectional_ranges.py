"""Causal prefill in which the tokens of a range see each other in both directions."""

import functools
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxattn.attention import paged_prefill
from jaxattn.checks import check_int32, check_shape
from jaxattn.flashinfer.arguments import check_as_constructed, float_dtype, q_and_kv_dtype
from jaxattn.flashinfer.batch_wrapper import BatchWrapper
from jaxattn.flashinfer.index_arrays import Indices, last, pad
from jaxattn.flashinfer.logits import Logits
from jaxattn.flashinfer.options import Unbuilt, flashinfer_options
from jaxattn.flashinfer.programs import compiled_plan_of_ranges
from jaxattn.plan import AttentionPlan

_RANGES_SAY_IT = Unbuilt(advice="ranges say what a query sees: run(bidirectional_ranges=...)")


class BatchPrefillWithCausalBidirectionalRangesWrapper(BatchWrapper):
    """Attention of ragged query tokens over paged keys, in which the tokens of a range, an image's
    say, see each other whole and all else is causal; as FlashInfer's class.

    Args:
      kv_layout, use_cuda_graph and the buffers: as for `BatchPrefillWithPagedKVCacheWrapper`.
      q_data_type, kv_data_type, o_data_type, head_dim_qk, head_dim_vo: those of every plan.

    Raises: as `BatchPrefillWithPagedKVCacheWrapper`.
    """

    @flashinfer_options(pos_encoding_mode=Unbuilt(off=("NONE",)))
    def __init__(
        self,
        float_workspace_buffer: Any,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: ArrayLike | None = None,
        paged_kv_indptr_buf: ArrayLike | None = None,
        paged_kv_indices_buf: ArrayLike | None = None,
        paged_kv_last_page_len_buf: ArrayLike | None = None,
        pos_encoding_mode: str = "NONE",
        q_data_type: DTypeLike = "bfloat16",
        kv_data_type: DTypeLike = "bfloat16",
        o_data_type: DTypeLike | None = None,
        head_dim_qk: int = 128,
        head_dim_vo: int = 128,
    ):
        super().__init__(kv_layout)
        dtypes = q_and_kv_dtype(q_data_type=q_data_type, kv_data_type=kv_data_type)
        o_dtype = dtypes[0] if o_data_type is None else float_dtype("o_data_type", o_data_type)
        self._constructed: dict[str, Any] = dict(
            q_data_type=dtypes[0],
            kv_data_type=dtypes[1],
            o_data_type=o_dtype,
            head_dim_qk=head_dim_qk,
            head_dim_vo=head_dim_vo,
        )
        if use_cuda_graph:
            self._fix_capacity(
                qo_indptr_buf=qo_indptr_buf,
                paged_kv_indptr_buf=paged_kv_indptr_buf,
                paged_kv_indices_buf=paged_kv_indices_buf,
                paged_kv_last_page_len_buf=paged_kv_last_page_len_buf,
            )

    @flashinfer_options(
        custom_mask=_RANGES_SAY_IT,
        packed_custom_mask=_RANGES_SAY_IT,
        causal=Unbuilt(off=(False,), advice="all that no range says is causal already"),
        pos_encoding_mode=Unbuilt(off=("NONE",)),
        window_left=Unbuilt(off=(-1,), advice="use run(causal_window_left=...)"),
        logits_soft_cap=Unbuilt(off=(None, 0)),
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
        q_data_type: DTypeLike | None = None,
        kv_data_type: DTypeLike | None = None,
        o_data_type: DTypeLike | None = None,
        non_blocking: bool = True,
        prefix_len_ptr: ArrayLike | None = None,
        token_pos_in_items_ptr: ArrayLike | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: ArrayLike | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
    ) -> None:
        """Keeps the arguments of a step. As ranges say what a query sees, the work is planned by the
        first `run` with them, once for all layers that pass the same array of JAX; inside jit, by
        each.

        Args:
          q_data_type, kv_data_type, o_data_type, head_dim_qk, head_dim_vo: None, or those that the
            wrapper was constructed with.
          The rest: as for `BatchPrefillWithPagedKVCacheWrapper.plan`.

        Raises: as there; ValueError for a dtype or head_dim that the wrapper was not constructed
          with.
        """
        check_as_constructed(
            self._constructed,
            dict(
                q_data_type=q_data_type,
                kv_data_type=kv_data_type,
                o_data_type=o_data_type,
                head_dim_qk=head_dim_qk,
                head_dim_vo=head_dim_vo,
            ),
        )
        table, check_pages = self._fit_table(
            "paged_kv_", paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size
        )
        batch_size = np.shape(paged_kv_last_page_len)[0]
        qo_indptr = self._fit_indptr("qo_indptr", qo_indptr, batch_size)
        heads: dict[str, Any] = dict(num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads)

        def make(rows: int, ranges: Any, causal_window_left: int, range_window_left: int) -> Any:
            return compiled_plan_of_ranges(
                qo_indptr,
                table,
                pad(ranges, rows),
                num_qo_tokens=rows,
                window_left=causal_window_left,
                range_window_left=range_window_left,
                fixed_split_size=fixed_split_size,
                disable_split_kv=disable_split_kv,
                **heads,
            )

        self._make = make
        self._ranges: Any = None
        self._keep(
            self._plan_of_ranges,
            last(qo_indptr),
            **heads,
            head_dim=head_dim_qk,
            head_dim_vo=self._constructed["head_dim_vo"],
            dtypes=(self._constructed["q_data_type"], self._constructed["kv_data_type"]),
            o_dtype=self._constructed["o_data_type"],
            logits=Logits.of(head_dim_qk, sm_scale, None, "NONE"),
            check_pages=check_pages,
            now=False,
        )

    begin_forward = plan

    def _plan_of_ranges(self, rows: int) -> AttentionPlan:
        return self._make(rows, *self._ranges)

    @flashinfer_options()
    def run(
        self,
        q: Array,
        paged_kv_cache: Any,
        bidirectional_ranges: ArrayLike,
        causal_window_left: int = -1,
        range_window_left: int = -1,
        q_scale: ArrayLike | None = None,
        k_scale: ArrayLike | None = None,
        v_scale: ArrayLike | None = None,
        out: None = None,
        lse: None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        kv_cache_sf: Any = None,
        *,
        lse_base: str = "log2",
    ) -> Any:
        """Attends: a query sees the keys up to its own, and all keys of its range.

        Args:
          bidirectional_ranges: int32 [rows of q, 2], for each query token the first and the last
            position (inclusive) of the range that it lies in; (-1, -1): none. A range in which the
            token itself does not lie is none here; FlashInfer shows it its keys.
          causal_window_left: keys outside of its range that a query sees before its own position,
            besides its own; negative: all.
          range_window_left: if positive, the keys of its range that a query sees up to its own,
            which counts; those behind it are seen whatever this says. 0 or negative: all.
          q, paged_kv_cache, q_scale, k_scale, v_scale, return_lse, lse_base: as for
            `BatchPrefillWithPagedKVCacheWrapper.run`.

        Returns, raises: as there.
        """
        planned = self._check_planned()
        check_shape("q", q, ("rows", planned.num_qo_heads, planned.head_dim))
        given: Any = bidirectional_ranges
        ranges = given if isinstance(given, jax.Array) else np.array(given)
        check_shape("bidirectional_ranges", ranges, (q.shape[0], 2))
        check_int32("bidirectional_ranges", ranges)
        windows = (max(causal_window_left, -1), max(range_window_left, 0))
        # Arrays of JAX do not change: the same one is the next layer's.
        if self._ranges is None or self._ranges[0] is not ranges or self._ranges[1:] != windows:
            self._ranges = (ranges, *windows)
            planned.made = None
        return self._run(
            paged_prefill,
            q,
            paged_kv_cache,
            q_scale=q_scale,
            k_scale=k_scale,
            v_scale=v_scale,
            return_lse=return_lse,
            lse_base=lse_base,
        )

    run_return_lse = functools.partialmethod(run, return_lse=True)
