"""Draws and compares the images of a policy search, and times policies against dense in one process.

A function that the caller passes in builds the bundles, in another process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from ...core.policy import DENSE, PruningPolicy
from ...engines.bundle.manifest import Manifest
from ...errors import InputError
from ...families import family_named
from ...runtime.pipeline import Pipeline
from .metrics import Pixels, psnr, ssim
from .search import Constraints, Quality, Timing, Tuning, search
from .space import PolicySpace

Build = Callable[[PruningPolicy], Path]  # a policy's bundle
Scorer = Callable[[Sequence[Pixels], Sequence[str]], float]  # images and their prompts -> accuracy, 0 to 1
FEWEST_RUNS = 3


@dataclass(frozen=True)
class TuningSetup:
    """What is drawn: image i of `images` shows prompt i modulo their number, with seed + i."""

    prompts: tuple[str, ...]
    images: int
    seed: int = 0
    runs: int = 9  # timed images of each policy, after one warm-up

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InputError("there is no prompt to draw", expected="one a line")
        if self.images < 1 or self.runs < FEWEST_RUNS:
            raise InputError(
                f"{self.images} images and {self.runs} runs", expected=f"at least 1 image and {FEWEST_RUNS} runs"
            )

    def prompt(self, image: int) -> str:
        return self.prompts[image % len(self.prompts)]


class Gallery:
    """Images of policies and of dense.

    Args:
        build: builds the bundle of a policy.
        scorer: gives the accuracy of images; None for no accuracy.
        spent: share of the budget that is spent. From 1 on timing takes `FEWEST_RUNS` runs.
        told: receives progress messages.
    """

    def __init__(
        self,
        build: Build,
        setup: TuningSetup,
        scorer: Scorer | None = None,
        *,
        threads: int | None = None,
        spent: Callable[[], float] = lambda: 0.0,
        told: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._build, self.setup, self._scorer = build, setup, scorer
        self._threads, self._spent, self._told = threads, spent, told
        self._dense = self._load(DENSE)
        self._references: list[Pixels] = []

    def _load(self, policy: PruningPolicy) -> Pipeline:
        return Pipeline.load(self._build(policy), threads=self._threads)

    def judge(self, policy: PruningPolicy) -> Quality:
        """Draw all images of a policy and compare them with the dense ones."""
        self._told(f"drawing {policy.name}")
        if not self._references:
            self._references = self._draw(self._dense)
        images = self._references if policy == DENSE else self._draw(self._load(policy))
        pairs = list(zip(images, self._references, strict=True))
        return Quality(
            psnr_db=float(np.median([psnr(*pair) for pair in pairs])),
            ssim=float(np.mean([ssim(*pair) for pair in pairs])),
            accuracy=self._accuracy(images),
        )

    def _draw(self, pipe: Pipeline) -> list[Pixels]:
        numbers = range(self.setup.images)
        drawn = (pipe(self.setup.prompt(i), seed=self.setup.seed + i).images[0] for i in numbers)
        return [np.asarray(image) for image in drawn]

    def _accuracy(self, images: Sequence[Pixels]) -> float | None:
        if self._scorer is None:
            return None
        found = self._scorer(images, [self.setup.prompt(i) for i in range(len(images))])
        if not isinstance(found, int | float) or not 0 <= found <= 1:
            raise InputError(f"the scorer gave {found!r}", expected="a number from 0 to 1")
        return float(found)

    def time(self, policy: PruningPolicy) -> Timing:
        """Draw a policy and dense alternately. Run -1 is a warm-up and is not counted."""
        self._told(f"timing {policy.name}")
        pipes = (self._dense, self._dense if policy == DENSE else self._load(policy))
        spent: list[tuple[float, float]] = []
        for run in range(-1, self.setup.runs):
            pair = tuple(self._scales_ms(pipe, run) for pipe in pipes)
            if run >= 0:
                spent.append((pair[0], pair[1]))
            if len(spent) >= FEWEST_RUNS and self._spent() >= 1:
                break
        dense, own = (median(column) for column in zip(*spent, strict=True))
        return Timing(dense if policy == DENSE else own, dense, len(spent))

    def _scales_ms(self, pipe: Pipeline, run: int) -> float:
        image = run % self.setup.images
        return pipe(self.setup.prompt(image), seed=self.setup.seed + image).timings[0].scales_ms


class Budget:
    """Share of some minutes of wall clock time that is spent since construction."""

    def __init__(self, minutes: float) -> None:
        if not 0 < minutes < 1e5:
            raise InputError(f"a budget of {minutes} minutes", expected="a number above 0")
        self._seconds, self._start = minutes * 60, time.monotonic()

    def spent(self) -> float:
        return (time.monotonic() - self._start) / self._seconds


def tune_bundle(
    manifest: Manifest,
    build: Build,
    setup: TuningSetup,
    constraints: Constraints,
    *,
    scorer: Scorer | None = None,
    minutes: float = 30.0,
    threads: int | None = None,
    told: Callable[[str], None] = lambda _: None,
) -> Tuning:
    """Search policies for a bundle's model and size.

    A PSNR drop counts from the bundle's own policy, or from the published one if the bundle is dense.

    Raises:
        InputError: the bundle cannot read prompts.
    """
    if manifest.text_tokenizer is None:
        raise InputError(
            "this bundle has no text encoder, so it cannot draw prompts",
            fix="build it from a checkpoint with a text encoder",
        )
    schedule, depth = manifest.plan.schedule, manifest.plan.depth
    own, published = manifest.plan.policy, family_named(manifest.family).policy("fastvar", schedule, depth)
    budget = Budget(minutes)
    space = PolicySpace(schedule, depth, (published.first_layer, published.stop_layer))
    reference = own if space.key(own) != space.key(DENSE) else published
    gallery = Gallery(build, setup, scorer, threads=threads, spent=budget.spent, told=told)
    return search(space, gallery.judge, gallery.time, reference, constraints, budget.spent)
