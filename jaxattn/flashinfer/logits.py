"""What becomes of the products of queries and keys, as FlashInfer's arguments say it."""

import dataclasses
import math

import numpy as np

from jaxattn.checks import check_positive, check_scale
from jaxattn.spec import check_soft_cap

POS_ENCODING_MODES = ("NONE", "ROPE_LLAMA", "ALIBI")


@dataclasses.dataclass(frozen=True)
class Logits:
    """The logit of a product s: `sm_scale * s`, capped where soft_cap says so, plus ALiBi's bias.

    Each step is taken once, and lse is that of these logits. FlashInfer's kernels scale twice where ALiBi meets a cap,
    and measure ALiBi's distance from a query's index among the new tokens rather than from its position, which shifts
    their lse: neither is copied.
    """

    sm_scale: float
    soft_cap: float | None
    alibi: bool

    @classmethod
    def of(
        cls,
        head_dim: int,
        sm_scale: float | None,
        logits_soft_cap: float | None,
        pos_encoding_mode: str,
    ) -> "Logits":
        """From the arguments of `plan`.

        Raises:
          KeyError: an unknown pos_encoding_mode, as in FlashInfer.
          NotImplementedError: pos_encoding_mode="ROPE_LLAMA".
          ValueError: a scale or head_dim that is not positive, or a negative cap.
        """
        check_positive(head_dim=head_dim)
        if pos_encoding_mode not in POS_ENCODING_MODES:
            raise KeyError(
                f"pos_encoding_mode must be one of {', '.join(map(repr, POS_ENCODING_MODES))}; "
                f"got {pos_encoding_mode!r}"
            )
        if pos_encoding_mode == "ROPE_LLAMA":
            raise NotImplementedError(
                "pos_encoding_mode='ROPE_LLAMA' is not built yet: rotate q and k with apply_rope, "
                "and append k rotated"
            )
        return cls(
            check_scale(sm_scale, head_dim),
            check_soft_cap(logits_soft_cap),
            pos_encoding_mode == "ALIBI",
        )

    def scaled(self, sm_scale: float | None) -> "Logits":
        """With another sm_scale, if given."""
        if sm_scale is None:
            return self
        return dataclasses.replace(self, sm_scale=check_scale(sm_scale, 1))


def alibi_slopes(num_qo_heads: int) -> np.ndarray:
    """ALiBi's slopes, float32 [num_qo_heads] (Press et al. 2022, section 3, and their code for other head counts).

    For n heads, a power of two: 2^(-8/n), its square, and so on. Beyond the largest power of two, every other slope of
    twice as many heads.
    """
    n = 2 ** int(math.log2(num_qo_heads))
    own = -8 * np.arange(1, n + 1) / n
    between = -4 * np.arange(1, 2 * (num_qo_heads - n), 2) / n
    return (2.0 ** np.concatenate([own, between])).astype(np.float32)
