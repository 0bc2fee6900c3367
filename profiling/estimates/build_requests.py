"""Builds that `fastvar plan` plans: described before they are made, with what may be chosen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from ...core.precision import Precision, parse_precision
from ...core.schedule import ScaleSchedule
from ...engines.bundle.estimates import with_estimates
from ...engines.bundle.manifest import Manifest
from ...engines.registry import backend_class
from ...errors import InputError
from ...export.build import GUIDANCE_ROWS
from ...export.checkpoints.checkpoint import Checkpoint, load_checkpoint
from ...export.checkpoints.random_weights import random_checkpoint
from ...export.describe import describe
from ...export.models.registry import adapter_of
from .fitting import Change, Limits, MemoryOptions, PlanOf
from .memory_plan import MemoryPlan, memory_plan
from .requests import Subject


@dataclass(frozen=True)
class Asked:
    """A build, in the command line's words."""

    size: str | None
    policy: str
    backend: str
    precision: str | None
    guidance: str
    text_length: int | None
    choice: MemoryOptions


def build_subject(checkpoint: Checkpoint, asked: Asked) -> Subject:
    """A build of a checkpoint, described.

    Raises:
        FastvarError: what `fastvar build` would refuse too.
    """
    if asked.guidance not in GUIDANCE_ROWS:
        raise InputError(f"guidance {asked.guidance!r} not understood", expected=f"one of {', '.join(GUIDANCE_ROWS)}")
    schedule = _schedule(checkpoint, asked)
    height, width = schedule.pixels
    precision = _precision(asked, asked.choice)
    title = f"{checkpoint.name}, {width}x{height}, policy {asked.policy}, {asked.backend}, {precision.label}"
    return Subject(
        title,
        asked.choice,
        _limits(checkpoint, asked, schedule, precision),
        _plans(checkpoint, asked),
        lambda: _changes(checkpoint, asked, schedule),
        estimated=True,
        on_host=backend_class(asked.backend).runs_on_host(""),
    )


def find_checkpoint(source: Path | None, model: str | None) -> Checkpoint:
    """A folder's checkpoint, or the shapes of a named model."""
    if (source is None) == (model is None):
        raise InputError(
            "nothing to plan" if source is None else "a folder and --model exclude each other",
            expected="a bundle, a checkpoint folder, or --model MODEL",
        )
    if model is not None:
        return random_checkpoint(model, text_encoder=True)
    assert source is not None
    if not source.exists():
        raise InputError(f"no checkpoint {source}", expected="a bundle or a checkpoint folder", fix="check the path")
    return load_checkpoint(source)


def _plans(checkpoint: Checkpoint, asked: Asked) -> PlanOf:
    @cache
    def described(tile: int | None, weights: str | None) -> Manifest:
        return _describe(checkpoint, asked, MemoryOptions(decoder_tile=tile, weights=weights))

    def plan_of(choice: MemoryOptions) -> MemoryPlan:
        manifest = described(choice.decoder_tile, choice.weights)
        return memory_plan(manifest, offload_text_encoder=choice.offload_text_encoder)

    return plan_of


def _describe(checkpoint: Checkpoint, asked: Asked, choice: MemoryOptions) -> Manifest:
    family, transformer = checkpoint.family, checkpoint.transformer
    schedule = _schedule(checkpoint, asked)
    manifest = describe(
        checkpoint,
        family.plan(schedule, family.policy(asked.policy, schedule, transformer.depth), transformer),
        backend_class(asked.backend),
        _precision(asked, choice),
        rows=GUIDANCE_ROWS[asked.guidance],
        text_length=asked.text_length,
        decoder_tile=choice.decoder_tile,
    )
    return with_estimates(manifest)


def _precision(asked: Asked, choice: MemoryOptions) -> Precision:
    return parse_precision(asked.precision, choice.weights, default=backend_class(asked.backend).precisions[0])


def _limits(checkpoint: Checkpoint, asked: Asked, schedule: ScaleSchedule, precision: Precision) -> Limits:
    tiles = adapter_of(checkpoint.transformer).tiles_decoder
    return Limits(
        text_encoder=checkpoint.text_encoder is not None,
        quantised_weights=not backend_class(asked.backend).runs_on_host("") and precision.compute != "float32",
        latent_rows=schedule.final[0] * checkpoint.transformer.patch if tiles else 0,
    )


def _changes(checkpoint: Checkpoint, asked: Asked, schedule: ScaleSchedule) -> Iterator[Change]:
    """Fewer tokens at the same size, then one guidance row, then smaller sizes of the same shape."""
    if asked.policy != "fastvar":
        yield _change("--policy fastvar", checkpoint, replace(asked, policy="fastvar"))
    if asked.guidance != "off":
        yield _change("--guidance off", checkpoint, replace(asked, guidance="off"))
    for height, width in _smaller(checkpoint, schedule):
        size = f"{width}x{height}"
        yield _change(f"--size {size}", checkpoint, replace(asked, size=size))


def _change(what: str, checkpoint: Checkpoint, asked: Asked) -> Change:
    schedule = _schedule(checkpoint, asked)
    limits = _limits(checkpoint, asked, schedule, _precision(asked, asked.choice))
    return Change(what, _plans(checkpoint, asked), limits)


def _schedule(checkpoint: Checkpoint, asked: Asked) -> ScaleSchedule:
    family, transformer = checkpoint.family, checkpoint.transformer
    return family.schedule_for(family.size(asked.size, transformer), transformer)


def _smaller(checkpoint: Checkpoint, schedule: ScaleSchedule) -> list[tuple[int, int]]:
    """Sizes of the same shape with fewer pixels, the largest first."""
    schedules = checkpoint.family.schedules(checkpoint.transformer).values()
    same = [s.pixels for s in schedules if s.rope_grid == schedule.rope_grid]
    area = schedule.pixels[0] * schedule.pixels[1]
    return sorted((p for p in same if p[0] * p[1] < area), key=lambda p: -p[0] * p[1])
