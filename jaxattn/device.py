"""Facts about the device that plans and tile configurations ask for."""

import jax

NUM_SMS_ELSEWHERE = 4  # off the GPU nothing needs filling; a few units still exercise every split


def num_sms() -> int:
    """Streaming multiprocessors of the GPU to fill; a small number on any other platform.

    That is the GPU of the mesh in force, which may not be attached (compiling ahead of time), else
    the default device.
    """
    target = jax.sharding.get_abstract_mesh().abstract_device
    if target is not None and target.platform == "gpu" and target.num_cores:
        return target.num_cores
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else NUM_SMS_ELSEWHERE


def on_gpu() -> bool:
    """Whether JAX's default device is a GPU."""
    return jax.default_backend() == "gpu"
