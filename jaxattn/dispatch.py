"""Chooses how an op runs: the Triton kernel on a GPU, the XLA reference elsewhere, or the interpreted kernel."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxattn.checks import check_choice
from jaxattn.device import on_gpu

BACKENDS = (None, "triton", "xla", "interpret")


def dispatch(
    backend: str | None, kernel: Callable[..., Any], reference: Callable[..., Any], *args: Any
) -> Any:
    """Runs an op.

    Args:
      backend: "triton" runs `kernel` (needs an NVIDIA GPU), "xla" runs `reference`, "interpret" runs `kernel`
        interpreted on any platform, None picks "triton" for CUDA and "xla" elsewhere when the program is lowered.
      kernel: takes `*args` and the keyword `interpret`.
      reference: the plain jnp computation of the same result.
      *args: pytrees of arrays, NumPy's included.

    Raises:
      ValueError: an unknown backend, or "triton" where there is no GPU.
    """
    check_choice("backend", backend, BACKENDS)
    args = jax.tree.map(jnp.asarray, args)
    if backend == "xla":
        return reference(*args)
    if backend == "interpret":
        return _with_derivative_of(reference, functools.partial(kernel, interpret=True))(*args)
    compiled = _with_derivative_of(reference, functools.partial(kernel, interpret=False))
    if backend is None:
        return jax.lax.platform_dependent(*args, cuda=compiled, default=reference)
    if not on_gpu():
        raise ValueError(
            f"backend='triton' needs an NVIDIA GPU; JAX's default backend here is {jax.default_backend()!r}. "
            "Use backend='xla', 'interpret', or None to let the platform decide."
        )
    return compiled(*args)


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
