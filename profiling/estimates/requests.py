"""What `fastvar plan` plans: a bundle as it is, or a build (`build_requests.py`, which needs what builds)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ...engines.bundle.bundle import Bundle
from ...engines.registry import runs_on_host
from ...runtime.memory.soundness import sound_layout
from .fitting import Change, Limits, MemoryOptions, PlanOf
from .memory_plan import memory_plan
from .passes import largest_that_fits, passes_of


@dataclass(frozen=True)
class PlanRequest:
    """Something to plan: plans by choice, what may be chosen, and larger changes in the order they are thought of."""

    title: str
    asked: MemoryOptions
    limits: Limits
    plan_of: PlanOf
    changes: Callable[[], Iterator[Change]]
    estimated: bool  # scratch memory, where nothing has been compiled
    on_host: bool  # engines take the memory of this machine, not of a GPU
    images: int = 1  # of the largest pass
    largest_batch: Callable[[MemoryOptions, int], int] | None = None  # choice, budget -> images of a pass; 0: none fits


def bundle_request(path: Path, asked: MemoryOptions) -> PlanRequest:
    """A bundle: all is decided but for where its text encoder stays."""
    manifest = Bundle.open(path, verify="auto", trust_remote_code=True).manifest  # nothing of it is run
    for engine_set in manifest.sets:
        sound_layout(manifest, *engine_set.batch)

    def largest_batch(choice: MemoryOptions, budget: int) -> int:
        return largest_that_fits(passes_of(manifest, offload_text_encoder=choice.offload_text_encoder), budget)

    height, width = manifest.plan.schedule.pixels
    title = f"{manifest.model}, {width}x{height}, policy {manifest.plan.policy.name}, {manifest.backend}, "
    return PlanRequest(
        title + manifest.precision.label,
        asked,
        Limits(text_encoder=bool(manifest.text_encoder), quantised_weights=False, latent_rows=0),
        lambda choice: memory_plan(manifest, offload_text_encoder=choice.offload_text_encoder),
        lambda: iter(()),
        estimated=False,
        on_host=runs_on_host(manifest),
        images=max(engine_set.images for engine_set in manifest.sets),
        largest_batch=largest_batch,
    )
