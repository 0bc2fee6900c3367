"""How much memory a build takes to read a checkpoint and to write a bundle's weights.

`python -m benchmarks.checkpoint_memory` writes random weights in the shapes of a published model as shards, then reads,
checks and writes them as a build does (`load_checkpoint`, `write_sources`), in a process of its own. Graphs and engines
are left out: their memory does not grow with the weights. What counts is anonymous memory. Pages of mapped files are
told besides: the system takes them back whenever it needs room.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.builder import RESULTS, ROOT
from fastvar.core.dtypes import human_bytes
from fastvar.core.files import write_json
from fastvar.core.precision import Precision
from fastvar.doctor import examine
from fastvar.errors import FastvarError, InputError

if TYPE_CHECKING:
    from fastvar.export.checkpoints.checkpoint import Checkpoint
    from fastvar.export.checkpoints.random_weights import RandomWeights

TOKENIZER = ROOT / "demo" / "checkpoint" / "text_encoder" / "tokenizer.json"
FOLDERS = {"infinity_2b": "infinity_2b_reg", "infinity_8b": "infinity_8b_weights"}  # as published
IMAGE_TOKENIZERS = {"infinity_2b": "infinity_vae_d32reg", "infinity_8b": "infinity_vae_d56_f8_14_patchify"}
PLAIN_FOLDER = "transformer"  # of other models
BYTES = 2  # of a number in these checkpoints
SAMPLE_SECONDS = 0.005
SHARE_OF_SHARD, ALLOWANCE = 1.3, 2 << 30  # what reading may take: so much of the largest shard, and so many bytes


@dataclass(frozen=True)
class Peak:
    """The most that a process held, in bytes."""

    before: int  # anonymous, with all libraries imported
    anonymous: int
    resident: int  # pages of mapped files included
    seconds: float


@dataclass(frozen=True)
class Measured:
    """One model in one format."""

    model: str
    format: str
    shards: int
    largest_shard: int
    checkpoint_bytes: int  # text encoder and image tokenizer included
    weight_bytes: int  # of the bundle
    precision: str
    loading: Peak
    writing: Peak

    @property
    def bound(self) -> int:
        return int(SHARE_OF_SHARD * self.largest_shard) + ALLOWANCE

    @property
    def anonymous(self) -> int:
        return max(self.loading.anonymous, self.writing.anonymous)


def main(
    models: Annotated[str, typer.Option(help="Names of `fastvar sizes --help`, by commas.")] = "infinity_2b",
    formats: Annotated[str, typer.Option(help="pickle, safetensors, or both by commas.")] = "pickle,safetensors",
    shard: Annotated[str, typer.Option(help="Bytes of a shard at most.")] = "2GiB",
    precision: Annotated[str, typer.Option(help="Precision of the bundle's weights.")] = "bf16",
    folder: Annotated[Path | None, typer.Option(help="Where the temporary files go.", show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="Record, added to.")] = RESULTS / "checkpoint-memory.json",
) -> None:
    """Measure, print, and write a record; exit code 1 where a bound is broken."""
    from fastvar.core.dtypes import parse_bytes
    from fastvar.core.precision import parse_precision

    found = []
    for model in models.split(","):
        for form in formats.split(","):
            if form not in ("pickle", "safetensors"):
                raise InputError(f"no format {form!r}", expected="pickle or safetensors")
            with tempfile.TemporaryDirectory(dir=folder) as place:
                chosen = parse_precision(precision, None)
                found.append(measured(Path(place), model, form == "pickle", parse_bytes(shard), chosen))
            told(found[-1])
    _record(out, found)
    if any(one.anonymous > one.bound for one in found):
        raise typer.Exit(1)


def measured(place: Path, model: str, pickled: bool, shard_bytes: int, precision: Precision) -> Measured:
    """Write a random checkpoint, read it in a fresh process, and clear it away."""
    source = write_checkpoint(place / "checkpoint", model, pickled, shard_bytes)
    shards = [path for path in source.rglob("*") if re.search(r"-\d+-of-\d+\.", path.name)]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        loading, writing = pool.submit(read_and_write, source, place / "weights.safetensors", precision).result()
    found = Measured(
        model,
        "pickle" if pickled else "safetensors",
        len(shards),
        max(path.stat().st_size for path in shards),
        sum(path.stat().st_size for path in source.rglob("*") if path.is_file()),
        (place / "weights.safetensors").stat().st_size,
        precision.label,
        loading,
        writing,
    )
    shutil.rmtree(source)
    return found


def write_checkpoint(folder: Path, model: str, pickled: bool, shard_bytes: int) -> Path:
    """A published model's folder with random weights in bfloat16."""
    import torch

    from fastvar.export.checkpoints.random_weights import RandomWeights, random_checkpoint

    checkpoint = random_checkpoint(model, text_encoder=True, dtype=torch.bfloat16)
    weights = checkpoint.transformer_weights
    assert isinstance(weights, RandomWeights)
    _write_shards(folder / FOLDERS.get(model, PLAIN_FOLDER), weights, pickled, shard_bytes)
    images = folder / f"{IMAGE_TOKENIZERS.get(model, 'image_tokenizer')}.pth"
    torch.save({"vae": dict(checkpoint.image_tokenizer_weights)}, images)
    _write_text_encoder(folder / "text_encoder", checkpoint, shard_bytes)
    return folder


