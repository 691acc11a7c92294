"""The rotary embedding of a kind of layer: base, scaling of the frequencies, and how many dims turn.

A scaling is a frozen value that computes frequencies and reads itself from the entries of a config; `SCALINGS` has them
by transformers' names. The mathematics of those that take more than a line is in `stretched_rope.py`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jax import Array

from jaxattn.checks import check_rotary_dim
from jaxattn.models.entries import (
    AT_LEAST_0,
    BOOL,
    POSITIVE,
    POSITIVE_INT,
    POSITIVES,
    TEXT,
    Entries,
)
from jaxattn.models.stretched_rope import (
    check_longrope_factors,
    longrope_frequencies,
    yarn_frequencies,
)
from jaxattn.reference import rope_frequencies

# Entries that change frequencies, and the value at which they do not.
NEUTRAL = {"partial_rotary_factor": 1.0}

Frequencies = tuple[Array | np.ndarray, float]


class Lengths(NamedTuple):
    """What a config says of its model's contexts beside the settings of its rotary embedding."""

    longest: int  # max_position_embeddings
    original: int | None = None  # an original_max_position_embeddings that holds for the settings

    def read_original(self, entries: Entries) -> int:
        """The length of context before it was stretched; transformers takes the longest where nothing says it.

        Raises:
          ValueError: the settings have another than the config.
        """
        name = "original_max_position_embeddings"
        inside = entries.get(name, POSITIVE_INT, self.original)
        if self.original not in (None, inside):
            raise ValueError(
                f"{name} in config.json, or its default there, and in its settings of the rotary embedding must be "
                f"the same; got {self.original} and {inside}"
            )
        return inside or self.longest


class Scaling:
    """A frozen value."""

    def __call__(self, rope_theta: float, rotary_dim: int, max_context: int) -> Frequencies:
        """(frequencies float32 [rotary_dim / 2] in radians a position, the factor of cosines and sines)."""
        raise NotImplementedError

    def is_stretched(self, max_context: int) -> bool:
        """Whether contexts of so many tokens have other frequencies than short ones."""
        return False

    def check(self, rotary_dim: int) -> None:
        """Raises ValueError unless it is for so many dims."""


@dataclasses.dataclass(frozen=True)
class Linear(Scaling):
    """Position interpolation (Chen et al. 2023): positions, or here frequencies, are divided by `factor`."""

    factor: float

    @classmethod
    def read(cls, entries: Entries, lengths: Lengths) -> "Linear":
        return cls(float(entries.need("factor", POSITIVE)))

    def __call__(self, rope_theta: float, rotary_dim: int, max_context: int) -> Frequencies:
        return rope_frequencies(rotary_dim, rope_theta, self.factor), 1.0


