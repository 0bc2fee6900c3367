"""The loop over scales of the torch references, with which chained engines are compared. Clear before fast."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ....core.plan import GenerationPlan, StepPlan
from ....core.schedule import Size
from .pruning import LayerState


@dataclass
class Trace:
    """What one pass through the blocks did, for comparison.

    B counts images, R guidance rows: all conditional ones first, then unconditional ones.
    """

    step: StepPlan
    block_in: Tensor  # [R, L, C]
    layer_out: list[Tensor]  # per layer [R, L, C]
    logits: Tensor  # [B, L, n], guided, before filtering
    states: list[LayerState]


ConditionT = TypeVar("ConditionT")
TraceT = TypeVar("TraceT", bound=Trace)


@dataclass
class Generation(ABC, Generic[TraceT]):
    """One generation of a family's transformer: a subclass says what a scale is and what the next one sees."""

    model: Any
    plan: GenerationPlan
    conditioning: Any
    tokens: Tensor  # of the scale at hand [R, L, C], before level and position embedding
    images: int
    noise: Any  # the family's randomness and sampling settings
    sampling: Any

    def __post_init__(self) -> None:
        config, final = self.model.config, self.plan.schedule.final
        self.patch = config.patch
        self.final = (final[0] * self.patch, final[1] * self.patch)
        self.states = [LayerState() for _ in self.model.layers]
        self.summed = torch.zeros(self.images, config.code_channels // self.patch**2, *self.final)

    @abstractmethod
    def scale(self, step: StepPlan) -> Iterator[TraceT]:
        """Run one scale on `tokens`; one trace a pass."""

    @abstractmethod
    def following(self, size: Size) -> Tensor:
        """Tokens of the next scale, of a size, before level and position embedding [B, L, C]."""

    def run(self) -> Iterator[TraceT]:
        """Run every scale of the plan."""
        for step in self.plan.steps:
            if not step.guided and len(self.tokens) > self.images:
                self.conditioning, self.tokens = conditional_only(
                    self.conditioning, self.tokens, self.states, self.images
                )
            yield from self.scale(step)
            if step.next_index is not None:
                following = self.following(self.plan.schedule.sizes[step.next_index])
                self.tokens = following.repeat(len(self.tokens) // self.images, 1, 1)


def conditional_only(
    conditioning: ConditionT, tokens: Tensor, states: list[LayerState], images: int = 1
) -> tuple[ConditionT, Tensor]:
    """Guidance is switched off: condition, tokens and layer states lose their unconditional rows."""
    for state in states:
        state.drop_rows(images)
    given: Any = conditioning
    tensors = {f.name: getattr(given, f.name) for f in fields(given)}
    first = {name: None if tensor is None else tensor[:images] for name, tensor in tensors.items()}
    return replace(given, **first), tokens[:images]