def _write_text_encoder(folder: Path, checkpoint: Checkpoint, shard_bytes: int) -> None:
    from fastvar.export.checkpoints.random_weights import RandomWeights

    weights = checkpoint.text_encoder_weights
    if checkpoint.text_encoder is None or not isinstance(weights, RandomWeights):
        return
    _write_shards(folder, weights, False, shard_bytes)
    checkpoint.text_encoder.save_pretrained(folder)
    shutil.copy(TOKENIZER, folder / "tokenizer.json")


def _write_shards(folder: Path, state: RandomWeights, pickled: bool, shard_bytes: int) -> None:
    """As transformers splits a state dict; one shard in memory at a time."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    stem, suffix = ("pytorch_model", ".bin") if pickled else ("model", ".safetensors")
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in state.shapes.items():
        size = math.prod(shape) * BYTES
        if filled + size > shard_bytes and groups[-1]:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    places: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        file = f"{stem}-{number:05}-of-{len(groups):05}{suffix}"
        part = {name: state[name] for name in names}
        torch.save(part, folder / file) if pickled else save_file(part, folder / file)
        places |= dict.fromkeys(names, file)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": places}))


def read_and_write(source: Path, out: Path, precision: Precision) -> tuple[Peak, Peak]:
    """What a build does with a checkpoint and its weights, and the memory that either took."""
    import transformers  # noqa: F401  a library's own memory is no part of what is read

    from fastvar.export.checkpoints.checkpoint import load_checkpoint
    from fastvar.export.checkpoints.weight_sources import engine_weights, preview_weights, write_sources

    with _watched() as loading:
        checkpoint = load_checkpoint(source)
    with _watched() as writing:
        sources = engine_weights(checkpoint, True, precision) | preview_weights(checkpoint)
        write_sources(out, sources, precision)
    return loading[0], writing[0]


@contextmanager
def _watched() -> Iterator[list[Peak]]:
    """Peaks of this process while the block runs, read often by a thread."""
    found: list[Peak] = []
    most = {"RssAnon": 0, "VmRSS": 0}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLE_SECONDS):
            for field, size in _status().items():
                most[field] = max(most[field], size)

    before, started = _status()["RssAnon"], time.perf_counter()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()
    found.append(Peak(before, most["RssAnon"], most["VmRSS"], round(time.perf_counter() - started, 1)))


def _status() -> dict[str, int]:
    """Bytes that this process holds, from Linux."""
    text = Path("/proc/self/status").read_text()
    return {name: int(size) << 10 for name, size in re.findall(r"^(RssAnon|VmRSS):\s+(\d+) kB$", text, re.MULTILINE)}


def told(one: Measured) -> None:
    """One line a model."""
    typer.echo(
        f"{one.model}, {one.shards} shards ({one.format}) of {human_bytes(one.largest_shard)} at most: anonymous "
        f"{human_bytes(one.anonymous)} of {human_bytes(one.bound)} allowed; with mapped files "
        f"{human_bytes(max(one.loading.resident, one.writing.resident))}; read in {one.loading.seconds} s, written in "
        f"{one.writing.seconds} s"
    )


def _record(out: Path, found: list[Measured]) -> None:
    """Add to the record, in place of older figures of the same models and formats."""
    rows = [{**asdict(one), "bound": one.bound, "anonymous": one.anonymous} for one in found]
    new = {(row["model"], row["format"]) for row in rows}
    old = json.loads(out.read_text())["measured"] if out.exists() else []
    facts = examine()
    kept = [row for row in old if (row["model"], row["format"]) not in new]
    write_json(
        out,
        {
            "measured": kept + rows,
            "machine": {name: facts[name] for name in ("cpu", "cpu_cores", "memory_bytes", "python", "platform")},
            "date": datetime.now(timezone.utc).date().isoformat(),
        },
    )


if __name__ == "__main__":
    try:
        typer.run(main)
    except FastvarError as error:
        raise SystemExit(f"error: {error}") from None
