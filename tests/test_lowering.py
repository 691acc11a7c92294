"""Every op lowers for CUDA on a machine without a GPU and without JAX's CUDA plugin."""

import jax
import pytest

from benchmarks.compile_cases import CASES

if jax.__version_info__ < (0, 11):
    pytest.skip(
        f"JAX {jax.__version__} cannot lower for an abstract GPU; 0.11 can", allow_module_level=True
    )

H200 = jax.sharding.AbstractMesh(
    (1,),
    ("x",),
    abstract_device=jax.sharding.AbstractDevice(
        device_kind="NVIDIA H200", num_cores=None, platform="gpu"
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_lowers_for_cuda(case):
    if case.mosaic and jax.__version_info__ >= (0, 12):
        pytest.skip(f"JAX {jax.__version__} does not compile it at its speed; 0.11 does")
    with jax.sharding.use_abstract_mesh(H200):
        fn, args = case.build()
        lowered = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    if case.mosaic:
        assert "mosaic_gpu" in text and "jaxattn_" in text
    else:
        assert "__gpu$xla.gpu.triton" in text
        assert 'name = "jaxattn_' in text
