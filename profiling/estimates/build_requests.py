"""Builds that `fastvar plan` plans: described before they are made, with what may be chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

from ...core.precision import Precision
from ...core.schedule import ScaleSchedule
from ...engines.bundle.estimates import with_estimates
from ...engines.bundle.manifest import Manifest
from ...engines.registry import backend_class
from ...errors import InputError
from ...export.checkpoints import hub_models
from ...export.checkpoints.checkpoint import Checkpoint
from ...export.checkpoints.random_weights import random_checkpoint
from ...export.describe import describe
from ...export.models.registry import adapter_of
from ...export.options import MOST_IMAGES, BuildOptions
from ...hub.repository import HubAccess
from .fitting import Change, Limits, MemoryOptions, PlanOf
from .memory_plan import MemoryPlan, memory_plan
from .requests import PlanRequest


def build_request(checkpoint: Checkpoint, options: BuildOptions, choice: MemoryOptions) -> PlanRequest:
    """A build of a checkpoint, described.

    Raises:
        FastvarError: what `fastvar build` would refuse too.
    """
    schedule = _schedule(checkpoint, options)
    height, width = schedule.pixels
    precision = _precision(options, choice)
    title = f"{checkpoint.name}, {width}x{height}, policy {options.policy}, {options.backend}, {precision.label}"
    return PlanRequest(
        title,
        choice,
        _limits(checkpoint, options, schedule, precision),
        _plans(checkpoint, options),
        lambda: _changes(checkpoint, options, choice, schedule),
        estimated=True,
        on_host=backend_class(options.backend).runs_on_host(options.target or ""),
        images=max(options.batch),
        largest_batch=lambda choice, budget: _largest_batch(checkpoint, options, choice, budget),
    )


def _largest_batch(checkpoint: Checkpoint, options: BuildOptions, choice: MemoryOptions, budget: int) -> int:
    """The most images that a pass may draw within a budget: memory grows with them, so halving finds it."""

    def fits(images: int) -> bool:
        plan = _plans(checkpoint, replace(options, batch=(images,)))(choice)
        return plan.need.total_bytes <= budget

    fitting, beyond = 0, MOST_IMAGES + 1
    while beyond - fitting > 1:
        middle = (fitting + beyond) // 2
        fitting, beyond = (middle, beyond) if fits(middle) else (fitting, middle)
    return fitting


def find_checkpoint(
    source: Path | None, model: str | None, *, offline: bool = False, told: Callable[[str], None] = lambda _: None
) -> Checkpoint:
    """A checkpoint of a folder or of hub:ORG/NAME, which is downloaded; of several models the named one. Without
    either, the shapes of a named model.
    """
    if source is None:
        if model is None:
            raise InputError(
                "nothing to plan", expected="a bundle, a checkpoint folder, hub:ORG/NAME, or --model MODEL"
            )
        return random_checkpoint(model, text_encoder=True)
    return hub_models.find_checkpoint(source, model=model, access=HubAccess(offline=offline), told=told).load()


def _plans(checkpoint: Checkpoint, options: BuildOptions) -> PlanOf:
    @cache
    def described(tile: int | None, weights: str | None) -> Manifest:
        return _describe(checkpoint, options, MemoryOptions(decoder_tile=tile, weights=weights))

    def plan_of(choice: MemoryOptions) -> MemoryPlan:
        manifest = described(choice.decoder_tile, choice.weights)
        return memory_plan(manifest, offload_text_encoder=choice.offload_text_encoder)

    return plan_of


def _describe(checkpoint: Checkpoint, options: BuildOptions, choice: MemoryOptions) -> Manifest:
    family, transformer = checkpoint.family, checkpoint.transformer
    schedule = _schedule(checkpoint, options)
    manifest = describe(
        checkpoint,
        family.plan(schedule, family.policy(options.policy, schedule, transformer.depth), transformer),
        backend_class(options.backend),
        _precision(options, choice),
        replace(options, decoder_tile=choice.decoder_tile),
    )
    return with_estimates(manifest)


def _precision(options: BuildOptions, choice: MemoryOptions) -> Precision:
    backend = backend_class(options.backend)
    found = backend.planned_precision(options.precision, choice.weights, options.target)
    backend.check_precision(found)
    return found


def _limits(checkpoint: Checkpoint, options: BuildOptions, schedule: ScaleSchedule, precision: Precision) -> Limits:
    tiles = adapter_of(checkpoint.transformer).tiles_decoder
    return Limits(
        text_encoder=checkpoint.text_encoder is not None,
        quantised_weights=not backend_class(options.backend).runs_on_host(options.target or "")
        and precision.compute != "float32",
        latent_rows=schedule.final[0] * checkpoint.transformer.patch if tiles else 0,
    )


def _changes(
    checkpoint: Checkpoint, options: BuildOptions, choice: MemoryOptions, schedule: ScaleSchedule
) -> Iterator[Change]:
    """Fewer images in a pass, fewer tokens at the same size, one guidance row, smaller sizes of the same shape."""
    for images in (count for count in (32, 16, 8, 4, 2, 1) if count < max(options.batch)):
        yield _change(f"--batch {images}", checkpoint, replace(options, batch=(images,)), choice)
    if options.policy != "fastvar":
        yield _change("--policy fastvar", checkpoint, replace(options, policy="fastvar"), choice)
    if options.guidance != "off":
        yield _change("--guidance off", checkpoint, replace(options, guidance="off"), choice)
    for height, width in _smaller(checkpoint, schedule):
        size = f"{width}x{height}"
        yield _change(f"--size {size}", checkpoint, replace(options, size=size), choice)


def _change(what: str, checkpoint: Checkpoint, options: BuildOptions, choice: MemoryOptions) -> Change:
    schedule = _schedule(checkpoint, options)
    limits = _limits(checkpoint, options, schedule, _precision(options, choice))
    return Change(what, _plans(checkpoint, options), limits)


def _schedule(checkpoint: Checkpoint, options: BuildOptions) -> ScaleSchedule:
    family, transformer = checkpoint.family, checkpoint.transformer
    return family.schedule_for(family.size(options.size, transformer), transformer)


def _smaller(checkpoint: Checkpoint, schedule: ScaleSchedule) -> list[tuple[int, int]]:
    """Sizes of the same shape with fewer pixels, the largest first."""
    schedules = checkpoint.family.schedules(checkpoint.transformer).values()
    same = [s.pixels for s in schedules if s.rope_grid == schedule.rope_grid]
    area = schedule.pixels[0] * schedule.pixels[1]
    return sorted((p for p in same if p[0] * p[1] < area), key=lambda p: -p[0] * p[1])
