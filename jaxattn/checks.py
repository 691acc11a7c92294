"""Argument checks with errors that say what must hold, what came, and what to do."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FLOAT_DTYPES = ("float16", "bfloat16", "float32")


def check_array(name: str, x: Any, dtype: str = "") -> None:
    """Raises TypeError unless `x` is an array, of JAX or NumPy; `dtype` completes the advice.

    Raises ValueError where axes of an explicit mesh partition it: JAX has no rule by which to partition a kernel.
    """
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        how = f"jnp.asarray({name}{', ' + dtype if dtype else ''})"
        raise TypeError(f"{name} must be an array; got {type(x).__name__}: use {how}")
    spec = jax.typeof(x).sharding.spec if isinstance(x, jax.Array) else ()
    if any(axes is not None for axes in spec):
        raise ValueError(
            f"{name} must not be partitioned by axes of an explicit mesh; got {jax.typeof(x)}: call the op, and the "
            "plan, in jax.shard_map over these axes, with the heads and the requests of one device"
        )


def check_shape(
    name: str, x: Any, expected: Sequence[int | str], sizes: Mapping[str, int] | None = None
) -> None:
    """Raises unless `x` is an array of the expected shape; a string in it is a free, named axis."""
    check_array(name, x)
    shape = tuple(x.shape)
    fits = len(shape) == len(expected) and all(
        isinstance(want, str) or want == got for want, got in zip(expected, shape, strict=True)
    )
    if not fits:
        must = "[" + ", ".join(map(str, expected)) + "]"
        where = "".join(f", {axis}={size}" for axis, size in (sizes or {}).items())
        raise ValueError(f"{name} must have shape {must}{where}; got {list(shape)}")


def check_float(name: str, x: jax.Array, dtypes: Sequence[str] = FLOAT_DTYPES) -> None:
    """Raises TypeError unless `x` is an array of one of the dtypes: by default float16, bfloat16 or float32."""
    check_array(name, x)
    if x.dtype.name not in dtypes:
        raise TypeError(f"{name} must be one of {', '.join(dtypes)}; got {x.dtype.name}")


def check_same_dtype(**arrays: Any) -> None:
    """Raises TypeError unless all arrays have one dtype."""
    if len({jnp.dtype(x.dtype) for x in arrays.values()}) > 1:
        came = ", ".join(f"{name} is {jnp.dtype(x.dtype).name}" for name, x in arrays.items())
        raise TypeError(
            f"{' and '.join(arrays)} must have the same dtype; {came}: cast one of them"
        )


def check_index(name: str, x: Any, num_elements: int | str) -> None:
    """Raises unless `x` is an int32 vector of `num_elements` (a string: any number)."""
    check_array(name, x, "jnp.int32")
    check_shape(name, x, (num_elements,))
    check_int32(name, x)


def check_int32(name: str, x: Any) -> None:
    """Raises TypeError unless `x` is int32."""
    if x.dtype != jnp.int32:
        int32 = "np.int32" if isinstance(x, np.ndarray) else "jnp.int32"
        raise TypeError(f"{name} must be int32; got {x.dtype.name}: use {name}.astype({int32})")


def copied_from_host(x: Any) -> Any:
    """`x`, copied to the device where it is NumPy's.

    `jnp.asarray`, `jnp.array` and calls of jitted functions may read NumPy's memory after they have
    returned: whoever refills a buffer for the next step would change this one. And `jnp.asarray`
    compiles a program for each length, which `device_put` does not.
    """
    return jax.device_put(x.copy()) if isinstance(x, np.ndarray) else x


def check_host_indptr(name: str, indptr: Any) -> None:
    """Raises ValueError for an indptr on the host (NumPy) that does not start at 0 or decreases."""
    if not isinstance(indptr, np.ndarray):
        return
    if indptr[:1].any() or (indptr[1:] < indptr[:-1]).any():
        raise ValueError(f"{name} must start at 0 and not decrease; got {indptr}")


def check_host_page_table(
    indptr: Any,
    indices: Any,
    last_page_len: Any,
    page_size: int,
    num_pages: int | None = None,
    *,
    prefix: str = "kv_",
) -> None:
    """Raises ValueError for a page table that cannot be, as far as its arrays are on the host.

    Arrays on a device are not read, and what depends on them is not checked.

    Args:
      indptr, indices, last_page_len: int32 [b + 1], [any] and [b], in CSR form; NumPy arrays are
        checked, anything else is not.
      page_size: tokens a page.
      num_pages: pages of the cache, where it is known: page ids must be less.
      prefix: of the arrays' names in errors.

    Raises:
      ValueError: indptr does not start at 0, decreases, or owns more entries than indices has; the
        last page of a request holds less than one token or more than page_size; a request without
        pages has tokens; a page id that a request owns is not in the cache.
    """
    check_host_indptr(f"{prefix}indptr", indptr)
    name = f"{prefix}last_page_len"
    if isinstance(last_page_len, np.ndarray):
        least: Any = 0
        if isinstance(indptr, np.ndarray):
            owns = indptr[1:] > indptr[:-1]
            least = owns.astype(np.int32)
            for i in np.flatnonzero(~owns & (last_page_len != 0))[:1]:
                raise ValueError(
                    f"{name}[{i}] must be 0, as request {i} has no pages; got {last_page_len[i]}"
                )
        for i in np.flatnonzero((last_page_len < least) | (last_page_len > page_size))[:1]:
            raise ValueError(
                f"{name}[{i}] must be from 1 to {page_size=}, or 0 without pages; got "
                f"{last_page_len[i]}: it is (kv_len - 1) % page_size + 1"
            )
    if not (isinstance(indptr, np.ndarray) and isinstance(indices, np.ndarray)):
        return
    name, owned = f"{prefix}indices", indices[: indptr[-1]]
    if indptr[-1] > len(indices):
        raise ValueError(
            f"{name} must have {prefix}indptr[-1]={indptr[-1]} elements; got {len(indices)}"
        )
    most = np.iinfo(np.int32).max if num_pages is None else num_pages - 1
    for i in np.flatnonzero((owned < 0) | (owned > most))[:1]:
        ids = (
            "at least 0"
            if num_pages is None
            else f"from 0 to {most}, as the cache has {num_pages=}"
        )
        raise ValueError(f"{name}[{i}] must be a page id, {ids}; got {owned[i]}")


def check_host_lengths(name: str, lengths: np.ndarray, most: int, why: str) -> None:
    """Raises ValueError unless lengths on the host are in [0, most]."""
    wrong = np.flatnonzero((lengths < 0) | (lengths > most))
    if wrong.size:
        i = int(wrong[0])
        raise ValueError(
            f"{name} must be in [0, {most}] ({why} tokens); got {name}[{i}]={lengths[i]}"
        )


def integer(name: str, value: int, least: int = 1) -> int:
    """An integer that is known at trace time, NumPy's or an array's say, as an int.

    Raises:
      ValueError: it is none, or below `least`.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__") or int(value) < least:
        what = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ValueError(f"{name} must be {what}; got {value!r}")
    return int(value)


