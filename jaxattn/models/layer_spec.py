"""What tells one layer of a decoder from another."""

import dataclasses

from jaxattn.models.feed_forward import FeedForward
from jaxattn.models.rope_scaling import RopeConfig


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One layer; frozen and hashable, so layers that are alike share what is compiled.

    Attributes:
      feed_forward: what follows attention.
      rope: of its queries and keys.
      window: keys that a token sees, its own included; None: all before it.
    """

    feed_forward: FeedForward
    rope: RopeConfig = RopeConfig()
    window: int | None = None
