"""Checks of the arguments that the entry points share, FlashInfer's errors included."""

from collections.abc import Mapping
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
    """The one dtype of q, keys and values; the first is q's, and those that are None follow it."""
    q = next(iter(dtypes))
    came = {
        name: float_dtype(name, dtypes[q] if value is None else value)
        for name, value in dtypes.items()
    }
    if len(set(came.values())) > 1:
        listed = ", ".join(f"{name}={dtype.name!r}" for name, dtype in came.items())
        raise NotImplementedError(
            f"mixed dtypes of q and the cache are not built yet: {listed}. data_type sets only the "
            "kv_data_type: set q_data_type too"
        )
    return came[q]


def float_dtype(name: str, value: Any) -> jnp.dtype:
    """The dtype that is asked for, if attention has it."""
    try:
        # jnp.dtype(None) is a float.
        dtype = jnp.dtype("None" if value is None else value)
    except TypeError:
        raise TypeError(
            f"{name} must be a dtype or its name, such as 'bfloat16'; got {value!r}"
        ) from None
    if dtype.name not in FLOAT_DTYPES:
        raise NotImplementedError(
            f"{name}={dtype.name!r} is not built yet: use one of {', '.join(FLOAT_DTYPES)}"
        )
    return dtype


def check_as_constructed(constructed: Mapping[str, Any], planned: Mapping[str, Any]) -> None:
    """Raises ValueError where a plan asks for what its wrapper was not constructed with; None asks for nothing."""
    for name, want in constructed.items():
        got = planned[name]
        if got is not None and "data_type" in name:
            got = float_dtype(name, got)
        if got is not None and got != want:
            raise ValueError(
                f"{name} must be {want}, as the wrapper was constructed with; got {got}: construct "
                "another wrapper"
            )
