"""`python -m benchmarks profile`: one case of ours under Nsight Compute; where `ncu` is missing, the command to run.

Kernels are picked by their stable names, `jaxattn_...`; the clocks are left alone and the caches flushed, as where time
is measured.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks import cases

METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes.sum.per_second",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "lts__t_sector_hit_rate.pct",
    "launch__grid_size",
    "launch__block_size",
    "launch__registers_per_thread",
    "launch__waves_per_multiprocessor",
)
# The first four launches warm up.
CALLS, SKIPPED_LAUNCHES, LAUNCHES = 6, 4, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "case", nargs="?", default="decode/seed_profile/p1/float16", help="part of a case's id"
    )
    parser.add_argument("--smoke", action="store_true", help="among the small cases")
    parser.add_argument(
        "--export", type=Path, metavar="FILE", help="every section, to a .ncu-rep file"
    )


def main(options: argparse.Namespace) -> int:
    case = cases.select(smoke=options.smoke, names=[options.case])[0]
    command = ncu_command(case, smoke=options.smoke, export=options.export)
    if shutil.which("ncu") is None:
        print("ncu is not on PATH: install Nsight Compute, then run", file=sys.stderr)
        print(shlex.join(command))
        return 0
    print(shlex.join(command), file=sys.stderr)
    # One kernel a launch, none inside a CUDA graph.
    env = os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer=".strip(),
    }
    return subprocess.run(command, env=env).returncode


def ncu_command(case: cases.Case, *, smoke: bool, export: Path | None) -> list[str]:
    """Nsight Compute on this module, which only makes the calls."""
    what = ["--set", "full", "--export", str(export), "--force-overwrite"]
    return [
        "ncu",
        "--clock-control",
        "none",
        "--target-processes",
        "all",
        "--kernel-name",
        "regex:jaxattn_",
        "--launch-skip",
        str(SKIPPED_LAUNCHES),
        "--launch-count",
        str(LAUNCHES),
        *(what if export else ["--metrics", ",".join(METRICS)]),
        sys.executable,
        "-m",
        "benchmarks.profile",
        case.id,
        *(["--smoke"] if smoke else []),
    ]


def make_calls(case_id: str, *, smoke: bool = False) -> None:
    """The calls to be profiled."""
    from benchmarks.inputs import make_inputs
    from benchmarks.providers import jaxattn

    [case] = [case for case in cases.select(smoke=smoke) if case.id == case_id]
    call = jaxattn.make_call(case, make_inputs(case))
    for _ in range(CALLS):
        call.wait(call.run())


if __name__ == "__main__":
    make_calls(sys.argv[1], smoke="--smoke" in sys.argv)
