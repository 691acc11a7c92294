"""Merging attention states, as FlashInfer's functions: lse in base 2, as the classes here return it.

A port that hands a wrapper's lse straight to `merge_state` is right without a further word. States
of the functions on arrays (`paged_decode` and its siblings) hold natural logs: pass lse_base="ln", or
call `jaxattn.merge`, whose functions take no base for granted.
"""

from jax import Array

from jaxattn import merge


def merge_state(
    v_a: Array,
    s_a: Array,
    v_b: Array,
    s_b: Array,
    *,
    lse_base: str = "log2",
    backend: str | None = None,
) -> tuple[Array, Array]:
    """`jaxattn.merge.merge_state` of states in base 2, or in the base that is given.

    Args:
      v_a, v_b: [n, h, d], of one dtype: float16, bfloat16 or float32.
      s_a, s_b: [n, h], floating-point; float32 keeps their precision. Base 2, as the wrappers' lse;
        natural logs need lse_base="ln".
      lse_base: "log2" or "ln", the logarithm of s_a, s_b and of the s returned.
      backend: "triton", "xla", "interpret", or None: Triton on an NVIDIA GPU, XLA elsewhere.

    Returns, raises: as `jaxattn.merge.merge_state`.
    """
    return merge.merge_state(v_a, s_a, v_b, s_b, lse_base=lse_base, backend=backend)


def merge_state_in_place(
    v: Array,
    s: Array,
    v_other: Array,
    s_other: Array,
    mask: Array | None = None,
    *,
    lse_base: str = "log2",
    backend: str | None = None,
) -> tuple[Array, Array]:
    """`jaxattn.merge.merge_state_in_place` of states in base 2, or in the base that is given.

    Args:
      v, v_other: [n, h, d], of one dtype: float16, bfloat16 or float32.
      s, s_other: [n, h], float32. Base 2, as the wrappers' lse; natural logs need lse_base="ln".
      mask: bool [n]; where False, v and s stay as they are. None: all rows merge.
      lse_base, backend: as for `merge_state`.

    Returns:
      (v, s), which FlashInfer writes and returns nothing: use what is returned. It is aliased to v and
      s, in place where they are donated or not used again.

    Raises: as `jaxattn.merge.merge_state_in_place`.
    """
    return merge.merge_state_in_place(
        v, s, v_other, s_other, mask, lse_base=lse_base, backend=backend
    )


def merge_states(
    v: Array, s: Array, *, lse_base: str = "log2", backend: str | None = None
) -> tuple[Array, Array]:
    """`jaxattn.merge.merge_states` of states in base 2, or in the base that is given.

    Args:
      v: [n, states, h, d]; float16, bfloat16 or float32.
      s: [n, states, h], floating-point; float32 keeps its precision. Base 2, as the wrappers' lse;
        natural logs need lse_base="ln".
      lse_base, backend: as for `merge_state`.

    Returns, raises: as `jaxattn.merge.merge_states`.
    """
    return merge.merge_states(v, s, lse_base=lse_base, backend=backend)
