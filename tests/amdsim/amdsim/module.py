"""Loads a code object and launches its kernels on numpy arrays."""

from __future__ import annotations

import ctypes
import os
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .build import compile_handlers, core_library, find_program, write_program
from .code_object import CodeObject, Kernel
from .operands import UnsupportedError
from .translate import Program, translate

Dim = tuple[int, int, int]


class TrapError(RuntimeError):
    """A kernel did what it must not; the message names the workgroup, the wave, the instruction and what was wrong."""


@dataclass(frozen=True)
class Coverage:
    """Which of a kernel's instructions ran."""

    executed: int
    total: int
    missed: tuple[str, ...]  # "pc: text" of those that never ran

    @property
    def fraction(self) -> float:
        return self.executed / self.total


class _Range(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_uint64), ("end", ctypes.c_uint64), ("writable", ctypes.c_uint32))


class _Options(ctypes.Structure):
    _fields_ = (
        ("lds_races", ctypes.c_uint32),
        ("lds_uninitialized", ctypes.c_uint32),
        ("global_races", ctypes.c_uint32),
        ("reverse", ctypes.c_uint32),
        ("interleave", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("max_instructions", ctypes.c_uint64),
    )


_cores: dict[int, ctypes.CDLL] = {}


def _core(wave: int) -> ctypes.CDLL:
    if wave not in _cores:
        core = ctypes.CDLL(str(core_library(wave)))
        core.amdsim_open.restype = ctypes.c_void_p
        core.amdsim_open.argtypes = [ctypes.c_char_p]
        core.amdsim_close.argtypes = [ctypes.c_void_p]
        core.amdsim_error.restype = ctypes.c_char_p
        core.amdsim_launch.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_uint32] + [ctypes.c_void_p] * 2 + [ctypes.c_size_t, ctypes.c_void_p]
        core.amdsim_num_instructions.restype = ctypes.c_size_t
        core.amdsim_num_instructions.argtypes = [ctypes.c_void_p]
        core.amdsim_hits.restype = ctypes.POINTER(ctypes.c_uint64)
        core.amdsim_hits.argtypes = [ctypes.c_void_p]
        _cores[wave] = core
    return _cores[wave]


class _Loaded:
    """A kernel that the core has opened."""

    def __init__(self, wave: int, program_file: Path) -> None:
        self.core = _core(wave)
        self.program_file = program_file
        self.handle = self.core.amdsim_open(str(program_file).encode())
        if not self.handle:
            raise RuntimeError(self.core.amdsim_error().decode())
        self.num_instructions: int = self.core.amdsim_num_instructions(self.handle)

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.core.amdsim_close(self.handle)

    @property
    def hits(self) -> np.ndarray:
        return np.ctypeslib.as_array(self.core.amdsim_hits(self.handle), (self.num_instructions,)).copy()


def _located_texts(program_file: Path) -> list[list[str]]:
    """[pc, text] of a program's instructions, in order."""
    return [line.split(" ", 2)[1:] for line in program_file.read_text().splitlines() if line.startswith("text ")]


def instruction_texts(program_file: Path) -> list[str]:
    """The instructions of a program, in the order of their counts."""
    return [text for _, text in _located_texts(program_file)]


def coverage_of(program_file: Path, hits: np.ndarray) -> Coverage:
    """Coverage from the counts of a program's instructions."""
    missed = tuple(f"{int(pc):#x}: {text}" for (pc, text), count in zip(_located_texts(program_file), hits, strict=True) if not count)
    return Coverage(len(hits) - len(missed), len(hits), missed)


