"""`python -m amdsim.prepare CODE_OBJECT KERNEL`: translates one kernel for the stand-in HIP runtime and prints where it is."""

from __future__ import annotations

import sys

from .build import core_library
from .module import Module
from .operands import UnsupportedError


def main() -> None:
    path, name = sys.argv[1:]
    module = Module(path)
    try:
        program = module.program_file(name)
    except UnsupportedError as error:
        sys.exit(f"not modelled: {error}")
    print(f"core {core_library(module.kernels[name].wave)}")
    print(f"program {program}")


if __name__ == "__main__":
    main()
