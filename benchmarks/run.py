"""`python -m benchmarks run`: starts the measuring processes, shows progress, writes results as they come."""

import argparse
import datetime
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import cases, providers

CASE_SECONDS = 180  # a worker that says nothing for so long is given up
NO_GRAPHS = (
    "--xla_gpu_enable_command_buffer="  # kernels in a CUDA graph are not recorded one by one
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ops", type=_words, default=[], help="comma-separated; default: all")
    parser.add_argument(
        "--cases", type=_words, default=[], help="parts of case ids, comma-separated; default: all"
    )
    parser.add_argument(
        "--providers",
        type=_words,
        default=list(providers.NAMES),
        help=f"among {','.join(providers.NAMES)} (default: all that are installed)",
    )
    parser.add_argument("--smoke", action="store_true", help="small cases, for a CPU")
    parser.add_argument("--list", action="store_true", help="print the ids of the cases and stop")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), metavar="SECONDS", help="then stop"
    )
    parser.add_argument("--out", type=Path, default=Path("results.json"))


def main(options: argparse.Namespace) -> int:
    chosen = cases.select(smoke=options.smoke, ops=options.ops, names=options.cases)
    if unknown := set(options.providers) - set(providers.NAMES):
        raise ValueError(f"providers must be among {providers.NAMES}; got {sorted(unknown)}")
    ids = [case.id for case in chosen]
    if options.list:
        print(*ids, sep="\n")
        return 0
    run = Run(options, len(ids))
    by_clock = ("decode_step", "decode_loop")
    run.measure([case.id for case in chosen if case.op not in by_clock], flags=NO_GRAPHS)
    # Loops last: their kernels are recorded too, and that may slow the graphs of what follows.
    run.measure([case.id for op in by_clock for case in chosen if case.op == op], flags="")
    run.write()
    untimed = sum(not row["ok"] for row in run.rows)
    run.say(f"{options.out}: {len(run.rows)} rows, {untimed} of them not timed")
    return 1 if run.meta["failures"] else 0


class Run:
    """The results so far, written after every case."""

    def __init__(self, options: argparse.Namespace, total: int):
        self._options = options
        self._total = total
        self._done = 0
        self._began = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.meta: dict[str, Any] = {
            "gpu": None,
            "driver": None,
            "versions": {},
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
            "seconds": None,
            "ceilings": None,
            "not_installed": {},
            "failures": {},  # case id: what kept all of it from being measured
        }

    def measure(self, ids: list[str], flags: str) -> None:
        """Adds the rows of these cases, from as many processes as it takes.

        Raises:
          RuntimeError: a process ends before its first case.
        """
        while ids:
            begun: list[str] = []
            ended = 0
            reason = None
            for message in self._worker(ids, flags):
                match message:
                    case {"meta": meta}:
                        self.meta |= meta
                    case {"begin": name}:
                        begun.append(name)
                        self._bar(name)
                        first_row = len(self.rows)
                    case {"row": row}:
                        self.rows.append(row)
                    case {"end": failure}:
                        ended += 1
                        self._finish(begun[-1], self.rows[first_row:], failure)
                    case {"gone": reason}:
                        pass
            if not begun:
                raise RuntimeError(f"the measuring process ended before its first case: {reason}")
            if ended < len(begun):
                self._finish(begun[-1], self.rows[first_row:], f"the process was lost: {reason}")
            ids = ids[len(begun) :]
            if self._seconds > self._options.budget:
                self.meta["failures"] |= dict.fromkeys(ids, "out of budget")
                return

    def write(self) -> None:
        """The whole result; an older file stays until this one is complete."""
        self.meta["seconds"] = round(self._seconds, 1)
        rows = ",\n".join(json.dumps(row, allow_nan=False) for row in self.rows)
        meta = json.dumps(self.meta, indent=1, allow_nan=False)
        self._options.out.parent.mkdir(parents=True, exist_ok=True)
        part = self._options.out.with_suffix(".part")
        part.write_text(f'{{"meta": {meta},\n"rows": [\n{rows}\n]}}\n')
        part.replace(self._options.out)

    def say(self, text: str) -> None:
        clear = "\r\033[K" if sys.stderr.isatty() else ""
        print(f"{clear}{text}", file=sys.stderr, flush=True)

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._began

    def _worker(self, ids: list[str], flags: str) -> Iterator[dict[str, Any]]:
        """The messages of one process; {"gone": reason} last where it did not end well."""
        job = {
            "cases": ids,
            "smoke": self._options.smoke,
            "providers": self._options.providers,
            "ceilings": self.meta["ceilings"],
        }
        env = os.environ | {
            # PyTorch needs some of the memory too.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
        }
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.worker", json.dumps(job)],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

        def read() -> None:
            for line in process.stdout or ():
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        try:
            while (line := lines.get(timeout=CASE_SECONDS)) is not None:
                message = json.loads(line)
                yield message
                if "end" in message and self._seconds > self._options.budget:
                    yield {"gone": "out of budget"}
                    return
            if code := process.wait():
                yield {"gone": f"exit status {code}"}
        except queue.Empty:
            yield {"gone": f"silent for {CASE_SECONDS} s"}
        finally:
            process.kill()
            process.wait()

    def _finish(self, name: str, rows: list[dict[str, Any]], failure: str | None) -> None:
        self._done += 1
        if failure:
            self.meta["failures"][name] = failure
        texts = [
            f"{row['provider']} " + (f"{row['us']:.1f}" if row["ok"] else f"({row['failure']})")
            for row in rows
        ]
        texts += [failure] if failure else []
        self.say(f"[{self._done}/{self._total} {self._seconds:.0f}s] {name}: {', '.join(texts)}")
        self.write()

    def _bar(self, name: str) -> None:
        if sys.stderr.isatty():
            filled = 30 * self._done // self._total
            bar = "#" * filled + "." * (30 - filled)
            print(f"\r\033[K[{bar}] {name}", end="", file=sys.stderr, flush=True)


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]
