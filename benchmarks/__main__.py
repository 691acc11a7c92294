"""`python -m benchmarks`: run, report, profile, tune. README.md shows each; `--help` lists their options."""

import argparse
import importlib
import sys

COMMANDS = {
    "run": "measure, and write a JSON file",
    "report": "make the README's tables and the plots from such a file",
    "profile": "profile one case under Nsight Compute, or print its command",
    "tune": "sweep an op's tile configurations on this GPU",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    modules = {}
    for name, what in COMMANDS.items():
        modules[name] = importlib.import_module(f"benchmarks.{name}")
        modules[name].add_arguments(
            commands.add_parser(name, help=what, description=modules[name].__doc__)
        )
    options = parser.parse_args()
    try:
        return modules[options.command].main(options)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
