"""Runs the machine code of AMD GPU kernels on a CPU; see ../README.md."""

from .code_object import CodeObject, write_bundle
from .module import Coverage, Module, TrapError
from .operands import UnsupportedError
from .toolchain import TARGETS, MissingToolError, Toolchain, toolchain

__all__ = [
    "TARGETS",
    "CodeObject",
    "Coverage",
    "MissingToolError",
    "Module",
    "Toolchain",
    "TrapError",
    "UnsupportedError",
    "toolchain",
    "write_bundle",
]
