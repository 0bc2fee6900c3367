"""What several commands share: arguments, JSON on stdout, a progress bar on stderr."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

BundlePath = Annotated[Path, typer.Argument(help="Folder made by `fastvar build`.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def print_json(data: dict[str, Any]) -> None:
    typer.echo(json.dumps(data, indent=2))


def progress_bar() -> Progress:
    """On stderr, so that stdout can be piped; silent where that is no terminal, gone when done."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    return Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal)
