"""The pruning policy: which tokens, layers and scales are forwarded; read from and written to TOML and JSON.

How many tokens of a scale are kept says `ScaleRule.kept`. Which ones, and in which order, say `pivotal` and `largest`
(export/models/common/rows.py) to the torch reference, the graphs and the programs.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import PlanError, RenamedWarning
from .schedule import ScaleSchedule

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_SWITCHES = ("guidance", "text")  # of a scale rule, on by default
LONGEST_TOPK = 3840  # numbers that TensorRT ranks at once


def in_turns(count: int) -> bool:
    """Whether graphs rank so many numbers in turns, for which they hold what is left to rank."""
    return count > LONGEST_TOPK


@dataclass(frozen=True)
class ScaleRule:
    """What happens at one scale: the share of tokens kept in the pruned layers, or the scale left out.

    Without `guidance` only the conditional row is run: half the work. It must stay off then, for the unconditional
    row lacks that scale's keys. Without `text` the pruned layers do not look at the text again: the output of their
    cross-attention is restored whole from the restore scale. Late scales hardly need it (StageVAR).
    """

    keep: float = 1.0
    skip: bool = False
    guidance: bool = True
    text: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise PlanError(f"keep ratio {self.keep} is out of range", expected="a number above 0, at most 1")

    def kept(self, tokens: int) -> int:
        """Tokens forwarded of `tokens`. Upstream drops int(tokens * (1 - keep)); the guard absorbs rounding."""
        return max(1, tokens - math.floor(tokens * (1 - self.keep) + 1e-9))


@dataclass(frozen=True)
class PruningPolicy:
    """Which scales are pruned or skipped, in which layers, restored from which restore scale (paper, 3.2-3.3).

    Layers outside [first_layer, stop_layer) always run on every token.
    """

    name: str
    rules: Mapping[int, ScaleRule] = field(default_factory=dict)
    first_layer: int = 0
    stop_layer: int = 0
    restore_scale: int | None = None
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

    The file: `restore_scale = 8`, `layers = [3, 28]`, `shared_selection = true`, and tables `[scale.9]` with
    `keep = 0.6`, `skip = true`, `guidance = false` or `text = false`.

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
            expected="restore_scale = 8, layers = [3, 28], shared_selection = true, and tables [scale.9] with "
            "keep = 0.6, skip = true, guidance = false or text = false",
        ) from error


def _policy_from_toml(name: str, data: dict[str, Any]) -> PruningPolicy:
    if "cached_scale" in data:
        warnings.warn(f"policy {name}: cached_scale is named restore_scale now", RenamedWarning, stacklevel=2)
        data = {"restore_scale": data["cached_scale"]} | {
            entry: v for entry, v in data.items() if entry != "cached_scale"
        }
    unknown = sorted(set(data) - {"restore_scale", "layers", "scale", "shared_selection"})
    if unknown:
        raise ValueError(f"unknown entries {unknown}")
    first, stop = (_whole_number("layers", layer) for layer in data.get("layers", (0, 0)))
    rules = {int(index): ScaleRule(**rule) for index, rule in data.get("scale", {}).items()}
    for index, rule in rules.items():
        for entry in ("skip", *_SWITCHES):
            value = getattr(rule, entry)
            if not isinstance(value, bool):
                raise TypeError(f"scale.{index}: {entry} is {value!r}, expected true or false")
    cached, shared = data.get("restore_scale"), data.get("shared_selection", False)
    if not isinstance(shared, bool):
        raise TypeError(f"shared_selection is {shared!r}, expected true or false")
    cached = None if cached is None else _whole_number("restore_scale", cached)
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
        "restore_scale": policy.restore_scale,
        **({"shared_selection": True} if policy.shared_selection else {}),
        "scale": {str(i): _rule_to_json(r) for i, r in sorted(policy.rules.items())},
    }


def _rule_to_json(rule: ScaleRule) -> dict[str, Any]:
    found: dict[str, Any] = {"skip": True} if rule.skip else {"keep": rule.keep}
    return found | {entry: False for entry in _SWITCHES if not getattr(rule, entry)}


def policy_from_json(data: dict[str, Any]) -> PruningPolicy:
    """Read back what `policy_to_json` wrote."""
    return _policy_from_toml(data["name"], {k: v for k, v in data.items() if k != "name"})


def policy_to_toml(policy: PruningPolicy) -> str:
    """A policy file as `load_policy` reads it. The file's name stands for that of the policy, which is not in it."""
    data = policy_to_json(policy)
    cached = [] if policy.restore_scale is None else [f"restore_scale = {policy.restore_scale}"]
    shared = ["shared_selection = true"] if policy.shared_selection else []
    lines = [*cached, f"layers = {data['layers']}", *shared]
    for index, rule in data["scale"].items():
        lines += ["", f"[scale.{index}]", *(f"{name} = {_toml(value)}" for name, value in rule.items())]
    return "\n".join(lines) + "\n"


def _toml(value: bool | float) -> str:
    return str(value).lower()
