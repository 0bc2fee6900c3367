"""`fastvar convert`: a checkpoint of any form becomes one plain file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..console.streams import tell
from ..core.platform import needs_extra
from ..errors import InputError


def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="Transformer or image tokenizer: a file, pickled or not, the index of shards, or a folder; of a "
            "training checkpoint the averaged weights (EMA), where it holds them.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The new .safetensors file.")],
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which of several models in a folder, by name or file.")
    ] = None,
    lora: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Merge this LoRA: a file, or a folder with adapter_config.json."),
    ] = None,
    scale: Annotated[float | None, typer.Option(help="Strength of the LoRA. [dim]default: 1[/dim]")] = None,
) -> None:
    """Write a checkpoint as one plain .safetensors file with the official names, without holding it in memory."""
    if scale is not None and lora is None:
        raise InputError("--scale goes with --lora", fix="leave it away")
    if not checkpoint.exists():
        raise InputError(f"no checkpoint {checkpoint}", expected="a file or a folder", fix="check the path")
    from ..core.dtypes import human_bytes

    with needs_extra("export"):
        from ..export.conversion.convert import convert as convert_file

        report = convert_file(checkpoint, out, model=model, lora=lora, scale=1.0 if scale is None else scale)
    changed = f", {report.changed} of them changed by the LoRA" if lora is not None else ""
    tell(f"wrote {report.out}: {report.part} of {report.family}, from {report.origin}")
    tell(f"{report.tensors} tensors{changed}, {human_bytes(report.size_bytes)}")
    if report.settings is not None:
        tell(f"copy {report.settings} beside it: it says what tensors do not")
