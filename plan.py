"""The pruning policy, and the generation plan it gives for a schedule: every shape, known beforehand.

Keyed by scale index and keep ratio, never by width, so that every aspect ratio is planned alike.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .errors import PlanError
from .schedule import ScaleSchedule, Size

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MOST_ITERATIONS = 64


@dataclass(frozen=True)
class ScaleRule:
    """What happens at one scale: the share of tokens kept in the pruned layers, or the scale left out.

    Without `guidance` only the conditional row is run: half the work. It must stay off then, for the unconditional
    row lacks that scale's keys.
    """

    keep: float = 1.0
    skip: bool = False
    guidance: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise PlanError(f"keep ratio {self.keep} is out of range", expected="a number above 0, at most 1")

    def kept(self, tokens: int) -> int:
        """Tokens forwarded of `tokens`. Upstream drops int(tokens * (1 - keep)); the guard absorbs rounding."""
        return max(1, tokens - math.floor(tokens * (1 - self.keep) + 1e-9))


@dataclass(frozen=True)
class PruningPolicy:
    """Which scales are pruned or skipped, in which layers, restored from which cached scale (paper, 3.2-3.3).

    Layers outside [first_layer, stop_layer) always run on every token.
    """

    name: str
    rules: Mapping[int, ScaleRule] = field(default_factory=dict)
    first_layer: int = 0
    stop_layer: int = 0
    cached_scale: int | None = None
    shared_selection: bool = False  # one selection a layer in place of one a sub-layer: cheaper, not the paper's

    def rule(self, scale: int) -> ScaleRule:
        return self.rules.get(scale, ScaleRule())

    def prunes(self, layer: int) -> bool:
        return self.first_layer <= layer < self.stop_layer


DENSE = PruningPolicy("dense")
# A policy made for a schedule and a model depth.
Preset = Callable[[ScaleSchedule, int], PruningPolicy]


def dense_policy(_schedule: ScaleSchedule, _depth: int) -> PruningPolicy:
    """The `dense` preset: no scale is pruned."""
    return DENSE


def load_policy(
    name_or_file: str,
    schedule: ScaleSchedule,
    depth: int,
    presets: Mapping[str, Preset],
) -> PruningPolicy:
    """A preset by name, or a TOML file.

    The file: `cached_scale = 8`, `layers = [3, 28]`, `shared_selection = true`, and tables `[scale.9]` with
    `keep = 0.6`, `skip = true` or `guidance = false`.

    Raises:
        PlanError: neither a preset nor a readable policy file.
    """
    if name_or_file in presets:
        return presets[name_or_file](schedule, depth)
    path = Path(name_or_file)
    if not path.is_file():
        raise PlanError(
            f"no policy {name_or_file!r}",
            expected=f"{', '.join(presets)}, or the path of a TOML policy file",
            fix="check the spelling or the path",
        )
    try:
        return _policy_from_toml(path.stem, tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise PlanError(f"cannot read policy file {path}: {error.strerror}", fix="check its permissions") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValueError, TypeError, AttributeError) as error:
        raise PlanError(
            f"policy file {path} not understood: {error}",
            expected="cached_scale = 8, layers = [3, 28], shared_selection = true, and tables [scale.9] with "
            "keep = 0.6, skip = true or guidance = false",
        ) from error


def _policy_from_toml(name: str, data: dict[str, Any]) -> PruningPolicy:
    unknown = sorted(set(data) - {"cached_scale", "layers", "scale", "shared_selection"})
    if unknown:
        raise ValueError(f"unknown entries {unknown}")
    first, stop = (_whole_number("layers", layer) for layer in data.get("layers", (0, 0)))
    rules = {int(index): ScaleRule(**rule) for index, rule in data.get("scale", {}).items()}
    for index, rule in rules.items():
        for entry in ("skip", "guidance"):
            value = getattr(rule, entry)
            if not isinstance(value, bool):
                raise TypeError(f"scale.{index}: {entry} is {value!r}, expected true or false")
    cached, shared = data.get("cached_scale"), data.get("shared_selection", False)
    if not isinstance(shared, bool):
        raise TypeError(f"shared_selection is {shared!r}, expected true or false")
    cached = None if cached is None else _whole_number("cached_scale", cached)
    return PruningPolicy(name, rules, first, stop, cached, shared)


def _whole_number(entry: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{entry} holds {value!r}, expected a whole number")
    return value


def policy_to_json(policy: PruningPolicy) -> dict[str, Any]:
    """A dictionary for the manifest."""
    return {
        "name": policy.name,
        "layers": [policy.first_layer, policy.stop_layer],
        "cached_scale": policy.cached_scale,
        **({"shared_selection": True} if policy.shared_selection else {}),
        "scale": {str(i): _rule_to_json(r) for i, r in sorted(policy.rules.items())},
    }


def _rule_to_json(rule: ScaleRule) -> dict[str, Any]:
    found: dict[str, Any] = {"skip": True} if rule.skip else {"keep": rule.keep}
    return found if rule.guidance else {**found, "guidance": False}


def policy_from_json(data: dict[str, Any]) -> PruningPolicy:
    """Read back what `policy_to_json` wrote."""
    return _policy_from_toml(data["name"], {k: v for k, v in data.items() if k != "name"})


def policy_to_toml(policy: PruningPolicy) -> str:
    """A policy file as `load_policy` reads it. The file's name stands for that of the policy, which is not in it."""
    data = policy_to_json(policy)
    cached = [] if policy.cached_scale is None else [f"cached_scale = {policy.cached_scale}"]
    shared = ["shared_selection = true"] if policy.shared_selection else []
    lines = [*cached, f"layers = {data['layers']}", *shared]
    for index, rule in data["scale"].items():
        lines += ["", f"[scale.{index}]", *(f"{name} = {_toml(value)}" for name, value in rule.items())]
    return "\n".join(lines) + "\n"


