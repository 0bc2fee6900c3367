"""The generation plan that a schedule gives under a pruning policy: every shape, known beforehand.

Keyed by scale index and keep ratio, never by width, so that every aspect ratio is planned alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from ..errors import PlanError
from .policy import PruningPolicy
from .schedule import ScaleSchedule, Size

MOST_ITERATIONS = 64


@dataclass(frozen=True)
class SamplingMode:
    """How codes are drawn, where a family offers a choice. It shapes the engines, so it is decided at build time."""

    smooth: bool = False  # embeddings mixed by Gumbel weights in place of single codes (upstream's more_smooth)
    final_iterations: int = 1  # rounds that the last scale's tokens are drawn in (upstream's num_maskgit_iters)
    residual: bool = True  # what a diffusion head adds to the last scale's codes (upstream's final_stage 0)

    def __post_init__(self) -> None:
        count = self.final_iterations
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST_ITERATIONS:
            raise PlanError(
                f"{count!r} final iterations are out of range", expected=f"a whole number from 1 to {MOST_ITERATIONS}"
            )

    @property
    def asked_for(self) -> tuple[str, ...]:
        """Names of what differs from the default."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) != f.default)


class Batch(NamedTuple):
    """What one pass draws: images side by side, each with its guidance rows (2 with guidance, 1 without)."""

    guidance_rows: int
    images: int = 1


@dataclass(frozen=True)
class StepPlan:
    """One executed scale, or one part of it. Token counts are per guidance row.

    `past_dense` and `past_pruned` are the keys already cached in a layer that never prunes and in one that may;
    `guided_dense` and `guided_pruned` count those among them that were cached for both guidance rows.
    """

    index: int  # position in the full schedule; also the row of the level embedding
    size: Size
    tokens: int  # those of the grid; at the first scale the prompt's, at a scale drawn in parts this part's
    kept: int  # tokens forwarded in the pruned layers; all of them where nothing is pruned
    past_dense: int
    past_pruned: int
    writes_restore_cache: bool  # pruned layers keep their sub-layer outputs for restoration
    next_index: int | None  # the next executed scale
    guided: bool  # classifier-free guidance is on, where the caller asks for any
    guided_dense: int
    guided_pruned: int
    part: int | None = None  # which part of the scale, where it is drawn in several
    parts: int = 1
    text: bool = True  # the pruned layers read the text; else their cross-attention is restored from the restore scale

    def past(self, pruned_layer: bool) -> int:
        return self.past_pruned if pruned_layer else self.past_dense

    def guided_past(self, pruned_layer: bool) -> int:
        return self.guided_pruned if pruned_layer else self.guided_dense

    def rows(self, most: int, images: int = 1) -> int:
        """Rows of this scale for so many images, in a generation that begins with `most` guidance rows of each."""
        return (most if self.guided else 1) * images

    @property
    def prunes(self) -> bool:
        return self.kept < self.tokens


@dataclass(frozen=True)
class GenerationPlan:
    """A schedule under a policy, for a model of a given depth: what is executed, with every length.

    `first_tokens` is how many tokens the first scale has: one, or the prompt's where the prompt itself comes first.
    """

    schedule: ScaleSchedule
    policy: PruningPolicy
    depth: int
    steps: tuple[StepPlan, ...]
    sampling_mode: SamplingMode = field(default_factory=SamplingMode)
    first_tokens: int = 1

    @property
    def cached_size(self) -> Size | None:
        """Grid of the scale that pruned tokens are restored from; None where nothing is restored."""
        if not any(step.prunes for step in self.steps):
            return None
        assert self.policy.restore_scale is not None
        return self.schedule.sizes[self.policy.restore_scale]

    def capacity(self, layer: int) -> int:
        """Keys that a layer holds at the end, per guidance row."""
        last = self.steps[-1]
        if self.policy.prunes(layer):
            return last.past_pruned + last.kept
        return last.past_dense + last.tokens

    @property
    def forwarded_tokens(self) -> int:
        """Tokens through all layers, per guidance row."""
        return self.forwarded(1)

    def forwarded(self, rows: int) -> int:
        """Tokens through all layers and guidance rows, of which there are `rows` while guidance is on."""
        pruned = sum(self.policy.prunes(layer) for layer in range(self.depth))
        return sum((step.kept * pruned + step.tokens * (self.depth - pruned)) * step.rows(rows) for step in self.steps)


