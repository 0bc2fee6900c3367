"""`fastvar profile`: where the milliseconds and the bytes go."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from ..console.options import (
    AsJson,
    BundlePath,
    RequireSignature,
    TrustRemoteCode,
    local_bundle,
    print_json,
    progress_bar,
)
from ..console.streams import tell


def profile(
    bundle: BundlePath,
    prompt: Annotated[
        str | None,
        typer.Option(help="What to draw. [dim]default: a red circle above a blue square[/dim]", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the image, the same in every run.")] = 0,
    runs: Annotated[int, typer.Option(min=1, help="Timed images; as many again launch by launch.")] = 10,
    warm_up: Annotated[int, typer.Option("--warm-up", min=1, help="Images drawn before, and not counted.")] = 2,
    against: Annotated[
        Path | None,
        typer.Option(help="Another bundle of the same model and size, dense say: the two take turns."),
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance-scale", "--cfg", help="Classifier-free guidance. [dim]bundle's[/dim]")
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Images of a pass, drawn with seeds in a row; times are those of all of them.")
    ] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads. [dim]default: the library's choice[/dim]")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Memory budget that the peak is held against: 15GiB, 900MiB.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the report. [dim]default: profile-BUNDLE[/dim]"),
    ] = None,
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
    require_signature: RequireSignature = None,
) -> None:
    """Measure latency, arithmetic, memory and kept tokens per scale; writes an HTML report, JSON, CSV and a trace."""
    from ..console.profile_tables import stage_table, summary_lines
    from ..core.dtypes import parse_bytes
    from ..engines.bundle.bundle import Bundle
    from ..profiling.profile import profile as measure
    from ..profiling.records import Request
    from ..profiling.report.files import check_folder, to_json, write

    budget = parse_bytes(memory) if memory is not None else None
    request = Request(prompt, seed, runs, warm_up, guidance_scale, threads, budget, batch)
    read = partial(Bundle.open, trust_remote_code=trust_remote_code, require_signature=require_signature)
    opened = read(local_bundle(bundle))
    other = read(local_bundle(against)) if against is not None else None
    folder = out or Path(f"profile-{bundle.resolve().name}")
    check_folder(folder)
    with progress_bar() as progress:
        found = measure(opened, request, against=other, progress=_on_run(progress))
    written = write(found, folder)
    if as_json:
        print_json(to_json(found))
        return
    Console().print(stage_table(found))
    for line in (*summary_lines(found), f"wrote {', '.join(str(path) for path in written)}"):
        tell(line)


def _on_run(progress: Progress) -> Callable[[str, int, int], None]:
    task = progress.add_task("memory", total=None)

    def tell(what: str, done: int, total: int) -> None:
        progress.update(task, description=what, completed=done, total=total)

    return tell
