"""Attention of one query token per request over its paged keys, or of a few."""

import functools
from typing import Any

import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxattn.attention import paged_decode, paged_prefill
from jaxattn.checks import check_positive
from jaxattn.flashinfer.arguments import float_dtype, q_and_kv_dtype
from jaxattn.flashinfer.batch_wrapper import BatchWrapper
from jaxattn.flashinfer.index_arrays import Indices, host_kv_len
from jaxattn.flashinfer.logits import Logits
from jaxattn.flashinfer.options import flashinfer_options
from jaxattn.flashinfer.programs import compiled_plan_decode, compiled_plan_prefill
from jaxattn.plan import AttentionPlan
from jaxattn.spec import Visible


class BatchDecodeWithPagedKVCacheWrapper(BatchWrapper):
    """Attention of one query token per request, or q_len_per_req, over its paged keys, as
    FlashInfer's class.

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

    _q_len_per_req: int = 1

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
          pos_encoding_mode, logits_soft_cap: as for `BatchPrefillWithPagedKVCacheWrapper.plan`.
          window_left: keys that a query sees before its own position, besides its own; -1: all.
          q_data_type: dtype of q, by default float16 as in FlashInfer.
          kv_data_type: q's, which is the default, float8_e4m3fn or float8_e5m2.
          o_data_type: dtype of the output; default: q's.
          data_type: the kv_data_type where that is None; also the q_data_type where that is None.
          sm_scale: default 1 / sqrt(head_dim).
          fixed_split_size, disable_split_kv: as for `plan_decode`, the size in pages; not both.
          q_len_per_req: query tokens of each request, its last ones (speculative verification). With
            use_cuda_graph the first plan fixes it.
          window_right: of several query tokens, keys that each sees behind its own position: 0, as
            in FlashInfer, is causal, -1 is all.
          is_causal: None, or what q_len_per_req > 1 says; window_right says the rest.

        Raises:
          ValueError, TypeError: arrays or sizes that do not fit each other or the fixed capacities;
            a request with keys, but fewer than q_len_per_req, where lengths are on the host.
          KeyError: an unknown pos_encoding_mode.
          NotImplementedError: an option that is not built, pos_encoding_mode="ROPE_LLAMA", a
            kv_data_type that is neither q's nor a float8, and is_causal=False for several tokens among
            them.
        """
        dtypes = q_and_kv_dtype(
            q_data_type=data_type if q_data_type is None else q_data_type,
            kv_data_type=data_type if kv_data_type is None else kv_data_type,
        )
        o_dtype = dtypes[0] if o_data_type is None else float_dtype("o_data_type", o_data_type)
        logits = Logits.of(head_dim, sm_scale, logits_soft_cap, pos_encoding_mode)
        check_positive(q_len_per_req=q_len_per_req)
        if is_causal is False and q_len_per_req > 1:
            raise NotImplementedError(
                f"is_causal=False with {q_len_per_req=} is not built, as in FlashInfer: "
                "window_right=-1 lets each query token see all keys"
            )
        # Also where one token, which has no keys on its right, makes no use of it.
        Visible.of(False, window_left, window_right)
        table, check_pages = self._fit_table("", indptr, indices, last_page_len, page_size)
        self._check_q_len(q_len_per_req, host_kv_len(table))
        how: dict[str, Any] = dict(
            window_left=window_left,
            fixed_split_size=fixed_split_size,
            disable_split_kv=disable_split_kv,
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
        )

        def make(rows: int) -> AttentionPlan:
            if q_len_per_req == 1:
                return compiled_plan_decode(table, **how)
            qo_indptr = np.arange(table.batch_size + 1, dtype=np.int32) * np.int32(q_len_per_req)
            return compiled_plan_prefill(
                qo_indptr,
                table,
                num_qo_tokens=rows,
                causal=False,
                window_right=window_right,
                **how,
            )

        if self._max_batch_size is not None:
            self._max_rows = self._max_batch_size * q_len_per_req
        self._keep(
            make,
            np.shape(last_page_len)[0] * q_len_per_req,
            num_qo_heads,
            num_kv_heads,
            head_dim,
            dtypes,
            o_dtype,
            logits,
            window_left=window_left,
            check_pages=check_pages,
        )
        self._q_len_per_req = q_len_per_req

    def _check_q_len(self, q_len_per_req: int, kv_len: np.ndarray | None) -> None:
        """Raises ValueError for a q_len_per_req that the fixed capacities or a request lack."""
        fixed = self.is_cuda_graph_enabled and self._planned is not None
        if fixed and q_len_per_req != self._q_len_per_req:
            raise ValueError(
                f"q_len_per_req must be that of the first plan, {self._q_len_per_req}, which fixed "
                f"it (use_cuda_graph=True); got {q_len_per_req}"
            )
        if kv_len is None:
            return
        for i in np.flatnonzero((kv_len > 0) & (kv_len < q_len_per_req))[:1]:
            raise ValueError(
                f"a request must have at least {q_len_per_req=} tokens, the new ones among them, "
                f"or none; request {i} has {kv_len[i]}"
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
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Array | None = None,
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: Any = None,
        lse_base: str = "log2",
    ) -> Any:
        """Attends, as planned.

        Args:
          q: [batch_size * q_len_per_req, num_qo_heads, head_dim], the tokens of request 0 first; with
            fixed capacities also [max_batch_size * q_len_per_req, ...], which saves padding q and
            cutting the result, each compiled anew for another batch size.
          paged_kv_cache: a tuple of 4-D arrays (k, v), or one 5-D array, in kv_layout; with
            page_size 1 the page axis may be missing. Also a `PagedKVCache`.
          q_scale: what q is multiplied by, a positive number, or a float array of shape [] or
            [num_qo_heads]. The product is rounded to q's dtype.
          k_scale, v_scale: what keys and values are multiplied by: positive numbers, or float arrays
            of shape [] or [num_kv_heads]. No value is compiled anew, and no pass is made over the cache
            or the output. None for a `PagedKVCache` that has scales, such as each token's own.
          return_lse: also return the logsumexp of the logits.
          window_left, q_len_per_req: None, or those of plan.
          sinks: float32 [num_qo_heads], a further logit of each head (natural, not scaled by
            sm_scale) that takes part in the softmax and has no value. lse counts it. FlashInfer's
            fa2 ignores it here.
          lse_base: "log2" or "ln".

        Returns:
          o, shaped as q, of o_data_type; with return_lse, (o, lse float32 [rows of q,
          num_qo_heads]). A request without keys gives 0 and -inf, or its sink.

        Raises:
          RuntimeError: no plan.
          ValueError: rows, heads or dtypes other than planned, or an unknown lse_base.
          KeyError: the cache is a list.
          NotImplementedError: an option that is not built, and `out` or `lse`.
        """
        if q_len_per_req not in (None, self._q_len_per_req):
            raise ValueError(
                f"q_len_per_req must be that of plan, {self._q_len_per_req}, or None; got "
                f"{q_len_per_req}: call plan(..., q_len_per_req={q_len_per_req})"
            )
        return self._run(
            paged_decode if self._q_len_per_req == 1 else paged_prefill,
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
