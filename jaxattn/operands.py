"""What attention takes along besides q, k and v: operands with arrays, each with its own meaning.

    ScoreMod   a function of the score, its positions and its head, with an array per head: ALiBi, or a user's own
    MaskBits   for each request, one bit a (query, key)

Sinks (one logit a query head) and bidirectional spans (a range of keys a query token) are plain arrays.
The kernels and the reference call the same functions here.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxattn.checks import check_choice, check_index, check_shape

MAX_BYTES = 2**28 - 1  # of mask bits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScoreMod:
    """`fn(score, query_position, key_position, query_head, *arrays)`: the logit, from the scaled score.

    Attributes:
      fn: a jnp function (static), traced into the kernel; elementwise, its arguments broadcast against each other.
        score is float32; positions, in their request, and query_head are int32; an array gives its head's element.
      arrays: [num_qo_heads] each.
    """

    fn: Callable[..., Array] = dataclasses.field(metadata=dict(static=True))
    arrays: tuple[Array, ...] = ()

    @classmethod
    def of(cls, fn: Callable[..., Array], arrays: Sequence[Array], num_qo_heads: int) -> "ScoreMod":
        """A checked ScoreMod.

        Raises:
          TypeError: fn is no function.
          ValueError: an array that has not one element a query head.
        """
        if not callable(fn):
            raise TypeError(f"score_mod must be a function; got {type(fn).__name__}")
        for i, x in enumerate(arrays):
            check_shape(f"score_mod_arrays[{i}]", x, (num_qo_heads,))
        return cls(fn, tuple(arrays))


def alibi(
    score: Array, query_position: Array, key_position: Array, query_head: Array, slope: Array
) -> Array:
    """ALiBi (Press et al. 2022, section 3): a penalty for distance, steeper or flatter by head."""
    return score + slope * (key_position - query_position).astype(jnp.float32)


def may_be_kept(score_mods: Sequence[ScoreMod]) -> bool:
    """Whether the next call may use what was compiled for this one: what a user's function reads may have changed."""
    return all(mod.fn is alibi for mod in score_mods)


def modified(
    score_mods: Sequence[ScoreMod],
    score: Array,
    query_position: Array,
    key_position: Array,
    query_head: Array,
    arrays: Sequence[Sequence[Array]],
) -> Array:
    """The logit float32 after each of score_mods in turn; `arrays[i]` are those of the i-th, per head."""
    for mod, own in zip(score_mods, arrays):
        new = mod.fn(score, query_position, key_position, query_head, *own)
        if new.dtype != score.dtype or new.shape != score.shape:
            raise TypeError(
                f"score_mod must return {score.dtype} {list(score.shape)}, as its score; "
                f"got {new.dtype} {list(new.shape)}"
            )
        score = new
    return score


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskBits:
    """Which keys each query sees, one bit each, as FlashInfer's `packed_custom_mask`.

    Query i of request r, counted in its request, sees key j where bit `i * kv_len[r] + j` of the request's bytes is
    set, the lowest bit of a byte first. Bits beyond the array are clear.

    Attributes:
      bits: uint8 [capacity].
      indptr: int32 [b + 1], a request's bytes are `bits[indptr[r]:indptr[r + 1]]`, ceil(qo_len * kv_len / 8) of them.
    """

    bits: Array
    indptr: Array

    @classmethod
    def of(cls, mask: Array, qo_indptr: Array, kv_len: Array) -> "MaskBits":
        """From a bool mask, the requests' [qo_len, kv_len] masks one after the other, flattened.

        Args:
          mask: bool [any]; what is not there is False.
          qo_indptr: int32 [b + 1].
          kv_len: int32 [b].
        """
        check_shape("custom_mask", mask, ("sum of qo_len * kv_len",))
        if mask.dtype != jnp.bool_:
            raise TypeError(f"custom_mask must be bool; got {mask.dtype}: use mask.astype(bool)")
        sizes = (qo_indptr[1:] - qo_indptr[:-1]) * kv_len
        indptr = jnp.pad(jnp.cumsum(sizes, dtype=jnp.int32), (1, 0))
        return cls(*segment_packbits(mask, indptr, "little"))

    def check(self, batch_size: int) -> None:
        """Raises ValueError or TypeError, with the reason, unless the arrays are bits of so many requests."""
        check_shape("packed_custom_mask", self.bits, ("bytes",))
        if self.bits.dtype != jnp.uint8:
            raise TypeError(f"packed_custom_mask must be uint8; got {self.bits.dtype}")
        check_index("mask_indptr", self.indptr, batch_size + 1)
        if self.bits.shape[0] > MAX_BYTES:
            raise ValueError(
                f"packed_custom_mask must have at most {MAX_BYTES} bytes, whose bits an int32 counts; "
                f"got {self.bits.shape[0]}: split the batch"
            )

    def seen(self, index: Array, load: Callable[[Array, Array], Array] | None = None) -> Array:
        """bool: the bits at index int32 [...], counted from the first byte's lowest.

        load(index, exists) reads bytes; default: from `bits`.
        """
        byte = index >> 3
        exists = (index >= 0) & (byte < self.bits.shape[0])
        if load is None:
            value = self.bits.at[jnp.where(exists, byte, 0)].get(mode="clip")
        else:
            value = load(byte, exists)
        return exists & (((value.astype(jnp.int32) >> (index & 7)) & 1) == 1)


def packbits(x: Array, bitorder: str) -> Array:
    """Eight bools a byte: bool [n] -> uint8 [ceil(n / 8)]; `MaskBits` wants bitorder "little"."""
    check_shape("x", x, ("n",))
    check_choice("bitorder", bitorder, ("little", "big"))
    return jnp.packbits(x.astype(bool), bitorder=bitorder)


def segment_packbits(x: Array, indptr: Array, bitorder: str) -> tuple[Array, Array]:
    """`packbits` of each segment, which begin on a byte each; inside jit as well.

    Args:
      x: bool [n].
      indptr: int32 [b + 1], segment r is `x[indptr[r]:indptr[r + 1]]`; what is not in x counts as False.
      bitorder: "little" or "big".

    Returns:
      (bits uint8 [n // 8 + b], their indptr int32 [b + 1]); bytes from indptr[b] on are 0.
    """
    check_shape("x", x, ("n",))
    check_index("indptr", indptr, "b + 1")
    check_choice("bitorder", bitorder, ("little", "big"))
    indptr = jnp.asarray(indptr)
    num_bytes = (indptr[1:] - indptr[:-1] + 7) // 8
    packed_indptr = jnp.pad(jnp.cumsum(num_bytes, dtype=jnp.int32), (1, 0))
    byte = jnp.arange(x.shape[0] // 8 + num_bytes.size, dtype=jnp.int32)
    segment = jnp.searchsorted(packed_indptr[1:], byte, side="right").astype(jnp.int32)
    first = indptr.at[segment].get(mode="clip") + 8 * (
        byte - packed_indptr.at[segment].get(mode="clip")
    )
    at = first[:, None] + jnp.arange(8, dtype=jnp.int32)[None, :]
    end = indptr[1:].at[segment].get(mode="clip")
    bit = jnp.asarray(x).astype(bool).at[at].get(mode="fill", fill_value=False)
    bit &= (at < end[:, None]) & (segment < num_bytes.size)[:, None]
    return jnp.packbits(bit, axis=1, bitorder=bitorder)[:, 0], packed_indptr
