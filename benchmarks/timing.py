"""Device kernel time and wall-clock time, the same way for every provider.

Kernel time: the sum over a call's kernels, by CUPTI, with a cold L2: before each call 256 MiB pass through it and the
device drains, and only then does recording start, so every kernel recorded is the call's. Providers of a case take
turns, so that clocks and temperature drift alike for all; the median over the rounds counts. Launch gaps are not in
it; copies by the copy engine and memsets are not kernels either, so providers must launch none.

What an L2 is full of counts: lines that were written must go to memory before others take their place. A call that
writes as much as it reads leaves as many behind, and finds them before it. Attention hardly writes, in a model it
follows kernels that read weights, and what others wrote is not its time: it finds lines that were read. H200, decode of
32 x 4096: 8 of FlashInfer's 135 us, and as many of ours, were such write-backs.

Wall-clock time: steps enqueued back to back, until the device has finished, per step; enough of them that starting the
first and waiting for the last do not count; in turns, too, and the median of repeats.

A decode loop has both: what its steps take, and what their kernels take when launched one by one.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

ROUNDS, WARM_UP_ROUNDS = 25, 5
MIN_SHARE = 0.8  # of the rounds, that saw the same number of kernels: a record may get lost
REPEATS, MIN_STEPS, MIN_REPEAT_SECONDS = 20, 5, 0.03
LOOP_ROUNDS, LOOP_REPEATS, LOOP_CALLS = 5, 5, 2  # each a thousand kernels and more
FLUSH_BYTES = 256 * 2**20
CLOCK_RAMP_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Call:
    """One provider's op, bound to a case's inputs.

    Attributes:
      run: makes one call, returns its outputs without waiting.
      wait: returns when the device has finished those outputs.
      run_apart: the same call without CUDA graphs, whose kernels a recorder does not see; where both are timed.
    """

    run: Callable[[], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready
    run_apart: Callable[[], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Timing:
    us: float
    kernels: int | None
    timer: str
    kernel_us: float | None = None  # of a time by the clock: that of the kernels in it


Recorder = Callable[[Call], list[float]]  # runs a call once; microseconds of each of its kernels


def record_cupti(call: Call) -> list[float]:
    """By the CUPTI binding that comes with JAX's CUDA plugin; it sees PyTorch's kernels as well."""
    from jax._src.lib import mosaic_gpu

    # Its kernel names may be stale, its times and their number are right.
    mosaic_gpu._mosaic_gpu_ext._cupti_init()
    try:
        call.wait(call.run())
    finally:
        kernels = mosaic_gpu._mosaic_gpu_ext._cupti_get_timings(False)
    return [1e3 * milliseconds for _, milliseconds in kernels]


def record_torch(call: Call) -> list[float]:
    """By PyTorch's profiler, CUPTI too; it sees JAX's kernels as well."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call.wait(call.run())
        torch.cuda.synchronize()
    return [
        event.device_time
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith("Mem")
    ]


def record_wall(call: Call) -> list[float]:
    """Host clock; where there is no GPU."""
    begin = time.perf_counter()
    call.wait(call.run())
    return [1e6 * (time.perf_counter() - begin)]


def choose_recorder(probes: Iterable[Call]) -> tuple[str, Recorder]:
    """The first timer that sees the kernels of each probe (a small call of each framework), and its name.

    Raises:
      RuntimeError: none does.
    """
    if jax.default_backend() != "gpu":
        return "wall", record_wall
    probes = list(probes)
    reasons = []
    for name, record in (("cupti", record_cupti), ("torch.profiler", record_torch)):
        try:
            if all(record(probe) for probe in probes):
                return name, record
            reasons.append(f"{name} saw no kernel")
        except Exception as error:
            reasons.append(f"{name}: {error}")
    raise RuntimeError(
        f"no timer sees the GPU's kernels ({'; '.join(reasons)}): is another profiler attached, "
        "or profiling restricted to administrators?"
    )


def kernel_times(
    calls: Mapping[str, Call],
    timer: str,
    record: Recorder,
    *,
    counted: int = ROUNDS,
    dirty: bool = True,
) -> dict[str, Timing]:
    """The median kernel time of each call, the calls taking turns; `dirty`: the L2 is full of written lines.

    Raises:
      RuntimeError: the timer saw nothing, or not the same number of kernels most of the time.
    """
    flush = _make_flush(dirty)
    _ramp_clocks()
    rounds: dict[str, list[list[float]]] = {name: [] for name in calls}
    for _ in range(WARM_UP_ROUNDS + counted):
        for name, call in calls.items():
            flush()
            rounds[name].append(record(call))
    times = {}
    for name, records in rounds.items():
        kept = records[WARM_UP_ROUNDS:]
        kernels = statistics.mode(len(record) for record in kept)
        sums = [sum(record) for record in kept if len(record) == kernels]
        if not kernels or len(sums) < MIN_SHARE * counted:
            raise RuntimeError(
                f"{timer} saw {kernels} kernels of {name} in {len(sums)} rounds of {counted} only"
            )
        times[name] = Timing(statistics.median(sums), kernels, timer)
    return times


