"""Who is measured. A provider is a module with these functions:

    build(case, inputs) -> {row name: function that makes its Call}   # empty where it has nothing for the case
    versions() -> {package: version}
    probe() -> Call   # only where JAX does not launch its kernels: a small one, for choosing a timer that sees them

It may fail to import: then it is not installed here and has no rows. Outputs of a Call: attention (o,), decode_step
the o of every layer, decode_loop (tokens, k and v appended in a few layers), plan_decode its arrays,
append (k pages, v pages), merge_states (v, lse), rmsnorm (y,), fused_add_rmsnorm (y, sum), rope (query, key),
rope_append (k pages, v pages, query).
"""

import importlib
from types import ModuleType

# Row names start with the provider's: flashinfer fills flashinfer-fa2 and others.
NAMES = ("jaxattn", "flashinfer", "jax", "cudnn", "tokamax", "xla")


def load(name: str) -> ModuleType:
    """The module of a provider.

    Raises:
      ImportError: what it needs is not installed.
      ValueError: there is no such provider.
    """
    if name not in NAMES:
        raise ValueError(f"providers must be among {NAMES}; got {name!r}")
    return importlib.import_module(f"benchmarks.providers.{name}")
