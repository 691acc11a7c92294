"""Prefill and decode with attention sinks."""

import functools
from collections.abc import Mapping
from typing import Any

from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxattn.attention import paged_prefill
from jaxattn.flashinfer.arguments import check_as_constructed, q_and_kv_dtype
from jaxattn.flashinfer.options import flashinfer_options
from jaxattn.flashinfer.paged_prefill import BatchPrefillWithPagedKVCacheWrapper


class BatchAttentionWithAttentionSinkWrapper(BatchPrefillWithPagedKVCacheWrapper):
    """`BatchPrefillWithPagedKVCacheWrapper` whose `run` takes a sink for each head, as FlashInfer's
    class. Decode is a prefill of one query token a request.

    Args:
      q_data_type, kv_data_type, head_dim_qk, head_dim_vo, pos_encoding_mode: those of every plan.
      window_left: at least 0 where plans have a window.
      The rest: as for `BatchPrefillWithPagedKVCacheWrapper`.

    Raises: as there.
    """

    @flashinfer_options()
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
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        q_data_type: DTypeLike = "bfloat16",
        kv_data_type: DTypeLike = "bfloat16",
        head_dim_qk: int = 128,
        head_dim_vo: int = 128,
        window_left: int = -1,
    ):
        super().__init__(
            None,
            kv_layout,
            use_cuda_graph,
            qo_indptr_buf,
            paged_kv_indptr_buf,
            paged_kv_indices_buf,
            paged_kv_last_page_len_buf,
            custom_mask_buf,
            mask_indptr_buf,
        )
        q_dtype, kv_dtype = q_and_kv_dtype(q_data_type=q_data_type, kv_data_type=kv_data_type)
        self._constructed: dict[str, Any] = {
            "q_data_type": q_dtype,
            "kv_data_type": kv_dtype,
            "head_dim_qk": head_dim_qk,
            "head_dim_vo": head_dim_vo,
            "pos_encoding_mode": pos_encoding_mode,
            "window_left >= 0": window_left >= 0,
        }

    def _check_plan(self, planned: Mapping[str, Any]) -> None:
        check_as_constructed(self._constructed, planned)

    @flashinfer_options()
    def run(  # type: ignore[override]
        self,
        q: Array,
        paged_kv_cache: Any,
        sink: Array,
        sm_scale: float,
        *,
        q_scale: ArrayLike | None = None,
        k_scale: ArrayLike | None = None,
        v_scale: ArrayLike | None = None,
        out: None = None,
        lse: None = None,
        return_lse: bool = False,
        lse_base: str = "log2",
        lse_layout: str = "NH",
        enable_pdl: bool | None = None,
        window_left: int | None = None,
    ) -> Any:
        """Attends, as planned.

        Args:
          sink: float32 [num_qo_heads], a further logit of each head (natural, not scaled by
            sm_scale) that takes part in the softmax and has no value. lse counts it.
          sm_scale: the softmax scale, a Python number, in place of the plan's.
          The rest: as for `BatchPrefillWithPagedKVCacheWrapper.run`.

        Returns, raises: as there.
        """
        return self._run(
            paged_prefill,
            q,
            paged_kv_cache,
            q_scale=q_scale,
            k_scale=k_scale,
            v_scale=v_scale,
            return_lse=return_lse,
            lse_base=lse_base,
            window_left=window_left,
            sinks=sink,
            sm_scale=sm_scale,
        )

    run_return_lse = functools.partialmethod(run, return_lse=True)
