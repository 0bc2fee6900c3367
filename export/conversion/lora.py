"""Low-rank changes of a model's matrices (LoRA), as fine-tuning tools save them, added to the weights.

Two ways of naming are understood: PEFT's `base_model.model.X.lora_A.weight` with `lora_alpha` in adapter_config.json,
and `X.lora_down.weight`, X with dots or underscores (`lora_unet_X`), with a tensor `X.alpha`. X is an official name
without `.weight`. A change is scale * alpha / rank * B @ A. A key that is not understood is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import CheckpointError
from ..checkpoints.nesting import plain_names
from ..checkpoints.stored_numbers import PlainTensors
from ..checkpoints.tensor_files import FLOAT_TYPES, check_finite, read_json, read_tensors

CONFIG = "adapter_config.json"
FOLDER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
KEY = re.compile(r"(?P<module>.+)\.(?:lora_(?P<half>A|B|down|up)(?:\.default)?\.weight|(?P<alpha>alpha))")
DOWN = ("A", "down")
PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "model.")  # before official names
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lora_")  # before names with underscores for dots
PLAIN_TYPE = "LORA"
# Entries of adapter_config.json that change what the tensors mean; supported with these values alone.
ONLY = {"use_dora": (False, None), "fan_in_fan_out": (False, None), "alora_invocation_tokens": (None,)}


@dataclass(frozen=True)
class Change:
    """What one matrix is changed by: factor * up @ down."""

    down: Tensor  # [rank, inputs, ...]
    up: Tensor  # [outputs, rank, ...]
    factor: float

    def added_to(self, weight: Tensor) -> Tensor:
        """The changed matrix, computed in fp32, in the type of the weight."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (weight.float() + self.factor * product.view(weight.shape)).to(weight.dtype)

    def fits(self, shape: tuple[int, ...]) -> bool:
        rank, outputs = self.down.shape[0], self.up.shape[0]
        inner = math.prod(self.up.shape[1:]) == rank and self.down.dim() == len(shape)
        return inner and outputs == shape[0] and tuple(self.down.shape[1:]) == tuple(shape[1:])


class Merged(Mapping[str, Tensor]):
    """Weights with changes, each tensor made when it is asked for. A mapping of `stored` like `PlainTensors`."""

    def __init__(self, weights: PlainTensors, changes: Mapping[str, Change]) -> None:
        self._weights, self._changes = weights, changes
        self.stored = weights.stored

    def __getitem__(self, name: str) -> Tensor:
        weight, change = self._weights[name], self._changes.get(name)
        return weight if change is None else change.added_to(weight)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def read_changes(path: Path, weights: PlainTensors, scale: float = 1.0) -> dict[str, Change]:
    """The changes in a LoRA file, or a folder as PEFT writes it, by the names of the weights that they change.

    Raises:
        CheckpointError: unreadable, a key that is not understood or changes no weight, half of a pair, another shape,
            or no alpha.
        NumericsError: a number is not finite.
    """
    file = next((path / name for name in FOLDER_FILES if (path / name).is_file()), path)
    state = plain_names(read_tensors(file), file)
    check_finite({name: tensor for name, tensor in state.items() if tensor.is_floating_point()}, file)
    config = _config(file.with_name(CONFIG))
    names = _Names(weights, file)
    changes: dict[str, Change] = {}
    for module, parts in _modules(state, file).items():
        name = names.official(module, next(iter(parts.values()))[0])
        if name in changes:
            raise CheckpointError(f"{file} changes {name} twice", fix="merge one file after the other")
        down, up = (_matrix(parts, half, module, file) for half in ("down", "up"))
        alpha = _alpha(parts, config, module, down.shape[0], file)
        changes[name] = Change(down, up, scale * alpha / _divisor(config, down.shape[0]))
        if not changes[name].fits(tuple(weights.stored[name].shape)):
            raise CheckpointError(
                f"{file}: {module} changes a matrix {list(up.shape)} x {list(down.shape)}, "
                f"{name} is {list(weights.stored[name].shape)}",
                fix="give the LoRA that was trained on this model",
            )
    return changes


Parts = dict[str, tuple[str, Tensor]]  # "down", "up", "alpha" -> key in the file, and its tensor


