"""What XLA's own fusion makes of the plain jnp definition of each op; not of attention, which it does not fuse, nor
of a plan, which is plain jnp anyway."""

from collections.abc import Callable
from typing import Any

from benchmarks.cases import Attention, Case, Loop, Plan
from benchmarks.providers import jaxattn
from benchmarks.timing import Call


def versions() -> dict[str, str]:
    return {}


def build(case: Case, inputs: Any) -> dict[str, Callable[[], Call]]:
    if isinstance(case, Attention | Loop | Plan):
        return {}
    return {"xla": lambda: jaxattn.make_call(case, inputs, backend="xla")}
