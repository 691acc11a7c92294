"""Rotary position embedding (Su et al. 2021), from a table of cosines and sines or on the fly.

Every op rotates queries and keys in one kernel, in float32. Pairs of dims are the two halves of the
first rotary_dim dims (GPT-NeoX, Llama; the default) or even and odd neighbours (GPT-J).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxattn import reference
from jaxattn.as_program import as_program
from jaxattn.checks import (
    check_cos_sin_cache,
    check_float,
    check_index,
    check_positive,
    check_rotary_dim,
    check_same_dtype,
    check_shape,
    copied_from_host,
)
from jaxattn.dispatch import dispatch
from jaxattn.kernels.triton import rope as kernels


def precompute_freqs_cis(
    head_dim: int,
    max_seq_len: int,
    rope_theta: float = 1e4,
    *,
    rotary_dim: int | None = None,
    rope_scale: float = 1.0,
    low_freq_factor: float | None = None,
    high_freq_factor: float | None = None,
    old_context_len: int | None = None,
    frequencies: Array | None = None,
) -> Array:
    """The table that `apply_rope_with_cos_sin_cache` reads.

    Frequency i is `rope_theta^(-2 i / rotary_dim) / rope_scale`; with the last three arguments,
    Llama-3.1's: wavelengths below `old_context_len / high_freq_factor` are not scaled, those above
    `old_context_len / low_freq_factor` in full, and between them the frequency is interpolated.

    Args:
      head_dim: dims of a head.
      max_seq_len: positions.
      rope_theta: base of the frequencies.
      rotary_dim: dims that rotate, even, at most head_dim; default all.
      rope_scale: divides the frequencies.
      low_freq_factor, high_freq_factor, old_context_len: Llama-3.1's scaling; all three or none.
      frequencies: float32 [rotary_dim / 2], radians a position, in place of all of the above: YaRN's, NTK-aware or
        LongRoPE's, say. Where such a scheme also scales attention, multiply the table by its factor.

    Returns:
      float32 [max_seq_len, rotary_dim], cosines in the first half of a row, sines in the second.

    Raises:
      ValueError: a size that is not positive, an odd or too large rotary_dim, only some of
        Llama-3.1's three arguments, or frequencies together with what they replace.
      TypeError: frequencies that are not float32.
    """
    check_positive(head_dim=head_dim, max_seq_len=max_seq_len)
    llama31 = (low_freq_factor, high_freq_factor, old_context_len)
    if None in llama31 and any(llama31):
        raise ValueError(
            "low_freq_factor, high_freq_factor and old_context_len must come together; "
            f"got {low_freq_factor=}, {high_freq_factor=}, {old_context_len=}"
        )
    positions = jnp.arange(max_seq_len, dtype=jnp.int32)
    if frequencies is None:
        rotary_dim = _rotary_dim(rotary_dim, head_dim)
        frequencies = reference.rope_frequencies(rotary_dim, rope_theta, rope_scale, *llama31)
    else:
        if rope_theta != 1e4 or rope_scale != 1 or llama31 != (None,) * 3:
            raise ValueError(
                "frequencies are used as they are: leave out rope_theta, rope_scale and Llama-3.1's arguments; "
                f"got {rope_theta=}, {rope_scale=}, {low_freq_factor=}, {high_freq_factor=}, {old_context_len=}"
            )
        check_shape("frequencies", frequencies, ("rotary_dim / 2",))
        size = 2 * frequencies.shape[0]
        if rotary_dim not in (None, size):
            raise ValueError(
                f"frequencies must have rotary_dim / 2 = {rotary_dim / 2:g} elements; got {size // 2}"
            )
        _rotary_dim(size, head_dim)
        if frequencies.dtype != jnp.float32:
            raise TypeError(
                f"frequencies must be float32; got {frequencies.dtype}: use frequencies.astype(jnp.float32)"
            )
        frequencies = copied_from_host(frequencies)
    return _table(positions, frequencies)


def apply_rope_with_cos_sin_cache(
    positions: Array,
    query: Array,
    key: Array,
    head_size: int,
    cos_sin_cache: Array,
    is_neox: bool = True,
    *,
    in_place: bool = False,
    backend: str | None = None,
) -> tuple[Array, Array]:
    """Rotates query and key by a table's rows.

    Args:
      positions: int32 [t], rows of the table; a position outside it gives NaN.
      query: [t, num_qo_heads * head_size] or [t, num_qo_heads, head_size]; float16, bfloat16 or
        float32.
      key: as query, with num_kv_heads.
      head_size: dims of a head.
      cos_sin_cache: float32 [max_position, rotary_dim], rotary_dim even and at most head_size:
        cosines in the first half of a row, sines in the second. Dims from rotary_dim on are copied.
      is_neox: pairs are the two halves; otherwise even and odd neighbours.
      in_place: alias the results to query and key, as the `_inplace` twin does: they are rotated in
        place where donated or not used again. Where they are used again, XLA first copies them.
      backend: "triton", "xla", "interpret", or None: Triton on an NVIDIA GPU, XLA elsewhere.

    Returns:
      (query, key), rotated, shaped and typed as they came.

    Raises:
      ValueError: shapes that do not fit, a table that is not float32, a backend that cannot run
        here.
      TypeError: positions are not int32, an unsupported dtype, query and key of different dtypes.
    """
    return _rope(query, key, positions, cos_sin_cache, head_size, not is_neox, in_place, backend)


def apply_rope(
    q: Array,
    k: Array,
    indptr: Array,
    offsets: Array,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
    *,
    in_place: bool = False,
    backend: str | None = None,
) -> tuple[Array, Array]:
    """Rotates ragged queries and keys: row i, of request r, by `offsets[r] + i - indptr[r]`.

    Args:
      q: [t, num_qo_heads, head_dim]; float16, bfloat16 or float32.
      k: [t, num_kv_heads, head_dim].
      indptr: int32 [b + 1]; rows of request r are `indptr[r]:indptr[r + 1]`. Rows past indptr[b]
        are copied.
      offsets: int32 [b], the position of each request's first row.
      rotary_dim: dims that rotate, even, at most head_dim; default all.
      interleave: pairs are even and odd neighbours; otherwise the two halves.
      rope_scale: divides the frequencies `rope_theta^(-2 i / rotary_dim)`.
      rope_theta: their base.
      in_place: alias the results to q and k, as the `_inplace` twin does.
      backend: "triton", "xla", "interpret", or None: Triton on an NVIDIA GPU, XLA elsewhere.

    Returns:
      (q, k), rotated, shaped and typed as they came.

    Raises:
      ValueError: shapes that do not fit, a backend that cannot run here.
      TypeError: indices are not int32, an unsupported dtype, q and k of different dtypes.
    """
    positions = _positions(q, indptr, offsets)
    return _apply(
        q, k, positions, rotary_dim, interleave, (rope_theta, rope_scale), in_place, backend
    )


def apply_rope_pos_ids(
    q: Array,
    k: Array,
    pos_ids: Array,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
    *,
    in_place: bool = False,
    backend: str | None = None,
) -> tuple[Array, Array]:
    """`apply_rope` with the position of every row, pos_ids int32 [t]."""
    return _apply(
        q, k, pos_ids, rotary_dim, interleave, (rope_theta, rope_scale), in_place, backend
    )


def apply_llama31_rope(
    q: Array,
    k: Array,
    indptr: Array,
    offsets: Array,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
    *,
    in_place: bool = False,
    backend: str | None = None,
) -> tuple[Array, Array]:
    """`apply_rope` with Llama-3.1's frequencies, as `precompute_freqs_cis` describes them."""
    positions = _positions(q, indptr, offsets)
    scaling = (rope_theta, rope_scale, low_freq_factor, high_freq_factor, old_context_len)
    return _apply(q, k, positions, rotary_dim, interleave, scaling, in_place, backend)


