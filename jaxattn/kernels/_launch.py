"""Launches a kernel: one place for names, compiler parameters, aliasing and interpretation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


def launch(
    kernel: Callable[..., None],
    *args: jax.Array,
    name: str,
    grid: tuple[int, ...],
    out_shape: Sequence[tuple[Sequence[int], Any]],
    num_warps: int,
    num_stages: int,
    interpret: bool,
    aliases: Mapping[int, int] | None = None,
) -> tuple[jax.Array, ...]:
    """Runs `kernel(*arg_refs, *out_refs)` on every point of `grid`; the first grid axis varies fastest.

    Each ref is a whole array in device memory: kernels compute the addresses they touch.

    Args:
      kernel: the kernel, statics bound.
      *args: its inputs.
      name: how profiles and dumps call it.
      grid: at most three axes.
      out_shape: (shape, dtype) of each output.
      num_warps: warps a program.
      num_stages: depth of software pipelining of loads in loops.
      interpret: run it as plain JAX on any platform.
      aliases: input index -> output index that shares its buffer (in place where the input is donated).

    Returns:
      The outputs, a tuple.
    """
    # Under shard_map an output varies over every mesh axis that an input varies over.
    varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in args))
    axes = jax.sharding.ManualAxisType(varying=varying)
    outputs = [
        jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes) for shape, dtype in out_shape
    ]
    return pl.pallas_call(
        kernel,
        out_shape=outputs,
        grid=grid,
        input_output_aliases=dict(aliases or {}),
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=interpret,
        name=name,
    )(*args)
