"""Merging attention states, the algebra behind split keys, cascades and sequence parallelism.

The attention state of a set of keys is its output v and the logsumexp s of its scaled scores.
States of disjoint sets merge into the state of their union (FlashInfer, recursive attention):

    s = log sum_i exp(s_i),   v = sum_i exp(s_i - s) v_i

in float32. A state with s = -inf is empty: it contributes nothing, whatever its v holds; where all
are empty, v = 0 and s = -inf.

Nothing in an array tells its base, and states of another base merge to a plausible, wrong result. So
these functions have no default: whoever calls them says which logarithm s is, "ln" for what
`paged_decode` and the other functions on arrays return. FlashInfer's functions of the same names,
which `jaxattn` itself exports and which take what FlashInfer's classes return, are in
`jaxattn.flashinfer`; there the base is FlashInfer's, 2, unless the call says otherwise.
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from jaxattn import reference
from jaxattn.checks import check_choice, check_float, check_same_dtype, check_shape
from jaxattn.dispatch import dispatch
from jaxattn.kernels.triton import merge as kernels

LSE_BASES = ("log2", "ln")


def merge_state(
    v_a: Array,
    s_a: Array,
    v_b: Array,
    s_b: Array,
    *,
    lse_base: str,
    backend: str | None = None,
) -> tuple[Array, Array]:
    """Merges two attention states.

    Args:
      v_a, v_b: [n, h, d], of one dtype: float16, bfloat16 or float32.
      s_a, s_b: [n, h], floating-point; float32 keeps their precision.
      lse_base: "ln" or "log2", the logarithm of s; required.
      backend: "triton", "xla", "interpret", or None: Triton on an NVIDIA GPU, XLA elsewhere.

    Returns:
      (v [n, h, d] in the dtype of v_a, s float32 [n, h]).

    Raises:
      ValueError: shapes that do not fit, an unknown lse_base, a backend that cannot run here.
      TypeError: an unsupported dtype, v_a and v_b of different dtypes.
    """
    _check_states(lse_base, "nhd", ("v_a", v_a), ("s_a", s_a), ("v_b", v_b), ("s_b", s_b))
    return dispatch(
        "xla" if v_a.size == 0 else backend,
        functools.partial(kernels.merge_state, in_place=False, lse_base=lse_base),
        functools.partial(reference.merge_state, lse_base=lse_base),
        v_a,
        s_a,
        v_b,
        s_b,
    )


def merge_state_in_place(
    v: Array,
    s: Array,
    v_other: Array,
    s_other: Array,
    mask: Array | None = None,
    *,
    lse_base: str,
    backend: str | None = None,
) -> tuple[Array, Array]:
    """`merge_state`, the results aliased to v and s, in the rows that a mask selects.

    Args:
      v, v_other: [n, h, d], of one dtype: float16, bfloat16 or float32.
      s, s_other: [n, h], float32.
      mask: bool [n]; where False, v and s stay as they are. None: all rows merge.
      lse_base: "ln" or "log2", the logarithm of s; required.
      backend: "triton", "xla", "interpret", or None: Triton on an NVIDIA GPU, XLA elsewhere.

    Returns:
      (v, s), updated in place where donated or not used again; otherwise XLA first copies them.

    Raises:
      ValueError: shapes that do not fit, an unknown lse_base, a backend that cannot run here.
      TypeError: s is not float32, mask is not bool, an unsupported dtype, v and v_other of
        different dtypes.
    """
    _check_states(lse_base, "nhd", ("v", v), ("s", s), ("v_other", v_other), ("s_other", s_other))
    if s.dtype != jnp.float32:
        raise TypeError(f"s must be float32 to be updated in place; got {s.dtype}")
    if mask is not None:
        check_shape("mask", mask, v.shape[:1])
        if mask.dtype != jnp.bool_:
            raise TypeError(f"mask must be bool; got {mask.dtype}: use mask.astype(bool)")
    return dispatch(
        "xla" if v.size == 0 else backend,
        functools.partial(kernels.merge_state, in_place=True, lse_base=lse_base),
        functools.partial(reference.merge_state_in_place, lse_base=lse_base),
        v,
        s,
        v_other,
        s_other,
        *(() if mask is None else (mask,)),
    )


def merge_states(
    v: Array, s: Array, *, lse_base: str, backend: str | None = None
) -> tuple[Array, Array]:
    """Merges any number of attention states.

    Args:
      v: [n, states, h, d]; float16, bfloat16 or float32.
      s: [n, states, h], floating-point; float32 keeps its precision.
      lse_base: "ln" or "log2", the logarithm of s; required.
      backend: "triton", "xla", "interpret", or None: Triton on an NVIDIA GPU, XLA elsewhere.

    Returns:
      (v [n, h, d] in v's dtype, s float32 [n, h]); 0 and -inf for no states.

    Raises:
      ValueError: shapes that do not fit, an unknown lse_base, a backend that cannot run here.
      TypeError: an unsupported dtype.
    """
    _check_states(lse_base, ("n", "states", "h", "d"), ("v", v), ("s", s))
    return dispatch(
        "xla" if v.size == 0 else backend,
        functools.partial(kernels.merge_states, lse_base=lse_base),
        functools.partial(reference.merge_states, lse_base=lse_base),
        v,
        s,
    )


def _check_states(lse_base: str, axes: Sequence[str], *states: tuple[str, Array]) -> None:
    """Checks (name, v), (name, s) and so on, all states of one shape and dtype."""
    check_choice("lse_base", lse_base, LSE_BASES)
    values, lses = dict(states[::2]), dict(states[1::2])
    shape = states[0][1].shape
    check_shape(*states[0], axes)
    for name, v in values.items():
        check_shape(name, v, shape)
        check_float(name, v)
    check_same_dtype(**values)
    for name, s in lses.items():
        check_shape(name, s, shape[:-1])
        check_float(name, s)
