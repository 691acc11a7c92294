"""What every test runs under: strict promotion, two CPU devices, a cheap compiler on a CPU, a GPU shared by workers."""

import functools
import gc
import os
from collections.abc import Sequence
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; NumPy reads this once
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax  # noqa: E402
import pytest  # noqa: E402

ON_GPU = Path("/dev/nvidiactl").exists() and os.environ.get("JAX_PLATFORMS") != "cpu"
if ON_GPU:
    # Of a GPU, each worker takes what its tests use, not three quarters of the card at its start. A pool keeps what
    # it once took, so what counts is the largest test of each worker: most stay below 5 GB, the three whose arrays
    # pass 2^31 elements below 14 GB. With 6 workers that is 3 x 14 + 3 x 5 = 57 GB and 6 CUDA contexts of 0.6 GB.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Searching for the fastest matrix product of every oracle would take longer than the tests.
    flags = ["--xla_gpu_autotune_level=0"]
    # What one worker has compiled, the others and the next run need not: most of the tests' time.
    cache = Path(__file__).parents[1] / ".pytest_cache" / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
else:
    # Interpreted kernels run for milliseconds and compile for seconds: LLVM need not optimise, nor start threads, and
    # the older emitter of fusions takes half as long as the MLIR one (which JAX 0.11 and later cannot go without).
    flags = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
    if jax.__version_info__ < (0, 11):
        flags.append("--xla_cpu_use_fusion_emitters=false")
        # MLIR's context of each program is a tenth of the tests' time; later versions of JAX use one several times too.
        from jax._src.interpreters import mlir

        mlir.make_ir_context = functools.cache(mlir.make_ir_context)
    # There is none; the name that each program would have in it is a few percent of the tests' time.
    jax.config.update("jax_enable_compilation_cache", False)
os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")])

# What JAX traces and compiles lives long and is many objects: looking for garbage among all of them every few hundred
# new ones is a tenth of the tests' time. Where each operation was written down is a thirtieth.
gc.set_threshold(100_000, 20, 100)
jax.config.update("jax_traceback_in_locations_limit", 0)

# A GPU machine keeps its platform; its CPU is then not the default and needs no second device.
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


# Tests that took more than some half second on a slow machine; of a GPU's, which compile for 10 s and more, those
# whose like is tested beside them.
SLOW = frozenset((Path(__file__).parent / "slow_tests.txt").read_text().splitlines())


def asks_for_slow(mark_expression: str, args: Sequence[str]) -> bool:
    """Whether the slow tests of a GPU are meant too: -m speaks of them, or a file is named. They are thousands."""
    return "slow" in mark_expression or any(arg.split("::")[0].endswith(".py") for arg in args)


@pytest.hookimpl(tryfirst=True)  # before -m looks at marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid in SLOW:
            item.add_marker(pytest.mark.slow)
    if not asks_for_slow(config.option.markexpr, config.args):
        marks = lambda item: {mark.name for mark in item.iter_markers()}
        left_out = {item for item in items if {"gpu", "slow"} <= marks(item)}
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and jax.default_backend() != "gpu":
        skip = pytest.mark.skip(
            reason=f"needs an NVIDIA GPU; JAX's backend here is {jax.default_backend()!r}"
        )
        for item in marked:
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Arrays that test files make as they are imported are of the CPU, where a GPU machine has JAX's CPU too.

    Each worker imports all files, and on a GPU compiles for a tenth of a second for each kind of array.
    """
    if ON_GPU and "cpu" in os.environ.get("JAX_PLATFORMS", "cuda,cpu"):
        with jax.default_device("cpu"):
            return (yield)
    return (yield)


def pytest_unconfigure() -> None:
    """pytest ends with five searches for garbage, of seconds each, in what goes with the process anyway."""
    gc.freeze()


@pytest.fixture
def gpu_memory():
    """gpu_memory(gigabytes): skips a test that needs more than this GPU has."""

    def need(gigabytes: float) -> None:
        limit = jax.devices()[0].memory_stats()["bytes_limit"] / 1e9
        if limit < gigabytes:
            pytest.skip(f"needs {gigabytes} GB of GPU memory; JAX may take {limit:.0f} GB here")

    return need
