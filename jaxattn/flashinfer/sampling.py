"""Sampling, as FlashInfer's functions: what `jaxattn.sampling` draws, by FlashInfer's arguments.

Where FlashInfer takes random numbers of a generator with a state, JAX has keys: `generator` is a random key, new for
each call (`jax.random.split`), or `seed` and `offset` make one. One of them must be given.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxattn import sampling
from jaxattn.checks import check_array, check_index, copied_from_host
from jaxattn.flashinfer.options import flashinfer_options
from jaxattn.sampling import PerRow


@flashinfer_options(backend=None)
def sampling_from_probs(
    probs: Array,
    indices: Array | None = None,
    deterministic: bool = True,
    generator: Array | None = None,
    check_nan: bool = False,
    seed: int | Array | None = None,
    offset: int | Array | None = None,
    return_valid: bool = False,
    *,
    backend: str | None = None,
) -> Array | tuple[Array, Array]:
    """Draws a token of a row with its probability.

    Args:
      probs: [rows, vocab], float16, bfloat16 or float32.
      indices: int32 [b], the row that each draw is of; None: one draw of each row.
      generator: a random key, or one for each draw [b].
      check_nan: raise ValueError where a value is NaN; it must then be known, outside of jit.
      seed, offset: in place of a generator, integers that make a key, or arrays [b] that make one for each draw.
      return_valid: also return which rows had mass.
      backend: "triton", "xla", "interpret", or None: Triton on an NVIDIA GPU, XLA elsewhere.

    Returns:
      int32 [b]; -1 of a row without mass; with return_valid, (tokens, bool [b]).

    Raises: as `jaxattn.sampling.sampling_from_probs`; ValueError without generator and seed, or with both.
    """
    return _draw(
        sampling.sampling_from_probs,
        "probs",
        probs,
        (),
        dict(backend=backend),
        indices,
        generator,
        seed,
        offset,
        check_nan,
        return_valid,
    )


@flashinfer_options(backend=None)
def sampling_from_logits(
    logits: Array,
    indices: Array | None = None,
    deterministic: bool = True,
    generator: Array | None = None,
    check_nan: bool = False,
    seed: int | Array | None = None,
    offset: int | Array | None = None,
    *,
    backend: str | None = None,
) -> Array:
    """`sampling_from_probs` of softmax(logits), which returns no validity."""
    return _draw(
        sampling.sampling_from_logits,
        "logits",
        logits,
        (),
        dict(backend=backend),
        indices,
        generator,
        seed,
        offset,
        check_nan,
        False,
    )


@flashinfer_options(backend=None)
def top_p_sampling_from_probs(
    probs: Array,
    top_p: PerRow,
    indices: Array | None = None,
    deterministic: bool = True,
    generator: Array | None = None,
    check_nan: bool = False,
    seed: int | Array | None = None,
    offset: int | Array | None = None,
    return_valid: bool = False,
    *,
    backend: str | None = None,
) -> Array | tuple[Array, Array]:
    """`sampling_from_probs` among the likeliest tokens, as few as hold top_p of the mass, and their ties."""
    return _draw(
        sampling.top_p_sampling_from_probs,
        "probs",
        probs,
        (top_p,),
        dict(backend=backend),
        indices,
        generator,
        seed,
        offset,
        check_nan,
        return_valid,
    )


@flashinfer_options(backend=None)
def top_k_sampling_from_probs(
    probs: Array,
    top_k: PerRow,
    indices: Array | None = None,
    deterministic: bool = True,
    generator: Array | None = None,
    check_nan: bool = False,
    seed: int | Array | None = None,
    offset: int | Array | None = None,
    return_valid: bool = False,
    *,
    backend: str | None = None,
) -> Array | tuple[Array, Array]:
    """`sampling_from_probs` among the top_k likeliest tokens and their ties."""
    return _draw(
        sampling.top_k_sampling_from_probs,
        "probs",
        probs,
        (top_k,),
        dict(backend=backend),
        indices,
        generator,
        seed,
        offset,
        check_nan,
        return_valid,
    )


@flashinfer_options(backend=None)
def min_p_sampling_from_probs(
    probs: Array,
    min_p: PerRow,
    indices: Array | None = None,
    deterministic: bool = True,
    generator: Array | None = None,
    check_nan: bool = False,
    seed: int | Array | None = None,
    offset: int | Array | None = None,
    return_valid: bool = False,
    *,
    backend: str | None = None,
) -> Array | tuple[Array, Array]:
    """`sampling_from_probs` among the tokens of at least min_p times the largest probability."""
    return _draw(
        sampling.min_p_sampling_from_probs,
        "probs",
        probs,
        (min_p,),
        dict(backend=backend),
        indices,
        generator,
        seed,
        offset,
        check_nan,
        return_valid,
    )


@flashinfer_options(backend=None)
def top_k_top_p_sampling_from_probs(
    probs: Array,
    top_k: PerRow,
    top_p: PerRow,
    indices: Array | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: Array | None = None,
    check_nan: bool = False,
    seed: int | Array | None = None,
    offset: int | Array | None = None,
    return_valid: bool = False,
    *,
    backend: str | None = None,
) -> Array | tuple[Array, Array]:
    """`sampling_from_probs` among the tokens that top_k and top_p keep.

    Args:
      probs: [rows, vocab], float16, bfloat16 or float32.
      top_k: at least 1; a number, or an array of one for each row.
      top_p: in (0, 1]; a number, or an array of one for each row.
      indices: int32 [b], the row that each draw is of; None: one draw of each row.
      filter_apply_order: "top_k_first": top_p is a share of what top_k keeps; "joint": of all of the row's mass.
      generator: a random key, or one for each draw [b].
      check_nan: raise ValueError where a value is NaN; it must then be known, outside of jit.
      seed, offset: in place of a generator, integers that make a key, or arrays [b] that make one for each draw.
      return_valid: also return which rows had mass.
      backend: "triton", "xla", "interpret", or None: Triton on an NVIDIA GPU, XLA elsewhere.

    Returns:
      int32 [b]; -1 of a row without mass; with return_valid, (tokens, bool [b]).

    Raises: as `jaxattn.sampling.top_k_top_p_sampling_from_probs`; ValueError without generator and seed, or with both.
    """
    return _draw(
        sampling.top_k_top_p_sampling_from_probs,
        "probs",
        probs,
        (
            top_k,
            top_p,
        ),
        dict(backend=backend, filter_apply_order=filter_apply_order),
        indices,
        generator,
        seed,
        offset,
        check_nan,
        return_valid,
    )


@flashinfer_options(backend=None)
def top_k_top_p_sampling_from_logits(
    logits: Array,
    top_k: PerRow,
    top_p: PerRow,
    indices: Array | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: Array | None = None,
    check_nan: bool = False,
    seed: int | Array | None = None,
    offset: int | Array | None = None,
    *,
    backend: str | None = None,
) -> Array:
    """`top_k_top_p_sampling_from_probs` of softmax(logits), which returns no validity."""
    return _draw(
        sampling.top_k_top_p_sampling_from_logits,
        "logits",
        logits,
        (
            top_k,
            top_p,
        ),
        dict(backend=backend, filter_apply_order=filter_apply_order),
        indices,
        generator,
        seed,
        offset,
        check_nan,
        False,
    )


@flashinfer_options(backend=None)
def top_p_renorm_probs(
    probs: Array,
    top_p: PerRow,
    is_deterministic: bool = False,
    *,
    backend: str | None = None,
) -> Array:
    """As `jaxattn.sampling.top_p_renorm_probs`: of the tokens that top_p keeps, divided by their sum."""
    return sampling.top_p_renorm_probs(probs, top_p, backend=backend)


@flashinfer_options(backend=None)
def top_k_renorm_probs(
    probs: Array,
    top_k: PerRow,
    is_deterministic: bool = False,
    *,
    backend: str | None = None,
) -> Array:
    """As `jaxattn.sampling.top_k_renorm_probs`: of the tokens that top_k keeps, divided by their sum."""
    return sampling.top_k_renorm_probs(probs, top_k, backend=backend)


top_p_renorm_prob = top_p_renorm_probs
top_k_renorm_prob = top_k_renorm_probs


def _draw(
    op: Any,
    name: str,
    x: Array,
    limits: Sequence[PerRow],
    how: dict[str, Any],
    indices: Array | None,
    generator: Array | None,
    seed: int | Array | None,
    offset: int | Array | None,
    check_nan: bool,
    return_valid: bool,
) -> Any:
    check_array(name, x)
    if check_nan:
        if isinstance(x, jax.core.Tracer):
            raise NotImplementedError(
                f"check_nan=True must see the values of {name}, which jax.jit hides: check them before, or leave it off"
            )
        if jnp.isnan(x).any():
            raise ValueError(f"{name} must have no NaN, as check_nan=True asks; it has some")
    draws = x.shape[0]
    if indices is not None:
        check_index("indices", indices, "b")
        draws = indices.shape[0]
        limits = [np.asarray(a) if isinstance(a, list | tuple) else a for a in limits]
        x, *limits = (
            jnp.asarray(copied_from_host(a))[indices] if jnp.ndim(a) else a for a in (x, *limits)
        )
    tokens = op(x, *limits, _key(generator, seed, offset, draws), **how)
    return (tokens, tokens >= 0) if return_valid else tokens


def _key(
    generator: Array | None, seed: int | Array | None, offset: int | Array | None, draws: int
) -> Array:
    """The random key, or those of each draw."""
    if (generator is None) == (seed is None):
        raise ValueError(
            "either generator, a random key such as jax.random.key(0), or seed must be given: JAX keeps no state to "
            f"draw from; got {'neither' if seed is None else 'both'}"
        )
    if generator is not None:
        if offset is not None:
            raise ValueError(
                "offset must come with seed, not with a generator: split the key instead"
            )
        return generator
    seeds, offsets = jnp.asarray(seed), jnp.asarray(0 if offset is None else offset)
    for name, given in (("seed", seeds), ("offset", offsets)):
        if given.shape not in ((), (1,), (draws,)):
            raise ValueError(
                f"{name} must be a number or an array [1] or [{draws}]; got shape {list(given.shape)}"
            )
    if not seeds.shape and not offsets.shape:
        return jax.random.fold_in(jax.random.key(seeds), offsets)
    seeds, offsets = (jnp.broadcast_to(given, (draws,)) for given in (seeds, offsets))
    each = jax.vmap(lambda seed, offset: jax.random.fold_in(jax.random.key(seed), offset))(
        seeds, offsets
    )
    # As in FlashInfer, rows of one seed draw apart.
    return jax.vmap(jax.random.fold_in)(each, jnp.arange(draws, dtype=jnp.int32))
