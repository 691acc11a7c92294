"""What this lowering needs of JAX under names that are not public: a barrier that counts a thread's copies, and under
`shard_map` a kernel whose counters are those of one device.

`tests/test_mosaic.py` fails where JAX changes them.
"""

import functools
from typing import Any

import jax
from jax._src import config
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu import lowering, primitives
from jax._src.state import primitives as state_primitives
from jax.experimental.mosaic import gpu as mgpu
from jax.extend import core as jax_core
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

# Kernels take no refs that vary over the axes of a mesh: within, types do not say what varies.
without_varying_types = functools.partial(config._check_vma, False)

_arrive_p = jax_core.Primitive("arrive_after_copies")
_arrive_p.multiple_results = True


def arrive_after_copies(barrier: Any) -> None:
    """`barrier` (of one arrival) completes when the copies that the threads have begun (`gather_rows`) are there."""
    ref, transforms = state_primitives.get_ref_and_transforms(barrier, None, "arrive_after_copies")
    flat, tree = jax.tree.flatten(transforms)
    _arrive_p.bind(ref, *flat, transforms_treedef=tree)


@_arrive_p.def_effectful_abstract_eval
def _abstract(barrier, *flat, transforms_treedef):
    return (), {gpu_core._memory_effect}


@lowering.register_lowering_rule(_arrive_p, mgpu.LoweringSemantics.Warpgroup)
def _lower(ctx, barrier, *flat, transforms_treedef):
    at = primitives._get_barrier_base_index(ctx.avals_in[0], transforms_treedef.unflatten(flat))
    barrier = barrier if at is None else barrier[at]
    barrier = getattr(barrier, "barrier_ref", barrier)
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [barrier.get_ptr()],
        "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];",
        "r",
        has_side_effects=True,
    )
    return ()
