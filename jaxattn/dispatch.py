"""Chooses how an op runs: a kernel on a GPU, the XLA reference elsewhere, or the interpreted kernel.

A kernel has one or two lowerings: Triton's, which serves every NVIDIA GPU and everything, and for some ops Mosaic's,
which serves Hopper where it is faster.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxattn.checks import check_choice, copied_from_host
from jaxattn.device import on_gpu

BACKENDS = (None, "triton", "mosaic", "xla", "interpret")


def dispatch(
    backend: str | None,
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    *args: Any,
    mosaic: Callable[..., Any] | str = "this op has no such kernel",
) -> Any:
    """Runs an op.

    Args:
      backend: "triton" runs `kernel` and "mosaic" `mosaic` (each needs an NVIDIA GPU), "xla" runs `reference`,
        "interpret" runs `kernel` interpreted on any platform. None picks when the program is lowered: for CUDA `mosaic`
        where it serves the call, else `kernel`; elsewhere `reference`.
      kernel: takes `*args` and the keyword `interpret`.
      reference: the plain jnp computation of the same result.
      *args: pytrees of arrays, NumPy's included.
      mosaic: takes `*args`; or why it cannot serve this call.

    Raises:
      ValueError: an unknown backend, or one that cannot run here.
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "mosaic" and isinstance(mosaic, str):
        raise ValueError(
            f"backend='mosaic' cannot serve this call: {mosaic}. Use backend='triton', or None to choose"
        )
    args = jax.tree.map(lambda x: jnp.asarray(copied_from_host(x)), args)
    if backend == "xla":
        return reference(*args)
    if backend == "interpret":
        return _with_derivative_of(reference, functools.partial(kernel, interpret=True))(*args)
    compiled: Callable[..., Any] = functools.partial(kernel, interpret=False)
    if backend != "triton" and not isinstance(mosaic, str):
        compiled = _batched_as(compiled, mosaic)
    compiled = _with_derivative_of(reference, compiled)
    if backend is None:
        return jax.lax.platform_dependent(*args, cuda=compiled, default=reference)
    if not on_gpu():
        raise ValueError(
            f"backend={backend!r} needs an NVIDIA GPU; JAX's default backend here is {jax.default_backend()!r}. "
            "Use backend='xla', 'interpret', or None to let the platform decide."
        )
    return compiled(*args)


def _batched_as(kernel: Callable[..., Any], mosaic: Callable[..., Any]) -> Callable[..., Any]:
    """`mosaic`; under vmap `kernel`, since a Mosaic launch of ours takes no batch axis."""
    op = jax.custom_batching.custom_vmap(mosaic)

    @op.def_vmap
    def batched(axis_size: int, in_batched: Any, *args: Any) -> tuple[Any, Any]:
        axes = jax.tree.map(lambda batched: 0 if batched else None, in_batched)
        out = jax.vmap(kernel, in_axes=tuple(axes), axis_size=axis_size)(*args)
        return out, jax.tree.map(lambda _: True, out)

    return op


def _with_derivative_of(
    reference: Callable[..., Any], kernel: Callable[..., Any]
) -> Callable[..., Any]:
    """`kernel`, differentiated as `reference`: kernels are for serving and define no derivative themselves."""
    op = jax.custom_jvp(kernel)

    @op.defjvp
    def jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        # By `op`, not by `kernel`, so that a derivative of the derivative asks here again.
        return op(*primals), jax.jvp(reference, primals, tangents)[1]

    return op
