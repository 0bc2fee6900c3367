"""What all trainings share: the optimizer, averaged weights, checkpoints, and a learning rate that follows a budget.

Knows nothing of images, codes or captions.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from demo.training.team import ALONE, Team

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalize(update: Tensor) -> Tensor:
    """The orthogonal factor of a matrix [rows, columns], roughly, by Newton-Schulz steps in bf16, as the forward pass.

    `torch.optim.Muon` computes them by `addmm`, which in bf16 takes CPUs without AMX hundreds of times longer.
    """
    a, b, c = NEWTON_SCHULZ
    x = update.mT if update.shape[0] > update.shape[1] else update
    x = (x / (x.norm() + 1e-7)).bfloat16()
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if update.shape[0] > update.shape[1] else x).to(update.dtype)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for matrices and convolutions, its step as large as one of AdamW.

    The processes of a team share the work: each orthogonalises some of the matrices.
    """

    def __init__(self, params: Sequence[Tensor], lr: float, decay: float, team: Team = ALONE) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.95, "decay": decay})
        self.team = team

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update every parameter that has a gradient; takes no closure."""
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            directions = [self._direction(group["momentum"], p) for p in moved]
            own = set(self.team.parts(len(moved)))
            updates = [orthogonalize(d) if i in own else torch.zeros_like(d) for i, d in enumerate(directions)]
            self.team.sum(updates)
            for p, update in zip(moved, updates, strict=True):
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(update.view_as(p), alpha=-group["lr"] * 0.2 * max(update.shape) ** 0.5)

    def _direction(self, momentum: float, p: Tensor) -> Tensor:
        """Nesterov's momentum, as a matrix [rows, columns]."""
        if "momentum" not in self.state[p]:
            self.state[p]["momentum"] = torch.zeros_like(p)
        buffer, gradient = self.state[p]["momentum"], p.grad
        assert gradient is not None  # see `step`
        buffer.lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum).flatten(1)


def optimizers(
    matrices: Sequence[Tensor], others: Sequence[Tensor], lr: float, decay: float, team: Team = ALONE
) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for everything else, with one learning rate for both."""
    adam = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    built: list[torch.optim.Optimizer] = [Muon(matrices, lr, decay, team), adam]
    for optimizer in built:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return built


def matrices_and_others(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """All parameters: matrices and convolutions, for Muon, and those of one dimension."""
    parameters = list(model.parameters())
    return [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]


def learning_rate_factor(progress: float, falls_from: float = 0.03, warm_up: float = 0.03) -> float:
    """Linear warm-up, one, and from `falls_from` on a cosine to zero; `progress` runs from 0 to 1."""
    if progress < warm_up:
        return progress / warm_up + 1e-3
    return 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress - falls_from) / (1 - falls_from))))


@dataclass(frozen=True)
class Minutes:
    """A budget of processor time: the run takes as long on any machine, and goes as far as it can."""

    minutes: float

    def progress(self, _step: int, cpu_s: float) -> float:
        return cpu_s / (60 * self.minutes)


@dataclass(frozen=True)
class Steps:
    """A budget of steps: the run ends with the same weights on any machine, up to rounding."""

    steps: int

    def progress(self, step: int, _cpu_s: float) -> float:
        return step / self.steps


class TrainingRun:
    """Step counter, clock, optimizers, and the averaged weights of one model; resumes from its file.

    The learning rate follows the share of the budget that is used, and falls from `falls_from` on: until then a budget
    can still be changed. The clock counts the processor time of this process, so that a stopped or crowded-out run
    loses nothing of it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        file: Path,
        budget: Minutes | Steps,
        average: float,
        falls_from: float = 0.03,
    ) -> None:
        self.model, self.optimizers, self.file = model, optimizers, file
        self.budget, self.average, self.falls_from = budget, average, falls_from
        self.step, self.used_s = 0, 0.0
        self.averaged = {k: v.clone() for k, v in model.state_dict().items()}
        if file.exists():
            self._restore(torch.load(file, weights_only=False))
        self._clock = time.process_time()

    @property
    def progress(self) -> float:
        return self.budget.progress(self.step, self.used_s)

    def update(self, lr_scale: float = 1.0) -> None:
        """One optimizer step on the gradients at hand, then the average and the clock."""
        factor = learning_rate_factor(self.progress, self.falls_from) * lr_scale
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        weight = 1 - min(self.average, 1 - 1 / (1 + self.step / 5))
        for k, v in self.model.state_dict().items():
            self.averaged[k].lerp_(v, weight)
        now = time.process_time()
        self.used_s, self._clock = self.used_s + now - self._clock, now

    def save(self) -> None:
        write_atomically(
            {
                "model": self.model.state_dict(),
                "averaged": self.averaged,
                "optimizers": [o.state_dict() for o in self.optimizers],
                "step": self.step,
                "used_s": self.used_s,
                "rng": torch.get_rng_state(),
            },
            self.file,
        )
        self.resume_clock()

    def resume_clock(self) -> None:
        """Leave out the time since the last step: saving and evaluating are no training."""
        self._clock = time.process_time()

    def _restore(self, state: dict[str, Any]) -> None:
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise SystemExit(
                f"{self.file} cannot be resumed: it holds the weights of another model: {str(error).splitlines()[-1]}; "
                "expected one that this version wrote; move it away, or set FASTVAR_DEMO_STATE to an empty folder"
            ) from None
        self.averaged = state["averaged"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            peaks = [group["peak_lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["peak_lr"] = peak
        self.step, self.used_s = state["step"], state["used_s"]
        torch.set_rng_state(state["rng"])


def zero_bias(module: nn.Linear | nn.Embedding | nn.Conv2d) -> None:
    """Where there is one."""
    if isinstance(bias := getattr(module, "bias", None), Tensor):
        nn.init.zeros_(bias)


def write_atomically(state: Any, file: Path) -> None:
    """`torch.save` under a temporary name, then rename: a reader never sees half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.part")
    with temporary.open("wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(file)


def half_precision(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Floating-point tensors rounded to fp16, the rest as they are; everything contiguous."""
    return {k: (v.half() if v.is_floating_point() else v).contiguous().clone() for k, v in weights.items()}
