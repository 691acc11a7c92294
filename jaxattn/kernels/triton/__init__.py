"""The Pallas kernels, lowered through Triton; the only folder that imports `jax.experimental.pallas`."""
