"""Facts about the device that plans and tile configurations ask for.

The device is the one of the mesh in force, which need not be attached (compiling ahead of time), else JAX's default.
"""

from typing import Any

import jax

NUM_SMS_ELSEWHERE = 4  # off the GPU nothing needs filling; a few units still exercise every split
HOPPER = ("H100", "H200", "H800", "H20")


def num_sms() -> int:
    """Streaming multiprocessors of the GPU to fill; a small number on any other platform."""
    device = _target()
    known = getattr(device, "num_cores", None) or getattr(device, "core_count", None)
    return known if known and device.platform == "gpu" else NUM_SMS_ELSEWHERE


def has_wgmma() -> bool:
    """Whether the tensor cores take their operands from shared memory, a warpgroup at a time (Hopper)."""
    return any(name in _target().device_kind for name in HOPPER)


def check_fp8(dtype: Any) -> None:
    """Raises NotImplementedError where the GPU cannot convert numbers of a cache's dtype."""
    device = _target()
    capability = getattr(device, "compute_capability", None)
    if dtype.name != "float8_e4m3fn" or device.platform != "gpu" or capability is None:
        return
    if tuple(map(int, str(capability).split("."))) < (8, 9):
        raise NotImplementedError(
            f"a cache of float8_e4m3fn needs compute capability 8.9 (Ada, Hopper); {device.device_kind} "
            f"has {capability}: use float8_e5m2"
        )


def on_gpu() -> bool:
    """Whether programs are for a GPU: JAX's default device is one, or that of the mesh in force."""
    return jax.default_backend() == "gpu" or getattr(_target(), "platform", None) == "gpu"


def _target() -> Any:
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