def apply_llama31_rope_pos_ids(
    q: Array,
    k: Array,
    pos_ids: Array,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
    *,
    in_place: bool = False,
    backend: str | None = None,
) -> tuple[Array, Array]:
    """`apply_llama31_rope` with the position of every row, pos_ids int32 [t]."""
    scaling = (rope_theta, rope_scale, low_freq_factor, high_freq_factor, old_context_len)
    return _apply(q, k, pos_ids, rotary_dim, interleave, scaling, in_place, backend)


def _inplace_twin(op: Callable[..., tuple[Array, Array]]) -> Callable[..., tuple[Array, Array]]:
    @functools.wraps(op)
    def twin(*args: Any, **kwargs: Any) -> tuple[Array, Array]:
        return op(*args, in_place=True, **kwargs)

    twin.__name__ = f"{op.__name__}_inplace"
    twin.__doc__ = f"`{op.__name__}` with in_place=True: the results alias the queries and keys."
    return twin


apply_rope_with_cos_sin_cache_inplace = _inplace_twin(apply_rope_with_cos_sin_cache)
apply_rope_inplace = _inplace_twin(apply_rope)
apply_rope_pos_ids_inplace = _inplace_twin(apply_rope_pos_ids)
apply_llama31_rope_inplace = _inplace_twin(apply_llama31_rope)
apply_llama31_rope_pos_ids_inplace = _inplace_twin(apply_llama31_rope_pos_ids)


