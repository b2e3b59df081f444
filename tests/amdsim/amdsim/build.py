"""Compiles handlers and the core, and writes program files, all cached by content.

The cache is `build/amdsim` in the repository, or $AMDSIM_CACHE, with folders per version of the emulator and the host compiler. Handlers
are compiled once for all kernels: each library has a list of its handlers beside it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .code_object import CodeObject
from .toolchain import toolchain
from .translate import Program

_HERE = Path(__file__).resolve().parent
RUNTIME = _HERE / "runtime"
FAKE_RUNTIME = _HERE.parent / "fake_runtime" / "fake_hip.cpp"
_FLAGS = ["-std=c++17", "-fPIC", "-mavx2", "-mfma", "-mf16c", "-mpopcnt", "-mlzcnt", "-mbmi", "-mbmi2", "-pthread"]
# Fused or reordered float operations would not be the instruction's; the rounding mode changes at run time.
_EXACT = ["-ffp-contract=off", "-frounding-math", "-fno-strict-aliasing", "-w"]
_OPTIMIZED = ["-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic"]
_HANDLERS_PER_FILE = 160


def _versioned(prefix: str, sources: Iterable[Path]) -> Path:
    """A folder of the cache whose name changes with the sources and with how they are compiled."""
    version = hashlib.sha256(repr([_FLAGS, _EXACT, _OPTIMIZED]).encode())
    for source in sorted(sources):
        version.update(source.read_bytes())
    compiler = subprocess.run([toolchain().host_compiler, "--version"], capture_output=True, text=True, check=True).stdout
    version.update(compiler.encode())
    root = Path(os.environ.get("AMDSIM_CACHE") or _HERE.parents[2] / "build" / "amdsim")
    directory = root / f"{prefix}_{version.hexdigest()[:16]}"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@functools.cache
def cache_directory() -> Path:
    """Of everything that depends on the whole emulator."""
    return _versioned("programs", [*RUNTIME.iterdir(), *_HERE.glob("*.py"), *FAKE_RUNTIME.parent.iterdir()])


@functools.cache
def _handler_directory() -> Path:
    """Of handlers: they depend on the runtime's headers alone, their names on their bodies."""
    return _versioned("handlers", RUNTIME.glob("*.h"))


def write_atomically(path: Path, data: bytes) -> Path:
    """Other processes see the whole file or none."""
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
    return path


def compile_library(source: Path, output: Path, *flags: str) -> Path:
    """Raises RuntimeError with the compiler's messages."""
    return _compile([*flags, "-shared", f"-I{RUNTIME}", str(source), "-ldl"], output)


def _compile(arguments: Sequence[str], output: Path) -> Path:
    handle, temporary = tempfile.mkstemp(dir=output.parent)
    os.close(handle)
    result = subprocess.run([toolchain().host_compiler, *_FLAGS, *arguments, "-o", temporary], capture_output=True, text=True, check=False)
    if result.returncode:
        os.unlink(temporary)
        raise RuntimeError(f"{output.name} does not compile:\n{result.stderr[:4000]}")
    os.replace(temporary, output)
    return output


def core_library(wave: int) -> Path:
    output = cache_directory() / f"core{wave}.so"
    if not output.exists():
        compile_library(RUNTIME / "core.cpp", output, "-O2", "-Wall", f"-DAMDSIM_WAVE={wave}")
    return output


def _handler_flags(wave: int) -> list[str]:
    return [*_OPTIMIZED, *_EXACT, f"-DAMDSIM_WAVE={wave}"]


def _precompiled_header(wave: int) -> Path:
    """The folder of handlers.h as g++ keeps it parsed, which is most of the work for a few handlers; other compilers pass it over."""
    folder = _handler_directory() / f"header{wave}"
    folder.mkdir(exist_ok=True)
    output = folder / "handlers.h.gch"
    if not output.exists():
        _compile([*_handler_flags(wave), "-x", "c++-header", str(RUNTIME / "handlers.h")], output)
    return folder


