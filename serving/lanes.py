"""Pipelines that draw passes of one bundle: one on all cores, and several side by side on a share of the cores each.

Threads that draw one pass together meet at every operation, and wait for each other. With a pass each they do not: each
pass takes longer, and more images are drawn. So one pipeline draws on all cores while a single pass is wanted, and the
others draw when several wait. Weights are mapped once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..core.arguments import byte_count
from ..core.dtypes import human_bytes
from ..core.platform import memory_bytes, usable_cores
from ..engines.registry import get_backend, runs_on_host
from ..errors import DeviceMemoryError, InputError
from ..runtime.pipeline import Pipeline
from .jobs import Job

BY_ITSELF = 2  # as many draw side by side where nobody says how many
SHARE_BY_ITSELF = 0.5  # of the machine's memory, which they may take then


@dataclass(eq=False)
class Lane:
    """A pipeline and the jobs that it draws for. `is_whole`: on all cores, so beside no other."""

    pipe: Pipeline
    is_whole: bool = True
    drawing: Sequence[Job] = field(default_factory=tuple)

    def may_begin(self, lanes: Sequence[Lane], several: bool) -> bool:
        """Whether the next pass is this lane's to draw; `several`: whether more than one pass waits."""
        others = [lane for lane in lanes if lane.drawing and lane is not self]
        if self.is_whole:
            return not others and not (several and len(lanes) > 1)
        return not any(lane.is_whole for lane in others) and bool(several or others)


def open_lanes(path: Path, instances: int | None, **load_options: Any) -> list[Lane]:
    """The bundle of a folder in one pipeline, and in as many more as shall draw side by side.

    Args:
        instances: how many of these; by default two where engines, cores and memory allow, otherwise none.
        load_options: arguments of `Pipeline.load`.

    Raises:
        InputError: more than there are cores, or engines that share the threads of the process.
        DeviceMemoryError: together they take more than the budget.
        FastvarError: the bundle cannot be loaded.
    """
    whole = Pipeline.load(path, **load_options)
    opened = [Lane(whole)]
    try:
        threads = load_options.get("threads") or usable_cores()
        count = _instances(whole, instances, threads, load_options.get("memory_budget"))
        sizes = {images for own in whole.batch_sizes.values() for images in own}
        whole.warm_up(min(sizes))
        for _ in range(count):
            pipe = Pipeline(whole.bundle, threads=threads // count, batch=max(sizes))
            opened.append(Lane(pipe, is_whole=False))
            pipe.warm_up(max(sizes))
    except BaseException:
        for lane in opened:
            lane.pipe.close()
        raise
    return opened


def _instances(pipe: Pipeline, wanted: int | None, threads: int, budget: str | int | None) -> int:
    """How many draw side by side; none where passes are drawn one at a time."""
    if wanted == 1:
        return 0
    allowed = _can_share_cores(pipe, threads)
    limit = memory_bytes()
    if budget is not None:
        limit = min(filter(None, (limit, byte_count("memory_budget", budget))))
    if wanted is None:
        count = min(BY_ITSELF, threads)
        fits = limit is None or _need(pipe, count) <= (limit if budget is not None else SHARE_BY_ITSELF * limit)
        return count if allowed and fits else 0
    if not allowed:
        raise InputError(
            f"{wanted} instances of {pipe.bundle.path.name}, whose engines run on the threads of the process",
            expected="1, or engines of onnxruntime 1.26 or later on at most 8 threads",
            fix="leave --instances away",
        )
    if wanted > threads:
        raise InputError(f"{wanted} instances on {threads} threads", expected=f"at most {threads}")
    if limit is not None and _need(pipe, wanted) > limit:
        raise DeviceMemoryError(
            f"{wanted} instances of {pipe.bundle.path.name} need {human_bytes(_need(pipe, wanted))} of memory, "
            f"{human_bytes(limit)} are allowed",
            expected="room for all of them",
            fix="fewer --instances, or a smaller --batch",
        )
    return wanted


def _can_share_cores(pipe: Pipeline, threads: int) -> bool:
    built = pipe.manifest
    return threads > 1 and runs_on_host(built) and get_backend(built.backend).keeps_threads_apart(threads)


def _need(pipe: Pipeline, count: int) -> int:
    """Bytes of the pipeline and of so many beside it, which have its weights in common."""
    once = pipe.memory_need
    return once.total_bytes + count * replace(once, weight_bytes=0).total_bytes
