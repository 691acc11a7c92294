"""Masks as FlashInfer's users bring them: a bool for each query and key, or the same in bits."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxattn.flashinfer.index_arrays import pad, power_of_two
from jaxattn.operands import MaskBits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CustomMask:
    """What the queries of a batch see: the requests' [qo_len, kv_len] masks, row-major, one after the other.

    Attributes:
      array: bool [capacity]; or uint8 [capacity], its bits, the lowest of a byte first and each request on a byte of
        its own.
    """

    array: Array

    @classmethod
    def of(
        cls,
        custom_mask: Any,
        packed_custom_mask: Any,
        qo_indptr: Any,
        kv_len: np.ndarray | None,
        max_bytes: int | None = None,
    ) -> "CustomMask | None":
        """A checked mask, padded; bits go before bools, and None is no mask.

        Args:
          qo_indptr: int32 [b + 1].
          kv_len: int32 [b] where it is known on the host: the mask is then checked against it.
          max_bytes: the capacity, in bytes of bits; None: the next power of two.

        Raises:
          ValueError, TypeError: another number of elements than the lengths give, or more than the capacity; another
            dtype.
        """
        packed = packed_custom_mask is not None
        mask = packed_custom_mask if packed else custom_mask
        if mask is None:
            return None
        name = "packed_custom_mask" if packed else "custom_mask"
        # Copied: whoever keeps a host buffer refills it for the next step.
        mask = mask.reshape(-1) if isinstance(mask, jax.Array) else np.array(mask).reshape(-1)
        want = jnp.uint8 if packed else jnp.bool_
        if mask.dtype != want:
            advice = "pack it by segment_packbits(..., bitorder='little')" if packed else "cast it"
            raise TypeError(f"{name} must be {jnp.dtype(want)}; got {mask.dtype}: {advice}")
        if kv_len is not None and isinstance(qo_indptr, np.ndarray):
            sizes = np.diff(qo_indptr).astype(np.int64) * kv_len
            elements = int((-(-sizes // 8) if packed else sizes).sum())
            # Packed inside jit, bits come with bytes to spare.
            if mask.size < elements or mask.size > elements and not packed:
                what = "ceil(qo_len * kv_len / 8)" if packed else "qo_len * kv_len"
                raise ValueError(
                    f"{name} must have the requests' sum of {what} elements, {elements}; got "
                    f"{mask.size}"
                )
        a_byte = 1 if packed else 8
        capacity = power_of_two(mask.size) if max_bytes is None else a_byte * max_bytes
        if mask.size > capacity:
            raise ValueError(
                f"{name} has {mask.size} elements, more than the {capacity} that custom_mask_buf, "
                f"{max_bytes} bytes, holds: make a wrapper with a larger buffer"
            )
        return cls(pad(mask, capacity))

    def bits(self, qo_indptr: Array, kv_len: Array) -> MaskBits:
        """For the plan; inside jit."""
        if self.array.dtype == jnp.bool_:
            return MaskBits.of(self.array, qo_indptr, kv_len)
        sizes = (qo_indptr[1:] - qo_indptr[:-1]) * kv_len
        indptr = jnp.pad(jnp.cumsum((sizes + 7) // 8, dtype=jnp.int32), (1, 0))
        return MaskBits(self.array, indptr)
