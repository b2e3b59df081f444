"""Held-out text: the Python sources of installed packages that the project's models were not trained on.

``python -m kvarn.eval.held_out heldout.txt`` writes them to one file, documents separated by zero bytes, in an order that depends on the
packages' versions alone.
"""

from __future__ import annotations

import importlib.metadata
import random
import sys
from pathlib import Path

#: Packages, at the versions that the published figures are for. All are under permissive licences (BSD, BSD, MIT).
PACKAGES = {"networkx": "3.6.1", "pygments": "2.21.0", "simplejson": "4.3.0"}
_SEED = 20260603
# Sources shorter than this say little; longer ones are cut, so that no file is most of a text.
_LEAST_BYTES, _MOST_BYTES = 1000, 65536


def collect(limit: int = 4_000_000) -> tuple[bytes, dict[str, str]]:
    """The text, at most `limit` bytes, and the packages' versions.

    Raises:
        FileNotFoundError: none of the packages is installed.
    """
    documents: list[bytes] = []
    versions = {}
    for package in PACKAGES:
        try:
            distribution = importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        versions[package] = distribution.version
        files = sorted((file for file in distribution.files or [] if file.suffix == ".py"), key=str)
        for file in files:
            data = Path(str(distribution.locate_file(file))).read_bytes()[:_MOST_BYTES]
            if len(data) >= _LEAST_BYTES and b"\0" not in data:
                documents.append(data)
    if not documents:
        raise FileNotFoundError(f"[kvarn.eval] text: expected one of {', '.join(PACKAGES)} to be installed, got none; or name a text file")
    random.Random(_SEED).shuffle(documents)
    kept, size = [], 0
    for document in documents:
        if size + len(document) > limit:
            break
        kept.append(document)
        size += len(document) + 1
    return b"\0".join(kept), versions


def main(arguments: list[str]) -> int:
    """Writes the text to the file that is named."""
    text, versions = collect()
    Path(arguments[0]).write_bytes(text)
    print(f"{arguments[0]}: {len(text)} bytes of {', '.join(f'{name} {version}' for name, version in versions.items())}")
    for name, version in PACKAGES.items():
        if versions.get(name) != version:
            print(f"{name}: the published figures are for version {version}, not {versions.get(name)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
