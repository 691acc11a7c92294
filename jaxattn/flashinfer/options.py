"""What an option of FlashInfer's means here, and the values that all entry points share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.checks import FLOAT_DTYPES, check_choice
from jaxattn.kv_cache import LAYOUTS

# What leaves an option off, where None does not (or not alone).
OFF: dict[str, Any] = {
    "window_left": -1,
    "window_right": 0,
    "logits_soft_cap": 0,
    "token_pos_in_items_len": 0,
    "q_len_per_req": 1,
    "o_scale": 1,
    "lse_layout": "NH",
}


def refuse(**options: Any) -> None:
    """Raises NotImplementedError, naming the first option that is not off."""
    for name, value in options.items():
        plain = isinstance(value, bool | int | float | str)
        if value is None or value is False or plain and value == OFF.get(name):
            continue
        shown = repr(value) if plain else type(value).__name__
        raise NotImplementedError(f"{name}={shown} is not built yet: leave {name} at its default")


def refuse_outputs(**outputs: Any) -> None:
    for name, value in outputs.items():
        if value is not None:
            raise NotImplementedError(
                f"{name} cannot be written, as JAX arrays are immutable: use what run returns, "
                "and to reuse memory donate buffers to the jit-compiled function around it"
            )


def check_layout(kv_layout: str) -> None:
    if kv_layout not in LAYOUTS:
        raise KeyError(f"kv_layout must be 'NHD' or 'HND'; got {kv_layout!r}")


def check_pos_encoding(mode: str) -> None:
    if mode not in ("NONE", "ROPE_LLAMA", "ALIBI"):
        raise KeyError(f"pos_encoding_mode must be 'NONE', 'ROPE_LLAMA' or 'ALIBI'; got {mode!r}")
    if mode != "NONE":
        raise NotImplementedError(
            f"pos_encoding_mode={mode!r} is not built yet: "
            "rotate q and k with apply_rope, and append k rotated"
        )


def check_backend(backend: str) -> None:
    if backend not in ("auto", "fa2"):
        raise NotImplementedError(
            f"{backend=} is not built: one FlashAttention-2 kernel serves all cases; "
            "use 'auto' or 'fa2'"
        )


def check_lse_base(lse_base: str) -> str:
    check_choice("lse_base", lse_base, ("log2", "ln"))
    return lse_base


def check_scalar(name: str, x: Any) -> Any:
    if np.shape(x) != ():
        raise ValueError(f"{name} must be a number or an array of shape []; got {np.shape(x)}")
    return x


def fold_scales(sm_scale: float, **scales: float | None) -> float:
    """sm_scale times the scales of q and k, which are part of the compiled program."""
    for name, scale in scales.items():
        if isinstance(scale, jax.Array):
            raise TypeError(f"{name} must be a Python number, known at compile time; got an array")
        sm_scale *= 1.0 if scale is None else float(scale)
    return sm_scale


def one_dtype(q: Any, kv: Any, o: Any) -> jnp.dtype:
    """The one dtype of q, keys, values and output."""
    names = {"q_data_type": q, "kv_data_type": q if kv is None else kv}
    names["o_data_type"] = q if o is None else o
    dtypes = {}
    for name, value in names.items():
        try:
            # jnp.dtype(None) is a float.
            dtypes[name] = jnp.dtype("None" if value is None else value)
        except TypeError:
            raise TypeError(
                f"{name} must be a dtype or its name, such as 'bfloat16'; got {value!r}"
            ) from None
        if dtypes[name].name not in FLOAT_DTYPES:
            raise NotImplementedError(
                f"{name}={dtypes[name].name!r} is not built yet: "
                f"use one of {', '.join(FLOAT_DTYPES)}"
            )
    if len(set(dtypes.values())) > 1:
        came = ", ".join(f"{name}={dtype.name!r}" for name, dtype in dtypes.items())
        raise NotImplementedError(
            f"mixed dtypes are not built yet: {came}. "
            "data_type sets only the kv_data_type: set q_data_type too"
        )
    return dtypes["q_data_type"]
