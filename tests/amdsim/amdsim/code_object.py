"""Loads an AMDGPU code object: segments, relocations, kernel descriptors, and the metadata in its notes."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MACHINE_AMDGPU, _NOTE_METADATA, _RELATIVE64 = 224, 32, 13
_SECTION_RELOCATIONS, _SECTION_NOTE, _SECTION_DYNSYM, _SEGMENT_LOAD = 4, 7, 11, 1
_FLAG_EXECUTABLE = 1
_BUNDLE_MAGIC = b"__CLANG_OFFLOAD_BUNDLE__"
_BUNDLE_ALIGNMENT = 4096


@dataclass(frozen=True)
class Argument:
    kind: str  # the metadata's .value_kind
    offset: int
    size: int

    @property
    def hidden(self) -> bool:
        return self.kind.startswith("hidden_")


@dataclass(frozen=True)
class Kernel:
    """A kernel's descriptor and metadata. Sizes in bytes; `entry` is an offset into the image."""

    name: str
    wave: int
    entry: int
    lds: int
    private: int
    kernarg: int
    properties: int
    preload: int
    rsrc1: int
    rsrc2: int
    arguments: tuple[Argument, ...]
    metadata: dict[str, Any]


class CodeObject:
    """An ELF file made by `clang --offload-device-only --no-gpu-bundle-output`.

    Attributes:
        target: the processor, such as gfx1100.
        image: what the loader puts in memory, before relocation.
        code: the bytes of its executable segments.
        relocations: (offset, addend) of the 64-bit words to which the image's address is added.
        kernels: by name.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        data = self.data = self.path.read_bytes()
        if data[:4] != b"\x7fELF" or struct.unpack_from("<H", data, 18)[0] != _MACHINE_AMDGPU:
            raise ValueError(f"{path}: expected an ELF file for AMDGPU")
        program_headers, section_headers = struct.unpack_from("<QQ", data, 32)
        num_segments = struct.unpack_from("<H", data, 56)[0]
        num_sections = struct.unpack_from("<H", data, 60)[0]
        segments = [struct.unpack_from("<IIQQQQQQ", data, program_headers + 56 * i) for i in range(num_segments)]
        loaded = [(s[2], s[3], s[5], s[6]) for s in segments if s[0] == _SEGMENT_LOAD]
        self.code = b"".join(data[s[2] : s[2] + s[5]] for s in segments if s[0] == _SEGMENT_LOAD and s[1] & _FLAG_EXECUTABLE)
        self.image = bytearray(-(-max(address + size for _, address, _, size in loaded) // 4096) * 4096)
        for offset, address, file_size, _ in loaded:
            self.image[address : address + file_size] = data[offset : offset + file_size]
        self._sections = [struct.unpack_from("<IIQQQQIIQQ", data, section_headers + 64 * i) for i in range(num_sections)]
        self.symbols: dict[str, int] = {}
        self.relocations: list[tuple[int, int]] = []
        self.metadata: dict[str, Any] = {}
        for section in self._sections:
            self._read_section(section)
        self.target: str = self.metadata["amdhsa.target"].split("--")[-1].split(":")[0]
        self.kernels = {entry[".name"]: self._kernel(entry) for entry in self.metadata["amdhsa.kernels"]}

    def _read_section(self, section: tuple[int, ...]) -> None:
        kind, begin, size, link = section[1], section[4], section[5], section[6]
        if kind == _SECTION_DYNSYM:
            names = self._sections[link][4]
            for at in range(begin, begin + size, 24):
                name, _, _, _, value, _ = struct.unpack_from("<IBBHQQ", self.data, at)
                text = self.data[names + name : self.data.index(b"\0", names + name)].decode()
                if text:
                    self.symbols[text] = value
        elif kind == _SECTION_RELOCATIONS:
            for at in range(begin, begin + size, 24):
                offset, info, addend = struct.unpack_from("<QQq", self.data, at)
                if info & 0xFFFFFFFF != _RELATIVE64:
                    raise ValueError(f"{self.path}: relocation type {info & 0xFFFFFFFF} is not known")
                self.relocations.append((offset, addend))
        elif kind == _SECTION_NOTE:
            name_size, _, note_type = struct.unpack_from("<III", self.data, begin)
            if note_type == _NOTE_METADATA:
                self.metadata = _unpack(self.data, begin + 12 + (name_size + 3) // 4 * 4)[0]

    def _kernel(self, metadata: dict[str, Any]) -> Kernel:
        name = metadata[".name"]
        at = self.symbols[metadata[".symbol"]]
        lds, private, kernarg, _, entry = struct.unpack_from("<IIIIq", self.image, at)
        _, rsrc1, rsrc2, properties, preload = struct.unpack_from("<IIIHH", self.image, at + 44)
        arguments = tuple(Argument(a[".value_kind"], a[".offset"], a[".size"]) for a in metadata.get(".args", []))
        kernarg = max(kernarg, metadata[".kernarg_segment_size"])
        return Kernel(
            name, metadata[".wavefront_size"], at + entry, lds, private, kernarg, properties, preload, rsrc1, rsrc2, arguments, metadata
        )


def _unpack(data: bytes, at: int) -> tuple[Any, int]:
    """One msgpack value and the position after it; the subset that code objects use."""
    tag = data[at]
    at += 1
    if tag < 0x80:
        return tag, at
    if tag >= 0xE0:
        return tag - 256, at
    if tag < 0x90:
        return _unpack_map(data, at, tag & 15)
    if tag < 0xA0:
        return _unpack_list(data, at, tag & 15)
    if tag < 0xC0:
        return data[at : at + (tag & 31)].decode(), at + (tag & 31)
    if tag == 0xC0:
        return None, at
    if tag in (0xC2, 0xC3):
        return tag == 0xC3, at
    sizes = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD9: ">B", 0xDA: ">H", 0xDC: ">H", 0xDE: ">H", 0xDD: ">I", 0xDF: ">I"}
    if tag not in sizes:
        raise ValueError(f"msgpack tag {tag:#x} is not known")
    value = struct.unpack_from(sizes[tag], data, at)[0]
    at += struct.calcsize(sizes[tag])
    if tag in (0xD9, 0xDA):
        return data[at : at + value].decode(), at + value
    if tag in (0xDC, 0xDD):
        return _unpack_list(data, at, value)
    if tag in (0xDE, 0xDF):
        return _unpack_map(data, at, value)
    return value, at


def _unpack_list(data: bytes, at: int, count: int) -> tuple[list[Any], int]:
    values = []
    for _ in range(count):
        value, at = _unpack(data, at)
        values.append(value)
    return values, at


def _unpack_map(data: bytes, at: int, count: int) -> tuple[dict[Any, Any], int]:
    values = {}
    for _ in range(count):
        key, at = _unpack(data, at)
        values[key], at = _unpack(data, at)
    return values, at


def write_bundle(path: Path, code_objects: dict[str, Path]) -> None:
    """Writes the offload bundle that hipModuleLoadData takes, from code objects by target."""
    entries = [(b"host-x86_64-unknown-linux--", b"")]
    entries += [(b"hipv4-amdgcn-amd-amdhsa--" + target.encode(), file.read_bytes()) for target, file in code_objects.items()]
    header_size = len(_BUNDLE_MAGIC) + 8 + sum(24 + len(name) for name, _ in entries)
    start = -(-header_size // _BUNDLE_ALIGNMENT) * _BUNDLE_ALIGNMENT
    header, body = _BUNDLE_MAGIC + struct.pack("<Q", len(entries)), b""
    for name, data in entries:
        header += struct.pack("<QQQ", start + len(body), len(data), len(name)) + name
        body += data + b"\0" * (-len(data) % _BUNDLE_ALIGNMENT)
    path.write_bytes(header.ljust(start, b"\0") + body)
