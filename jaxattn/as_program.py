"""Functions that are one program each, also where they are called outside of one."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax

F = TypeVar("F", bound=Callable[..., Any])


def as_program(*static: str) -> Callable[[F], F]:
    """A decorator: called outside of a program, the function is one, compiled once for each shape.

    Operation by operation it would be dozens of programs, and its loops would be compiled at every call. Within a
    program, nothing shows of it. Its arrays come checked and from `copied_from_host`: on their way into a program int64
    becomes int32, and NumPy's memory may be read late.

    Args:
      *static: arguments that are no arrays: hashable, and compiled in.
    """

    def decorated(function: F) -> F:
        return cast(F, jax.jit(function, static_argnames=static, inline=True))

    return decorated
