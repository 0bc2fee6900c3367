"""`make bench-batches`, `python -m benchmarks.batches`: milliseconds an image in passes of one and of several images.

Passes of each size take turns in one process. Bundles are built beforehand and kept (`--build-only` builds and ends).
Launches are counted from the plan, which is all that is known of a GPU here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.contenders import EngineContender, Entry, parse_contenders
from benchmarks.models import DEMO, GUIDANCE_ROWS, ROOT, SMALL, TARGETS, Model, Place, build_engines
from benchmarks.peers import Watch
from benchmarks.tables import markdown_table, placed_in
from benchmarks.timing import TOLERANCES, Run, forced_logits, timed_in_turn, token_error
from fastvar.core.files import write_json, write_text
from fastvar.core.precision import Precision
from fastvar.doctor import examine
from fastvar.engines.bundle.bundle import Bundle, is_bundle
from fastvar.engines.bundle.manifest import Manifest
from fastvar.engines.registry import backend_class
from fastvar.errors import BuildError, FastvarError, InputError, NumericsError
from fastvar.export.describe import describe
from fastvar.profiling.environment import FACTS
from fastvar.profiling.estimates.passes import pass_launches
from fastvar.profiling.memory_run import run_apart
from fastvar.runtime.memory.layout import build_layout

RESULTS, BUNDLES = ROOT / "benchmarks" / "results", ROOT / "build" / "batches"
MODELS = "demo,infinity_layer12"
ENGINES = "onnxruntime:fp32,aotinductor:bf16"
BATCHES, PREDICTED = (1, 2, 4), (1, 2, 4, 8)  # images of a pass: that are timed, and whose launches are counted
ON_GPUS = {"infinity_2b": "1024x1024"}  # of which launches are counted, and nothing is drawn
BEGIN, END = "<!-- passes: made by `make bench-batches` -->", "<!-- passes: end -->"

Record = dict[str, Any]


def main(
    models: Annotated[str, typer.Option(help="By commas.")] = MODELS,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT in pixels.")] = SMALL,
    engines: Annotated[str, typer.Option(help="BACKEND:PRECISION by commas.")] = ENGINES,
    policy: Annotated[str, typer.Option(help="A preset or a TOML file.")] = "fastvar",
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text; the demo has a prompt.")] = 64,
    runs: Annotated[int, typer.Option(min=1, help="Timed rounds, after one that warms up.")] = 5,
    decode_runs: Annotated[int, typer.Option(min=1, help="Rounds of these that run the decoder too.")] = 2,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; the libraries' choice by default.")] = None,
    bundles: Annotated[Path, typer.Option(help="Folder of the bundles, which stay there.")] = BUNDLES,
    build_only: Annotated[bool, typer.Option("--build-only", help="Build what is missing, and time nothing.")] = False,
    out: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "batches-cpu.json",
    docs: Annotated[Path | None, typer.Option(help="Page whose table is written anew.")] = None,
) -> None:
    """Time passes of one, two and four images in turn."""
    try:
        entries = engine_entries(engines, policy)
        wanted = [Model(name, prompt_tokens, batch=BATCHES) for name in models.split(",")]
        places = {(m, e): bundle_of(m, entry, size, bundles) for m in wanted for e, entry in entries.items()}
        if build_only:
            return
        record = begin(runs, threads, size)
        for (model, name), path in places.items():
            record["passes"].append(measure(model, name, path, Place("cpu", threads), runs, decode_runs))
            write_json(out, record)
        typer.echo(f"wrote {out}", err=True)
        table = tables(record)
        if docs is not None:
            write_text(docs, placed_in(docs.read_text(encoding="utf-8"), table, BEGIN, END))
    except FastvarError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(table)


def engine_entries(text: str, policy: str) -> dict[str, Entry]:
    """The backends asked for.

    Raises:
        InputError: not understood, or eager torch, which draws one image at a time.
    """
    entries = parse_contenders(text, policy)
    for name, entry in entries.items():
        if entry.eager:
            raise InputError(f"{name} draws one image at a time", expected="backends")
    return entries


def begin(runs: int, threads: int | None, size: str) -> Record:
    machine = examine()
    return {
        "what": "passes of several images in turn in one process, guidance on, images of a pass alike but for their "
        "place; ms an image is the median of a pass's divided by its images; load and the share of all cores that "
        "other processes had are of each measurement; launches are counted from the plan",
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {name: machine[name] for name in (*FACTS, "packages")},
        "size": size,
        "runs": runs,
        "threads": threads,
        "passes": [],
        "launches": {name: launches_of(Model(name, 2), size) for name, size in {DEMO: SMALL, **ON_GPUS}.items()},
    }


def bundle_of(model: Model, entry: Entry, size: str, folder: Path) -> Path:
    """The bundle of a model and a backend, built in a process of its own where it is not there.

    Raises:
        BuildError: the backend builds nothing for CPUs.
    """
    target = TARGETS["cpu"].get(entry.engine)
    if target is None:
        raise BuildError(f"{entry.engine} builds nothing for CPUs")
    name = f"{model.name}-{entry.engine}-{entry.precision}-{entry.policy}-{size}-t{model.text_length}"
    out = folder / name.replace("/", "-")
    if not is_bundle(out):
        folder.mkdir(parents=True, exist_ok=True)
        typer.echo(f"building {out.name}", err=True)
        run_apart(f"built {out.name}", build_engines, model, entry, size, target, out, None)
    return out


def measure(model: Model, name: str, path: Path, place: Place, runs: int, decode_runs: int) -> Record:
    """One model on one backend: passes of each size compared with one image, then timed in turn."""
    bundle, text = Bundle.open(path), model.text()
    contenders = {
        str(images): EngineContender(bundle, text, model.settings, place.threads, images=images) for images in BATCHES
    }
    precision = name.split(":")[1]
    errors = {own: require_alike(contenders["1"], contender, precision) for own, contender in contenders.items()}
    typer.echo(f"timing {model.name}, {name}", err=True)
    with Watch() as watch:
        timed = timed_in_turn(contenders, runs, decode_runs=decode_runs)
    return {
        "model": model.name,
        "engines": name,
        "policy": bundle.manifest.plan.policy.name,
        "text_length": bundle.manifest.text_length,
        "load_before": watch.found.load,
        "share_of_others": watch.found.share,
        "batches": {own: pass_record(int(own), timed[own]) | {"error_against_alone": errors[own]} for own in timed},
        "times_one_image": {own: paired_ratio(timed["1"], timed[own], int(own)) for own in timed if own != "1"},
    }


def require_alike(alone: EngineContender, several: EngineContender, precision: str) -> float:
    """Relative error of the median token at the worst scale, on equal forced bits.

    Raises:
        NumericsError: more than rounding explains: what was timed would be something else.
    """
    pairs = zip(forced_logits(several), forced_logits(alone), strict=True)
    error = max(token_error(found, np.repeat(one, several.images, axis=0)) for found, one in pairs)
    if not error <= TOLERANCES[precision]:
        raise NumericsError(
            f"images of a pass of {several.images} are others than alone: the median token is off by {error:.2g}",
            expected=f"at most {TOLERANCES[precision]:g}",
        )
    return error


def pass_record(images: int, runs: Sequence[Run]) -> Record:
    """Medians of a pass, divided by its images."""
    decoded = [run.decode_ms for run in runs if run.decode_ms is not None]
    scales = [run.scales_ms / images for run in runs]
    text, decode = median(run.text_ms for run in runs) / images, median(decoded) / images
    return {
        "images": images,
        "text_ms": text,
        "scales_ms": median(scales),
        "scales_ms_spread": [min(scales), max(scales)],
        "decode_ms": decode,
        "image_ms": text + median(scales) + decode,
        "scale_ms": [median(run.scale_ms[i] for run in runs) / images for i in range(len(runs[0].scale_ms))],
    }


def paired_ratio(alone: Sequence[Run], several: Sequence[Run], images: int) -> Record:
    """How many times faster the scales of an image are in a pass, round by round."""
    found = [a.scales_ms * images / b.scales_ms for a, b in zip(alone, several, strict=True)]
    return {"median": median(found), "min": min(found), "max": max(found)}


def launches_of(model: Model, size: str) -> list[Record]:
    """Launches of passes of each size with guidance on, counted from a bundle that is described and not built."""
    return [
        {**vars(found), "engines_an_image": found.engines_an_image, "recorded_an_image": found.recorded_an_image}
        for found in (pass_launches(m, build_layout(m, GUIDANCE_ROWS, n)) for m, n in _described(model, size))
    ]


def _described(model: Model, size: str) -> list[tuple[Manifest, int]]:
    backend, options = backend_class("onnxruntime"), replace(model.options, batch=PREDICTED)
    manifest = describe(model.checkpoint(), model.plan(size, "fastvar"), backend, Precision(), options)
    return [(manifest, images) for images in PREDICTED]


def tables(record: Record) -> str:
    """Milliseconds an image, then launches, as Markdown."""
    head = ["model", "engines", *(f"{n} in a pass, ms an image: scales / whole" for n in BATCHES)]
    head += [f"scales of {n}, times as fast" for n in BATCHES[1:]]
    rows = [_time_cells(found) for found in record["passes"]]
    busy = [found["share_of_others"] for found in record["passes"] if found["share_of_others"] is not None]
    quiet = f" Other processes had at most {max(busy):.0%} of the cores meanwhile." if busy else ""
    counted = ["model", *(f"{n} in a pass" for n in PREDICTED)]
    launches = [
        [name, *(f"{own['engines_an_image']:,.0f} / {own['recorded_an_image']:.3g}" for own in found)]
        for name, found in record["launches"].items()
    ]
    return "\n\n".join(
        (
            markdown_table(head, rows),
            f"{record['size']}, guidance on, medians of {record['runs']} rounds in turn.{quiet}",
            "Launches an image, counted from the plan: engine by engine / each scale recorded as one, as on a GPU.",
            markdown_table(counted, launches),
        )
    )


def _time_cells(found: Record) -> list[str]:
    batches: Mapping[str, Record] = found["batches"]
    ratios = (found["times_one_image"][str(n)] for n in BATCHES[1:])
    return [
        found["model"],
        found["engines"],
        *(f"{own['scales_ms']:,.1f} / {own['image_ms']:,.1f}" for own in batches.values()),
        *(f"{r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f})" for r in ratios),
    ]


if __name__ == "__main__":
    typer.run(main)
