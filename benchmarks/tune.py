"""`python -m benchmarks tune`: an op under every tile configuration, beside the default; for those who set defaults.

Configurations that spill registers are rejected by compiling for the GPU's description alone. The library itself never
tunes: it looks its defaults up.
"""

import argparse
import contextvars
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import ModuleType
from typing import Any, get_args
from unittest import mock

import jax

from benchmarks import cases, timing
from benchmarks.cases import Case
from benchmarks.compiled import KernelReport, compile_for
from benchmarks.inputs import make_inputs
from benchmarks.oracle import make_oracle, tolerance
from benchmarks.providers import jaxattn as ours
from benchmarks.timing import Call
from benchmarks.work import work
from jaxattn.kernels.mosaic import attention as mosaic_attention
from jaxattn.kernels.triton import (
    activation,
    append,
    attention,
    grouped_matmul,
    merge,
    rmsnorm,
    rope,
    rope_append,
    sampling,
)

Config = dict[str, Any]  # the fields that differ from the default

_ATTENTION: dict[str, tuple[Any, ...]] = dict(
    block_kv=(32, 64, 128),
    num_warps=(2, 4, 8),
    num_stages=(2, 3, 4, 5),
)
_NORM: dict[str, tuple[Any, ...]] = dict(
    block_rows=(1, 8),
    block=(256, 1024, 2048, 4096),
    kept_tiles=(2, 3, 5, 16),
    num_warps=(1, 4, 8, 16, 32),
    load_weight=get_args(rmsnorm.LoadWeight),
)
_HEADS: dict[str, tuple[Any, ...]] = dict(
    block_tokens=(1, 2, 4, 8), head_blocks=(1, 2, 4, 8), num_warps=(1, 2, 4, 8)
)


@dataclasses.dataclass(frozen=True)
class Space:
    """Which tiles an op is tried with: fields of the Config of a kernel's file."""

    module: ModuleType
    fields: dict[str, tuple[Any, ...]]
    backend: str | None = None
    op: str | None = None  # of the cases; None: as the space is called


SPACES: dict[str, Space] = {
    "decode": Space(attention, _ATTENTION),
    "prefill": Space(attention, _ATTENTION, "triton"),
    "prefill_mosaic": Space(
        mosaic_attention,
        dict(block_kv=(64, 128), num_stages=(2, 3, 4), turns=(False, True)),
        "mosaic",
        "prefill",
    ),
    "append": Space(append, dict(block_rows=(4, 8, 16, 32), num_warps=(1, 2, 4, 8))),
    "merge_states": Space(
        merge,
        dict(block_rows=(1, 2, 4, 8, 16), block_states=(2, 8, 16, 32, 64), num_warps=(1, 2, 4)),
    ),
    "rmsnorm": Space(rmsnorm, _NORM),
    "fused_add_rmsnorm": Space(rmsnorm, _NORM),
    "grouped_matmul": Space(
        grouped_matmul,
        dict(
            block_rows=(16, 64, 128),
            block_cols=(32, 64, 128, 256),
            block_k=(64, 128),
            num_warps=(4, 8),
            num_stages=(3, 4, 5),
        ),
    ),
    "rope": Space(rope, _HEADS),
    "rope_append": Space(rope_append, _HEADS),
    "sampling": Space(
        sampling,
        dict(
            chunk=(2048, 4096, 8192),
            num_warps=(1, 2),
            loads=(2, 4, 8),
            pivots=(8, 12, 16),
            passes=(1, 2, 3),
            finish_warps=(2, 4, 8),
        ),
    ),
    "silu_and_mul": Space(activation, dict(block=(512, 1024, 2048, 4096), num_warps=(1, 2, 4, 8))),
}
TARGETS = {"NVIDIA H200": "h200", "NVIDIA H100": "h200", "NVIDIA A100": "a100"}  # by architecture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", choices=SPACES)
    parser.add_argument("--cases", default="", help="part of case ids; default: all of the op")
    parser.add_argument("--smoke", action="store_true", help="the small cases")
    parser.add_argument(
        "--values",
        nargs="*",
        default=[],
        metavar="FIELD=N,N",
        help="these of a field instead of all",
    )
    parser.add_argument(
        "--spill", type=int, default=0, metavar="BYTES", help="that a configuration may have (0)"
    )
    parser.add_argument(
        "--target", choices=sorted(set(TARGETS.values())), help="default: the GPU at hand"
    )
    parser.add_argument(
        "--static", action="store_true", help="compile only, for --target; needs no GPU"
    )


def main(options: argparse.Namespace) -> int:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    target = options.target or _target()
    if options.static and not target:
        raise ValueError("--static needs --target where there is no known GPU")
    names = [options.cases] if options.cases else []
    values = {
        name: tuple(int(n) for n in numbers.split(","))
        for name, _, numbers in (given.partition("=") for given in options.values)
    }
    op = SPACES[options.op].op or options.op
    for case in cases.select(smoke=options.smoke, ops=[op], names=names):
        print(f"\n{case.id}, {jax.devices()[0].device_kind}, target {target}\n")
        how: dict[str, Any] = dict(static=options.static, values=values, spill=options.spill)
        print(tune(case, target, space=options.op, **how), flush=True)
    return 0


