"""`fastvar cache`: what is kept of earlier builds, and its removal."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..console.options import AsJson, print_json
from ..errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..engines.cache.contents import Item


def cache(
    max_size: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="Remove what was not used for longest, until this much is left: 2GiB say."),
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove everything that fastvar keeps there.")] = False,
    folder: Annotated[
        Path | None, typer.Option("--cache", help="Engine cache folder. [dim]default: see `fastvar doctor`[/dim]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what is kept from build to build, or remove some of it. A build makes anew what it lacks."""
    from ..core.dtypes import parse_bytes
    from ..engines.cache.contents import contents, evict, remove
    from ..engines.cache.engine_cache import default_folder

    if clear and max_size is not None:
        raise InputError("--clear and --max-size exclude each other", fix="leave one away")
    where = folder or default_folder()
    removed: list[Item] = []
    if max_size is not None:
        removed = evict(where, parse_bytes(max_size))
    elif clear:
        removed = contents(where)
        remove(removed)
    kept = contents(where)
    if as_json:
        print_json({"folder": str(where), "kept": _facts(kept), "removed": _facts(removed)})
    else:
        _show(where, kept, removed, asked=clear or max_size is not None)


def _facts(items: Sequence[Item]) -> dict[str, Any]:
    return {
        "files": sum(len(item.files) for item in items),
        "bytes": sum(item.size_bytes for item in items),
        "items": [
            {
                "kind": item.kind,
                "files": [file.name for file in item.files],
                "bytes": item.size_bytes,
                "used": datetime.fromtimestamp(item.used).astimezone().isoformat(timespec="seconds"),
            }
            for item in items
        ],
    }


def _show(folder: Path, kept: Sequence[Item], removed: Sequence[Item], asked: bool) -> None:
    from ..core.dtypes import human_bytes

    console = Console()
    console.print(f"[bold]{folder}[/bold]", soft_wrap=True, highlight=False)
    table = Table("kept", "files", "bytes", "used last", box=None, pad_edge=False)
    for kind in dict.fromkeys(item.kind for item in kept):
        own = [item for item in kept if item.kind == kind]
        used = datetime.fromtimestamp(max(item.used for item in own)).isoformat(" ", timespec="minutes")
        size = human_bytes(sum(item.size_bytes for item in own))
        table.add_row(kind, str(sum(len(item.files) for item in own)), size, used)
    size, files = human_bytes(sum(item.size_bytes for item in kept)), sum(len(item.files) for item in kept)
    table.add_row("together", str(files), size, "")
    console.print(table)
    if asked:
        gone, freed = sum(len(item.files) for item in removed), sum(item.size_bytes for item in removed)
        console.print(f"removed {gone} files, {human_bytes(freed)}", highlight=False)