@dataclasses.dataclass(frozen=True)
class Llama3(Scaling):
    """Llama 3.1's: long wavelengths are scaled in full, short ones not at all (`precompute_freqs_cis` says which)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    old_context_len: int

    @classmethod
    def read(cls, entries: Entries, lengths: Lengths) -> "Llama3":
        factor = float(entries.need("factor", POSITIVE))
        low, high = (float(entries.need(f"{x}_freq_factor", POSITIVE)) for x in ("low", "high"))
        if low >= high:
            raise ValueError(
                f"low_freq_factor must be less than high_freq_factor; got {low}, {high}"
            )
        old_context_len = entries.need("original_max_position_embeddings", POSITIVE_INT)
        return cls(factor, low, high, old_context_len)

    def __call__(self, rope_theta: float, rotary_dim: int, max_context: int) -> Frequencies:
        return rope_frequencies(rotary_dim, rope_theta, *dataclasses.astuple(self)), 1.0


@dataclasses.dataclass(frozen=True)
class Yarn(Scaling):
    """YaRN's; the attributes are arguments of `yarn_frequencies`.

    Raises:
      ValueError: frequencies that turn beta_slow times would be faster than those that turn beta_fast times.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"beta_fast must be at least beta_slow; got {self.beta_fast} and {self.beta_slow}"
            )

    @classmethod
    def read(cls, entries: Entries, lengths: Lengths) -> "Yarn":
        return cls(
            float(entries.need("factor", POSITIVE)),
            lengths.read_original(entries),
            # transformers takes its own where these are 0.
            float(entries.get("beta_fast", AT_LEAST_0) or 32),
            float(entries.get("beta_slow", AT_LEAST_0) or 1),
            entries.get("truncate", BOOL, True),
            entries.get("mscale", AT_LEAST_0),
            entries.get("mscale_all_dim", AT_LEAST_0),
            entries.get("attention_factor", POSITIVE),
        )

    def __call__(self, rope_theta: float, rotary_dim: int, max_context: int) -> Frequencies:
        return yarn_frequencies(rotary_dim, rope_theta, **dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class LongRope(Scaling):
    """LongRoPE's; the attributes are arguments of `longrope_frequencies`."""

    factor: float
    original_max_position_embeddings: int
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention_factor: float | None = None

    @classmethod
    def read(cls, entries: Entries, lengths: Lengths) -> "LongRope":
        original = lengths.read_original(entries)
        return cls(
            float(entries.get("factor", POSITIVE, lengths.longest / original)),
            original,
            tuple(map(float, entries.need("short_factor", POSITIVES))),
            tuple(map(float, entries.need("long_factor", POSITIVES))),
            entries.get("attention_factor", POSITIVE),
        )

    def __call__(self, rope_theta: float, rotary_dim: int, max_context: int) -> Frequencies:
        given = dataclasses.asdict(self)
        return longrope_frequencies(rotary_dim, rope_theta, **given, max_context=max_context)

    def is_stretched(self, max_context: int) -> bool:
        return max_context > self.original_max_position_embeddings

    def check(self, rotary_dim: int) -> None:
        check_longrope_factors(rotary_dim, self.short_factor, self.long_factor)


SCALINGS: dict[str, Callable[[Entries, Lengths], Scaling | None]] = {
    "default": lambda entries, lengths: None,
    "linear": Linear.read,
    "llama3": Llama3.read,
    "yarn": Yarn.read,
    "longrope": LongRope.read,
}
ALL_SCALINGS = {name: name for name in SCALINGS}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """The rotary embedding of some layers.

    Attributes:
      rope_theta: base of the frequencies.
      scaling: of the frequencies; None: `rope_theta^(-2 i / rotary_dim)` as they are.
      rotary_dim: dims of a head that turn, the first ones; None: all.
    """

    rope_theta: float = 10000.0
    scaling: Scaling | None = None
    rotary_dim: int | None = None

    @classmethod
    def read(
        cls,
        entries: Entries,
        theta: float,
        lengths: Lengths,
        *,
        needs_type: bool,
        head_dim: int,
        part: float | None = None,
        scalings: Mapping[str, str] = ALL_SCALINGS,
    ) -> "RopeConfig":
        """From a config's settings of the rotary embedding.

        Args:
          entries: the settings.
          theta: the base where they have none.
          lengths: of contexts.
          needs_type: they must say which scaling they mean.
          head_dim: dims of a head.
          part: of a head that turns, where the settings do not say it; None: all of it, whatever they say.
          scalings: names that rope_type may have, and what `SCALINGS` calls them.

        Raises:
          ValueError: an entry that is missing, of another type, or at odds with another.
          NotImplementedError: a scaling, or another entry, that is not understood.
        """
        theta = float(entries.get("rope_theta", POSITIVE, theta))
        kind, older = entries.get("rope_type", TEXT), entries.get("type", TEXT)
        if kind and older and kind != older:
            raise ValueError(
                f"rope_type and the older type must be the same; got {kind!r}, {older!r}"
            )
        kind = kind or older
        if kind is None:
            kind = entries.need("rope_type", TEXT) if needs_type else "default"
        if kind not in scalings:
            raise NotImplementedError(
                f"rope_type={kind!r} is not built; supported: {', '.join(map(repr, scalings))}"
            )
        scaling = SCALINGS[scalings[kind]](entries, lengths)
        rotary_dim = head_dim
        if part is not None:
            rotary_dim = int(head_dim * entries.get("partial_rotary_factor", POSITIVE, part))
            check_rotary_dim(rotary_dim, head_dim)
        entries.refuse_the_rest((), NEUTRAL)
        return cls(theta, scaling, None if rotary_dim == head_dim else rotary_dim)

    def check(self, head_dim: int) -> None:
        """Raises ValueError unless heads of so many dims can turn by it."""
        rotary_dim = self.rotary_dim or head_dim
        check_rotary_dim(rotary_dim, head_dim)
        if self.scaling is not None:
            self.scaling.check(rotary_dim)

    def frequencies(self, head_dim: int, max_context: int) -> Frequencies:
        """(float32 [rotary_dim / 2] in radians a position, the factor of cosines and sines).

        max_context: tokens of the longest context that they will serve.
        """
        dim = self.rotary_dim or head_dim
        if self.scaling is None:
            return rope_frequencies(dim, self.rope_theta, 1.0), 1.0
        return self.scaling(self.rope_theta, dim, max_context)

    def is_stretched(self, max_context: int) -> bool:
        """Whether contexts of so many tokens have other frequencies than short ones."""
        return self.scaling is not None and self.scaling.is_stretched(max_context)
