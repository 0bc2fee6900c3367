"""`make bench`, `python -m benchmarks`: engines against eager torch on equal weights, text and noise.

No command of `fastvar`: it measures for this repository. Here the torch baselines (export/) and the measuring
(profiling/) meet, which know nothing of each other.
"""

from __future__ import annotations

import logging
import re
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.contenders import Entry, default_contenders, parse_contenders
from benchmarks.contest import Contest, Settings
from benchmarks.models import DEMO, MODELS, ROOT, SMALL, TINY, Engines, Model, Place
from benchmarks.records import Record
from benchmarks.tables import bench_table, breakdown_table
from fastvar.core.files import write_json, write_text
from fastvar.doctor import examine
from fastvar.errors import FastvarError, InputError
from fastvar.profiling.environment import FACTS

RESULTS = ROOT / "benchmarks" / "results"
SIZES = {DEMO: SMALL, TINY: SMALL}
LARGE_SIZES = {"cpu": "512x512,1024x1024", "cuda": "1024x1024,960x1920,2048x2048"}
DEFAULT_MODELS = {"cpu": "demo,infinity_layer12", "cuda": "infinity_2b"}
DEVICES = tuple(DEFAULT_MODELS)


def main(
    models: Annotated[
        str | None, typer.Option(help=f"Of {', '.join(MODELS)}; by commas. [default: by device]", show_default=False)
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(help="WIDTHxHEIGHT in pixels, by commas. [default: by model]", show_default=False)
    ] = None,
    contenders: Annotated[
        str | None,
        typer.Option(
            help="ENGINE:PRECISION[:POLICY] by commas; eager-dense, eager-pruned, or a backend. "
            "[default: those that this machine has]",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    policy: Annotated[str, typer.Option(help="Of backends that name none: a preset or a TOML file.")] = "fastvar",
    prompt_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens of the text, which engines are built for; the demo has a prompt.")
    ] = 64,
    runs: Annotated[
        int, typer.Option(min=1, help="Timed rounds, after one that warms up; three, where they take over two minutes.")
    ] = 5,
    dense_runs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Timed rounds of eager-dense. [default: --runs; 1 above a second]", show_default=False
        ),
    ] = None,
    decode_runs: Annotated[int, typer.Option(min=1, help="Runs of the decoder; one, where it takes over 10 s.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; the libraries' choice by default.")] = None,
    memory: Annotated[
        bool | None,
        typer.Option(help="Measure memory: each contender once more, in a fresh process. [default: on cuda]"),
    ] = None,
    prepare: Annotated[
        bool, typer.Option("--prepare", help="Build the engines and stop: the machine need not be quiet for that.")
    ] = False,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Record what stops a contender, and go on without it.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder of the JSON files, one a model.")] = RESULTS,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables there as well.")] = None,
) -> None:
    """Time contenders in turn, and compare them."""
    logging.basicConfig(format="%(message)s")
    try:
        memory = device == "cuda" if memory is None else memory
        settings = Settings(
            device, contenders_of(contenders, policy, device), runs, dense_runs, decode_runs, memory, keep_going
        )
        wanted = [Model(name, prompt_tokens) for name in _parts(models or DEFAULT_MODELS[device])]
        sizes_of = {model.name: checked_sizes(model, sizes, settings) for model in wanted}
        tables: list[str] = []
        if prepare:
            for model in wanted:
                build_engines_of(model, sizes_of[model.name], settings, Place(device, threads))
            return
        for model in wanted:
            record = bench(model, sizes_of[model.name], settings, Place(device, threads), out)
            tables += filter(None, (bench_table(record), breakdown_table(record)))
        if markdown is not None:
            write_text(markdown, "\n\n".join(tables) + "\n")
    except FastvarError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo("\n\n".join(tables))


def contenders_of(text: str | None, policy: str, device: str) -> dict[str, Entry]:
    """Those asked for; else the default ones, of which the missing are told.

    Raises:
        InputError: no such device, or a contender that is not understood.
    """
    if device not in DEVICES:
        raise InputError(f"no device {device!r}", expected=f"one of {', '.join(DEVICES)}")
    if text is None:
        text, missing = default_contenders(device)
        for name, why in missing.items():
            typer.echo(f"{name} is left out: {why}", err=True)
    return parse_contenders(text, policy)


def checked_sizes(model: Model, sizes: str | None, settings: Settings) -> list[str]:
    """Sizes of a model, each of which every policy must fit.

    Raises:
        PlanError: a size without a schedule, or a policy that does not fit it.
    """
    found = _parts(sizes or SIZES.get(model.name, LARGE_SIZES[settings.device]))
    for size in found:
        for entry in settings.entries.values():
            model.plan(size, entry.policy)
    return found


def _parts(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise InputError(f"{text!r} names nothing", expected="a list by commas")
    return parts


def build_engines_of(model: Model, sizes: list[str], settings: Settings, place: Place) -> None:
    """Into the engine cache, where a benchmark finds them."""
    with tempfile.TemporaryDirectory() as folder:
        engines = Engines(Path(folder), model, place)
        for size in sizes:
            for name, entry in settings.entries.items():
                if not entry.eager:
                    typer.echo(f"{size}: engines of {name}", err=True)
                    engines.bundle(entry, size)


def bench(model: Model, sizes: list[str], settings: Settings, place: Place, out: Path) -> Record:
    """Measure a model, size after size; the JSON file grows with each."""
    from benchmarks.eager import device_facts

    for engine in sorted({entry.engine for entry in settings.entries.values()}):
        place.prepare(engine, model)
    torch_facts, machine = device_facts(place.device), examine()
    record: Record = {
        "what": "engines against eager torch, batch 1, guidance on, equal weights, text and noise in every round; "
        "scales_ms is the transformer loop, text and decoder apart; flop are counted for the plan",
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {**{name: machine[name] for name in (*FACTS, "nvidia_driver", "packages")}, **torch_facts},
        "model": model.name,
        "settings": {
            **{name: value for name, value in vars(settings).items() if name != "entries"},
            "threads": place.threads,
            "weights": "demo checkpoint" if model.name == DEMO else f"random, seed {model.seed}",
            "text_length": model.text_length,
            "sampling": vars(model.settings),
        },
        "sizes": [],
    }
    path = out / f"bench-{model.name}-{_file_name(torch_facts.get('gpu', place.device))}.json"
    with tempfile.TemporaryDirectory() as folder:
        engines = Engines(Path(folder), model, place)
        for size in sizes:
            record["sizes"].append(Contest(model, size, settings, place, engines).measure())
            write_json(path, record)
    typer.echo(f"wrote {path}", err=True)
    return record


def _file_name(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


if __name__ == "__main__":
    typer.run(main)
