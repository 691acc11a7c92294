"""Checks of the arguments that the entry points share, FlashInfer's errors included."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.checks import FLOAT_DTYPES
from jaxattn.kv_cache import LAYOUTS


def check_layout(kv_layout: str) -> None:
    if kv_layout not in LAYOUTS:
        raise KeyError(f"kv_layout must be 'NHD' or 'HND'; got {kv_layout!r}")


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


def one_dtype(**dtypes: Any) -> jnp.dtype:
    """The one dtype of q, keys, values and output; the first is q's, and those that are None follow it."""
    q = next(iter(dtypes))
    came = {}
    for name, value in dtypes.items():
        value = dtypes[q] if value is None else value
        try:
            # jnp.dtype(None) is a float.
            came[name] = jnp.dtype("None" if value is None else value)
        except TypeError:
            raise TypeError(
                f"{name} must be a dtype or its name, such as 'bfloat16'; got {value!r}"
            ) from None
        if came[name].name not in FLOAT_DTYPES:
            raise NotImplementedError(
                f"{name}={came[name].name!r} is not built yet: use one of {', '.join(FLOAT_DTYPES)}"
            )
    if len(set(came.values())) > 1:
        listed = ", ".join(f"{name}={dtype.name!r}" for name, dtype in came.items())
        hint = "data_type sets only the kv_data_type: set q_data_type too"
        raise NotImplementedError(
            f"mixed dtypes are not built yet: {listed}. "
            + (hint if "kv_data_type" in came else f"Leave all but {q} out")
        )
    return came[q]
