"""HART's diffusion head: a small network that draws, token by token, the part of the latent that codes cannot hold.

Module names follow the official keys under `diffloss.net` (upstream: hart/modules/diffusion).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....families.hart import RESIDUAL_GAIN, HartConfig, diffusion_guidance

TRAINED_STEPS = 1000
SINUSOIDS = 128
MAX_PERIOD = 10000.0


class NumberEmbedding(nn.Module):
    """Sinusoids of a number, cosines first, through Linear-SiLU-Linear: [N] -> [N, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * SINUSOIDS, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, number: Tensor) -> Tensor:
        falling = torch.exp(-math.log(MAX_PERIOD) * torch.arange(SINUSOIDS) / SINUSOIDS)
        angles = number.float().unsqueeze(-1) * falling
        return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1))


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


class DiffusionNet(nn.Module):
    """x [N, Cv], z [N, C], original timestep [1] -> [N, 2 * Cv]: the noise, then the variance's interpolation."""

    def __init__(self, config: HartConfig) -> None:
        super().__init__()
        width = config.diffusion_width
        self.time_embed = NumberEmbedding(width)
        self.cond_embed = nn.Linear(config.width, width)
        self.input_proj = nn.Linear(config.code_channels, width)
        self.res_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(config.diffusion_depth))
        self.final_layer = FinalLayer(width, 2 * config.code_channels)

    def forward(self, x: Tensor, z: Tensor, timestep: Tensor) -> Tensor:
        h, y = self.input_proj(x), self.time_embed(timestep) + self.cond_embed(z)
        for block in self.res_blocks:
            h = block(h, y)
        return self.final_layer(h, y)


@dataclass(frozen=True)
class DiffusionStep:
    """One sampling step: its timestep in the trained schedule, and the constants of its arithmetic."""

    timestep: int
    x0_from_x: float  # x0 = x0_from_x * x - x0_from_noise * noise, then clamped to [-1, 1]
    x0_from_noise: float
    mean_from_x0: float
    mean_from_x: float
    log_variance_low: float  # where the variance output is -1
    log_variance_high: float  # where it is 1
    last: bool  # no noise is added

    def apply(self, x: Tensor, out: Tensor, noise: Tensor) -> Tensor:
        """x, noise [N, Cv], network output [N, 2 * Cv] -> x of the next step."""
        predicted, variance = out.chunk(2, dim=-1)
        x0 = (self.x0_from_x * x - self.x0_from_noise * predicted).clamp(-1, 1)
        mean = self.mean_from_x0 * x0 + self.mean_from_x * x
        if self.last:
            return mean
        share = (variance + 1) / 2
        log_variance = share * self.log_variance_high + (1 - share) * self.log_variance_low
        return mean + torch.exp(0.5 * log_variance) * noise


def trained_cumulative() -> list[float]:
    """Cumulative alphas of the trained schedule: cosine, betas at most 0.999."""

    def signal(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    cumulative, product = [], 1.0
    for i in range(TRAINED_STEPS):
        beta = min(1 - signal((i + 1) / TRAINED_STEPS) / signal(i / TRAINED_STEPS), 0.999)
        product *= 1 - beta
        cumulative.append(product)
    return cumulative


def sampled_timesteps(steps: int) -> list[int]:
    """Evenly spaced timesteps from 0 to the last trained one."""
    stride = (TRAINED_STEPS - 1) / (steps - 1) if steps > 1 else 1.0
    return [round(i * stride) for i in range(steps)]


def diffusion_steps(steps: int) -> tuple[DiffusionStep, ...]:
    """The sampling steps, noisiest first. Each beta spans the trained betas between two sampled timesteps."""
    trained, made = trained_cumulative(), []
    timesteps = sampled_timesteps(steps)
    cumulative = [trained[t] for t in timesteps]
    before = [1.0, *cumulative[:-1]]
    betas = [1 - now / previous for now, previous in zip(cumulative, before, strict=True)]
    low = [beta * (1 - b) / (1 - c) for beta, b, c in zip(betas, before, cumulative, strict=True)]
    low[0] = low[1] if steps > 1 else betas[0]  # zero, which has no logarithm
    for i, timestep in enumerate(timesteps):
        beta, now, previous = betas[i], cumulative[i], before[i]
        made.append(
            DiffusionStep(
                timestep=timestep,
                x0_from_x=math.sqrt(1 / now),
                x0_from_noise=math.sqrt(1 / now - 1),
                mean_from_x0=beta * math.sqrt(previous) / (1 - now),
                mean_from_x=(1 - previous) * math.sqrt(1 - beta) / (1 - now),
                log_variance_low=math.log(low[i]),
                log_variance_high=math.log(beta),
                last=i == 0,
            )
        )
    return tuple(reversed(made))


@dataclass
class StepTrace:
    """One sampling step, for comparison."""

    x_in: Tensor  # [N, Cv]
    net_out: Tensor  # [N, 2 * Cv], guided
    x_out: Tensor  # [N, Cv]


def sample(
    net: DiffusionNet, z: Tensor, guidance: float | None, noise: Tensor, steps: tuple[DiffusionStep, ...]
) -> Iterator[StepTrace]:
    """Ancestral sampling, step by step.

    Args:
        z: conditioning rows [R * N, C]: N conditional ones, then with guidance N unconditional ones.
        guidance: strength, or None for conditional rows alone.
        noise: [steps, N, Cv]: where x starts, then what is added behind each step but the last.
    """
    conditional = z[: noise.shape[1]]
    strength = 0.0 if guidance is None else diffusion_guidance(guidance)
    x = noise[0]
    for i, step in enumerate(steps):
        timestep = torch.tensor([step.timestep])
        out = net(x, conditional, timestep)
        if strength:
            out = guide(out, net(x, z[noise.shape[1] :], timestep), strength)
        following = step.apply(x, out, noise[min(i + 1, len(steps) - 1)])
        yield StepTrace(x, out, following)
        x = following


def guide(conditional: Tensor, unconditional: Tensor, strength: float) -> Tensor:
    """Network outputs [N, 2 * Cv]: guidance on the noise; the variance stays the conditional row's."""
    noise, variance = conditional.chunk(2, dim=-1)
    other, _ = unconditional.chunk(2, dim=-1)
    return torch.cat(((1 + strength) * noise - strength * other, variance), dim=-1)


def residual_of(x: Tensor) -> Tensor:
    """The last step's x -> the residual that is added to the codes' embeddings."""
    return x * RESIDUAL_GAIN
