"""The rotary embedding of a kind of layer: base, scaling of the frequencies, and how many dims turn.

A scaling is a frozen value that computes frequencies and reads itself from the entries of a config; `SCALINGS` has them
by transformers' names.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

from jax import Array

from jaxattn.models.entries import POSITIVE, POSITIVE_INT, TEXT, Entries
from jaxattn.reference import rope_frequencies

# Entries that change frequencies, and the value at which they do not.
NEUTRAL = {"partial_rotary_factor": 1.0}


class Scaling(Protocol):
    def __call__(self, rope_theta: float, rotary_dim: int) -> tuple[Array, float]:
        """(frequencies float32 [rotary_dim / 2] in radians a position, the factor of cosines and sines)."""


@dataclasses.dataclass(frozen=True)
class Linear:
    """Position interpolation (Chen et al. 2023): positions, or here frequencies, are divided by `factor`."""

    factor: float

    @classmethod
    def read(cls, entries: Entries) -> "Linear":
        return cls(float(entries.need("factor", POSITIVE)))

    def __call__(self, rope_theta: float, rotary_dim: int) -> tuple[Array, float]:
        return rope_frequencies(rotary_dim, rope_theta, self.factor), 1.0


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Llama 3.1's: long wavelengths are scaled in full, short ones not at all (`precompute_freqs_cis` says which)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    old_context_len: int

    @classmethod
    def read(cls, entries: Entries) -> "Llama3":
        factor = float(entries.need("factor", POSITIVE))
        low, high = (float(entries.need(f"{x}_freq_factor", POSITIVE)) for x in ("low", "high"))
        if low >= high:
            raise ValueError(
                f"low_freq_factor must be less than high_freq_factor; got {low}, {high}"
            )
        old_context_len = entries.need("original_max_position_embeddings", POSITIVE_INT)
        return cls(factor, low, high, old_context_len)

    def __call__(self, rope_theta: float, rotary_dim: int) -> tuple[Array, float]:
        return rope_frequencies(rotary_dim, rope_theta, *dataclasses.astuple(self)), 1.0


SCALINGS: dict[str, Callable[[Entries], Scaling | None]] = {
    "default": lambda entries: None,
    "linear": Linear.read,
    "llama3": Llama3.read,
}


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
    def read(cls, entries: Entries, theta: float, *, needs_type: bool) -> "RopeConfig":
        """From a config's settings of the rotary embedding; `theta` where they have none.

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
        if kind not in SCALINGS:
            raise NotImplementedError(
                f"rope_type={kind!r} is not built; supported: {', '.join(map(repr, SCALINGS))}"
            )
        scaling = SCALINGS[kind](entries)
        entries.refuse_the_rest((), NEUTRAL)
        return cls(theta, scaling)

    def frequencies(self, head_dim: int) -> tuple[Array, float]:
        """(float32 [rotary_dim / 2] in radians a position, the factor of cosines and sines)."""
        dim = self.rotary_dim or head_dim
        if self.scaling is None:
            return rope_frequencies(dim, self.rope_theta, 1.0), 1.0
        return self.scaling(self.rope_theta, dim)
