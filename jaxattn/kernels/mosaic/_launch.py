"""Launches a Hopper kernel: one place for names, barriers, shared memory and compiler parameters."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxattn.kernels.mosaic import _private


def launch(
    kernel: Callable[..., None],
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    scratch: Mapping[str, Any],
    counters: Mapping[str, Any],
    *,
    name: str,
    num_blocks: int,
    num_warpgroups: int,
) -> dict[str, Any]:
    """Runs `kernel` in num_blocks blocks of num_warpgroups warpgroups, axes "block" and "warpgroup".

    The kernel gets a ref for each input, output, counter and piece of scratch memory, by keyword; None stays None.

    Args:
      kernel: the kernel, statics bound.
      inputs: arrays by name.
      outputs: `jax.ShapeDtypeStruct`s by name.
      scratch: shared memory and barriers by name.
      counters: `jax.ShapeDtypeStruct`s by name, of device memory that holds zeros when the kernel begins.
      name: how profiles and dumps call it.

    Returns:
      The outputs, by name.
    """
    given, made, counting, scratch_types = (
        {name: x for name, x in values.items() if x is not None}
        for values in (inputs, outputs, counters, scratch)
    )
    nothing = dict.fromkeys([*inputs, *outputs, *counters, *scratch])

    def body(*refs: Any) -> None:
        named = dict(zip([*given, *counting, *made], refs))
        pl.run_scoped(
            functools.partial(_named, kernel, {**nothing, **named}),
            collective_axes="warpgroup",
            **scratch_types,
        )

    def stateful(refs: Any) -> None:
        counts, results = refs
        run = pl.kernel(
            body,
            out_type=list(made.values()),
            mesh=plgpu.Mesh(
                grid=(num_blocks,),
                grid_names=("block",),
                num_threads=num_warpgroups,
                thread_name="warpgroup",
                kernel_name=name,
            ),
            compiler_params=plgpu.CompilerParams(
                approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
            ),
            name=name,
        )
        for ref, x in zip(results, run(*given.values(), *counts)):
            ref[...] = x

    def zeros(types: Mapping[str, Any]) -> list[jax.Array]:
        return [jnp.zeros(x.shape, x.dtype) for x in types.values()]

    # Under shard_map an output varies over every mesh axis that an input varies over.
    varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in given.values()))
    with _private.without_varying_types():
        if varying:
            # What an operation returns here is of a type that does not vary.
            given = {name: x[None].reshape(x.shape) for name, x in given.items()}
        # Only a ref can be written that comes with contents. Of the outputs' refs only what is put there remains.
        _, results = pl.run_state(stateful)((zeros(counting), zeros(made)))
    if varying:
        results = [jax.lax.pcast(x, tuple(varying), to="varying") for x in results]
    return {**dict.fromkeys(outputs), **dict(zip(made, results))}


def _named(kernel: Callable[..., None], refs: Mapping[str, Any], **scratch: Any) -> None:
    kernel(**{**refs, **scratch})
