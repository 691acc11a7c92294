"""One measuring process: takes a job as JSON on its command line, prints what it finds as JSON lines.

`run` starts it, twice: wall-clock rows want JAX's default flags, kernel rows no CUDA graphs. A case that takes the
process down (a fault on the GPU leaves no way back) costs only itself: `run` starts another for the rest.
"""

import dataclasses
import gc
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib

from benchmarks import cases, providers
from benchmarks.cases import Case, Loop
from benchmarks.inputs import make_inputs
from benchmarks.oracle import make_oracle, tolerance
from benchmarks.timing import (
    Call,
    Ceilings,
    Recorder,
    Timing,
    choose_recorder,
    kernel_times,
    loop_times,
    measure_ceilings,
    wall_times,
)
from benchmarks.work import work


def main(job: dict[str, Any], emit: Any) -> None:
    """Measures the cases of a job.

    Args:
      job: "cases": ids; "smoke": whether they are the small ones; "providers": names; "ceilings": known ones, or null.
      emit: called with each message: {"meta": ...} once; then, of each case, {"begin": id}, a {"row": ...} for each
        provider, and {"end": reason or null} with what kept the whole case from being measured.
    """
    modules, missing = {}, {}
    for name in job["providers"]:
        try:
            modules[name] = providers.load(name)
        except ImportError as error:
            missing[name] = str(error)
    known = job["ceilings"]
    ceilings = Ceilings(**known) if known else measure_ceilings()
    emit({"meta": _meta(modules, missing, ceilings)})
    chosen = [case for case in cases.select(smoke=job["smoke"]) if case.id in job["cases"]]
    clock = _Clock(modules)
    for case in chosen:
        emit({"begin": case.id})
        failure = None
        try:
            for row in _measure(case, modules, clock, ceilings):
                emit({"row": row})
        except Exception as error:
            failure = _short(error)
        emit({"end": failure})
        gc.collect()
        jax.block_until_ready(
            jnp.ones(1) + 1
        )  # raises where a fault has taken the GPU from this process


class _Clock:
    """Wall clock for decode steps, both for a decode loop, kernel times for all else.

    The kernel timer is chosen when first needed.
    """

    def __init__(self, modules: dict[str, ModuleType]):
        self._modules = modules
        self._recorder: tuple[str, Recorder] | None = None

    def __call__(self, case: Case, calls: dict[str, Call]) -> dict[str, Timing]:
        if case.op == "decode_step":
            return wall_times(calls)
        if isinstance(case, Loop):
            return loop_times(calls, case.steps, *self._choose())
        return kernel_times(calls, *self._choose(), dirty=case.writes)

    def _choose(self) -> tuple[str, Recorder]:
        if self._recorder is None:
            x = jnp.ones(1024)
            bump = jax.jit(lambda x: x + 1)
            probes = [Call(lambda: bump(x))]
            probes += [m.probe() for m in self._modules.values() if hasattr(m, "probe")]
            for probe in probes:
                probe.wait(probe.run())
            self._recorder = choose_recorder(probes)
        return self._recorder


@dataclasses.dataclass
class _Attempt:
    """What became of one provider at a case: first its outputs, then their error, then its time; or a failure."""

    call: Call | None = None
    outputs: list[jax.Array] | None = None
    error: float | None = None
    timing: Timing | None = None
    failure: str | None = None