def _rotary_dim(rotary_dim: int | None, head_dim: int) -> int:
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    check_rotary_dim(rotary_dim, head_dim)
    return rotary_dim


def _positions(q: Array, indptr: Array, offsets: Array) -> Array:
    """The position of every row of q; 0, which turns nothing, in the rows of no request."""
    check_index("offsets", offsets, "b")
    check_index("indptr", indptr, offsets.shape[0] + 1)
    indptr, offsets = copied_from_host(indptr), copied_from_host(offsets)
    row = jnp.arange(q.shape[0], dtype=jnp.int32)
    request = jnp.searchsorted(indptr[1:], row, side="right")
    position = row + (offsets - indptr[:-1]).at[request].get(mode="clip")
    return jnp.where(row < indptr[-1], position, 0)


@as_program()
def _table(positions: Array, frequencies: Array) -> Array:
    """float32 [t, rotary_dim]: cosines, then sines, of positions int32 [t] at float32 [rotary_dim / 2]."""
    angle = jnp.asarray(positions, jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=1)


def _apply(
    q: Array,
    k: Array,
    positions: Array,
    rotary_dim: int | None,
    interleave: bool,
    scaling: tuple[Any, ...],
    in_place: bool,
    backend: str | None,
) -> tuple[Array, Array]:
    """Rotates by a table made for these rows alone."""
    check_shape("q", q, ("t", "num_qo_heads", "head_dim"))
    t, _, head_dim = q.shape
    check_shape("k", k, (t, "num_kv_heads", head_dim))
    check_index("pos_ids", positions, t)
    positions = copied_from_host(positions)
    frequencies = reference.rope_frequencies(_rotary_dim(rotary_dim, head_dim), *scaling)
    table = _table(positions, frequencies)
    rows = jnp.arange(t, dtype=jnp.int32)
    return _rope(q, k, rows, table, head_dim, interleave, in_place, backend)


def _rope(
    query: Array,
    key: Array,
    positions: Array,
    cos_sin_cache: Array,
    head_size: int,
    interleave: bool,
    in_place: bool,
    backend: str | None,
) -> tuple[Array, Array]:
    check_positive(head_size=head_size)
    check_index("positions", positions, "t")
    positions = copied_from_host(positions)
    t = positions.shape[0]
    for name, x in (("query", query), ("key", key)):
        check_float(name, x)
        flat = x.ndim == 2 and x.shape[1] % head_size == 0
        if not (flat or x.ndim == 3 and x.shape[2] == head_size) or x.shape[0] != t:
            raise ValueError(
                f"{name} must have shape [t, heads * head_size] or [t, heads, head_size], {t=}, "
                f"{head_size=}; got {list(x.shape)}"
            )
    check_same_dtype(query=query, key=key)
    check_cos_sin_cache(cos_sin_cache, head_size)
    rotated = dispatch(
        "xla" if t == 0 else backend,
        functools.partial(kernels.rope, interleave=interleave, in_place=in_place),
        functools.partial(reference.rope, interleave=interleave),
        *(x.reshape(t, math.prod(x.shape[1:]) // head_size, head_size) for x in (query, key)),
        positions,
        cos_sin_cache,
    )
    return rotated[0].reshape(query.shape), rotated[1].reshape(key.shape)
