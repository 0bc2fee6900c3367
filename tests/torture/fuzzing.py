"""Mutated files of every kind that fastvar reads: each is refused in words, or read; nothing crashes or hangs.

A trial is a pure function of its seed, so a failure is found again by kind and seed.
"""

from __future__ import annotations

import json
import random
import re
import signal
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from fastvar.errors import FastvarError
from tests.torture.children import run_child
from tests.torture.models import Workshop

TRIAL_SECONDS = 20
SHOWN = 5  # failures of a kind that are told in full
# Refused or read alike; the rest is a failure.
GOOD = {"refused", "same", "read"}
Trial = Callable[[random.Random], str]


@dataclass(eq=False)
class Kind:
    """What is mutated: `prepare` makes, in a child, the function that runs a trial and says how it ended."""

    name: str
    prepare: Callable[[], Trial]
    results: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)


def campaign(kind: Kind, trials: int, seed: int, folder: Path, chunk: int = 500) -> dict[str, Any]:
    """Run trials in children, a chunk each; one that crashes or hangs costs only itself."""
    start, next_trial = time.perf_counter(), 0
    log = folder / f"{kind.name}.log"
    while next_trial < trials:
        log.write_text("")
        last = min(next_trial + chunk, trials)
        outcome = run_child(lambda a=next_trial, b=last: _trials(kind, range(a, b), seed, log), timeout=3600)
        entries = [json.loads(line) for line in log.read_text().splitlines()]
        done = [e for e in entries if "result" in e]
        for entry in done:
            _count(kind, entry)
        next_trial += len(done)
        if outcome.kind != "done":
            how = "hung" if str(outcome.value).endswith(f"status {int(signal.SIGALRM)}") else "crashed"
            if not entries:
                raise RuntimeError(f"{kind.name} cannot be tried: {outcome.value}")
            _count(kind, {"trial": next_trial, "result": how, "why": outcome.value})
            next_trial += 1
    bad = sum(count for result, count in kind.results.items() if result not in GOOD)
    return {
        "trials": trials,
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 1),
        "found": dict(kind.results),
        "bad": bad,
        "failures": kind.failures[:SHOWN],
    }


def _count(kind: Kind, entry: dict[str, Any]) -> None:
    kind.results[entry["result"]] += 1
    if entry["result"] not in GOOD:
        kind.failures.append(entry)


def _trials(kind: Kind, numbers: range, seed: int, log: Path) -> None:
    trial = kind.prepare()
    with log.open("a", buffering=1) as file:
        for number in numbers:
            file.write(json.dumps({"trial": number}) + "\n")
            signal.alarm(TRIAL_SECONDS)  # unanswered, it ends the child
            why = None
            try:
                result = trial(random.Random(f"{kind.name} {seed} {number}"))
            except FastvarError:
                result = "refused"
            except Exception as error:  # noqa: BLE001 this is what campaigns look for
                import traceback

                frames = traceback.extract_tb(error.__traceback__)[-3:]
                where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))
                result, why = "raised", f"{type(error).__name__}: {str(error)[:200]} ({where})"
            signal.alarm(0)
            file.write(json.dumps({"trial": number, "result": result, "why": why}) + "\n")


# How bytes and text are damaged


def damaged(data: bytes, rng: random.Random, head: int | None = None) -> bytes:
    """Bytes flipped, cut, doubled, filled or replaced at random; within the first `head` bytes if given."""
    found, limit = bytearray(data), min(len(data), head or len(data))
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(max(1, min(limit, len(found))))
        match rng.randrange(6):
            case 0:
                found[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                found[at : at + 1] = bytes([(found[at] if at < len(found) else 0) ^ 1 << rng.randrange(8)])
            case 2:
                del found[at : at + rng.choice((1, 2, 8, 64, len(found)))]
            case 3:
                found[at:at] = found[at : at + rng.choice((1, 8, 64))]
            case 4:
                found[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31 - 1, 2**32, 2**63 - 1, 2**64 - 1)))
            case _:
                found[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 4, 32))))
    return bytes(found)