class Module:
    """A code object whose kernels are translated when they are first used.

    Attributes:
        code_object: its metadata.
        target: such as gfx942.
        kernels: the kernels by name.
    """

    def __init__(self, path: Path | str) -> None:
        self.code_object = CodeObject(path)
        self.target = self.code_object.target
        self.kernels: dict[str, Kernel] = self.code_object.kernels
        self._programs: dict[str, Program] = {}
        self._loaded: dict[str, _Loaded] = {}

    def program(self, name: str) -> Program:
        """The translated kernel. Raises UnsupportedError when it holds an instruction that the emulator does not model."""
        if name not in self._programs:
            try:
                self._programs[name] = translate(self.code_object, self.kernels[name])
            except UnsupportedError as error:
                raise UnsupportedError(f"{self.target} {name}: {error}") from error
        return self._programs[name]

    def prepare(self, names: Iterable[str] | None = None) -> None:
        """Translates several kernels (all by default) and compiles their handlers together."""
        names = list(self.kernels if names is None else names)
        for name in names:
            if name not in self.kernels:
                raise KeyError(f"{self.code_object.path}: no kernel {name}")
        missing = [name for name in names if find_program(self.code_object, name) is None]
        programs = [self.program(name) for name in missing]
        for wave in {program.kernel.wave for program in programs}:
            libraries = compile_handlers(wave, [program for program in programs if program.kernel.wave == wave])
            for program in programs:
                if program.kernel.wave == wave:
                    write_program(self.code_object, program, libraries)

    def program_file(self, name: str) -> Path:
        """The kernel's program for runtime/core.cpp, from the cache where it is there."""
        self.prepare([name])
        path = find_program(self.code_object, name)
        assert path is not None
        return path

    def _load(self, name: str) -> _Loaded:
        if name not in self._loaded:
            path = self.program_file(name)
            self._loaded[name] = _Loaded(self.kernels[name].wave, path)
        return self._loaded[name]

    def launch(
        self,
        name: str,
        grid: Dim,
        block: Dim,
        arguments: Sequence[object],
        *,
        buffers: Sequence[np.ndarray] | None = None,
        read_only: Sequence[np.ndarray] = (),
        dynamic_lds: int = 0,
        check_races: bool = True,
        check_uninitialized_lds: bool = True,
        check_global_races: bool = True,
        reverse: bool = False,
        interleave: int = 0,
        threads: int | None = None,
        max_instructions: int = 2_000_000_000,
    ) -> float:
        """Runs a grid of workgroups to its end.

        Args:
            grid: workgroups per axis.
            block: threads per axis.
            arguments: per explicit argument of the kernel an array (its address is passed), an int or float (stored in the argument's
                size), a numpy scalar or bytes (passed as they are).
            buffers: arrays that the kernel may touch; by default those among the arguments.
            read_only: arrays among them, or more, that it must not write.
            dynamic_lds: bytes of LDS beyond the kernel's own.
            check_races: trap when waves touch the same LDS bytes without a barrier between.
            check_uninitialized_lds: trap on reads of LDS that nothing wrote.
            check_global_races: trap when a workgroup writes what another one has read or written, or reads what another one has written.
            reverse: run workgroups and waves in descending order; a result that changes depends on their order.
            interleave: a seed: a few workgroups run at once, their waves in random order from barrier to barrier. 0: one after another.
            threads: host threads that share the workgroups; all cores by default.
            max_instructions: per wave and between two barriers, after which the kernel is taken to hang.

        Returns:
            Seconds that the run took.

        Raises:
            UnsupportedError: an instruction of the kernel is not modelled.
            TrapError: the kernel accessed memory outside of its buffers, raced in LDS, or broke another rule of README.md.
        """
        loaded = self._load(name)
        explicit = [a for a in self.kernels[name].arguments if not a.hidden]
        if len(explicit) != len(arguments):
            raise TypeError(f"{name}: expected {len(explicit)} arguments, got {len(arguments)}")
        values = [_argument_bytes(value, a.size) for value, a in zip(arguments, explicit, strict=True)]
        storage = [ctypes.create_string_buffer(value, len(value)) for value in values]
        pointers = (ctypes.c_void_p * max(len(storage), 1))(*[ctypes.addressof(s) for s in storage])
        arrays = list(buffers) if buffers is not None else [a for a in arguments if isinstance(a, np.ndarray)]
        ranges = _ranges(arrays, read_only)
        options = _Options(
            check_races, check_uninitialized_lds, check_global_races, reverse, interleave, threads or os.cpu_count() or 1, max_instructions
        )
        start = time.perf_counter()
        failed = loaded.core.amdsim_launch(
            loaded.handle,
            (ctypes.c_uint32 * 3)(*grid),
            (ctypes.c_uint32 * 3)(*block),
            dynamic_lds,
            pointers,
            ranges,
            len(ranges),
            ctypes.byref(options),
        )
        if failed:
            raise TrapError(f"{self.target} {name}: {loaded.core.amdsim_error().decode()}")
        return time.perf_counter() - start

    def coverage(self, name: str) -> Coverage:
        """What all launches of the kernel so far have executed. Padding that no path reaches does not count."""
        loaded = self._load(name)
        return coverage_of(loaded.program_file, loaded.hits)


def _argument_bytes(value: object, size: int) -> bytes:
    if isinstance(value, np.ndarray):
        data = struct.pack("<Q", value.ctypes.data)
    elif isinstance(value, bytes):
        data = value
    elif isinstance(value, np.generic):
        data = value.tobytes()
    elif isinstance(value, float):
        data = struct.pack("<f" if size == 4 else "<d", value)
    elif isinstance(value, int):
        data = value.to_bytes(size, "little", signed=value < 0)
    else:
        raise TypeError(f"expected an array, a number or bytes, got {type(value).__name__}")
    if len(data) != size:
        raise TypeError(f"expected an argument of {size} bytes, got {len(data)}")
    return data


def _ranges(arrays: Sequence[np.ndarray], read_only: Sequence[np.ndarray]) -> ctypes.Array[_Range]:
    """Disjoint ranges in ascending order; views of one array merge into one."""
    protected = {array.ctypes.data for array in read_only}
    spans = sorted(
        (a.ctypes.data, a.ctypes.data + a.nbytes, a.ctypes.data not in protected and a.flags.writeable) for a in [*arrays, *read_only]
    )
    merged: list[list[int]] = []
    for begin, end, writable in spans:
        if begin == end:
            continue
        if merged and begin < merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
            merged[-1][2] = merged[-1][2] and writable
        else:
            merged.append([begin, end, writable])
    return (_Range * max(len(merged), 1))(*[_Range(*span) for span in merged])
