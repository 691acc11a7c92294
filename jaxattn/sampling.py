"""Draws tokens from logits or probabilities: top-k, top-p and min-p, without a sort on a GPU.

Names and meaning are FlashInfer's. A token is drawn by one uniform number a row, that of its key: the same key gives
the same token, alone or in a batch, and on every backend (from logits: unless `exp2` rounds otherwise where two tokens
meet). Probabilities are added as integers (`token_mass.py`), so a set's border depends on no order of additions.

What is kept, in all of them:

- **top_k**: the tokens that fewer than top_k others exceed; a top_k of the vocabulary or more keeps all.
- **top_p** (nucleus; Holtzman et al. 2020): the tokens above which less than top_p of the row's mass lies; 1 keeps all.
  Rows need not add up to 1.
- **min_p**: the tokens that have at least min_p of the likeliest one's probability (Nguyen et al. 2024).
- Ties with the last token that is kept are kept. The likeliest token always is. A probability that is not positive and
  finite, and a logit of -inf or NaN, is never drawn; a row of only these gives the token -1.
- Limits are numbers, or arrays [b] of one for each row. Those that the host holds must be in their range; those on a
  device are not looked at, but clipped to it, a NaN to its least.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxattn import reference_sampling as reference
from jaxattn.checks import check_choice, check_float, check_shape
from jaxattn.dispatch import dispatch
from jaxattn.kernels.triton import sampling as kernels
from jaxattn.token_mass import MAX_VOCAB, Limits, cleaned, key_of, random_digits

PerRow = Any  # a number, or an array [b] of them
ORDERS = ("top_k_first", "joint")
LEAST_TEMPERATURE = 1e-30  # what is less draws as 0 does: no two logits are as near
# What is more draws as this does: none are as far apart, but for infinite ones, which 1 / temperature = 0 would lose.
MOST_TEMPERATURE = 2.0**100


def sampling_from_probs(probs: Array, key: Array, *, backend: str | None = None) -> Array:
    """Draws a token of each row with its probability.

    Args:
      probs: [b, vocab], float16, bfloat16 or float32; a vocabulary of at most 2^19 tokens.
      key: a random key of JAX, or one for each row [b].
      backend: "triton", "xla", "interpret", or None: Triton on an NVIDIA GPU, XLA elsewhere.

    Returns:
      int32 [b]; -1 of a row without mass.

    Raises:
      ValueError: another shape; a limit out of range; a backend that cannot run here.
      TypeError: an unsupported dtype; what is no random key.
    """
    return _draw("probs", probs, key, Limits(), backend=backend)


def top_p_sampling_from_probs(
    probs: Array, top_p: PerRow, key: Array, *, backend: str | None = None
) -> Array:
    """`sampling_from_probs` among the likeliest tokens, as few as hold top_p of the mass, and their ties."""
    return _draw("probs", probs, key, _limits(probs, top_p=top_p), backend=backend)


def top_k_sampling_from_probs(
    probs: Array, top_k: PerRow, key: Array, *, backend: str | None = None
) -> Array:
    """`sampling_from_probs` among the top_k likeliest tokens and their ties."""
    return _draw("probs", probs, key, _limits(probs, top_k=top_k), backend=backend)


def min_p_sampling_from_probs(
    probs: Array, min_p: PerRow, key: Array, *, backend: str | None = None
) -> Array:
    """`sampling_from_probs` among the tokens of at least min_p times the largest probability (Nguyen et al. 2024)."""
    return _draw("probs", probs, key, _limits(probs, min_p=min_p), backend=backend)


def top_k_top_p_sampling_from_probs(
    probs: Array,
    top_k: PerRow,
    top_p: PerRow,
    key: Array,
    *,
    filter_apply_order: str = "top_k_first",
    backend: str | None = None,
) -> Array:
    """`sampling_from_probs` among the tokens that top_k and top_p keep.

    Args:
      probs, key, backend, and what is raised: as `sampling_from_probs`.
      top_k, top_p: see this module.
      filter_apply_order: "top_k_first": top_p is a share of what top_k keeps; "joint": of all of the row's mass.
    """
    limits = _limits(probs, top_k=top_k, top_p=top_p)
    return _draw("probs", probs, key, limits, order=filter_apply_order, backend=backend)


def sampling_from_logits(
    logits: Array,
    key: Array,
    *,
    temperature: PerRow = 1.0,
    top_k: PerRow | None = None,
    top_p: PerRow | None = None,
    min_p: PerRow | None = None,
    backend: str | None = None,
) -> Array:
    """Draws a token of each row with the probability softmax(logits / temperature).

    Args:
      logits: [b, vocab], float16, bfloat16 or float32; a vocabulary of at most 2^19 tokens.
      key: a random key of JAX, or one for each row [b].
      temperature: at least 0; 0 takes the likeliest token, the first of equals.
      top_k, top_p, min_p: see this module; None: no limit. top_p is a share of what top_k keeps.
      backend: "triton", "xla", "interpret", or None: Triton on an NVIDIA GPU, XLA elsewhere.

    Returns:
      int32 [b]; -1 of a row whose logits are all -inf or NaN.

    Raises:
      ValueError: another shape; a limit out of range; a backend that cannot run here.
      TypeError: an unsupported dtype; what is no random key.
    """
    limits = _limits(logits, temperature, top_k, top_p, min_p)
    return _draw("logits", logits, key, limits, temperature, backend=backend)


def top_k_top_p_sampling_from_logits(
    logits: Array,
    top_k: PerRow,
    top_p: PerRow,
    key: Array,
    *,
    filter_apply_order: str = "top_k_first",
    backend: str | None = None,
) -> Array:
    """`top_k_top_p_sampling_from_probs` of softmax(logits)."""
    limits = _limits(logits, 1.0, top_k, top_p)
    return _draw("logits", logits, key, limits, order=filter_apply_order, backend=backend)


def top_p_renorm_probs(probs: Array, top_p: PerRow, *, backend: str | None = None) -> Array:
    """The probabilities of the tokens that top_p keeps, divided by their sum; 0 of the others.

    Args:
      probs: [b, vocab], float16, bfloat16 or float32.
      top_p: see this module.
      backend: as `sampling_from_probs`.

    Returns:
      [b, vocab], probs' dtype; zeros of a row without mass.

    Raises: as `sampling_from_probs`.
    """
    return _renormed(probs, _limits(probs, top_p=top_p), backend)


def top_k_renorm_probs(probs: Array, top_k: PerRow, *, backend: str | None = None) -> Array:
    """`top_p_renorm_probs`, of the tokens that top_k keeps."""
    return _renormed(probs, _limits(probs, top_k=top_k), backend)


def top_k_mask_logits(logits: Array, top_k: PerRow, *, backend: str | None = None) -> Array:
    """The logits [b, vocab] of the tokens that top_k keeps; -inf of the others. Raises as `sampling_from_probs`."""
    _check_rows("logits", logits)

    def kernel(logits: Array, limits: Limits, *, interpret: bool) -> Array:
        least, *_ = kernels.select(
            logits, limits, None, logits=True, joint=False, interpret=interpret
        )
        value = cleaned(logits, True)
        kept = key_of(value) >= least[:, None]
        return jnp.where(kept, value, -jnp.inf).astype(logits.dtype)

    limits = _limits(logits, top_k=top_k)
    return dispatch("xla" if not logits.size else backend, kernel, reference.masked, logits, limits)


def _renormed(probs: Array, limits: Limits, backend: str | None) -> Array:
    _check_rows("probs", probs)

    def kernel(probs: Array, limits: Limits, *, interpret: bool) -> Array:
        least, kept, _ = kernels.select(
            probs, limits, None, logits=False, joint=False, interpret=interpret
        )
        weight = cleaned(probs, False)
        share = weight / jnp.where(kept > 0, kept, 1)[:, None]
        return jnp.where(key_of(weight) >= least[:, None], share, 0).astype(probs.dtype)

    return dispatch("xla" if not probs.size else backend, kernel, reference.renormed, probs, limits)


def _draw(
    name: str,
    x: Array,
    key: Array,
    limits: Limits,
    temperature: PerRow = 1.0,
    *,
    order: str = "top_k_first",
    backend: str | None,
) -> Array:
    _check_rows(name, x)
    check_choice("filter_apply_order", order, ORDERS)
    _check_key(key, x.shape[0])
    how: dict[str, Any] = dict(logits=name == "logits", joint=order == "joint")

    def kernel(x: Array, limits: Limits, digits: Array, *, interpret: bool) -> Array | None:
        return kernels.select(x, limits, digits, interpret=interpret, **how)[2]

    def plain(x: Array, limits: Limits, digits: Array) -> Array:
        return reference.sample(x, limits, digits, **how)

    digits = random_digits(key, x.shape[0])
    if not (isinstance(temperature, int | float) and temperature > 0):
        # The least share: the first of the likeliest tokens.
        warm = jnp.asarray(temperature, jnp.float32).reshape(-1, 1) > 0
        digits = jnp.where(warm, digits, 0)
    return dispatch("xla" if not x.size else backend, kernel, plain, x, limits, digits)


def _limits(
    x: Array,
    temperature: PerRow | None = None,
    top_k: PerRow | None = None,
    top_p: PerRow | None = None,
    min_p: PerRow | None = None,
) -> Limits:
    """Limits of each row, checked where the host knows them; None where a number keeps all."""
    check_shape("logits or probs", x, ("b", "vocab"))
    rows, vocab = x.shape
    if isinstance(top_p, int | float) and top_p == 1:
        top_p = None
    if isinstance(top_k, int) and top_k >= vocab:
        top_k = None
    rate = None
    if temperature is not None:
        warm = _per_row("temperature", temperature, rows, 0, math.inf, float)
        rate = math.log2(math.e) / jnp.clip(warm, LEAST_TEMPERATURE, MOST_TEMPERATURE)
    least = float(np.finfo(np.float32).tiny)
    return Limits(
        rate,
        None if top_k is None else _per_row("top_k", top_k, rows, 1, 2**31 - 1, int),
        None if top_p is None else _per_row("top_p", top_p, rows, least, 1, float),
        None if min_p is None else _per_row("min_p", min_p, rows, 0, 1, float),
    )


def _per_row(
    name: str, value: PerRow, rows: int, least: float, most: float, kind: type[int] | type[float]
) -> Array:
    """int32 or float32, clipped, [b], or [1] of a number; what is on the host must be in its range.

    A number is not repeated for each row: that would be a kernel.
    """
    kinds = "iu" if kind is int else "iuf"
    must = f"{name} must be {'an integer' if kind is int else 'a number'}, or an array [{rows}] of one a row"
    dtype = jnp.int32 if kind is int else jnp.float32
    if not isinstance(value, jax.Array):
        value = np.asarray(value)
        if value.dtype.kind in kinds:
            wrong = ~((least <= value) & (value <= most) & np.isfinite(value))
            if wrong.any():
                at_most = "finite" if most == math.inf else f"at most {most:g}"
                above = "above 0" if 0 < least < 1 else f"at least {least:g}"
                raise ValueError(
                    f"{name} must be {above} and {at_most}; got {value[wrong].flat[0]}"
                )
    if value.shape not in ((), (rows,)):
        raise ValueError(f"{must}; got shape {list(value.shape)}")
    if not (
        jnp.issubdtype(value.dtype, jnp.integer)
        or kind is float
        and jnp.issubdtype(value.dtype, jnp.floating)
    ):
        raise TypeError(f"{must}; got {value.dtype}")
    # Of fmax and fmin, a NaN is the least: clip would keep it, and each backend make something else of it.
    clipped = jnp.fmin(jnp.fmax(jnp.asarray(value).astype(dtype), dtype(least)), dtype(most))
    return clipped.reshape(-1)


def _check_rows(name: str, x: Array) -> None:
    check_float(name, x)
    check_shape(name, x, ("b", "vocab"))
    if not 0 < x.shape[1] <= MAX_VOCAB:
        raise ValueError(
            f"the vocabulary of {name} must have 1 to {MAX_VOCAB} tokens; got {x.shape[1]}"
        )


def _check_key(key: Array, rows: int) -> None:
    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise TypeError(
            f"key must be a random key, as jax.random.key(0) is, or an array [{rows}] of them; got "
            f"{getattr(key, 'dtype', type(key).__name__)}: jax.random.wrap_key_data makes keys of old ones"
        )
    if key.shape not in ((), (rows,)):
        raise ValueError(
            f"key must be one key, or one for each of {rows} rows; got shape {list(key.shape)}"
        )