def tune(
    case: Case,
    target: str | None,
    *,
    space: str | None = None,
    static: bool = False,
    values: Mapping[str, tuple[Any, ...]] | None = None,
    spill: int = 0,
) -> str:
    """A Markdown table of the configurations, the fastest first.

    space: of SPACES; default: the op's. values: of some fields, in place of all; spill: bytes that are no fault.
    """
    space = space or case.op
    configs = [{}, *candidates(space, values)]  # {}: the default
    module, backend = SPACES[space].module, SPACES[space].backend
    with _overridable(module), ThreadPoolExecutor() as pool:
        compiled = list(
            pool.map(lambda config: _compile(case, config, target, spill, backend), configs)
        )
        times: dict[int, float] = {}
        if not static:
            sound = {i: configs[i] for i, (_, fault) in enumerate(compiled) if not fault}
            times = _times(case, sound, compiled, pool, backend)
    fields = list(configs[1])
    lines = [[*fields, "registers", "us", "TB/s", "TFLOP/s", "fault"], ["---"] * (len(fields) + 5)]
    done = work(case)
    for i in sorted(range(len(configs)), key=lambda i: times.get(i, float("inf"))):
        reports, fault = compiled[i]
        us = times.get(i)
        lines.append(
            [
                *([str(configs[i][name]) for name in fields] if i else ["default"] * len(fields)),
                " + ".join(
                    str(report.registers) for report in sorted(reports, key=lambda r: r.name)
                ),
                f"{us:.2f}" if us else "",
                f"{done.bytes / us / 1e6:.2f}" if us else "",
                f"{done.flops / us / 1e6:.0f}" if us and done.flops else "",
                fault,
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def candidates(op: str, values: Mapping[str, tuple[Any, ...]] | None = None) -> list[Config]:
    """Every combination of the op's space, in which `values` replace those of some fields, or add a field.

    Raises:
      ValueError: the op has none.
    """
    if op not in SPACES:
        raise ValueError(f"{op} has no tiles to tune; ops must be among {list(SPACES)}")
    space = SPACES[op].fields | dict(values or {})
    return [dict(zip(space, values)) for values in itertools.product(*space.values())]


_override: contextvars.ContextVar[Config] = contextvars.ContextVar("override")


@contextmanager
def _overridable(module: ModuleType) -> Iterator[None]:
    """The module's default_config obeys `_override`, in each thread its own."""
    default = module.default_config

    def config(*args: Any, **kwargs: Any) -> Any:
        return dataclasses.replace(default(*args, **kwargs), **_override.get({}))

    with mock.patch.object(module, "default_config", config):
        yield


def _with(config: Config, function: Callable[[], Any]) -> Any:
    """function() under a configuration."""
    token = _override.set(config)
    try:
        return function()
    finally:
        _override.reset(token)


def _compile(
    case: Case, config: Config, target: str | None, spill: int, backend: str | None
) -> tuple[list[KernelReport], str]:
    """Reports of the kernels for a described GPU, and what is wrong with them; without a target, nothing."""
    if target is None:
        return [], ""
    structs = jax.eval_shape(lambda: make_inputs(case))

    def op(inputs):
        return ours.make_call(case, inputs, backend=backend).run()

    try:
        mosaic = backend == "mosaic"
        reports = _with(config, lambda: compile_for(target, op, structs, mosaic=mosaic))
    except Exception as error:
        return [], f"does not compile: {error}".splitlines()[0][:80]
    much = [x for x in reports if x.spills and x.spill_stores + x.spill_loads > spill]
    return reports, "; ".join(fault for report in much for fault in report.spills)[:80]


def _times(
    case: Case,
    configs: dict[int, Config],
    compiled: list[tuple[list[KernelReport], str]],
    pool: ThreadPoolExecutor,
    backend: str | None,
) -> dict[int, float]:
    """Microseconds of each configuration that is right; what fails or is wrong is noted as a fault."""
    inputs = make_inputs(case)
    oracle = make_oracle(case, inputs)

    def start(config: Config) -> tuple[Call, Any] | Exception:
        def first() -> tuple[Call, Any]:
            call = ours.make_call(case, inputs, backend=backend)
            outputs = call.run()
            call.wait(outputs)
            return call, outputs

        try:
            return _with(config, first)
        except Exception as error:
            return error

    calls: dict[str, Call] = {}
    for i, started in zip(configs, pool.map(start, configs.values())):
        if isinstance(started, Exception):
            compiled[i] = compiled[i][0], f"{started}".splitlines()[0][:80]
        elif not (error := oracle.error(started[1])) <= tolerance(case):
            compiled[i] = compiled[i][0], f"wrong, error {error:.3g}"
        else:
            calls[str(i)] = started[0]
    if not calls:
        return {}
    recorder = timing.choose_recorder([next(iter(calls.values()))])
    times = timing.kernel_times(calls, *recorder, dirty=case.writes)
    return {int(i): timed.us for i, timed in times.items()}


def _target() -> str | None:
    kind = jax.devices()[0].device_kind
    return next((target for gpu, target in TARGETS.items() if kind.startswith(gpu)), None)
