"""``python -m kvarn`` and the command ``kvarn``: the environment report; with arguments, the commands of kvarn.cli."""

from __future__ import annotations

import sys

import kvarn
from kvarn._report import environment_report

_PATHS = {"--cmake-dir": kvarn.cmake_dir, "--include-dir": kvarn.include_dir}


def main() -> int:
    """Runs the command line; returns the exit status."""
    arguments = sys.argv[1:]
    if not arguments:
        print(environment_report())
        return 0
    if arguments == ["--version"]:
        print(kvarn.__version__)
        return 0
    if len(arguments) == 1 and arguments[0] in _PATHS:
        print(_PATHS[arguments[0]]())
        return 0
    try:
        from kvarn.cli import main as run_command
    except ModuleNotFoundError as error:
        print(f"kvarn {arguments[0]}: needs the package {error.name}; install it with: pip install 'kvarn[demo]'", file=sys.stderr)
        return 1
    return run_command() or 0


if __name__ == "__main__":
    sys.exit(main())