def _modules(state: Mapping[str, Tensor], file: Path) -> dict[str, Parts]:
    """The tensors of every changed module."""
    modules: dict[str, Parts] = {}
    for key, tensor in state.items():
        match = KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(
                f"{file} holds {key}, which is no part of a LoRA that is understood",
                expected="X.lora_A.weight and X.lora_B.weight; or X.lora_down.weight, X.lora_up.weight and X.alpha",
                fix="merge it with the tool that made it, and convert the merged model",
            )
        part = "alpha" if match["alpha"] else "down" if match["half"] in DOWN else "up"
        held = modules.setdefault(match["module"], {})
        if part in held:
            raise CheckpointError(f"{file} holds both {held[part][0]} and {key}", expected="one of them")
        held[part] = (key, tensor)
    if not modules:
        raise CheckpointError(f"{file} holds no tensors", expected="a LoRA")
    return modules


def _matrix(parts: Parts, half: str, module: str, file: Path) -> Tensor:
    if half not in parts:
        there = ", ".join(key for key, _ in parts.values())
        raise CheckpointError(f"{file} has half of a pair for {module}: {there}", expected="two matrices")
    key, tensor = parts[half]
    if tensor.dtype not in FLOAT_TYPES or tensor.dim() < 2 or not tensor.shape[0]:
        raise CheckpointError(f"{file}: {key} is {tensor.dtype}{list(tensor.shape)}", expected="a matrix of floats")
    return tensor


class _Names:
    """Which weight a module's name in a LoRA file means."""

    def __init__(self, weights: Iterable[str], file: Path) -> None:
        self._file = file
        self._official = {name.removesuffix(".weight"): name for name in weights if name.endswith(".weight")}
        self._flat: dict[str, list[str]] = {}
        for module, name in self._official.items():
            self._flat.setdefault(module.replace(".", "_"), []).append(name)

    def official(self, module: str, key: str) -> str:
        """The official name.

        Raises:
            CheckpointError: there is none, or more than one; names the key.
        """
        for prefix in ("", *PREFIXES):
            if module.startswith(prefix) and (found := self._official.get(module.removeprefix(prefix))):
                return found
        flat = [self._flat.get(module.removeprefix(p), []) for p in ("", *FLAT_PREFIXES) if module.startswith(p)]
        choices = next((names for names in flat if names), [])
        if len(choices) == 1:
            return choices[0]
        raise CheckpointError(
            f"{self._file}: {key} changes "
            + (f"any of {', '.join(choices)}" if choices else "no matrix of this model"),
            expected="official names before .lora_A, .lora_B, .lora_down, .lora_up and .alpha",
            fix="give the LoRA that was trained on this model",
        )


def _config(file: Path) -> dict[str, Any]:
    """adapter_config.json beside a LoRA, empty where there is none."""
    config = read_json(file) if file.is_file() else {}
    for entry, values in ONLY.items():
        if config.get(entry) not in values and entry in config:
            raise CheckpointError(f"{file} has {entry} {config[entry]!r}", expected=f"{entry} {values[0]!r}")
    kind = config.get("peft_type", PLAIN_TYPE)
    if kind != PLAIN_TYPE:
        raise CheckpointError(f"{file} is of type {str(kind)[:40]!r}", expected=PLAIN_TYPE)
    return config


def _alpha(parts: Parts, config: Mapping[str, Any], module: str, rank: int, file: Path) -> float:
    if "alpha" in parts:
        key, tensor = parts["alpha"]
        if tensor.numel() != 1:
            raise CheckpointError(f"{file}: {key} has shape {list(tensor.shape)}", expected="one number")
        return float(tensor)
    patterns = config.get("alpha_pattern") or {}
    found = next((alpha for key, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module)), None)
    alpha = config.get("lora_alpha") if found is None else found
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(
            f"{file} says no alpha of {module}" + (f": lora_alpha is {alpha!r}" if alpha is not None else ""),
            expected=f"a tensor {module}.alpha, or lora_alpha in {CONFIG} beside the file",
            fix=f"fetch {CONFIG} too; where alpha is the rank, say so there: lora_alpha {rank}",
        )
    return float(alpha)


def _divisor(config: Mapping[str, Any], rank: int) -> float:
    return math.sqrt(rank) if config.get("use_rslora") else rank
