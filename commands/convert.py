"""`fastvar convert`: a checkpoint of any form becomes one plain file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..console.options import Offline, check_there
from ..console.streams import tell
from ..core.platform import needs_extra
from ..errors import InputError


def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="Transformer or image tokenizer: a file, pickled or not, the index of shards, or a folder; of a "
            "training checkpoint the averaged weights (EMA), where it holds them. Or hub:ORG/NAME, whose transformer "
            "is downloaded, or hub:ORG/NAME/FILE.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The new .safetensors file.")],
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which of several models in a folder, by name or file.")
    ] = None,
    offline: Offline = False,
    lora: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Merge this LoRA: a file, or a folder with adapter_config.json."),
    ] = None,
    scale: Annotated[float | None, typer.Option(help="Strength of the LoRA. [dim]default: 1[/dim]")] = None,
) -> None:
    """Write a checkpoint as one plain .safetensors file with the official names, without holding it in memory."""
    if scale is not None and lora is None:
        raise InputError("--scale goes with --lora", fix="leave it away")
    check_there(checkpoint, "a file, a folder, or hub:ORG/NAME")
    from ..core.dtypes import human_bytes

    with needs_extra("export"):
        from ..export.checkpoints.hub_models import find_weights
        from ..export.conversion.convert import check_out
        from ..export.conversion.convert import convert as convert_file
        from ..hub.reference import is_reference
        from ..hub.repository import HubAccess

        check_out(out)  # before anything is downloaded
        if is_reference(checkpoint):
            found, model = find_weights(checkpoint, model=model, access=HubAccess(offline=offline), told=tell), None
        else:
            found = checkpoint
        report = convert_file(found, out, model=model, lora=lora, scale=1.0 if scale is None else scale)
    changed = f", {report.changed} of them changed by the LoRA" if lora is not None else ""
    tell(f"wrote {report.out}: {report.part} of {report.family}, from {report.origin}")
    tell(f"{report.tensors} tensors{changed}, {human_bytes(report.size_bytes)}")
    if report.settings is not None:
        tell(f"copy {report.settings} beside it: it says what tensors do not")
