"""What the Hopper lowering serves. What it does not, Triton does."""

import jax
import jax.numpy as jnp

from jaxattn.device import has_wgmma
from jaxattn.kernels.mosaic._in_line import pays
from jaxattn.kv_scales import FP8_DTYPES
from jaxattn.plan import MAX_ROWS, AttentionPlan

HEAD_DIMS = (64, 128, 256)
# At 256 the computing warpgroups need the registers that a fourth one would take.
NARROW_HEAD_DIMS = (64, 128)


def why_not() -> str | None:
    """Why nothing runs here: the device, or JAX's version; None: it does."""
    if not has_wgmma():
        return "it needs an NVIDIA GPU of compute capability 9 (H100, H200)"
    version = jax.__version_info__[:2]
    if version != (0, 11):
        # JAX 0.12.0 assembles through libnvJitLink, which ignores setmaxnreg (C7504): every thread has 168 registers,
        # and with 480 bytes of spills every product waits for the one before (C7512).
        return (
            f"it runs at its speed with JAX 0.11 alone; this is {jax.__version__}, which lacks what it needs or "
            "compiles it without registers for each warpgroup"
        )
    return None


def why_not_attention(
    q: jax.Array,
    values: jax.Array,
    plan: AttentionPlan,
    *,
    score_mods: bool,
    out_dtype: jax.typing.DTypeLike,
) -> str | None:
    """Why this attention does not run here, None: it does.

    values: V, or the array that holds it; score_mods: whether there are any.
    """
    if (reason := why_not()) is not None:
        return reason
    d = q.shape[-1]
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        return f"it takes float16 and bfloat16; q is {q.dtype}"
    narrow = values.dtype.name in FP8_DTYPES
    if values.dtype != q.dtype and not narrow:
        return f"it takes keys and values of q's dtype, {q.dtype}, or of float8; got {values.dtype}"
    if d not in HEAD_DIMS or values.shape[-1] != d:
        return f"it takes head_dim {HEAD_DIMS}, the same for V; got {d} and {values.shape[-1]}"
    if narrow and d not in NARROW_HEAD_DIMS and not pays(values, plan):
        return (
            f"over keys and values of 8 bits it takes head_dim {NARROW_HEAD_DIMS}, and others only where prompts are "
            f"so long, and the page table has so little room beside them, that all keys are converted first; got {d}"
        )
    if out_dtype != q.dtype:
        return f"it writes q's dtype, {q.dtype}; out_dtype is {out_dtype}"
    if score_mods:
        return "it has no alibi_slopes and score_mod"
    if plan.mask is not None or plan.limits is not None:
        return "it has no masks and bidirectional_spans"
    if plan.block_rows != MAX_ROWS:
        return (
            "it computes prefill in tiles of 128 rows (query token x query head of a KV head); this plan's requests "
            "have fewer"
        )
    return None
