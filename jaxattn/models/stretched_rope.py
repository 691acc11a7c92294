"""Rotary frequencies of models that were trained on short contexts and stretched to long ones.

Each function gives the frequencies, radians a position, and the factor by which cosines and sines are multiplied: both
query and key carry it, so scores grow by its square.
"""

import math
from collections.abc import Sequence

import numpy as np


def yarn_frequencies(
    rotary_dim: int,
    rope_theta: float,
    factor: float,
    original_max_position_embeddings: int,
    *,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    attention_factor: float | None = None,
) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al. 2023): frequencies that turn often within the original context stay, slow ones are divided.

    Frequency i turns `r(i) = L theta^(-2i / rotary_dim) / 2 pi` times within the L original positions. Where
    r > beta_fast it stays, where r < beta_slow it is divided by `factor`, and between the two indices at which r has
    these values it is a mixture, linear in i ("NTK-by-parts", section 3.2).

    Args:
      rotary_dim: dims that rotate, even.
      rope_theta: base of the frequencies, over 1.
      factor: how much longer the context became.
      original_max_position_embeddings: L.
      beta_fast, beta_slow: turns.
      truncate: round the two indices outwards to integers.
      mscale, mscale_all_dim: DeepSeek's: the attention factor is `m(mscale) / m(mscale_all_dim)` where neither is 0 or
        None, with `m(x) = 0.1 x ln(factor) + 1`; else it is `m(1)` (section 3.4, equation 22).
      attention_factor: replaces what follows from the above.

    Returns:
      (float32 [rotary_dim / 2], attention factor).
    """
    index = np.arange(rotary_dim // 2)
    fast = rope_theta ** (-2.0 * index / rotary_dim)

    def index_of(turns: float) -> float:
        wavelengths = math.log(original_max_position_embeddings / (turns * 2 * math.pi))
        return rotary_dim * wavelengths / (2 * math.log(rope_theta))

    begin, end = index_of(beta_fast), index_of(beta_slow)
    if truncate:
        begin, end = math.floor(begin), math.ceil(end)
    begin, end = max(begin, 0), min(end, rotary_dim - 1)
    if begin == end:
        end += 0.001  # a step
    divided = np.clip((index - begin) / (end - begin), 0, 1)
    frequencies = fast * (1 - divided) + fast / factor * divided

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    if attention_factor is None:
        if mscale and mscale_all_dim:
            attention_factor = magnitude(mscale) / magnitude(mscale_all_dim)
        else:
            attention_factor = magnitude(1.0)
    return frequencies.astype(np.float32), float(attention_factor)


def longrope_frequencies(
    rotary_dim: int,
    rope_theta: float,
    short_factor: Sequence[float],
    long_factor: Sequence[float],
    original_max_position_embeddings: int,
    *,
    factor: float,
    max_context: int,
    attention_factor: float | None = None,
) -> tuple[np.ndarray, float]:
    """LongRoPE (Ding et al. 2024): each frequency is divided by a number of its own, found by search.

    There are two sets of numbers: for contexts that the model could read before it was stretched, and for longer
    ones. Keys in a cache are rotated already, so a request must keep the set that it began with: the longest context
    that may be reached decides, once, for all requests that share a table. `transformers` instead decides anew in each
    call by the positions in it; a request that grows past the original length there has keys of both sets in its
    cache. Where all of a context is computed in one call the two rules agree if `max_context` is its length, and they
    agree on every request that stays on one side of the original length.

    Args:
      rotary_dim: dims that rotate, even.
      rope_theta: base of the frequencies.
      short_factor, long_factor: the divisors, rotary_dim / 2 each.
      original_max_position_embeddings: L: contexts of up to L tokens take the short factors.
      factor: how much longer the context became; scales attention.
      max_context: tokens of the longest context that the frequencies will serve.
      attention_factor: replaces `sqrt(1 + ln(factor) / ln(L))` (equation 4).

    Returns:
      (float32 [rotary_dim / 2], attention factor).

    Raises:
      ValueError: there are not rotary_dim / 2 factors.
    """
    check_longrope_factors(rotary_dim, short_factor, long_factor)
    divisors = long_factor if max_context > original_max_position_embeddings else short_factor
    exponents = np.arange(0, rotary_dim, 2) / rotary_dim
    frequencies = 1 / (np.asarray(divisors, np.float64) * rope_theta**exponents)
    if attention_factor is None:
        stretched = math.log(max(factor, 1.0))
        attention_factor = math.sqrt(1 + stretched / math.log(original_max_position_embeddings))
    return frequencies.astype(np.float32), float(attention_factor)


def check_longrope_factors(
    rotary_dim: int, short_factor: Sequence[float], long_factor: Sequence[float]
) -> None:
    """Raises ValueError unless there are rotary_dim / 2 of each."""
    for name, factors in (("short_factor", short_factor), ("long_factor", long_factor)):
        if len(factors) != rotary_dim // 2:
            raise ValueError(
                f"{name} must have rotary_dim / 2 = {rotary_dim // 2} numbers; got {len(factors)}"
            )
