"""Recorded runs of Infinity's published program against the torch reference and the engines.

A folder holds `weights.safetensors` and, per run, `<case>.json` with `<case>.safetensors`; optionally `vae.*` with
`weights_vae.safetensors` (image_tokenizer.py). Both sides are fed the recorded bits (teacher forcing), so every tensor
is comparable.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastvar.core.plan import GenerationPlan, make_plan
from fastvar.core.policy import DENSE, PruningPolicy, ScaleRule
from fastvar.core.schedule import ScaleSchedule
from fastvar.engines.bundle.bundle import Bundle
from fastvar.export.build import build_bundle
from fastvar.export.checkpoints.checkpoint import Checkpoint
from fastvar.export.checkpoints.random_weights import random_checkpoint_for
from fastvar.export.models.infinity.model import InfinityTransformer
from fastvar.export.models.infinity.reference import Sampling, generate_scales
from fastvar.export.options import BuildOptions
from fastvar.export.toolchain import make_toolchain
from fastvar.families.infinity import ImageTokenizerConfig, TransformerConfig, transformer_from_json
from fastvar.families.infinity_presets import official_schedules
from fastvar.runtime.memory.layout import StepCalls
from fastvar.runtime.requests.settings import SamplingSettings
from fastvar.runtime.session import Session
from fastvar.runtime.workspace import Workspace
from tests.parity.comparison import Comparison, Tensors

DEFAULT_TOLERANCE = {"block_in": 1e-4, "block_out": 3e-4, "logits": 2e-4, "summed_codes": 1e-5, "cond": 1e-4}
SUB_LAYERS = ("sa", "ca", "ffn")


@dataclass
class Run:
    """One recorded run."""

    name: str
    meta: dict[str, Any]
    tensors: Tensors
    model: InfinityTransformer

    @property
    def config(self) -> TransformerConfig:
        return self.model.config

    @property
    def tolerance(self) -> dict[str, float]:
        given = {k: v for k, v in self.meta["suggested_tolerance"].items() if isinstance(v, float)}
        return {**DEFAULT_TOLERANCE, **given}

    @property
    def text(self) -> tuple[Tensor, Tensor]:
        """Conditional and unconditional features [T, Ct]."""
        features = self.tensors["text_features"].float()
        return features, self.model.cfg_uncond.data[: features.shape[0]]

    def plan(self) -> GenerationPlan:
        schedule = find_schedule(self.meta)
        return make_plan(schedule, find_policy(self.meta, schedule, self.config.depth), self.config.depth)

    def forced(self, scale: int) -> Tensor:
        """Noise that forces the recorded bits: -1 gives one, 2 gives zero."""
        return torch.where(self.tensors[f"s{scale:02d}.bits"].bool(), -1.0, 2.0)


@dataclass
class Observed:
    """What one side computed at one scale."""

    index: int
    block_in: Tensor  # [B, L, C]
    block_out: Tensor
    logits: Tensor  # [L, 2d]
    kept: dict[str, Tensor]  # "layer.sub_layer" -> [B, k]
    layer_out: Tensor | None = None  # [depth, B, L, C]


def find_schedule(meta: dict[str, Any]) -> ScaleSchedule:
    """The official schedule of these sizes, or a custom one normalised to its own aspect ratio's 1M grid."""
    sizes = tuple((h, w) for h, w in meta["schedule"])
    official = [s for s in official_schedules().values() if s.sizes == sizes]
    if official:
        return official[0]
    return ScaleSchedule(sizes, sizes[-1])


def find_policy(meta: dict[str, Any], schedule: ScaleSchedule, depth: int) -> PruningPolicy:
    """The recorded width-keyed rules as rules by scale index."""
    if meta["variant"] != "fastvar":
        return DENSE
    published = meta["fastvar"]
    rules: dict[int, ScaleRule] = {}
    for index, (_, width) in enumerate(schedule.sizes):
        if width in published["skipped_widths"]:
            rules[index] = ScaleRule(skip=True)
        elif str(width) in published["prune_ratio_by_width"]:
            rules[index] = ScaleRule(round(1 - published["prune_ratio_by_width"][str(width)], 6))
    first, stop = published["pruned_layer_range"]
    cached = schedule.sizes.index(tuple(published["cached_scale"]))
    return PruningPolicy("recorded", rules, min(first, depth), min(stop, depth), cached)


def compare_scale(run: Run, seen: Observed, to: Comparison) -> None:
    prefix = f"s{seen.index:02d}."
    recorded_in = run.tensors[prefix + "block_in"]
    to.tensor(prefix[:-1], "block_in", seen.block_in[: recorded_in.shape[0]], recorded_in)
    to.tensor(prefix[:-1], "block_out", seen.block_out, run.tensors[prefix + "block_out"])
    to.tensor(prefix[:-1], "logits", seen.logits[None], run.tensors[prefix + "logits"])
    if seen.layer_out is not None and prefix + "layer_out" in run.tensors:
        to.tensor(prefix[:-1], "layer_out", seen.layer_out, run.tensors[prefix + "layer_out"])
    scale = run.meta["scales"][seen.index]
    for name, sums in scale.get("keep_index_sum_all_layers", {}).items():
        layer, sub_layer = name.split(".")
        got = seen.kept[name]
        to.same(f"{prefix[:-1]} kept {name}: index sums", got.sum(-1).tolist() == sums)
        stored = run.tensors.get(f"{prefix}layer{int(layer):02d}.keep_{sub_layer}")
        if stored is not None:
            equal = torch.equal(got.sort(-1).values, stored.long().sort(-1).values)
            to.same(f"{prefix[:-1]} kept {name}: sets", equal)


