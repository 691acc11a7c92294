"""Attention of ragged query tokens over contiguous keys."""

import functools
from typing import Any

import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxattn.attention import ragged_prefill
from jaxattn.checks import check_shape
from jaxattn.flashinfer.arguments import float_dtype, q_and_kv_dtype
from jaxattn.flashinfer.batch_wrapper import BatchWrapper
from jaxattn.flashinfer.index_arrays import Indices, index_array, last
from jaxattn.flashinfer.logits import Logits
from jaxattn.flashinfer.options import Unbuilt, flashinfer_options
from jaxattn.flashinfer.programs import compiled_plan_ragged_prefill


class BatchPrefillWithRaggedKVCacheWrapper(BatchWrapper):
    """Attention of ragged query tokens over contiguous keys, as FlashInfer's class.

    The module's docstring says which arguments mean what here.

    Args:
      float_workspace_buffer: anything; XLA needs no workspace.
      kv_layout: "NHD" or "HND", the axes of k and v.
      use_cuda_graph: fixes capacities: the batch size by the lengths of the buffers, the rows of q
        by the first plan (or, where its qo_indptr is on the device, the first run), the size of a
        mask by custom_mask_buf. The rows of k and v compile as they come.
      backend: "auto" or "fa2".

    Raises: as `BatchPrefillWithPagedKVCacheWrapper`.
    """

    _num_keys: int | None = None

    @flashinfer_options()
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
        super().__init__(kv_layout)
        if use_cuda_graph:
            self._fix_capacity(qo_indptr_buf=qo_indptr_buf, kv_indptr_buf=kv_indptr_buf)
            self._fix_mask_capacity(custom_mask_buf, mask_indptr_buf)

    @flashinfer_options(fixed_split_size=Unbuilt())
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
          The rest: as there.

        Raises: as there.
        """
        dtypes = q_and_kv_dtype(q_data_type=q_data_type, kv_data_type=kv_data_type)
        o_dtype = dtypes[0] if o_data_type is None else float_dtype("o_data_type", o_data_type)
        logits = Logits.of(head_dim_qk, sm_scale, logits_soft_cap, pos_encoding_mode)
        batch_size = len(index_array("kv_indptr", kv_indptr, "batch_size + 1")) - 1
        qo_indptr = self._fit_indptr("qo_indptr", qo_indptr, batch_size)
        kv_indptr = self._fit_indptr("kv_indptr", kv_indptr, batch_size)
        kv_len = np.diff(kv_indptr) if isinstance(kv_indptr, np.ndarray) else None
        mask = self._fit_mask(custom_mask, packed_custom_mask, qo_indptr, kv_len)
        heads: dict[str, Any] = dict(num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads)
        self._keep(
            lambda rows: compiled_plan_ragged_prefill(
                qo_indptr,
                kv_indptr,
                mask,
                num_qo_tokens=rows,
                causal=causal,
                window_left=window_left,
                disable_split_kv=disable_split_kv,
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
        )
        self._num_keys = last(kv_indptr)

    begin_forward = plan

    @flashinfer_options()
    def run(
        self,
        q: Array,
        k: Array,
        v: Array,
        *args: Any,
        q_scale: ArrayLike | None = None,
        k_scale: ArrayLike | None = None,
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
          k, v: [kv_indptr[-1] or more, num_kv_heads, head_dim], V's head_dim being head_dim_vo, or
            with the first two axes swapped for "HND".
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
            q_scale=q_scale,
            k_scale=k_scale,
            v_scale=v_scale,
            return_lse=return_lse,
            lse_base=lse_base,
        )

    run_return_lse = functools.partialmethod(run, return_lse=True)
