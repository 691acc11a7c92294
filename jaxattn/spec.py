"""What attention computes, apart from its data: which keys a query sees, and what is done to a score.

Small frozen values, known when a program is traced. The plan, the kernels and the reference all ask them, so that no
rule stands in two places. Positions are tokens of a request, from 0; `i` is a query's position, `j` a key's.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxattn.checks import check_heads

FAR = 2**29  # beyond all keys
Position = Any  # int, or int32 array


@dataclasses.dataclass(frozen=True)
class Visible:
    """Which keys a query sees: from `window_left` before its own position to `window_right` behind it.

    None: no bound on that side but the request's own keys. A causal mask is `window_right=0`.
    """

    window_left: int | None = None
    window_right: int | None = None

    @classmethod
    def of(
        cls, causal: bool, window_left: int | None = None, window_right: int | None = None
    ) -> "Visible":
        """From the arguments of a plan, in which -1 is None too.

        Raises:
          ValueError: a window that is no integer, or below -1; a causal mask and a window to the right.
          TypeError: a traced window.
        """
        windows = []
        for name, size in (("window_left", window_left), ("window_right", window_right)):
            if isinstance(size, jax.core.Tracer):
                raise TypeError(f"{name} must be a Python integer, known when the plan is traced")
            if size is not None and (isinstance(size, bool) or not hasattr(size, "__index__")):
                raise ValueError(f"{name} must be an integer or None; got {size!r}")
            if size is not None and size < -1:
                raise ValueError(f"{name} must be at least 0, or -1 or None for none; got {size}")
            # A window of FAR keys is as good as none, and sums with positions stay within int32.
            windows.append(None if size is None or size == -1 or size >= FAR else int(size))
        left, right = windows
        if causal and right:
            raise ValueError(
                f"window_right={right} has no effect under a causal mask: set causal=False"
            )
        return cls(left, 0 if causal else right)

    @property
    def width(self) -> int | None:
        """The most keys that a query sees; None: no bound."""
        if self.window_left is None or self.window_right is None:
            return None
        return self.window_left + 1 + self.window_right

    def begin(self, i: Position) -> Position:
        """The first key that a query at position i sees."""
        return 0 if self.window_left is None else jnp.maximum(i - self.window_left, 0)

    def end(self, i: Position, kv_len: Position) -> Position:
        """One past the last key that it sees, of a request of kv_len keys; at least 0."""
        if self.window_right is None:
            return kv_len
        return jnp.clip(i + (self.window_right + 1), 0, kv_len)

    def some(self, first: Position, last: Position, kv_len: Position) -> tuple[Position, Position]:
        """The keys [begin, end) that any of the queries at first .. last sees: what is worth reading."""
        return self.begin(first), self.end(last, kv_len)

    def all(self, first: Position, last: Position, kv_len: Position) -> tuple[Position, Position]:
        """The keys [begin, end) that every one of them sees: where nothing need be masked."""
        return self.begin(last), self.end(first, kv_len)


@dataclasses.dataclass(frozen=True)
class Score:
    """What becomes of a score s = <q, k>: `exponent_scale * Score(s)` is the logit whose exponential is the weight.

    Without a cap the scale stays in the exponent, where it costs nothing. `cap * tanh(sm_scale s / cap)` (Gemma 2)
    needs it before; then the cap takes its place in the exponent.
    """

    sm_scale: float
    soft_cap: float | None = None

    @property
    def exponent_scale(self) -> float:
        return self.soft_cap or self.sm_scale

    def __call__(self, s: Array, tanh: Callable[[Array], Array] = jnp.tanh) -> Array:
        if not self.soft_cap:
            return s
        return tanh(s * (self.sm_scale / self.soft_cap))

    def logit(self, s: Array, tanh: Callable[[Array], Array] = jnp.tanh) -> Array:
        """exponent_scale * self(s)."""
        return self(s, tanh) * self.exponent_scale


def check_soft_cap(logits_soft_cap: float | None) -> float | None:
    """The cap as a float; None for None and 0, which leave scores as they are."""
    if logits_soft_cap is None:
        return None
    if isinstance(logits_soft_cap, jax.core.Tracer):
        raise TypeError("logits_soft_cap must be a Python float, known when the function is traced")
    if not 0 <= float(logits_soft_cap) < math.inf:
        raise ValueError(
            f"logits_soft_cap must be positive and finite, or 0 or None for none; got {logits_soft_cap}"
        )
    return float(logits_soft_cap) or None


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What a plan is made for: the heads, and which keys a query sees.

    Raises:
      ValueError: num_kv_heads does not divide num_qo_heads.
    """

    num_qo_heads: int
    num_kv_heads: int
    visible: Visible = Visible()

    def __post_init__(self) -> None:
        check_heads(self.num_qo_heads, self.num_kv_heads)
        for name in ("num_qo_heads", "num_kv_heads"):
            object.__setattr__(self, name, int(getattr(self, name)))

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_qo_heads // self.num_kv_heads