def wall_times(
    calls: Mapping[str, Call], *, steps: int | None = None, repeats: int = REPEATS
) -> dict[str, Timing]:
    """The median wall-clock time of one of `steps` calls enqueued back to back, the calls taking turns.

    By default as many steps for all as keep the fastest busy for MIN_REPEAT_SECONDS.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call.wait(call.run())
    _ramp_clocks()
    if steps is None:
        fastest = min((_lap(call, MIN_STEPS) for call in calls.values()), default=1.0)
        steps = max(MIN_STEPS, math.ceil(1e6 * MIN_REPEAT_SECONDS / fastest))
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(_lap(call, steps))
    return {name: Timing(statistics.median(us), None, "wall") for name, us in times.items()}


def _lap(call: Call, steps: int) -> float:
    """Microseconds of one of so many calls."""
    outputs = None
    begin = time.perf_counter()
    for _ in range(steps):
        # Freed first, so that this call finds its memory where the last one did: a CUDA graph is
        # rewritten for other addresses.
        outputs = None
        outputs = call.run()
    call.wait(outputs)
    return 1e6 * (time.perf_counter() - begin) / steps


def _ramp_clocks() -> None:
    """Keeps a GPU busy until its clocks are up."""
    end = time.perf_counter() + CLOCK_RAMP_SECONDS
    while jax.default_backend() == "gpu" and time.perf_counter() < end:
        _make_flush(True)()


def loop_times(
    calls: Mapping[str, Call], steps: int, timer: str, record: Recorder
) -> dict[str, Timing]:
    """A step's wall-clock time and its kernels', of calls that make `steps` of them.

    The clock comes first: a recorder, once it was there, may slow what follows.
    """
    wall = wall_times(calls, steps=LOOP_CALLS, repeats=LOOP_REPEATS)
    apart = {name: Call(call.run_apart or call.run, call.wait) for name, call in calls.items()}
    kernels = kernel_times(apart, timer, record, counted=LOOP_ROUNDS)
    return {
        name: Timing(
            wall[name].us / steps,
            (kernels[name].kernels or 0) // steps,
            "wall",
            kernels[name].us / steps,
        )
        for name in calls
    }


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What this device does at best, measured in the same run as everything that is held against it."""

    copy_gbps: float  # device to device, bytes read + written
    read_gbps: float  # sum of an array
    matmul_tflops: float  # bfloat16, float32 accumulation

    @property
    def gbps(self) -> float:
        return max(self.copy_gbps, self.read_gbps)

    def floor_us(self, num_bytes: int, flops: int | None) -> float:
        """The least time for so much work."""
        return max(num_bytes / self.gbps / 1e3, (flops or 0) / self.matmul_tflops / 1e6)


def measure_ceilings() -> Ceilings:
    """On random data: 2 GiB arrays and 8192^3 products on a GPU, small ones elsewhere."""
    on_gpu = jax.default_backend() == "gpu"
    size, n = (2**30, 8192) if on_gpu else (2**20, 256)
    x = jax.random.normal(jax.random.key(0, impl="rbg"), (size,), jnp.bfloat16)
    a, b = x[: n * n].reshape(n, n), x[-n * n :].reshape(n, n)
    copy, total = jax.jit(jnp.copy), jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
    # cuBLAS: searching for a tile of XLA's own product would take longer than all else here.
    matmul = jax.jit(jnp.dot, compiler_options={"xla_gpu_enable_triton_gemm": False})
    copy_us, read_us, matmul_us = (
        wall_times({"": Call(run)}, steps=20, repeats=5)[""].us
        for run in (lambda: copy(x), lambda: total(x), lambda: matmul(a, b))
    )
    return Ceilings(
        2 * x.nbytes / copy_us / 1e3, x.nbytes / read_us / 1e3, 2 * n**3 / matmul_us / 1e6
    )


@functools.cache
def _make_flush(dirty: bool) -> Callable[[], None]:
    """A function that writes or reads more than any L2 holds, and waits."""
    if jax.default_backend() != "gpu":
        return lambda: None
    state = [jnp.zeros(FLUSH_BYTES // 4, jnp.int32)]
    if dirty:
        bump = jax.jit(lambda x: x + 1, donate_argnums=0)

        def flush() -> None:
            state[0] = jax.block_until_ready(bump(state[0]))
    else:
        total = jax.jit(jnp.sum)

        def flush() -> None:
            jax.block_until_ready(total(state[0]))

    return flush