def make_plan(
    schedule: ScaleSchedule,
    policy: PruningPolicy,
    depth: int,
    sampling_mode: SamplingMode | None = None,
    first_tokens: int = 1,
) -> GenerationPlan:
    """Lay out a generation.

    Raises:
        PlanError: the policy does not fit the schedule, the model, or the way of drawing.
    """
    sampling_mode = sampling_mode or SamplingMode()
    _check_policy(schedule, policy, depth)
    executed = [i for i in range(len(schedule)) if not policy.rule(i).skip]
    any_pruned_layer = policy.first_layer < policy.stop_layer
    tokens = {i: schedule.tokens(i) if i else first_tokens for i in executed}
    kept = {i: policy.rule(i).kept(tokens[i]) if any_pruned_layer else tokens[i] for i in executed}
    restores = any(kept[i] < tokens[i] for i in executed)
    last = executed[-1]
    _check_parts(policy, sampling_mode, kept[last] < tokens[last], tokens[last], len(executed))
    steps: list[StepPlan] = []
    past = guided_past = (0, 0)  # in layers that never prune, and in those that may
    for i, following in zip(executed, [*executed[1:], None], strict=True):
        fills, guided = restores and i == policy.restore_scale, policy.rule(i).guidance
        counts = part_counts(tokens[i], sampling_mode.final_iterations) if following is None else (tokens[i],)
        for part, count in enumerate(counts):
            forwarded = count if len(counts) > 1 else kept[i]
            if guided or not steps or steps[-1].guided:
                guided_past = past
            own = (i, schedule.sizes[i], count, forwarded, *past, fills, following, guided, *guided_past)
            of_scale = part if len(counts) > 1 else None
            steps.append(StepPlan(*own, part=of_scale, parts=len(counts), text=policy.rule(i).text))
            past = (past[0] + count, past[1] + forwarded)
    return GenerationPlan(schedule, policy, depth, tuple(steps), sampling_mode, first_tokens)


def part_counts(tokens: int, iterations: int) -> tuple[int, ...]:
    """How many tokens each round of the last scale draws: few at first, by a cosine (MaskGIT; upstream HART)."""
    counts, left = [], tokens
    for n in range(1, iterations):
        later = math.floor(tokens * math.cos(math.pi / 2 * n / iterations))
        later = max(1, min(left - 1, later))
        counts.append(left - later)
        left = later
    return (*counts, left)


def _check_parts(policy: PruningPolicy, sampling_mode: SamplingMode, pruned: bool, tokens: int, scales: int) -> None:
    if sampling_mode.final_iterations == 1:
        return
    if pruned:
        raise PlanError(
            f"policy {policy.name!r} prunes the last scale, which is drawn in "
            f"{sampling_mode.final_iterations} iterations",
            expected="one of the two: a part of a scale has no grid to restore it on",
            fix="choose the policy dense, or one final iteration",
        )
    if tokens < sampling_mode.final_iterations:
        raise PlanError(
            f"{sampling_mode.final_iterations} final iterations for {tokens} tokens",
            expected=f"at most {tokens}: one token each",
        )
    if scales == 1:
        raise PlanError("a schedule of one scale cannot be drawn in parts", expected="a scale before the last")


def _check_policy(schedule: ScaleSchedule, policy: PruningPolicy, depth: int) -> None:
    last = len(schedule) - 1
    if not 0 <= policy.first_layer <= policy.stop_layer <= depth:
        raise PlanError(
            f"policy {policy.name!r} prunes layers {policy.first_layer} to {policy.stop_layer}",
            expected=f"a range inside the model's {depth} layers",
        )
    beyond = [i for i in policy.rules if not 0 <= i <= last]
    if beyond:
        raise PlanError(
            f"policy {policy.name!r} names scale {beyond[0]}",
            expected=f"scales 0 to {last} of this schedule",
            fix="remove the rule, or choose a larger size",
        )
    if policy.rule(0).skip:
        raise PlanError("the first scale cannot be skipped: it carries the text")
    _check_guidance(policy, last)
    pruned = [i for i in range(last + 1) if not policy.rule(i).skip and policy.rule(i).keep < 1]
    _check_text(schedule, policy)
    if not pruned or policy.first_layer == policy.stop_layer:
        return
    cached = policy.restore_scale
    if cached is None or not 0 <= cached < min(pruned) or policy.rule(cached).skip:
        raise PlanError(
            f"policy {policy.name!r} prunes scale {min(pruned)} but its restore scale is {cached}",
            expected="an executed scale before the first pruned one, to restore from",
            fix="set restore_scale",
        )


def _check_text(schedule: ScaleSchedule, policy: PruningPolicy) -> None:
    for i in range(len(schedule)):
        rule, tokens = policy.rule(i), schedule.tokens(i)
        prunes = policy.first_layer < policy.stop_layer and rule.kept(tokens) < tokens
        if not (rule.text or rule.skip or prunes):
            raise PlanError(
                f"policy {policy.name!r} has text off at scale {i}, which it does not prune",
                expected="text off at pruned scales alone: there the restore scale stands for it",
                fix=f"lower keep under [scale.{i}] and name pruned layers, or leave text = false away",
            )


def _check_guidance(policy: PruningPolicy, last: int) -> None:
    executed = [i for i in range(last + 1) if not policy.rule(i).skip]
    off = [i for i in executed if not policy.rule(i).guidance]
    if off and off[0] == 0:
        raise PlanError(
            f"policy {policy.name!r} has guidance off from the first scale on",
            expected="guidance at the first scale at least",
            fix="build with --guidance off instead, or draw with a guidance scale of 1",
        )
    back = [i for i in executed if off and i > off[0] and policy.rule(i).guidance]
    if back:
        raise PlanError(
            f"policy {policy.name!r} switches guidance off at scale {off[0]} and on again at scale {back[0]}",
            expected="guidance off at all later scales: the unconditional row has no keys of those it missed",
            fix=f"write guidance = false under [scale.{back[0]}] too",
        )
