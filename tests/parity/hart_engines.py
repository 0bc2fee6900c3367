"""Recorded runs of the published HART programs against chained engines: comparisons for `python -m tests.parity`.

Engines draw one image at a time, so the images of a run are drawn one after another, under their recorded randomness.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from fastvar.core.plan import SamplingMode
from fastvar.engines.bundle.bundle import Bundle
from fastvar.export.build import build_bundle
from fastvar.export.checkpoints.checkpoint import Checkpoint
from fastvar.export.checkpoints.random_weights import random_checkpoint_for
from fastvar.export.models.codebook.tokenizer import area_pool
from fastvar.export.models.hart.reference import as_grid
from fastvar.export.options import BuildOptions
from fastvar.export.toolchain import make_toolchain
from fastvar.families.hart import HART
from fastvar.runtime.memory.layout import EngineCall, StepCalls
from fastvar.runtime.requests.settings import SamplingSettings
from fastvar.runtime.session import Session
from fastvar.runtime.workspace import Workspace
from tests.parity.comparison import Comparison, compare_crops
from tests.parity.hart import SWAPPED, HartRun, compare_far, compare_stored, load_hart_runs


def compare_hart_engines(folder: Path, backend: str, cache: Path) -> Iterator[Comparison]:
    """Every image of every run that a folder holds."""
    with torch.no_grad():
        for run in load_hart_runs(folder):
            yield from compare_run(run, backend, cache)


def checkpoint_of(run: HartRun) -> Checkpoint:
    """The run's models; a decoder that was not recorded is random, and not compared."""
    made = random_checkpoint_for(run.config, run.tokenizer.config, name=run.name)
    images = run.tokenizer.state_dict()
    return replace(made, transformer_weights=run.model.state_dict(), image_tokenizer_weights=images)


def compare_run(run: HartRun, backend: str, cache: Path) -> Iterator[Comparison]:
    """Chained engines, from a bundle that is built for this run, against the recording: image after image."""
    s = run.sampling
    sampling_mode = SamplingMode(smooth=s.smooth, residual=s.residual, final_iterations=s.final_iterations)
    plan = HART.plan(run.config.schedule, run.plan().policy, run.config, sampling_mode)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bundle"
        toolchain = make_toolchain(backend, precision="fp32")
        build_bundle(checkpoint_of(run), plan, out, BuildOptions(guidance="on"), toolchain=toolchain, cache=cache)
        workspace = Session(Bundle.open(out), threads=1).workspace(2)
        batch = run.prompt.features.shape[0]
        for image in range(batch):
            title = f"{run.name}: {backend} engines" + (f", image {image}" if batch > 1 else "")
            yield compare_image(run, EngineRun(run, workspace, image, batch), Comparison(title, run.tolerance))


@dataclass
class EngineRun:
    """One image of a batch, drawn by engines under the recorded randomness."""

    run: HartRun
    workspace: Workspace
    image: int
    batch: int

    def own(self, tensor: Tensor) -> Tensor:
        """This image's rows of a batch [B, ...], or its two rows of [2 B, ...]; samples before guidance rows."""
        count = tensor.shape[0]
        return tensor[self.image :: self.batch] if count in (self.batch, 2 * self.batch) else tensor

    def give_text(self) -> None:
        prompt = self.run.prompt
        features, counted = prompt.features[self.image], int(prompt.mask[self.image].sum())
        self.workspace.set_features(features.numpy(), None, (counted,))

    def noise(self, index: int, shape: tuple[int, ...], name: str = "noise") -> NDArray[Any]:
        kind, _, part = name.partition(".")
        key, tensors = f"s{index + int(part or 0):02d}.", self.run.tensors
        if kind == "noise":
            return (-1.0 - self.own(tensors[key + "idx"]).float()).view(shape).numpy()
        if kind == "gumbel":
            return self.own(tensors[key + "gumbel_noise"]).view(shape).numpy()
        if kind == "order":
            return self.own(tensors["maskgit_orders"]).view(shape).numpy()
        drawn = self.run.diffusion_noise(index + int(part or 0), shape)
        return drawn.unflatten(1, (self.batch, -1))[:, self.image].numpy()

    def read(self, call: EngineCall, name: str) -> Tensor:
        return torch.from_numpy(self.workspace.read(call, name).copy())

    def by_row(self, call: EngineCall, name: str) -> Tensor:
        """[L * R, C] -> [R, L, C]."""
        return self.read(call, name).unflatten(0, (-1, 2)).transpose(0, 1)

    def force_sum(self, calls: StepCalls, summed: Tensor) -> None:
        """Put another running sum in place of a scale's, and what the next scale begins with."""
        run, workspace = self.run, self.workspace
        workspace._bound.write(calls.summed, summed.numpy())
        following = calls.step.next_index
        assert following is not None
        x = run.model.embed(area_pool(summed, run.plan().schedule.sizes[following])) + run.model.level(following)
        rows = x.expand(2, -1, -1).transpose(0, 1).flatten(0, 1)
        workspace.write(calls.sampling_head, "x_next", rows.numpy())


