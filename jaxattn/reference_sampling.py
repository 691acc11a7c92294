"""Plain jnp definitions of the sampling ops: by a sort of the vocabulary, which the kernels do without.

What a key and a mass are is said in `token_mass.py`; kernels and these agree to the bit on probabilities, and on logits
as far as `exp2` does.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jaxattn.token_mass import (
    Limits,
    Mass,
    cleaned,
    digits_of,
    key_of,
    mass_of,
    scale_of,
    share,
    value_of,
    value_with_weight,
    weight_of,
)


def threshold(x: Array, limits: Limits, *, logits: bool, joint: bool) -> Array:
    """int32 [b], the least key that is kept of each row of x [b, vocab]; as `sampling_from_logits` says what is."""
    row = _Row(x, limits, logits)
    vocab = x.shape[1]
    # Without the barrier XLA on a GPU (JAX 0.11.2) reads the sorted keys, in the end, where other numbers lie by then.
    descending = jax.lax.optimization_barrier(jnp.sort(row.key, axis=1)[:, ::-1])
    masses = row.mass(value_of(descending))
    total = Mass(*(part[:, -1:] for part in _running(masses)))
    least = descending[:, -1:]
    if limits.top_k is not None:
        last = jnp.minimum(limits.top_k, vocab)[:, None] - 1
        least = jnp.maximum(least, jnp.take_along_axis(descending, last, axis=1))
    if limits.top_p is not None:
        top_p = limits.top_p[:, None]
        if not joint:
            chosen = descending >= least
            total = _running(Mass(*(jnp.where(chosen, part, 0) for part in masses)))
            total = Mass(*(part[:, -1:] for part in total))
        asked, left_out = share(total, digits_of(jnp.where(top_p < 1, top_p, 0)))
        asked = asked.plus(Mass(jnp.zeros_like(asked.high), left_out.astype(jnp.int32)))
        through = _running(masses)
        before = Mass(*(jnp.pad(part, ((0, 0), (1, 0)))[:, :-1] for part in through))
        needed = before.less_than(asked).at[:, 0].set(True)  # the likeliest always is
        in_nucleus = jnp.where(needed, descending, descending[:, :1]).min(axis=1, keepdims=True)
        least = jnp.where(top_p < 1, jnp.maximum(least, in_nucleus), least)
    if limits.min_p is not None:
        peak_weight = jnp.ones_like(row.peak) if logits else row.peak
        floor = value_with_weight(limits.min_p[:, None] * peak_weight, row.peak, row.rate, logits)
        least = jnp.maximum(least, key_of(floor))
    return least[:, 0]


def sample(x: Array, limits: Limits, digits: Array, *, logits: bool, joint: bool) -> Array:
    """int32 [b], a token drawn of those that are kept; -1 of a row without mass.

    Args:
      digits: int32 [b, 3], the random fraction of the kept mass whose token is taken.
    """
    row = _Row(x, limits, logits)
    kept = row.key >= threshold(x, limits, logits=logits, joint=joint)[:, None]
    running = _running(Mass(*(jnp.where(kept, part, 0) for part in row.mass(row.value))))
    total = Mass(*(part[:, -1:] for part in running))
    drawn, _ = share(total, [digits[:, i : i + 1] for i in range(digits.shape[1])])
    token = jnp.argmax(drawn.less_than(running), axis=1).astype(jnp.int32)
    return jnp.where(((total.high | total.low) > 0)[:, 0], token, -1)


def renormed(probs: Array, limits: Limits) -> Array:
    """probs [b, vocab] of the tokens that are kept, divided by their sum; 0 of the others."""
    kept = (
        key_of(cleaned(probs, False))
        >= threshold(probs, limits, logits=False, joint=False)[:, None]
    )
    weight = jnp.where(kept, cleaned(probs, False), 0)
    total = weight.sum(axis=1, keepdims=True)
    return (weight / jnp.where(total > 0, total, 1)).astype(probs.dtype)


def masked(logits: Array, limits: Limits) -> Array:
    """logits [b, vocab] of the tokens that are kept; -inf of the others."""
    value = cleaned(logits, True)
    kept = key_of(value) >= threshold(logits, limits, logits=True, joint=False)[:, None]
    return jnp.where(kept, value, -jnp.inf).astype(logits.dtype)


class _Row:
    """Rows x [b, vocab] as keys and masses."""

    def __init__(self, x: Array, limits: Limits, logits: bool):
        self.logits = logits
        self.value = cleaned(x, logits)
        self.key = key_of(self.value)
        self.peak = self.value.max(axis=1, keepdims=True)
        self.rate = jnp.ones_like(self.peak) if limits.rate is None else limits.rate[:, None]
        weight = weight_of(self.value, self.peak, self.rate, logits)
        self.scale = scale_of(weight.sum(axis=1, keepdims=True))

    def mass(self, value: Array) -> Mass:
        return mass_of(weight_of(value, self.peak, self.rate, self.logits), self.scale)


def _running(mass: Mass) -> Mass:
    """Sums along a row, carried."""
    return Mass(*(jnp.cumsum(part, axis=1) for part in mass)).carried()