def compare_reference(run: Run) -> Comparison:
    """The torch reference against the recording."""
    result = Comparison(f"{run.name}: torch reference", run.tolerance)
    features = torch.stack(run.text)
    mask = torch.ones(features.shape[:2], dtype=torch.bool)
    plan, settings = run.plan(), run.meta["run"]
    sampling = Sampling(settings["cfg"], settings["tau"], settings["top_p"])
    conditioning = run.model.conditioning(features, mask)
    result.tensor("text", "cond.sos", conditioning.sos, run.tensors["cond.sos"])
    result.tensor("text", "cond.ca_kv", conditioning.text.flatten(0, 1), run.tensors["cond.ca_kv"])
    result.tensor("text", "cond.gss", conditioning.modulation, run.tensors["cond.gss"])
    for scale in generate_scales(run.model, features, mask, plan, lambda i, _: run.forced(i), sampling):
        kept = {f"{i}.{n}": k for i, s in enumerate(scale.states) for n, k in s.kept.items()}
        layer_out = torch.stack(scale.layer_out)
        observed = Observed(scale.step.index, scale.block_in, layer_out[-1], scale.logits, kept, layer_out)
        compare_scale(run, observed, result)
        last = scale
    result.tensor("end", "summed_codes", last.summed_codes, run.tensors["final.summed_codes"])
    state = last.states[-1]
    assert state.keys is not None
    assert state.values is not None
    if plan.policy == DENSE:  # in a pruned layer the order of near-equal scores may differ
        for name, cached in (("k", state.keys), ("v", state.values)):
            last = run.tensors[f"kv.last4_{name}"]
            result.tensor("end", f"kv_{name}", cached[:, :, -last.shape[2] :], last)
    return result


def compare_engines(run: Run, checkpoint: Checkpoint, backend: str, cache: Path) -> Comparison:
    """Chained engines, from a bundle that is built for this run, against the recording."""
    result = Comparison(f"{run.name}: {backend} engines", run.tolerance)
    cond, uncond = run.text
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bundle"
        build_bundle(
            checkpoint,
            run.plan(),
            out,
            toolchain=make_toolchain(backend, precision="fp32"),
            options=BuildOptions(guidance="on", text_length=cond.shape[0]),
            cache=cache,
        )
        bundle = Bundle.open(out)
        workspace = Session(bundle).workspace(2)
        workspace.set_features(cond.numpy(), uncond.numpy(), (cond.shape[0],) * 2)
        settings = run.meta["run"]
        sampling = SamplingSettings(settings["cfg"], settings["tau"], settings["top_p"])
        for observed, calls in engine_scales(run, workspace, sampling):
            compare_scale(run, observed, result)
            summed = torch.from_numpy(workspace.summed_codes(calls).copy())[None]
        result.tensor("end", "summed_codes", summed, run.tensors["final.summed_codes"])
    return result


def engine_scales(run: Run, workspace: Workspace, sampling: SamplingSettings) -> Iterator[tuple[Observed, StepCalls]]:
    """Run the engines under recorded bits; what each scale saw and did."""
    rows = 2
    level = run.model.lvl_embed.weight.data
    block_in = run.model.first_tokens(run.tensors["cond.sos"]).detach()
    for calls, _ in workspace.run_scales(lambda i, _shape: run.forced(i).numpy(), sampling):
        out = torch.from_numpy(workspace.read(calls.layers[-1], "x_out").copy())
        logits = torch.from_numpy(workspace.read(calls.sampling_head, "logits").copy())
        kept = {
            f"{layer}.{name}": torch.from_numpy(workspace.read_view(view) // rows).view(-1, rows).t()
            for layer, views in calls.kept.items()
            for name, view in views.items()
        }
        yield Observed(calls.step.index, block_in, _by_row(out, rows), logits, kept), calls
        if "x_next" in calls.sampling_head.tensors:
            assert calls.step.next_index is not None
            following = torch.from_numpy(workspace.read(calls.sampling_head, "x_next").copy())
            block_in = _by_row(following, rows) - level[calls.step.next_index]


def _by_row(x: Tensor, rows: int) -> Tensor:
    """[L * R, C] -> [R, L, C]."""
    return x.view(-1, rows, x.shape[-1]).transpose(0, 1)


def load_runs(folder: Path) -> list[Run]:
    state = {k: v.float() for k, v in load_file(folder / "weights.safetensors").items()}
    runs = []
    for path in sorted(folder.glob("*.json")):
        meta = json.loads(path.read_text())
        if "variant" not in meta:
            continue
        model = InfinityTransformer(transformer_from_json(meta["model"])).eval()
        missing, extra = model.load_state_dict(state, strict=False)
        if extra or any("zero_k_bias" not in name for name in missing):
            raise SystemExit(f"{path}: weights do not fit, missing {missing[:3]}, extra {extra[:3]}")
        runs.append(Run(path.stem, meta, load_file(path.with_suffix(".safetensors")), model))
    return runs


def checkpoint_of(run: Run) -> Checkpoint:
    """The run's transformer beside a small random image tokenizer, which no transformer tensor depends on."""
    patches = (1, 1, 1, 1) if run.config.spatial_patchify else (1, 1, 1, 1, 1)
    images = ImageTokenizerConfig(run.config.bits, 32, patches, 1)
    made = random_checkpoint_for(run.config, images, name=run.name)
    return replace(made, transformer_weights=dict(run.model.state_dict()))
