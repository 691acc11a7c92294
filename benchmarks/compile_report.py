"""What the compiler made of each kernel, for an H200 or an A100, on a machine without a GPU (`compiled` says how).

    python -m benchmarks.compile_report [--target h200|a100] [--only SUBSTR] [--json FILE] [--check]

`--check` fails on a spill or a serialised wgmma in a case marked hot, and compiles only those.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.compile_cases import CASES, Case
from benchmarks.compiled import (
    ARCHITECTURES,
    KERNEL_PREFIX,
    KernelReport,
    compile_for,
    described_mesh,
)


def compile_cases(target: str, cases: Sequence[Case]) -> list[list[KernelReport]]:
    """The kernels of each case.

    By processes: tracing, and even more what Mosaic does before LLVM, is Python. A Mosaic kernel takes ten times as
    long as another, so these are begun first.
    """
    processes = concurrent.futures.ProcessPoolExecutor(
        os.cpu_count(), mp_context=multiprocessing.get_context("spawn")
    )
    with processes as pool:
        results = {
            case.name: pool.submit(_compile_named, target, case.name)
            for case in sorted(cases, key=lambda case: not case.mosaic)
        }
        return [results[case.name].result() for case in cases]


def _compile_named(target: str, name: str) -> list[KernelReport]:
    # The host compiles only; a GPU it may have stays free.
    jax.config.update("jax_platforms", "cpu")
    (case,) = (case for case in CASES if case.name == name)
    try:
        with jax.sharding.set_mesh(described_mesh(target)):  # plans ask for the device
            fn, args = case.build()
        return compile_for(target, fn, *args, mosaic=case.mosaic)
    except Exception as error:
        error.add_note(f"while compiling {name!r} for {target}")
        raise


COLUMNS: dict[str, Callable[[KernelReport], Any]] = {
    "kernel": lambda k: k.name.removeprefix(KERNEL_PREFIX),
    "threads": lambda k: k.threads,
    "regs": lambda k: k.registers,
    "spill st/ld": lambda k: f"{k.spill_stores}/{k.spill_loads}",
    "local": lambda k: k.local_memory,
    "smem st+dyn": lambda k: f"{k.static_shared}+{k.dynamic_shared}",
    "wgmma": lambda k: k.wgmma,
    "mma.sync": lambda k: k.mma_sync,
    "cp.async": lambda k: k.cp_async,
    "warnings": lambda k: " ".join(re.findall(r"C\d{4}", " ".join(k.warnings))),
}


def format_table(rows: Iterable[tuple[Case, KernelReport]]) -> str:
    """One line a kernel; a star marks a hot case."""
    lines = [["case", *COLUMNS]]
    for case, kernel in rows:
        name = case.name + " *" * case.hot
        lines.append([name, *(str(column(kernel)) for column in COLUMNS.values())])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    return "\n".join(line.rstrip() for line in text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=sorted(ARCHITECTURES), default="h200")
    parser.add_argument("--only", metavar="SUBSTR", default="", help="cases whose name contains it")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every field there too")
    parser.add_argument("--check", action="store_true", help="hot cases only; exit 1 on a fault")
    options = parser.parse_args(argv)

    named = [c for c in CASES if options.only in c.name and options.target in c.targets]
    cases = [c for c in named if c.hot or not options.check]
    if not cases:
        parser.error(f"no case matches --only {options.only!r}")

    results = list(zip(cases, compile_cases(options.target, cases), strict=True))
    rows = [(case, kernel) for case, kernels in results for kernel in kernels]

    print(f"JAX {jax.__version__}, target {options.target}; * marks a hot case")
    print(format_table(rows))
    if options.json:
        fields = [{"case": c.name, "hot": c.hot} | dataclasses.asdict(k) for c, k in rows]
        options.json.write_text(json.dumps(fields, indent=1) + "\n")

    faults = [f"{c.name}, {k.name}: {fault}" for c, k in rows for fault in c.faults(k)]
    faults += [
        f"{c.name}: no kernel of this library in it" for c, kernels in results if not kernels
    ]
    for fault in faults:
        print(f"FAULT {fault}", file=sys.stderr)
    return 1 if options.check and faults else 0


if __name__ == "__main__":
    sys.exit(main())
