"""The stream that a library of GPU arrays works on now, for libraries whose arrays do not say so through DLPack's exchange table."""

from __future__ import annotations

import sys


def current_stream(library: str, device: int) -> int | None:
    """Address of the current stream of `library` ("torch", "cupy") on a device, or None for a library that is not known.

    torch has the exchange table from version 2.10 on.
    """
    if library == "torch":
        return int(sys.modules["torch"].cuda.current_stream(device).cuda_stream)
    if library == "cupy":
        return int(sys.modules["cupy"].cuda.get_current_stream(device).ptr)
    return None