NUMBERS = (
    "0",
    "-1",
    "1e308",
    "nan",
    "inf",
    "0.5",
    "2",
    "999999999999999999999",
    "true",
    "''",
    "[]",
    "{}",
    "1979-05-27",
)


def damaged_text(text: str, rng: random.Random) -> str:
    """Numbers, words and lines of a text replaced, dropped or doubled at random."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        lines = text.splitlines() or [""]
        at = rng.randrange(len(lines))
        match rng.randrange(5):
            case 0:
                lines[at] = re.sub(r"[\d.]+", lambda _: rng.choice(NUMBERS), lines[at], count=1)
            case 1:
                del lines[at]
            case 2:
                lines.insert(rng.randrange(len(lines) + 1), lines[at])
            case 3:
                words = (lines[at][::-1], "scale", "keep", "x" * 300)
                lines[at] = re.sub(r"\w+", lambda _, w=words: rng.choice(w), lines[at], count=1)
            case _:
                spot = rng.randrange(len(lines[at]) + 1)
                lines[at] = lines[at][:spot] + rng.choice("\0\x7f\ud7ff[]{}=#\"'\\\t") + lines[at][spot:]
        text = "\n".join(lines)
    return text


# What is damaged


def bundles(shop: Workshop, checksum: str) -> Kind:
    """manifest.json of a bundle, a leaf at a time: with the checksum as it was, left out, or made to fit."""

    def prepare() -> Trial:
        from fastvar import Pipeline
        from tests.mutations import CHECKSUM, ERROR, SAME, mutations, outcome, sealed

        folder = shop.empty(f"mutated-{checksum}") / "bundle"
        shop.build(folder)
        document = json.loads((folder / "manifest.json").read_text())
        every = list(mutations(document))

        def draw(path: Path) -> bytes:
            with Pipeline.load(path, threads=1) as pipe:
                return pipe("a red circle", seed=7).images[0].tobytes()

        right = draw(folder)

        def trial(rng: random.Random) -> str:
            changed = rng.choice(every).applied_to(document)
            if checksum == "absent":
                changed.pop(CHECKSUM, None)
            elif checksum == "fitting":
                changed = sealed(changed)
            return {ERROR: "refused", SAME: "same"}.get(outcome(folder, changed, draw, right), "another image")

        return trial

    return Kind(f"bundle.{checksum}", prepare)


def checkpoints(shop: Workshop, form: str) -> Kind:
    """A transformer as .safetensors or as a torch pickle."""

    def prepare() -> Trial:
        import torch
        from safetensors.torch import save_file

        from fastvar.export.checkpoints.checkpoint import load_transformer
        from tests.mutations import mutations

        folder = shop.empty(form)
        path = folder / ("w.safetensors" if form == "safetensors" else "w.pth")
        weights = {name: tensor.contiguous() for name, tensor in shop.checkpoint.transformer_weights.items()}
        if form == "safetensors":
            save_file(weights, path)
        else:
            torch.save(weights, path)
        whole = path.read_bytes()
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        # Numbers of a checkpoint carry no digest: what describes them is damaged, and the file is cut.
        head = 8 + int.from_bytes(whole[:8], "little") if form == "safetensors" else None
        load_transformer(path)  # undamaged it is read

        described = list(mutations(json.loads(whole[8:head]))) if head else []

        def trial(rng: random.Random) -> str:
            if described and rng.random() < 0.7:
                text = json.dumps(rng.choice(described).applied_to(json.loads(whole[8:head]))).encode()
                path.write_bytes(len(text).to_bytes(8, "little") + text + whole[head:])
            else:
                path.write_bytes(damaged(whole, rng, head))
            _, found = load_transformer(path)
            return "read" if {n: tuple(t.shape) for n, t in found.items()} == shapes else "other model"

        return trial

    return Kind(f"checkpoint.{form}", prepare)


def policies(shop: Workshop) -> Kind:
    """A policy file, read and planned."""

    def prepare() -> Trial:
        from fastvar.families import family_of

        path, text = shop.empty("policies") / "policy.toml", shop.policies["half"].read_text()
        transformer = shop.checkpoint.transformer
        family = family_of(transformer)
        schedule = family.schedule_for(family.size("256x256", transformer), transformer)
        family.policy(str(shop.policies["half"]), schedule, transformer.depth)  # undamaged it is read

        def trial(rng: random.Random) -> str:
            if rng.random() < 0.7:
                path.write_text(damaged_text(text, rng), encoding="utf-8", errors="replace")
            else:
                path.write_bytes(damaged(text.encode(), rng))
            plan = family.plan(schedule, family.policy(str(path), schedule, transformer.depth), transformer)
            kept = all(1 <= step.kept <= step.tokens for step in plan.steps)
            return "read" if kept and plan.steps else "impossible plan"

        return trial

    return Kind("policy", prepare)


def prompt_files(shop: Workshop) -> Kind:
    """A file of prompts, each of which is then tokenized."""

    def prepare() -> Trial:
        import warnings

        from fastvar.console.prompt_file import plain_prompts
        from fastvar.runtime.requests.prompt import PromptTokenizer
        from tests.conftest import TOKENIZER

        path = shop.empty("prompts") / "prompts.txt"
        text = "a red circle\na blue square above a green triangle\n\n# 一只猫 \u202e\nstriped\n"
        tokenizer = PromptTokenizer(TOKENIZER, 16)
        warnings.simplefilter("ignore")

        def trial(rng: random.Random) -> str:
            data = damaged_text(text, rng).encode("utf-8", "replace") if rng.random() < 0.5 else text.encode()
            path.write_bytes(damaged(data, rng))
            for prompt in plain_prompts(path):
                found = tokenizer.encode(prompt)
                if found.ids.shape != (1, 16) or found.ids.min() < 0:
                    return "wrong ids"
            return "read"

        return trial

    return Kind("prompts", prepare)


def pictures() -> Kind:
    """Images as files: as a picture, as a mask, and their text chunks."""

    def prepare() -> Trial:
        import tempfile
        import warnings

        from PIL import Image

        from fastvar.runtime.editing.source_image import read_image, read_mask
        from fastvar.runtime.images.png import read_metadata, save_png

        folder = Path(tempfile.mkdtemp())
        levels = np.random.default_rng(0).integers(0, 256, (24, 20, 4), np.uint8)
        sources = []
        for mode in ("RGB", "RGBA", "L", "P", "1", "LA"):
            image = Image.fromarray(levels).convert("RGBA" if mode == "RGBA" else mode)
            save_png(image, folder / f"{mode}.png", {"prompt": "a red circle", "seed": "7"})
            sources.append((folder / f"{mode}.png").read_bytes())
        for form in ("JPEG", "WEBP", "GIF", "TIFF", "BMP"):
            buffer = BytesIO()
            Image.fromarray(levels[..., :3]).save(buffer, form)
            sources.append(buffer.getvalue())
        wide = BytesIO()
        Image.fromarray(levels[..., 0].astype(np.uint16) * 257).save(wide, "PNG")
        sources.append(wide.getvalue())
        path = folder / "damaged.png"
        warnings.simplefilter("ignore")

        def trial(rng: random.Random) -> str:
            path.write_bytes(damaged(rng.choice(sources), rng))
            results = set()
            for read in (read_image, read_mask, read_metadata):
                try:
                    found: Any = read(path)
                    results.add("read")
                except FastvarError:
                    results.add("refused")
                    continue
                if read is read_image and found.mode != "RGB":
                    return "not RGB"
            return "read" if "read" in results else "refused"

        return trial

    return Kind("picture", prepare)
