"""The tracked files of the project, for the tests that read its sources."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BINARY_SUFFIXES = {".npz", ".npy", ".safetensors", ".png", ".bin"}
SOURCE_SUFFIXES = {".cpp", ".h", ".hpp", ".c", ".cu", ".cuh", ".hip", ".py", ".pyi"}


def tracked_files(*folders: str) -> list[Path]:
    """Files that git tracks or would add, below the given folders (all when none is given)."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", *folders]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return sorted({ROOT / name for name in names if name and (ROOT / name).is_file()})


def text_files(*folders: str) -> list[Path]:
    return [path for path in tracked_files(*folders) if path.suffix not in BINARY_SUFFIXES]


def source_files(*folders: str) -> list[Path]:
    return [path for path in tracked_files(*folders) if path.suffix in SOURCE_SUFFIXES]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()