def _measure(
    case: Case, modules: dict[str, ModuleType], clock: _Clock, ceilings: Ceilings
) -> Iterator[dict[str, Any]]:
    """A row for each provider that has something for the case: checked first, timed if right."""
    inputs = make_inputs(case)
    # Compiling is most of a case's time; it can go on side by side, but not beside the capture of a CUDA graph.
    with ThreadPoolExecutor(1 if case.op == "decode_step" else None) as pool:
        oracle = pool.submit(make_oracle, case, inputs)
        started = [pool.submit(_start, module, case, inputs) for module in modules.values()]
    check, checked = oracle.result()
    attempts = {name: attempt for start in started for name, attempt in start.result().items()}
    right: dict[str, Call] = {}
    for name, attempt in attempts.items():
        if attempt.call is None or attempt.outputs is None:
            continue
        try:
            error = check(attempt.outputs)
        except Exception as failure:
            attempt.failure = f"not comparable: {_short(failure)}"
            continue
        finally:
            attempt.outputs = None
        attempt.error = error if math.isfinite(error) else None
        if error <= tolerance(case):
            right[name] = attempt.call
        else:
            attempt.failure = f"wrong: {error=:.3g}, tolerance {tolerance(case)}"
    try:
        for name, timing in clock(case, right).items():
            attempts[name].timing = timing
    except Exception as failure:
        for name in right:
            attempts[name].failure = _short(failure)
    for name, attempt in attempts.items():
        yield _row(case, name, attempt, checked, ceilings)


def _start(module: ModuleType, case: Case, inputs: Any) -> dict[str, _Attempt]:
    """Each call of a provider, run once."""
    attempts = {}
    for name, make in module.build(case, inputs).items():
        attempt = attempts[name] = _Attempt()
        try:
            call = make()
            outputs = call.run()
            call.wait(outputs)
            attempt.outputs = [
                x if isinstance(x, jax.Array) else jnp.from_dlpack(x) for x in outputs
            ]
            attempt.call = call
        except Exception as failure:
            attempt.failure = _short(failure)
    return attempts


def _row(
    case: Case, provider: str, attempt: _Attempt, checked: str, ceilings: Ceilings
) -> dict[str, Any]:
    done = work(case)
    timed = attempt.timing
    us = timed.us if timed else None
    return {
        "op": case.op,
        "case": case.name,
        "provider": provider,
        "dtype": case.dtype,
        "page_size": getattr(case, "page_size", None),
        "num_qo_heads": getattr(case, "num_qo_heads", None),
        "num_kv_heads": getattr(case, "num_kv_heads", None),
        "head_dim": getattr(case, "head_dim", None),
        "us": us and round(us, 3),
        "gbps": us and round(done.bytes / us / 1e3, 2),
        "tflops": us and done.flops and round(done.flops / us / 1e6, 3),
        "roof_share": us and round(ceilings.floor_us(done.bytes, done.flops) / us, 4),
        "error": attempt.error,
        "ok": timed is not None,
        "kernels": timed.kernels if timed else None,
        "timer": timed.timer if timed else None,
        "kernel_us": round(timed.kernel_us, 3) if timed and timed.kernel_us else None,
        "bytes": done.bytes,
        "flops": done.flops,
        "work_model": done.model,
        "checked": checked,
        "failure": attempt.failure,
    }


def _meta(
    modules: dict[str, ModuleType], missing: dict[str, str], ceilings: Ceilings
) -> dict[str, Any]:
    device = jax.devices()[0]
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
    versions |= {"python": platform.python_version()}
    for module in modules.values():
        versions |= module.versions()
    return {
        "gpu": device.device_kind if device.platform == "gpu" else "cpu",
        "driver": _driver() if device.platform == "gpu" else None,
        "versions": versions,
        "ceilings": vars(ceilings),
        "not_installed": missing,
    }


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _short(error: Exception) -> str:
    """Its first line; of files, without the folders of the machine that they lie in."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return re.sub(r"(?<![\w.:/])/(?:[^\s/:]+/)+", "", text)[:300]


if __name__ == "__main__":
    # Libraries print on stdout too: theirs goes to stderr, ours alone to the pipe.
    with os.fdopen(os.dup(1), "w") as pipe:
        os.dup2(2, 1)

        def emit(message: dict[str, Any]) -> None:
            print(json.dumps(message, allow_nan=False), file=pipe, flush=True)

        main(json.loads(sys.argv[1]), emit)