def compare_image(run: HartRun, engines: EngineRun, to: Comparison) -> Comparison:
    """All that is recorded of one image."""
    workspace, s = engines.workspace, run.sampling
    engines.give_text()
    settings = SamplingSettings(s.guidance_scale, None, s.top_p, guidance_off=HART.guidance_off)
    expected, whole, block_in = torch.zeros(()), torch.zeros(()), engines.by_row(workspace.layout.conditioning, "x")
    for calls, _ in workspace.run_scales(engines.noise, settings):
        prefix = f"s{calls.step.index + (calls.step.part or 0):02d}."
        scale = prefix[:-1]
        if calls.pick is not None:
            picked = engines.read(calls.pick, "positions")
            whole = engines.by_row(calls.pick, "x") if calls.step.part == 0 else whole
            block_in = whole[:, picked]
        compare_rows(engines, prefix + "block_in", "block_in", block_in[: 2 if calls.step.index == 0 else 1], to)
        compare_rows(engines, prefix + "block_out", "block_out", engines.by_row(calls.layers[-1], "x_out"), to)
        compare_rows(engines, prefix + "logits_cfg", "logits", engines.read(calls.sampling_head, "logits")[None], to)
        total = torch.from_numpy(workspace.summed_codes(calls).copy())[None]
        if prefix + "f_hat" in run.tensors:
            recorded = engines.own(run.tensors[prefix + "f_hat"])
            stride = total.shape[-1] // recorded.shape[-1]
            to.tensor(scale, "f_hat", total[..., ::stride, ::stride], recorded)
        compare_kept_sets(run, calls, engines, to)
        if calls.step.next_index is None:
            continue
        block_in = engines.by_row(calls.sampling_head, "x_next")
        if s.smooth:
            expected = forced_sum(run, engines, calls, expected)
            to.tensor(scale, "f_hat.smooth", total, expected)
        if s.smooth or calls.step.index == 0:
            # The recorded average of the first map, which is nearly constant, is off by 1e-6; heads whose scores are
            # multiplied by 100 make 2e-3 of that.
            engines.force_sum(calls, expected if s.smooth else total)
    compare_far("end", "residual", total, engines.own(run.tensors["f_hat_final"]), to)
    if run.decodes:
        image = (torch.from_numpy(workspace.decode().copy())[None] + 1) / 2
        crops = {name: engines.own(tensor) for name, tensor in run.tensors.items() if name.startswith("img_")}
        compare_crops(to, "end", "image", image, crops, "img")
    return to


def forced_sum(run: HartRun, engines: EngineRun, calls: StepCalls, before: Tensor) -> Tensor:
    """The running sum behind a scale with the recorded mixture of codes in place of the drawn one."""
    grid = as_grid(engines.own(run.tensors[f"s{calls.step.index:02d}.h_soft"]), calls.step.size)
    final, scales = run.plan().schedule.final, len(run.plan().schedule)
    return before + run.tokenizer.quantize.contribution(grid, calls.step.index, scales, final)


def compare_rows(engines: EngineRun, key: str, name: str, got: Tensor, to: Comparison) -> None:
    """One image's rows against what is stored of them."""
    stored = {k: engines.own(v) for k, v in engines.run.tensors.items() if k.startswith(key)}
    compare_stored(stored, key, name, got, to)


def compare_kept_sets(run: HartRun, calls: StepCalls, engines: EngineRun, to: Comparison) -> None:
    """Which tokens every sub-layer of every layer kept, per guidance row."""
    prefix = f"s{calls.step.index:02d}."
    for layer, views in calls.kept.items():
        for ours, theirs in (("sa", "attn"), ("ffn", "ffn")):
            found = engines.workspace.read_view(views[ours]).reshape(-1, 2).T // 2
            expected = run.tensors[f"sel.{prefix}layer{layer}.{theirs}"]
            swapped = [len(set(a.tolist()) - set(b.tolist())) for a, b in zip(found, expected, strict=True)]
            to.same(f"{prefix}kept {layer}.{ours}: {swapped} tokens differ", max(swapped) <= SWAPPED)