def _toml(value: bool | float) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


@dataclass(frozen=True)
class Drawing:
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
    fills_cache: bool  # pruned layers keep their sub-layer outputs for restoration
    next_index: int | None  # the next executed scale
    guided: bool  # classifier-free guidance is on, where the caller asks for any
    guided_dense: int
    guided_pruned: int
    part: int | None = None  # which part of the scale, where it is drawn in several
    parts: int = 1

    def past(self, pruned_layer: bool) -> int:
        return self.past_pruned if pruned_layer else self.past_dense

    def guided_past(self, pruned_layer: bool) -> int:
        return self.guided_pruned if pruned_layer else self.guided_dense

    def rows(self, most: int) -> int:
        """Guidance rows of this scale in a generation that begins with `most`."""
        return most if self.guided else 1

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
    drawing: Drawing = field(default_factory=Drawing)
    first_tokens: int = 1

    @property
    def cached_size(self) -> Size | None:
        """Grid of the scale that pruned tokens are restored from; None where nothing is restored."""
        if not any(step.prunes for step in self.steps):
            return None
        assert self.policy.cached_scale is not None
        return self.schedule.sizes[self.policy.cached_scale]

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
    drawing: Drawing | None = None,
    first_tokens: int = 1,
) -> GenerationPlan:
    """Lay out a generation.

    Raises:
        PlanError: the policy does not fit the schedule, the model, or the way of drawing.
    """
    drawing = drawing or Drawing()
    _check_policy(schedule, policy, depth)
    executed = [i for i in range(len(schedule)) if not policy.rule(i).skip]
    any_pruned_layer = policy.first_layer < policy.stop_layer
    tokens = {i: schedule.tokens(i) if i else first_tokens for i in executed}
    kept = {i: policy.rule(i).kept(tokens[i]) if any_pruned_layer and i else tokens[i] for i in executed}
    restores = any(kept[i] < tokens[i] for i in executed)
    last = executed[-1]
    _check_parts(policy, drawing, kept[last] < tokens[last], tokens[last], len(executed))
    steps: list[StepPlan] = []
    past = guided_past = (0, 0)  # in layers that never prune, and in those that may
    for i, following in zip(executed, [*executed[1:], None], strict=True):
        fills, guided = restores and i == policy.cached_scale, policy.rule(i).guidance
        counts = part_counts(tokens[i], drawing.final_iterations) if following is None else (tokens[i],)
        for part, count in enumerate(counts):
            forwarded = count if len(counts) > 1 else kept[i]
            if guided or not steps or steps[-1].guided:
                guided_past = past
            own = (i, schedule.sizes[i], count, forwarded, *past, fills, following, guided, *guided_past)
            steps.append(StepPlan(*own, part=part if len(counts) > 1 else None, parts=len(counts)))
            past = (past[0] + count, past[1] + forwarded)
    return GenerationPlan(schedule, policy, depth, tuple(steps), drawing, first_tokens)


def part_counts(tokens: int, iterations: int) -> tuple[int, ...]:
    """How many tokens each round of the last scale draws: few at first, by a cosine (MaskGIT; upstream HART)."""
    counts, left = [], tokens
    for n in range(1, iterations):
        later = math.floor(tokens * math.cos(math.pi / 2 * n / iterations))
        later = max(1, min(left - 1, later))
        counts.append(left - later)
        left = later
    return (*counts, left)


def _check_parts(policy: PruningPolicy, drawing: Drawing, pruned: bool, tokens: int, scales: int) -> None:
    if drawing.final_iterations == 1:
        return
    if pruned:
        raise PlanError(
            f"policy {policy.name!r} prunes the last scale, which is drawn in {drawing.final_iterations} iterations",
            expected="one of the two: a part of a scale has no grid to restore it on",
            fix="choose the policy dense, or one final iteration",
        )
    if tokens < drawing.final_iterations:
        raise PlanError(
            f"{drawing.final_iterations} final iterations for {tokens} tokens",
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
    if not pruned or policy.first_layer == policy.stop_layer:
        return
    cached = policy.cached_scale
    if cached is None or not 0 <= cached < min(pruned) or policy.rule(cached).skip:
        raise PlanError(
            f"policy {policy.name!r} prunes scale {min(pruned)} but its cached scale is {cached}",
            expected="an executed scale before the first pruned one, to restore from",
            fix="set cached_scale",
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
