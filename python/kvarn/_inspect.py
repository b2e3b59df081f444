"""``kvarn inspect``: a record format, or a saved sequence, as tables."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from kvarn._formats import Format

_METADATA = ("k_scale", "k_zero", "k_token_scale", "v_channel_scale", "v_scale", "v_zero")


def show_format(name: str, head_dim: int, console: Console) -> None:
    """Prints where every byte of a record lies.

    Raises:
        InvalidArgumentError: an unknown format or head_dim.
    """
    format = Format(name)
    layout = format.layout(head_dim)
    console.print(f"record {format}, head_dim {head_dim}: {layout.record_bytes:,} bytes", soft_wrap=True)
    table = Table()
    for column in ("offset", "bytes", "part", "values"):
        table.add_column(column, justify="left" if column == "part" else "right")
    values = format.tile_tokens * head_dim
    planes = (
        ("K codes", layout.k_low_offset, layout.k_low_bytes),
        ("K codes, high plane", layout.k_high_offset, layout.k_high_bytes),
        ("V codes", layout.v_low_offset, layout.v_low_bytes),
        ("V codes, high plane", layout.v_high_offset, layout.v_high_bytes),
    )
    end = 0
    for part, offset, size in planes:
        if size:
            table.add_row(f"{offset:,}", f"{size:,}", part, f"{values:,}")
            end = offset + size
    for part, offset, count in zip(_METADATA, layout.metadata_offset, layout.metadata_count, strict=True):
        size = count * format.metadata_bits // 8
        table.add_row(f"{offset:,}", f"{size:,}", part, f"{count:,}")
        end = offset + size
    if format.metadata_bits == 8:
        size = len(_METADATA) * 4
        table.add_row(f"{layout.metadata_range_offset:,}", f"{size:,}", "low and step of each vector", f"{2 * len(_METADATA)}")
        end = layout.metadata_range_offset + size
    if end < layout.record_bytes:
        table.add_row(f"{end:,}", f"{layout.record_bytes - end:,}", "padding", "")
    console.print(table)
    full = 2 * 2 * values
    console.print(
        f"{format.tile_tokens} tokens of one KV head, K and V: {format.bits_per_element(head_dim):.3f} bits per value, "
        f"{full / layout.record_bytes:.2f} times smaller than 16 bits",
        soft_wrap=True,
    )


def show_file(path: Path, console: Console) -> None:
    """Prints what a saved sequence holds, after checking every tile's checksum.

    Raises:
        CorruptError: not a saved sequence, or a damaged one.
    """
    from kvarn._sequence_file import read

    metadata, tensors = read(path)
    format, head_dim = Format(metadata["format"]), int(metadata["head_dim"])
    encoded = int(tensors["table"].sum())
    staged = len(tensors["table"]) - encoded
    console.print(f"{path}: {len(tensors['table'])} tiles, every checksum right", soft_wrap=True)
    table = Table()
    table.add_column("what")
    table.add_column("value", justify="right")
    for key in sorted(metadata):
        if key != "kvarn":
            table.add_row(key, metadata[key])
    tokens = int(metadata["num_tokens"])
    values = 2 * tokens * int(metadata["num_layers"]) * int(metadata["num_kv_heads"]) * head_dim
    used = tensors["records"].nbytes + tensors["staging"].nbytes
    table.add_row(f"encoded tiles of {format.tile_tokens} tokens", str(encoded))
    table.add_row("tiles in full precision", str(staged))
    table.add_row("bytes of records", f"{tensors['records'].nbytes:,}")
    table.add_row("bytes in full precision", f"{tensors['staging'].nbytes:,}")
    if values:
        table.add_row("bits per value, all in all", f"{8 * used / values:.2f}")
    console.print(table)
