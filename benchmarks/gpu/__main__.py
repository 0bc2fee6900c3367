"""`make gpu`, `python -m benchmarks.gpu`: what a GPU can show in the minutes that it is there for.

Sections run one after another, the one that tells most in a minute first. Each measurement is a line of a journal as
soon as it is made, so that a day that was cut goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.builder import ROOT
from benchmarks.gpu import install
from benchmarks.gpu.day import Day, end_with_parent
from benchmarks.gpu.identity import Identity, identify
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.sections import (
    JOURNAL,
    LOGS,
    SECTIONS,
    Section,
    context_of,
    digest_of,
    section_named,
)
from benchmarks.gpu.summary import record_of, text_of, write_record
from fastvar.engines.aotinductor.stand_in_gpu import environment, is_stood_in
from fastvar.errors import FastvarError
from fastvar.profiling.memory_run import run_apart

MODEL = "infinity_2b"
WORK = {False: ROOT / "build" / "gpu", True: ROOT / "build" / "gpu-stand-in"}
StandIn = Annotated[
    str | None, typer.Option("--stand-in", help="Rehearse on a GPU that is not there, of this generation: sm90.")
]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def day(
    context: typer.Context,
    seconds: Annotated[float, typer.Option(min=1, help="For all sections together.")] = 840,
    work: Annotated[
        Path | None, typer.Option(help="Folder of journal, logs and bundles. [default: build/gpu]", show_default=False)
    ] = None,
    model: Annotated[str, typer.Option(help="Model that is timed, with random weights.")] = MODEL,
    stretch: Annotated[
        float, typer.Option(min=0.01, help="Multiplies every time box: for machines of fewer cores than 16.")
    ] = 1,
    only: Annotated[str, typer.Option(help="Sections by commas; all by default.")] = "",
    copy_to: Annotated[
        Path | None, typer.Option(help="Folder that journal and logs are copied to after every section.")
    ] = None,
    stand_in: StandIn = None,
    summary: Annotated[bool, typer.Option("--summary", help="Measure nothing: the record of the journal.")] = False,
) -> None:
    """Measure a GPU, or go on with it."""
    if context.invoked_subcommand is not None:
        return
    with_stand_in(stand_in)
    work = (work or WORK[is_stood_in()]).resolve()
    journal, failed = Journal(work / JOURNAL), []
    if not summary:
        identity = run_apart("asked torch for its GPU", identify, model)
        named = [section_named(name) for name in only.split(",")] if only else SECTIONS
        sections = [replace(section, seconds=section.seconds * stretch) for section in named]
        failed = Day(
            journal,
            command=lambda section: section_command(section, work, identity),
            digest=lambda section: digest_of(section, identity),
            logs=work / LOGS,
            after=lambda: copy_record(work, copy_to),
        ).run(sections, seconds)
    lines = journal.lines()
    record = record_of(lines)
    print(text_of(record))
    written = write_record(lines)
    print(f"wrote {written}" if written else "no record is written: a stand-in measured")
    raise typer.Exit(1 if failed or record["failed"] else 0)


@app.command()
def section(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(s.name for s in SECTIONS)}.")],
    work: Annotated[Path, typer.Option(help="As above.")],
    identity: Annotated[str, typer.Option(help="What was found of the machine, JSON.")],
    lifeline: Annotated[bool, typer.Option("--lifeline", help="End when stdin is closed.")] = False,
) -> None:
    """One section in this process; the day calls it."""
    if lifeline:
        end_with_parent()
    os.environ.update(install.linker_variables(work / "lib"))
    wanted = section_named(name)
    context = context_of(work, wanted, Identity(**json.loads(identity)))
    import_module(f"benchmarks.gpu.measured.{wanted.module}").measure(context)
    if context.log.failed:
        print(f"failed: {', '.join(context.log.failed)}", flush=True)
        raise typer.Exit(1)


@app.command()
def pack(
    out: Annotated[Path, typer.Option(help="Cache folder that is written.")] = ROOT / "dist" / "gpu" / "cache",
    model: Annotated[str, typer.Option(help="Model that will be timed.")] = MODEL,
    capability: Annotated[str, typer.Option(help="Of the GPU that the engines are for.")] = "sm90",
) -> None:
    """Compile all engines of the day beforehand, without a GPU, with a CUDA build of the torch that its machine has."""
    from benchmarks.gpu.pack import pack as pack_recipes
    from benchmarks.gpu.recipes import recipes

    pack_recipes(list(recipes(model, capability)), out.resolve())


def section_command(section: Section, work: Path, identity: Identity) -> list[str]:
    arguments = ["--work", str(work), "--identity", json.dumps(asdict(identity)), "--lifeline"]
    return [sys.executable, "-m", "benchmarks.gpu", "section", section.name, *arguments]


def with_stand_in(capability: str | None) -> None:
    """Begin this program anew in a process that a GPU seems to be in."""
    if capability is None or is_stood_in():
        return
    import torch

    variables = {**os.environ, **environment(torch, capability)}
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:]], variables)


def copy_record(work: Path, folder: Path | None) -> None:
    """What must not be lost with the machine: journal and logs, not the bundles."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for path in [work / JOURNAL, *(work / LOGS).glob("*.log")]:
        if path.is_file():
            shutil.copy(path, folder)


def main() -> None:
    try:
        app()
    except FastvarError as error:
        print(f"error: {'; '.join(str(error).splitlines())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
