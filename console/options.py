"""What several commands share: arguments, JSON and tables on stdout, a progress bar on stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from ..errors import InputError
from ..hub.reference import is_reference
from .streams import check_printed, tell

BundlePath = Annotated[
    Path, typer.Argument(help="Folder made by `fastvar build`, or hub:ORG/NAME for one on a hub.", show_default=False)
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run native code of a bundle that came from a hub: it can do anything here."
    ),
]
RequireSignature = Annotated[
    Path | None,
    typer.Option(
        "--require-signature",
        metavar="FILE",
        help="Public Ed25519 key in PEM: refuse a bundle that its owner did not sign. See `fastvar sign`.",
    ),
]
Batch = Annotated[
    str,
    typer.Option(
        metavar="N,...",
        help="How many images one pass may draw: engines for each of these numbers beside one. Weights are stored "
        "once. [dim]default: 1[/dim]",
        show_default=False,
    ),
]
Offline = Annotated[
    bool, typer.Option("--offline", help="Of hub:ORG/NAME, take what was downloaded before, and ask nobody.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def given_parameters(context: typer.Context) -> list[str]:
    """Names of the parameters that the user gave, rather than leave to their defaults."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    # By name: newer versions of typer bring a click of their own, older ones import it.
    return [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


def batch_sizes(text: str) -> tuple[int, ...]:
    """The numbers of --batch.

    Raises:
        InputError: no list of numbers.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and int(part[:9]) > 0 for part in parts):
        raise InputError(f"--batch {text!r} not understood", expected="numbers of images, as 1,2,4")
    return tuple(int(part[:9]) for part in parts)


def as_typed(parameter: str) -> str:
    """A parameter as the user wrote it."""
    return "CHECKPOINT" if parameter == "checkpoint" else f"--{parameter.replace('_', '-')}"


def check_there(checkpoint: Path, expected: str) -> None:
    """Whether a checkpoint that the command line names is on this disk; a name of the hub is not looked up.

    Raises:
        InputError: there is nothing of that name.
    """
    if not is_reference(checkpoint) and not checkpoint.exists():
        raise InputError(f"no checkpoint {checkpoint}", expected=expected, fix="check the path")


def local_bundle(bundle: Path) -> Path:
    """The folder of a bundle that the command line names; downloaded where it is on a hub.

    Raises:
        HubError, BundleError: it cannot be, or is no bundle.
    """
    if not is_reference(bundle):
        return bundle
    from ..engines.bundle.hub_bundle import found_bundle

    return found_bundle(str(bundle))


def print_json(data: dict[str, Any]) -> None:
    tell(json.dumps(data, indent=2))
    check_printed()


def print_tables(*tables: RenderableType) -> None:
    """Show tables and lines, for commands whose product they are."""
    Console().print(*tables, sep="\n")
    check_printed()


def progress_bar(*last: ProgressColumn) -> Progress:
    """On stderr, so that stdout can be piped; silent where that is no terminal, gone when done.

    `last`: columns in place of the time that it has taken.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    return Progress(
        *columns,
        *(last or (TimeElapsedColumn(),)),
        console=console,
        transient=True,
        # What is printed meanwhile goes above the bar where both are on a terminal, else to where stdout leads.
        redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
        disable=not console.is_terminal,
    )
