"""Facts about the device that plans and tile configurations ask for."""

import jax

NUM_SMS_ELSEWHERE = 4  # off the GPU nothing needs filling; a few units still exercise every split


def num_sms() -> int:
    """Streaming multiprocessors of the default GPU; a small number on any other platform."""
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else NUM_SMS_ELSEWHERE


def on_gpu() -> bool:
    """Whether JAX's default device is a GPU."""
    return jax.default_backend() == "gpu"
