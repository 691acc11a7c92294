"""Attention of one query token per request over its paged keys."""

import functools
from typing import Any

import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxattn.attention import paged_decode
from jaxattn.flashinfer.arguments import one_dtype
from jaxattn.flashinfer.batch_wrapper import BatchWrapper
from jaxattn.flashinfer.index_arrays import Indices
from jaxattn.flashinfer.options import flashinfer_options
from jaxattn.flashinfer.programs import compiled_plan_decode


class BatchDecodeWithPagedKVCacheWrapper(BatchWrapper):
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

    @flashinfer_options()
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
        super().__init__(kv_layout)
        if use_cuda_graph:
            self._fix_capacity(
                paged_kv_indptr_buffer=paged_kv_indptr_buffer,
                paged_kv_indices_buffer=paged_kv_indices_buffer,
                paged_kv_last_page_len_buffer=paged_kv_last_page_len_buffer,
            )
            self._max_rows = self._max_batch_size

    @property
    def use_tensor_cores(self) -> bool:
        """True, whatever was asked for: products are always taken on tensor cores."""
        return True

    @flashinfer_options()
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
        dtype = one_dtype(
            q_data_type=data_type if q_data_type is None else q_data_type,
            kv_data_type=data_type if kv_data_type is None else kv_data_type,
            o_data_type=o_data_type,
        )
        table, check_pages = self._fit_table("", indptr, indices, last_page_len, page_size)
        heads = dict(num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads)
        splits = dict(fixed_split_size=fixed_split_size, disable_split_kv=disable_split_kv)
        self._keep(
            lambda _: compiled_plan_decode(table, page_size=page_size, **splits, **heads),
            np.shape(last_page_len)[0],
            **heads,
            head_dim=head_dim,
            dtype=dtype,
            sm_scale=sm_scale,
            check_pages=check_pages,
        )

    begin_forward = plan

    @flashinfer_options()
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
            q_scale=q_scale,
            k_scale=k_scale,
            v_scale=v_scale,
            return_lse=return_lse,
            lse_base=lse_base,
        )

    run_return_lse = functools.partialmethod(run, return_lse=True)
