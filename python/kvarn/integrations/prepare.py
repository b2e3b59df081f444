"""``kvarn prepare`` and ``kvarn balance``: moments of a model, and the balanced model, on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvarn._errors import InvalidArgumentError
from kvarn._moments import Moments
from kvarn.integrations.balance import balance
from kvarn.integrations.moments import prepare

# 256 bytes and a few special tokens.
_BYTE_VOCABULARIES = range(256, 321)


def run(
    model: str,
    output: Path,
    *,
    text: Path | None,
    num_tokens: int,
    context: int | None,
    device: str,
    seed: int,
    console: Console,
) -> None:
    """Loads the model, makes its moments and writes them to `output`."""
    language_model: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    language_model = language_model.to(device).eval()
    tokens = None if text is None else torch.tensor(_token_ids(model, language_model, text.read_bytes(), console))
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        windows = bar.add_task("reading", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(windows, completed=done, total=total)

        moments = prepare(language_model, tokens, num_tokens=num_tokens, context=context, seed=seed, progress=progress)
    moments.save(output)
    console.print(f"{output}: {moments}, {output.stat().st_size:,} bytes", soft_wrap=True)


def save_balanced(model: str, output: Path, *, moments: Path, console: Console) -> None:
    """Writes the balanced model, its tokenizer where it has one, and ``moments.safetensors`` to the new folder `output`."""
    if output.exists():
        raise InvalidArgumentError(f"[kvarn.balance] OUTPUT: expected a folder that does not exist yet, got {output}")
    given = Moments.load(moments)
    language_model: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    # No configuration describes a shared norm of K with weights for each head.
    per_head = not any(name.endswith(".k_norm") for name, _ in language_model.named_modules())
    made = balance(language_model, given, per_head=per_head)
    language_model.save_pretrained(output)
    made.save(output / "moments.safetensors")
    if language_model.config.get_text_config(decoder=True).vocab_size not in _BYTE_VOCABULARIES:
        AutoTokenizer.from_pretrained(model).save_pretrained(output)
    console.print(f"{output}: {made}", soft_wrap=True)


def _token_ids(name: str, model: Any, text: bytes, console: Console) -> list[int]:
    if model.config.get_text_config(decoder=True).vocab_size in _BYTE_VOCABULARIES:
        console.print("the model's vocabulary has the size of one of bytes: the text is read as bytes")
        return list(text)
    return list(AutoTokenizer.from_pretrained(name)(text.decode("utf-8", "replace"))["input_ids"])