def _compile_handlers(wave: int, bodies: dict[str, str]) -> None:
    directory = _handler_directory()
    source = '#include "handlers.h"\nusing namespace amdsim;\nextern "C" {\n'
    for name, body in bodies.items():
        source += f"const Inst* {name}(const Inst* i, Wave& w, Machine& c) {{ {body} }}\n"
    source += "}\n"
    stem = f"handlers{wave}_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    path = write_atomically(directory / f"{stem}.cpp", source.encode())
    compile_library(path, directory / f"{stem}.so", *_handler_flags(wave), f"-I{directory / f'header{wave}'}")
    write_atomically(directory / f"{stem}.list", "\n".join(bodies).encode())


def _compiled_handlers(wave: int) -> dict[str, Path]:
    return {
        name: listing.with_suffix(".so")
        for listing in _handler_directory().glob(f"handlers{wave}_*.list")
        for name in listing.read_text().split()
    }


def compile_handlers(wave: int, programs: Iterable[Program]) -> dict[str, Path]:
    """Compiles the handlers that no library has yet, on all cores. Returns the library of each handler."""
    compiled = _compiled_handlers(wave)
    missing = {
        name: body for program in programs for name, body in zip(program.names, program.handlers, strict=True) if name not in compiled
    }
    if missing:
        _precompiled_header(wave)
        names = sorted(missing)
        workers = os.cpu_count() or 1
        size = min(_HANDLERS_PER_FILE, -(-len(names) // workers))
        parts = [{name: missing[name] for name in names[at : at + size]} for at in range(0, len(names), size)]
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda part: _compile_handlers(wave, part), parts))
        compiled = _compiled_handlers(wave)
    return compiled


def _program_path(code_object: CodeObject, kernel: str) -> Path:
    key = hashlib.sha256(code_object.data + b"\0" + kernel.encode()).hexdigest()[:16]
    return cache_directory() / f"{key}.program"


def find_program(code_object: CodeObject, kernel: str) -> Path | None:
    """The program file of a kernel that was translated before."""
    path = _program_path(code_object, kernel)
    return path if path.exists() else None


def write_program(code_object: CodeObject, program: Program, libraries: dict[str, Path]) -> Path:
    """Writes the program file that runtime/core.cpp reads."""
    directory = cache_directory()
    image = directory / f"{hashlib.sha256(code_object.image).hexdigest()[:16]}.image"
    if not image.exists():
        write_atomically(image, bytes(code_object.image))
    kernel = program.kernel
    gfx = int(code_object.target[3:5]) if code_object.target[3] == "1" else 9
    packed = gfx >= 11 or code_object.target in ("gfx90a", "gfx940", "gfx941", "gfx942", "gfx950")
    lines = [f"gfx {gfx}", f"packed_ids {int(packed)}", f"image {len(code_object.image)} {image}"]
    lines += [f"relocation {offset} {addend}" for offset, addend in code_object.relocations]
    lines += [f"lds {kernel.lds}", f"private {kernel.private}", f"properties {kernel.properties}", f"preload {kernel.preload}"]
    lines += [f"rsrc1 {kernel.rsrc1}", f"rsrc2 {kernel.rsrc2}", f"entry {kernel.entry}", f"kernarg {kernel.kernarg}"]
    lines += [f"argument {a.kind} {a.offset} {a.size}" for a in kernel.arguments]
    lines += [f"handlers {library}" for library in sorted({libraries[name] for name in program.names})]
    lines += [f"handler {name}" for name in program.names]
    for step in program.steps:
        lines.append(f"inst {step.instruction.pc} {step.handler} " + " ".join(map(str, step.parameters)))
    lines += [f"text {step.instruction.pc} {step.instruction.text}" for step in program.steps]
    data = ("\n".join(lines) + "\n").encode()
    return write_atomically(_program_path(code_object, kernel.name), data)
