"""The rotary embeddings of a decoder's layers, from the entries of its config.

Transformers 5 has `rope_parameters`, for all layers or for each kind of them; before there were `rope_theta`,
`rope_scaling` and `rope_local_base_freq`.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from jaxattn.models.entries import OBJECT, POSITIVE, POSITIVE_INT, Entries
from jaxattn.models.layer_types import FULL, SLIDING
from jaxattn.models.rope_scaling import ALL_SCALINGS, Lengths, RopeConfig


@dataclasses.dataclass(frozen=True)
class RopeRules:
    """What a family has of its own.

    Attributes:
      theta: base, where no entry says it.
      local_theta: that of the sliding layers, where they have one of their own.
      default: settings where a file has none; None: no scaling.
      scalings: names that a scaling may have, and what `SCALINGS` calls them.
      partial: whether a part of each head may turn.
      original_apart: whether original_max_position_embeddings is an entry beside the settings.
    """

    theta: float = 1e4
    local_theta: float | None = None
    default: Mapping[str, Any] | None = None
    scalings: Mapping[str, str] = dataclasses.field(default_factory=lambda: ALL_SCALINGS)
    partial: bool = False
    original_apart: bool = False


def read_ropes(
    entries: Entries, rules: RopeRules, kinds: Collection[str], head_dim: int
) -> dict[str, RopeConfig]:
    """The rotary embedding of each kind of layer.

    Args:
      entries: of a config.
      rules: of its family.
      kinds: of its layers.
      head_dim: dims of a head.

    Raises:
      ValueError: an entry that is missing, of another type, or at odds with another.
      NotImplementedError: a scaling, or another setting, that is not understood.
    """
    lengths = _lengths(entries, rules)
    thetas = dict.fromkeys((FULL, SLIDING), entries.get("rope_theta", POSITIVE, rules.theta))
    if rules.local_theta is not None:
        thetas[SLIDING] = entries.get("rope_local_base_freq", POSITIVE, rules.local_theta)

    def read(settings: Mapping[str, Any], where: str, kind: str) -> RopeConfig:
        return RopeConfig.read(
            Entries(settings, where),
            thetas[kind],
            lengths,
            needs_type=where == "rope_scaling",
            head_dim=head_dim,
            part=part,
            scalings=rules.scalings,
        )

    part = entries.get("partial_rotary_factor", POSITIVE, 1.0) if rules.partial else None
    given = {
        name: value
        for name in ("rope_parameters", "rope_scaling")
        if (value := entries.get(name, OBJECT))
    }
    if not given:
        default = rules.default if entries.get("rope_parameters", OBJECT) is None else None
        return {kind: read(default or {}, "rope_parameters", kind) for kind in thetas}
    name, raw = next(iter(given.items()))
    if any(other != raw for other in given.values()):
        raise ValueError("rope_parameters and rope_scaling in config.json must not differ")

    if not any(isinstance(value, Mapping) for value in raw.values()):
        if rules.local_theta is not None and name == "rope_parameters":
            raise ValueError(
                f"rope_parameters of this model must be settings of {FULL!r} and of {SLIDING!r}; got {dict(raw)}"
            )
        full = read(raw, name, FULL)
        # A base of their own comes without the scaling.
        own = rules.local_theta is not None
        return {FULL: full, SLIDING: read({}, "rope_parameters", SLIDING) if own else full}

    # Settings for each kind of layer.
    by_kind = Entries(raw, name)
    settings = {kind: by_kind.get(kind, OBJECT) for kind in (FULL, SLIDING)}
    by_kind.refuse_the_rest((), {})
    for kind in sorted(set(kinds)):
        if settings[kind] is None and rules.local_theta is None:
            raise ValueError(
                f"{name} in config.json has no settings for {kind!r}, which some layers are"
            )
    return {kind: read(settings[kind] or {}, f"{name}.{kind}", kind) for kind in sorted(set(kinds))}


def _lengths(entries: Entries, rules: RopeRules) -> Lengths:
    longest = entries.need("max_position_embeddings", POSITIVE_INT)
    if not rules.original_apart:
        return Lengths(longest)
    return Lengths(longest, entries.get("original_max_position_embeddings", POSITIVE_INT))
