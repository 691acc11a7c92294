"""Attention of ragged query tokens over paged keys."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxattn.attention import paged_prefill
from jaxattn.flashinfer.arguments import float_dtype, q_and_kv_dtype
from jaxattn.flashinfer.batch_wrapper import BatchWrapper
from jaxattn.flashinfer.index_arrays import Indices, host_kv_len, last
from jaxattn.flashinfer.logits import Logits
from jaxattn.flashinfer.options import flashinfer_options
from jaxattn.flashinfer.programs import compiled_plan_prefill


class BatchPrefillWithPagedKVCacheWrapper(BatchWrapper):
    """Attention of ragged query tokens over paged keys, as FlashInfer's class.

    The module's docstring says which arguments mean what here.

    Args:
      float_workspace_buffer: anything; XLA needs no workspace.
      kv_layout: "NHD" or "HND", the axes of the cache.
      use_cuda_graph: fixes capacities: the batch size and the number of page indices by the lengths
        of the buffers, the rows of q by the first plan (or, where its qo_indptr is on the device,
        the first run). custom_mask_buf and mask_indptr_buf fix the size of a mask, in bytes of bits.
      backend: "auto" or "fa2".

    Raises:
      KeyError: an unknown kv_layout.
      ValueError: use_cuda_graph without a buffer, or buffers that do not fit each other.
      NotImplementedError: an option that is not built.
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
        jit_args: Any = None,
        jit_kwargs: Any = None,
        variant_owns_mask: bool = False,
    ):
        super().__init__(kv_layout)
        if use_cuda_graph:
            self._fix_capacity(
                qo_indptr_buf=qo_indptr_buf,
                paged_kv_indptr_buf=paged_kv_indptr_buf,
                paged_kv_indices_buf=paged_kv_indices_buf,
                paged_kv_last_page_len_buf=paged_kv_last_page_len_buf,
            )
            self._fix_mask_capacity(custom_mask_buf, mask_indptr_buf)

    def _check_plan(self, planned: Mapping[str, Any]) -> None:
        """For a subclass whose constructor was told what will be planned."""

    @flashinfer_options()
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
          head_dim_vo: V's head_dim, and the output's; default head_dim_qk.
          custom_mask: bool [sum of qo_len * kv_len], the requests' row-major [qo_len, kv_len] masks
            one after the other, in any shape; True where a query sees a key.
          packed_custom_mask: uint8, the bits of that mask, as `segment_packbits(...,
            bitorder="little")` gives them. It goes before custom_mask, which goes before causal.
          causal: query j of a request sees its keys 0 .. kv_len - qo_len + j (bottom-right
            aligned).
          pos_encoding_mode: "NONE" or "ALIBI": logits get `slope * (key position - query position)`
            added, with ALiBi's slopes for num_qo_heads. lse is that of these logits. FlashInfer
            counts a query's position from the first new token, which shifts its lse, and with a cap
            scales twice; here neither happens.
          window_left: keys that a query sees before its own position, besides its own, whatever
            else says what it sees; -1: all.
          logits_soft_cap: logits become `cap * tanh(logit / cap)`, before ALiBi; None or 0: as they
            are.
          q_data_type: dtype of q, by default float16 as in FlashInfer.
          kv_data_type: q's, which is the default, float8_e4m3fn or float8_e5m2.
          o_data_type: dtype of the output; default: q's.
          sm_scale: default 1 / sqrt(head_dim_qk).
          fixed_split_size, disable_split_kv: as for `plan_prefill`, the size in pages; not both.

        Raises:
          ValueError, TypeError: arrays or sizes that do not fit each other or the fixed capacities.
          KeyError: an unknown pos_encoding_mode.
          NotImplementedError: an option that is not built, pos_encoding_mode="ROPE_LLAMA" and a
            kv_data_type that is neither q's nor a float8 among them.
        """
        dtypes = q_and_kv_dtype(q_data_type=q_data_type, kv_data_type=kv_data_type)
        o_dtype = dtypes[0] if o_data_type is None else float_dtype("o_data_type", o_data_type)
        self._check_plan(
            {
                "q_data_type": dtypes[0],
                "kv_data_type": dtypes[1],
                "head_dim_qk": head_dim_qk,
                "head_dim_vo": head_dim_qk if head_dim_vo is None else head_dim_vo,
                "pos_encoding_mode": pos_encoding_mode,
                "window_left >= 0": window_left >= 0,
            }
        )
        logits = Logits.of(head_dim_qk, sm_scale, logits_soft_cap, pos_encoding_mode)
        table, check_pages = self._fit_table(
            "paged_kv_", paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size
        )
        batch_size = np.shape(paged_kv_last_page_len)[0]
        qo_indptr = self._fit_indptr("qo_indptr", qo_indptr, batch_size)
        mask = self._fit_mask(custom_mask, packed_custom_mask, qo_indptr, host_kv_len(table))
        heads: dict[str, Any] = dict(num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads)
        splits = dict(fixed_split_size=fixed_split_size, disable_split_kv=disable_split_kv)
        self._keep(
            lambda rows: compiled_plan_prefill(
                qo_indptr,
                table,
                mask,
                num_qo_tokens=rows,
                causal=causal,
                window_left=window_left,
                **splits,
                **heads,
            ),
            last(qo_indptr),
            **heads,
            head_dim=head_dim_qk,
            head_dim_vo=head_dim_vo,
            dtypes=dtypes,
            o_dtype=o_dtype,
            logits=logits,
            window_left=window_left,
            check_pages=check_pages,
        )

    begin_forward = plan

    @flashinfer_options()
    def run(
        self,
        q: Array,
        paged_kv_cache: Any,
        *args: Any,
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
        sinks: Array | None = None,
        kv_cache_sf: Any = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        use_fp16_softmax: bool | None = None,
        uses_spcompress: bool | None = None,
    ) -> Any:
        """Attends, as planned.

        Args:
          q: [qo_indptr[-1], num_qo_heads, head_dim]; with fixed capacities also of the largest
            number of rows.
          paged_kv_cache, q_scale, k_scale, v_scale, return_lse, window_left, sinks, lse_base: as for
            the decode wrapper.

        Returns:
          o [rows of q, num_qo_heads, head_dim_vo], of o_data_type; with return_lse, (o, lse float32
          [rows of q, num_qo_heads]). A row without keys gives 0 and -inf, or its sink.

        Raises: as the decode wrapper's run.
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
            sinks=sinks,
        )

    run_return_lse = functools.partialmethod(run, return_lse=True)
