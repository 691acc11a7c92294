"""Attention over keys that requests share: a prefill for each level of sharing, merged."""

from collections.abc import Sequence
from typing import Any

from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxattn.checks import check_positive
from jaxattn.flashinfer.cascade import merge_state
from jaxattn.flashinfer.index_arrays import Indices
from jaxattn.flashinfer.options import Unbuilt, flashinfer_options
from jaxattn.flashinfer.paged_prefill import BatchPrefillWithPagedKVCacheWrapper

_NO_POSITIONS = "a level does not know at which positions of the whole its keys stand"


class MultiLevelCascadeAttentionWrapper:
    """Attention over keys in levels: those that all queries share, that some share, and their own; as
    FlashInfer's class.

    Shared keys are read once for all queries that share them. Each level's state stays float32 until
    the last merge; FlashInfer rounds each to q's dtype.

    Args:
      num_levels: of keys.
      float_workspace_buffer: anything; XLA needs no workspace.
      kv_layout: "NHD" or "HND", the axes of the cache.
      use_cuda_graph: fixes the capacities of each level by its buffers, one of each kind a level, as
        for `BatchPrefillWithPagedKVCacheWrapper`.

    Raises:
      KeyError: an unknown kv_layout.
      ValueError: num_levels that is not positive; use_cuda_graph without a buffer for each level, or
        buffers that do not fit each other.
    """

    @flashinfer_options()
    def __init__(
        self,
        num_levels: int,
        float_workspace_buffer: Any,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf_arr: Sequence[ArrayLike] | None = None,
        paged_kv_indptr_buf_arr: Sequence[ArrayLike] | None = None,
        paged_kv_indices_buf_arr: Sequence[ArrayLike] | None = None,
        paged_kv_last_page_len_buf_arr: Sequence[ArrayLike] | None = None,
    ):
        check_positive(num_levels=num_levels)
        self._num_levels = num_levels
        buffers: list[dict[str, Any]] = [{} for _ in range(num_levels)]
        if use_cuda_graph:
            buffers = self._by_level(
                qo_indptr_buf=qo_indptr_buf_arr,
                paged_kv_indptr_buf=paged_kv_indptr_buf_arr,
                paged_kv_indices_buf=paged_kv_indices_buf_arr,
                paged_kv_last_page_len_buf=paged_kv_last_page_len_buf_arr,
            )
        self._levels = [
            BatchPrefillWithPagedKVCacheWrapper(None, kv_layout, use_cuda_graph, **own)
            for own in buffers
        ]

    def _by_level(self, **lists: Sequence[Any] | None) -> list[dict[str, Any]]:
        """The lists' elements for each level."""
        for name, given in lists.items():
            if given is None or len(given) != self._num_levels:
                came = "None" if given is None else f"{len(given)}"
                raise ValueError(
                    f"{name} must be given for each of {self._num_levels} levels; got {came}"
                )
        return [
            {name: given[level] for name, given in lists.items() if given is not None}
            for level in range(self._num_levels)
        ]

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether capacities are fixed."""
        return self._levels[0].is_cuda_graph_enabled

    @flashinfer_options()
    def reset_workspace_buffer(
        self, float_workspace_buffer: Any, int_workspace_buffers: Any
    ) -> None:
        """Nothing: there is no workspace to replace."""

    @flashinfer_options()
    def prewarm_paged_kv_stride_variant(self, variant: str = "independent") -> None:
        """Nothing: there is one variant, which `run` compiles."""

    @flashinfer_options(
        pos_encoding_mode=Unbuilt(off=("NONE",), advice=_NO_POSITIONS),
        window_left=Unbuilt(off=(-1,), advice=_NO_POSITIONS),
    )
    def plan(
        self,
        qo_indptr_arr: Sequence[Indices],
        paged_kv_indptr_arr: Sequence[Indices],
        paged_kv_indices_arr: Sequence[Indices],
        paged_kv_last_page_len: Sequence[Indices],
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
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
    ) -> None:
        """Plans a step; one plan serves all layers.

        Args:
          qo_indptr_arr: for each level, int32 [groups + 1]: the rows of q that share keys of that
            level. All end at the same row.
          paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len: for each level, the
            pages of its groups, as for `BatchPrefillWithPagedKVCacheWrapper.plan`.
          causal: on the last level, which holds the new tokens' keys, a query sees no key behind its
            own position.
          The rest: as for `BatchPrefillWithPagedKVCacheWrapper.plan`.

        Raises: as there; ValueError for lists that have not one element a level.
        """
        arrays = self._by_level(
            qo_indptr=qo_indptr_arr,
            paged_kv_indptr=paged_kv_indptr_arr,
            paged_kv_indices=paged_kv_indices_arr,
            paged_kv_last_page_len=paged_kv_last_page_len,
        )
        for wrapper, own in zip(self._levels, arrays, strict=True):
            wrapper.plan(
                **own,
                num_qo_heads=num_qo_heads,
                num_kv_heads=num_kv_heads,
                head_dim_qk=head_dim,
                page_size=page_size,
                causal=causal and wrapper is self._levels[-1],
                sm_scale=sm_scale,
                logits_soft_cap=logits_soft_cap,
                q_data_type=q_data_type,
                kv_data_type=kv_data_type,
                o_data_type="float32",
            )

    begin_forward = plan

    def run(self, q: Array, paged_kv_cache: Any) -> Array:
        """Attends, as planned.

        Args:
          q: [rows, num_qo_heads, head_dim], as many rows as each qo_indptr ends at.
          paged_kv_cache: as for `BatchPrefillWithPagedKVCacheWrapper.run`; it holds all levels.

        Returns:
          o, shaped and typed as q. A row without keys on any level gives 0.

        Raises: as `BatchPrefillWithPagedKVCacheWrapper.run`.
        """
        *shared, own = self._levels
        o, lse = own.run(q, paged_kv_cache, return_lse=True)
        for level in shared:
            o, lse = merge_state(o, lse, *level.run(q, paged_kv_cache, return_lse=True))
        return o.astype(q.dtype)

    forward = run