def check_positive(**values: int) -> None:
    """Raises ValueError unless every value is a positive integer known at trace time."""
    for name, value in values.items():
        integer(name, value)


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_heads(num_qo_heads: int, num_kv_heads: int) -> None:
    """Raises ValueError unless num_kv_heads divides num_qo_heads (grouped-query attention)."""
    check_positive(num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads)
    if num_qo_heads % num_kv_heads:
        raise ValueError(
            f"num_qo_heads must be a multiple of num_kv_heads; got {num_qo_heads=}, {num_kv_heads=}"
        )


def check_scale(scale: float | None, head_dim: int, name: str = "sm_scale") -> float:
    """The softmax scale as a float: 1 / sqrt(head_dim) for None."""
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, jax.core.Tracer):
        raise TypeError(f"{name} must be a Python float, known when the function is traced")
    if not 0 < float(scale) < float("inf"):
        raise ValueError(f"{name} must be positive and finite; got {scale}")
    return float(scale)


def check_rotary_dim(rotary_dim: int, head_dim: int) -> None:
    """Raises ValueError unless rotary_dim is even, and at most head_dim."""
    check_positive(rotary_dim=rotary_dim)
    if rotary_dim % 2 or rotary_dim > head_dim:
        raise ValueError(
            f"rotary_dim must be even and at most head_dim; got {rotary_dim=}, {head_dim=}"
        )


def check_cos_sin_cache(cos_sin_cache: jax.Array, head_dim: int) -> None:
    """Raises ValueError unless it is float32 [max_position, rotary_dim] that fits the heads."""
    check_shape("cos_sin_cache", cos_sin_cache, ("max_position", "rotary_dim"))
    check_rotary_dim(cos_sin_cache.shape[1], head_dim)
    if cos_sin_cache.dtype != jnp.float32:
        raise ValueError(f"cos_sin_cache must be float32; got {cos_sin_cache.dtype}")


def check_norm_weight(name: str, weight: jax.Array, size: int, input: jax.Array) -> None:
    """Raises unless `weight` is [size], of the input's dtype or float32."""
    check_shape(name, weight, (size,))
    if weight.dtype not in (input.dtype, jnp.float32):
        raise TypeError(f"{name} must be {input.dtype} as input or float32; got {weight.dtype}")
