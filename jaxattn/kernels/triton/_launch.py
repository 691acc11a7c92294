"""Launches a kernel: one place for names, compiler parameters, aliasing and interpretation."""

import dataclasses
import functools
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
    kernel: functools.partial[None],
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    *,
    name: str,
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    interpret: bool,
    aliases: Mapping[str, str] | None = None,
    shared: bool = True,
) -> dict[str, Any]:
    """Runs `kernel` on every point of `grid`; the first grid axis varies fastest.

    The kernel gets a ref for each input and each output, by keyword. Each ref is a whole array in device memory:
    kernels compute the addresses they touch.

    A program that launches the same again and again, in each of its layers say, holds it once; and outside a program it
    is compiled once.

    Args:
      kernel: a `functools.partial` of a function that a module defines, with what it is compiled for as keyword
        arguments, which are hashable.
      inputs: arrays, or pytrees of them, by the name that the kernel gives them; None stays None.
      outputs: `Out`s, or pytrees of them, likewise.
      name: how profiles and dumps call it.
      grid: at most three axes.
      num_warps: warps a program.
      num_stages: depth of software pipelining of loads in loops.
      interpret: run it as plain JAX on any platform.
      aliases: input -> output that shares its buffers (in place where the input is donated).
      shared: False where kernel or inputs hold a function that was made for this call: the cache that launches share
        would keep the arrays it refers to, and would not see that what it reads has changed.

    Returns:
      The outputs, by name.
    """
    assert not kernel.args, "what is static goes by keyword"
    args, arg_tree = jax.tree.flatten(list(inputs.values()))
    outs, out_tree = jax.tree.flatten(list(outputs.values()))
    if not interpret:
        for x in (*args, *outs):
            _check_addressable(x)
    source, target = _leaf_numbers(inputs), _leaf_numbers(outputs)
    call = _Call(
        kernel.func,
        tuple(kernel.keywords.items()),
        tuple(inputs),
        arg_tree,
        tuple(outputs),
        tuple(outs),
        out_tree,
        name,
        grid,
        num_warps,
        num_stages,
        interpret,
        tuple(
            pair
            for a, b in (aliases or {}).items()
            for pair in zip(source[a], target[b], strict=True)
        ),
    )
    results = (_run_shared if shared else _run)(args, call)
    return dict(zip(outputs, jax.tree.unflatten(out_tree, results)))


@dataclasses.dataclass(frozen=True)
class _Call:
    """What of a launch is static."""

    kernel: Callable[..., None]
    statics: tuple[tuple[str, Any], ...]
    inputs: tuple[str, ...]
    arg_tree: Any
    outputs: tuple[str, ...]
    outs: tuple[Out, ...]
    out_tree: Any
    name: str
    grid: tuple[int, ...]
    num_warps: int
    num_stages: int
    interpret: bool
    aliases: tuple[tuple[int, int], ...]  # leaves of the inputs, and of the outputs


def _run(args: list[jax.Array], call: _Call) -> list[jax.Array]:
    # Under shard_map an output varies over every mesh axis that an input varies over.
    varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in args))
    axes = jax.sharding.ManualAxisType(varying=varying)

    def body(*refs: Any) -> None:
        given = jax.tree.unflatten(call.arg_tree, refs[: len(args)])
        made = jax.tree.unflatten(call.out_tree, refs[len(args) :])
        named = dict(zip(call.inputs, given)) | dict(zip(call.outputs, made))
        call.kernel(**named, **dict(call.statics))

    return pl.pallas_call(
        body,
        out_shape=[Out(x.shape, x.dtype, manual_axis_type=axes) for x in call.outs],
        grid=call.grid,
        input_output_aliases=dict(call.aliases),
        compiler_params=plgpu.CompilerParams(num_warps=call.num_warps, num_stages=call.num_stages),
        interpret=call.interpret,
        name=call.name,
    )(*args)


_run_shared = jax.jit(_run, static_argnames="call")


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
