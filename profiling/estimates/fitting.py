"""Choices that make a generation fit a memory budget, tried in a fixed order, the cheapest first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from .memory_plan import MemoryPlan

TILES = (32, 16, 8)  # latent rows of a stripe of the image decoder


@dataclass(frozen=True)
class MemoryOptions:
    """Options that do not change which tokens are computed.

    `decoder_tile` costs a few launches, `offload_text_encoder` a copy per prompt, `weights` ("int8") some precision.
    """

    decoder_tile: int | None = None
    offload_text_encoder: bool = False
    weights: str | None = None

    def build_options(self) -> list[str]:
        """Its options of `fastvar build`."""
        tile = [f"--decoder-tile {self.decoder_tile}"] if self.decoder_tile else []
        return tile + ([f"--weights {self.weights}"] if self.weights else [])

    def load_options(self) -> list[str]:
        """Its options of `fastvar generate`."""
        return ["--offload-text-encoder"] if self.offload_text_encoder else []

    def differences(self, asked: MemoryOptions) -> list[str]:
        """Descriptions of what differs from the choice asked for."""
        found: list[str] = []
        if self.decoder_tile != asked.decoder_tile:
            found.append(f"image decoder in stripes of {self.decoder_tile} latent rows")
        if self.offload_text_encoder and not asked.offload_text_encoder:
            found.append("text encoder offloaded")
        if self.weights != asked.weights:
            found.append(f"{self.weights} weights")
        return found


PlanOf = Callable[[MemoryOptions], MemoryPlan]


@dataclass(frozen=True)
class Limits:
    """The available choices: a model may have no text encoder, a backend no 8-bit weights."""

    text_encoder: bool
    quantised_weights: bool
    latent_rows: int


@dataclass(frozen=True)
class Fit:
    """A choice that fits, with its plan."""

    choice: MemoryOptions
    plan: MemoryPlan


@dataclass(frozen=True)
class Change:
    """A change of what is computed: its description, plans and limits."""

    what: str
    plan_of: PlanOf
    limits: Limits


def choices(asked: MemoryOptions, limits: Limits) -> Iterator[MemoryOptions]:
    """As asked; the image decoder in smaller and smaller stripes; the text encoder off the device; 8-bit weights.

    Each is combined with all before it.
    """
    tiles: list[int | None] = [asked.decoder_tile]
    tiles += [rows for rows in TILES if rows < (asked.decoder_tile or limits.latent_rows)]
    offloads = [asked.offload_text_encoder] + [True] * (limits.text_encoder and not asked.offload_text_encoder)
    weights = [asked.weights] + ["int8"] * (limits.quantised_weights and asked.weights is None)
    for stored in weights:
        for offload in offloads:
            for tile in tiles:
                yield MemoryOptions(tile, offload, stored)


def first_fit(plan_of: PlanOf, asked: MemoryOptions, limits: Limits, budget_bytes: int) -> Fit | None:
    """The first choice that fits; None if all of them together do not."""
    order = list(choices(asked, limits))
    if plan_of(order[-1]).need.total_bytes > budget_bytes:
        return None
    fits = (Fit(choice, plan_of(choice)) for choice in order)
    return next(fit for fit in fits if fit.plan.need.total_bytes <= budget_bytes)


def smallest_change(changes: Iterable[Change], asked: MemoryOptions, budget_bytes: int) -> tuple[Change, Fit] | None:
    """The first of the changes under which a choice fits, with that choice."""
    fits = ((change, first_fit(change.plan_of, asked, change.limits, budget_bytes)) for change in changes)
    return next(((change, fit) for change, fit in fits if fit is not None), None)
