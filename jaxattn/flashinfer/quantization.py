"""Bits out of bools, as FlashInfer's functions: the first is a byte's highest bit, unless told otherwise."""

from jax import Array

from jaxattn import operands


def packbits(x: Array, bitorder: str = "big") -> Array:
    """Eight elements a byte, as `numpy.packbits`: uint8 [ceil(n / 8)].

    Args:
      x: [n], bool or numbers of which 0 is False.
      bitorder: "big" or "little". A `packed_custom_mask` is "little".

    Raises:
      ValueError: another shape or bitorder.
    """
    return operands.packbits(x, bitorder)


def segment_packbits(x: Array, indptr: Array, bitorder: str = "big") -> tuple[Array, Array]:
    """`packbits` of each segment `x[indptr[i]:indptr[i + 1]]`, which begin on a byte each; inside jit as well.

    Args:
      x: [n], bool or numbers of which 0 is False.
      indptr: int32 [b + 1].
      bitorder: "big" or "little". A `packed_custom_mask` is "little".

    Returns:
      (bits uint8 [n // 8 + b], their indptr int32 [b + 1]). Bytes from indptr[b] on are 0; FlashInfer, which reads
      indptr back to the host, has none.

    Raises:
      ValueError, TypeError: another shape or bitorder, an indptr that is not int32.
    """
    return operands.segment_packbits(x, indptr, bitorder)
