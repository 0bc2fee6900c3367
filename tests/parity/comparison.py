"""What a recording is compared by: the largest error of every tensor, sets that must be equal, and parts of images."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

CROP = re.compile(r"(tl|br|center)(\d+)|stride(\d+)|full")

Tensors = dict[str, Tensor]


@dataclass
class Comparison:
    """Largest error per (scale, tensor) of one side of one run, and what did not match at all."""

    title: str
    tolerance: dict[str, float]
    errors: dict[tuple[str, str], float] = field(default_factory=dict)
    mismatches: list[str] = field(default_factory=list)
    checked_sets: int = 0

    def tensor(self, scale: str, name: str, got: Tensor, expected: Tensor, token_dim: int = -2) -> None:
        if got.shape[token_dim] > expected.shape[token_dim]:  # it holds as many of the first and of the last tokens
            half = expected.shape[token_dim] // 2
            ends = (got.narrow(token_dim, 0, half), got.narrow(token_dim, got.shape[token_dim] - half, half))
            got = torch.cat(ends, token_dim)
        if got.shape != expected.shape:
            self.mismatches.append(f"{scale} {name}: shape {tuple(got.shape)}, recorded {tuple(expected.shape)}")
            return
        error, before = float((got.float() - expected.float()).abs().max()), self.errors.get((scale, name), 0.0)
        self.errors[scale, name] = before if error <= before or not before <= before else error  # NaN stays

    def same(self, what: str, equal: bool) -> None:
        self.checked_sets += 1
        if not equal:
            self.mismatches.append(what)

    def limit(self, name: str) -> float:
        return self.tolerance.get(name, self.tolerance.get(name.split(".")[0], 1e-4))

    @property
    def failures(self) -> list[str]:
        over = [
            f"{scale} {name}: {error:.2e} > {self.limit(name):.0e}"
            for (scale, name), error in self.errors.items()
            if not error <= self.limit(name)
        ]
        return over + self.mismatches


def crop(image: Tensor, name: str) -> Tensor | None:
    """What a recording's name says of an image [..., H, W]; None where it names no crop.

    "tl32", "br32", "center32": so many pixels a side at the top left, the bottom right, the middle; "stride4": every
    fourth pixel; "full": all.
    """
    match = CROP.fullmatch(name)
    if match is None:
        return None
    if name == "full":
        return image
    if match[3]:
        return image[..., :: int(match[3]), :: int(match[3])]
    ranges = [_range(match[1], int(match[2]), length) for length in image.shape[-2:]]
    return image[..., ranges[0], ranges[1]]


def _range(where: str, side: int, length: int) -> slice:
    start = {"tl": 0, "br": max(length - side, 0), "center": max(length - side, 0) // 2}[where]
    return slice(start, start + side)


def compare_crops(to: Comparison, scale: str, what: str, image: Tensor, recorded: Tensors, prefix: str) -> None:
    """Every crop of an image that is recorded, under names of a prefix."""
    for name, expected in recorded.items():
        if name != prefix and not name.startswith(f"{prefix}_"):
            continue
        own = name.removeprefix(prefix).removeprefix("_") or "full"
        part = crop(image, own)
        if part is None:
            to.mismatches.append(f"{name}: not a crop that is known")
        else:
            to.tensor(scale, f"{what}.{own}", part, expected)
