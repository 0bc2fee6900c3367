"""Processes that train one model together: each computes some parts of a step, and their gradients are added up.

What a part is depends on the step and its number alone, so a run ends with the same weights for any number of
processes, up to the order of sums.
"""

from __future__ import annotations

import datetime
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MEETING = datetime.timedelta(minutes=10)  # until all have started
PATIENCE = datetime.timedelta(hours=6)  # how long others wait while the first evaluates


@dataclass(frozen=True)
class Team:
    """The place of this process among those of a run; the first one logs, evaluates and saves."""

    rank: int = 0
    size: int = 1
    group: Any = None  # that gradients are added up in

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def parts(self, count: int) -> range:
        """Those of a step's parts that this process computes."""
        return range(self.rank, count, self.size)

    def add_up(self, parameters: Sequence[Tensor], *others: Tensor) -> None:
        """Replace the gradients of parameters, and other tensors, by their sums over all processes."""
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        self.sum([*(p.grad for p in parameters if p.grad is not None), *others])

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype by their sums over all processes."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat, group=self.group)
        for tensor, summed in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))


ALONE = Team()


@contextmanager
def team(module: str, arguments: Sequence[str], processes: int, meeting: str = "") -> Iterator[Team]:
    """This process and the others of a run, which the first one starts.

    Args:
        module: what the others run, with these arguments, `--meeting FILE:RANK` and the number of processes.
        meeting: as another process was given it; empty for the first.
    """
    if processes == 1:
        yield ALONE
        return
    with tempfile.TemporaryDirectory() as folder:
        path, _, rank = (meeting or f"{Path(folder) / 'meeting'}:0").rpartition(":")
        others = []
        if not meeting:
            command = [sys.executable, "-m", module, *arguments, "--processes", str(processes)]
            others = [subprocess.Popen([*command, "--meeting", f"{path}:{other}"]) for other in range(1, processes)]
        try:
            method = f"file://{path}"
            dist.init_process_group("gloo", method, timeout=MEETING, rank=int(rank), world_size=processes)
            yield Team(int(rank), processes, dist.new_group(timeout=PATIENCE))
            dist.destroy_process_group()
            for other in others:
                other.wait()
        finally:
            for other in others:
                other.kill()
                other.wait()
