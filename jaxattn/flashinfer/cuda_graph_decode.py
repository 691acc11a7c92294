"""The decode class with fixed capacities."""

from typing import Any

from jax.typing import ArrayLike

from jaxattn.checks import check_positive
from jaxattn.flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper
from jaxattn.flashinfer.options import flashinfer_options


class CUDAGraphBatchDecodeWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """The decode wrapper with fixed capacities: any lengths and any batch size run one program.

    `plan` never recompiles with index arrays on the host, nor with ones of full capacity on the
    device; `run` never with a q of max_batch_size rows, times q_len_per_req. Another batch size costs
    only the compilation of a pad and a slice.

    Args:
      workspace_buffer: anything; XLA needs no workspace.
      indptr_buffer, indices_buffer, last_page_len_buffer: arrays whose lengths are the capacities:
        max_batch_size + 1, max_num_pages, max_batch_size. They are neither read nor written.
      kv_layout: "NHD" or "HND".
      max_batch_size, max_num_pages: the capacities, in place of the buffers.

    Raises:
      ValueError: neither all three buffers nor both numbers, or buffers that do not fit each other.
    """

    @flashinfer_options()
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
            super().__init__(None, kv_layout)
            self._max_batch_size = max_batch_size
            self._max_num_pages = max_num_pages
        elif max_batch_size is None and max_num_pages is None and given == 3:
            super().__init__(None, kv_layout, True, False, *buffers)
        else:
            raise ValueError(
                "capacities must come from indptr_buffer, indices_buffer and last_page_len_buffer, "
                "or from max_batch_size and max_num_pages; "
                f"got {max_batch_size=}, {max_num_pages=} and {given} of 3 buffers"
            )
