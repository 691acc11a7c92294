"""Launches a kernel: one place for names, compiler parameters, aliasing and interpretation."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

Out = jax.ShapeDtypeStruct  # an output's shape and dtype


def like(x: Any) -> Any:
    """Outputs that are shaped and typed as arrays are."""
    return jax.tree.map(lambda a: Out(a.shape, a.dtype), x)


def launch(
    kernel: Callable[..., None],
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    *,
    name: str,
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    interpret: bool,
    aliases: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Runs `kernel` on every point of `grid`; the first grid axis varies fastest.

    The kernel gets a ref for each input and each output, by keyword. Each ref is a whole array in device memory:
    kernels compute the addresses they touch.

    Args:
      kernel: the kernel, statics bound.
      inputs: arrays, or pytrees of them, by the name that the kernel gives them; None stays None.
      outputs: `Out`s, or pytrees of them, likewise.
      name: how profiles and dumps call it.
      grid: at most three axes.
      num_warps: warps a program.
      num_stages: depth of software pipelining of loads in loops.
      interpret: run it as plain JAX on any platform.
      aliases: input -> output that shares its buffers (in place where the input is donated).

    Returns:
      The outputs, by name.
    """
    args, arg_tree = jax.tree.flatten(list(inputs.values()))
    outs, out_tree = jax.tree.flatten(list(outputs.values()))
    # Under shard_map an output varies over every mesh axis that an input varies over.
    varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in args))
    axes = jax.sharding.ManualAxisType(varying=varying)

    if not interpret:
        for x in (*args, *outs):
            _check_addressable(x)

    def body(*refs: Any) -> None:
        given = jax.tree.unflatten(arg_tree, refs[: len(args)])
        made = jax.tree.unflatten(out_tree, refs[len(args) :])
        kernel(**dict(zip(inputs, given)), **dict(zip(outputs, made)))

    source, target = _leaf_numbers(inputs), _leaf_numbers(outputs)
    results = pl.pallas_call(
        body,
        out_shape=[Out(x.shape, x.dtype, manual_axis_type=axes) for x in outs],
        grid=grid,
        input_output_aliases={
            i: o
            for a, b in (aliases or {}).items()
            for i, o in zip(source[a], target[b], strict=True)
        },
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=interpret,
        name=name,
    )(*args)
    return dict(zip(outputs, jax.tree.unflatten(out_tree, results)))


def _check_addressable(x: Any) -> None:
    """The lowering counts elements in an int32 up to 2^32 bytes: those of 8 bits beyond 2^31 would be negative."""
    if x.dtype.itemsize == 1 and 2**31 < x.size <= 2**32:
        raise NotImplementedError(
            f"an array of {x.dtype} must have at most 2^31 elements, or more than 2^32, which JAX's Triton lowering "
            f"then counts in 64 bits; got {list(x.shape)}, {x.size}: use fewer or more pages, or backend='xla'"
        )


def _leaf_numbers(values: Mapping[str, Any]) -> dict[str, range]:
    """Which of the flattened leaves each of the named pytrees has."""
    end, found = 0, {}
    for name, value in values.items():
        begin, end = end, end + len(jax.tree.leaves(value))
        found[name] = range(begin, end)
    return found
