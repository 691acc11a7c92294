"""`python -m benchmarks COMMAND`; `python -m benchmarks COMMAND --help` lists a command's options.

run      measure, and write a JSON file
report   make the README's tables and the plots from such a file
profile  profile one case under Nsight Compute, or print the command for it
tune     sweep an op's tile configurations on this GPU
"""

import argparse
import importlib
import sys

COMMANDS = ("run", "report", "profile", "tune")


def main(argv: list[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=raw
    )
    parser.add_argument("command", choices=COMMANDS)
    name = parser.parse_args(argv[:1]).command
    # Only this one: a report needs no JAX.
    module = importlib.import_module(f"benchmarks.{name}")
    parser = argparse.ArgumentParser(f"python -m benchmarks {name}", description=module.__doc__)
    module.add_arguments(parser)
    options = parser.parse_args(argv[1:])
    try:
        return module.main(options)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
