"""What every test runs under: strict promotion, two CPU devices, GPU tests only on a GPU."""

import jax
import pytest

# A GPU machine keeps its platform; its CPU is then not the default and needs no second device.
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and jax.default_backend() != "gpu":
        skip = pytest.mark.skip(
            reason=f"needs an NVIDIA GPU; JAX's backend here is {jax.default_backend()!r}"
        )
        for item in marked:
            item.add_marker(skip)
