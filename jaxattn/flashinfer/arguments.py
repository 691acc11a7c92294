"""Checks of the arguments that the entry points share, FlashInfer's errors included."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.checks import FLOAT_DTYPES
from jaxattn.kv_cache import CACHE_DTYPES, LAYOUTS
from jaxattn.kv_scales import FP8_DTYPES


def check_layout(kv_layout: str) -> None:
    if kv_layout not in LAYOUTS:
        raise KeyError(f"kv_layout must be 'NHD' or 'HND'; got {kv_layout!r}")


def check_scale_of(name: str, x: Any, num_heads: int) -> None:
    """Raises unless x is None, a positive number, or an array: [], or [num_heads] with one element a head."""
    if x is None:
        return
    if np.shape(x) not in ((), (num_heads,)):
        raise ValueError(
            f"{name} must be a number or an array of shape [] or [{num_heads}]; got {np.shape(x)}"
        )
    if not isinstance(x, jax.Array) and not np.all((np.asarray(x) > 0) & np.isfinite(x)):
        raise ValueError(f"{name} must be positive and finite; got {x}")


def q_and_kv_dtype(**dtypes: Any) -> tuple[jnp.dtype, jnp.dtype]:
    """The dtypes of q and of keys and values; the first is q's, and those that are None follow it.

    Raises:
      NotImplementedError: keys and values in another 16 or 32-bit dtype than q.
    """
    (q_name, q_value), (kv_name, kv_value) = dtypes.items()
    q = float_dtype(q_name, q_value)
    kv = q if kv_value is None else float_dtype(kv_name, kv_value, CACHE_DTYPES)
    if kv != q and kv.name not in FP8_DTYPES:
        raise NotImplementedError(
            f"mixed dtypes of q and the cache are not built yet but for a float8 cache: {q_name}={q.name!r}, "
            f"{kv_name}={kv.name!r}. data_type sets only the kv_data_type: set q_data_type too"
        )
    return q, kv


def float_dtype(name: str, value: Any, dtypes: Sequence[str] = FLOAT_DTYPES) -> jnp.dtype:
    """The dtype that is asked for, if it is one of these."""
    try:
        # jnp.dtype(None) is a float.
        dtype = jnp.dtype("None" if value is None else value)
    except TypeError:
        raise TypeError(
            f"{name} must be a dtype or its name, such as 'bfloat16'; got {value!r}"
        ) from None
    if dtype.name not in dtypes:
        raise NotImplementedError(
            f"{name}={dtype.name!r} is not built yet: use one of {', '.join(dtypes)}"
        )
    return dtype


def check_as_constructed(constructed: Mapping[str, Any], planned: Mapping[str, Any]) -> None:
    """Raises ValueError where a plan asks for what its wrapper was not constructed with; None asks for nothing."""
    for name, want in constructed.items():
        got = planned[name]
        if got is not None and "data_type" in name:
            got = float_dtype(name, got, CACHE_DTYPES)
        if got is not None and got != want:
            raise ValueError(
                f"{name} must be {want}, as the wrapper was constructed with; got {got}: construct "
                "another wrapper"
            )
