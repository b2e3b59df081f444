"""The demonstration's model: bytes in, bytes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BEGIN, END, PADDING = 256, 257, 258

_FOLDER = Path("models") / "tiny-reason"


def find_model(folder: Path | None = None) -> Path:
    """The model's folder: `folder`, or models/tiny-reason of the working directory or of the source tree that this file is in.

    Raises:
        FileNotFoundError: there is no model; the message names the places.
    """
    places = [folder] if folder else [Path.cwd() / _FOLDER, Path(__file__).resolve().parents[3] / _FOLDER]
    for place in places:
        if (place / "model.safetensors").is_file():
            return place
    raise FileNotFoundError(
        f"[kvarn.demo] model: expected model.safetensors in {' or '.join(map(str, places))}; run from a clone, or pass --model"
    )


def load_model(folder: Path) -> Any:
    """The model, in float32, ready for inference."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def encode(text: str) -> list[int]:
    """Tokens of a document."""
    return [BEGIN, *text.encode()]


def decode(tokens: list[int]) -> str:
    """Text of the tokens before the end."""
    if END in tokens:
        tokens = tokens[: tokens.index(END)]
    return bytes(token for token in tokens if token < BEGIN).decode(errors="replace")
