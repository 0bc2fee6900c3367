"""Recorded runs of the published HART programs against the torch reference.

A folder holds `manifest.json` with the cases, and per case `<case>.json` and `<case>.safetensors`, besides the weights
that the manifest names. Recorded codes, noise and mixtures are fed back (teacher forcing), so every tensor compares.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastvar.core.plan import GenerationPlan, make_plan
from fastvar.core.policy import DENSE
from fastvar.export.models.codebook.tokenizer import VqTokenizer
from fastvar.export.models.hart.diffusion import diffusion_steps
from fastvar.export.models.hart.model import HartTransformer, image_rotary, infer_transformer
from fastvar.export.models.hart.reference import Draws, PassTrace, Prompt, Sampling, condition_rows, generate_scales
from fastvar.families.codebook import VqTokenizerConfig
from fastvar.families.hart import HartConfig, fastvar_policy, settings_of
from tests.parity.comparison import Comparison, compare_crops

Tensors = dict[str, Tensor]

# Absolute errors, of the manifest's tolerances; the relative part of those is left out.
HARD = {"block_in": 1e-4, "block_out": 1e-3, "logits": 2e-3, "f_hat": 1e-4, "image": 5e-3, "kept_out": 1e-3}
SMOOTH = HARD | {"block_in": 2e-2, "block_out": 2e-2, "logits": 5e-3, "f_hat": 1e-2, "mixture": 5e-3}
# The first diffusion step turns rounding into 1e-2 where a clamp lets it: judged by the share that is further off.
RESIDUAL = {"residual": 0.1, "residual_share": 1e-3}
FAR = 2e-3
DIFFUSION = {"diffusion_rows": 1e-3, "first_out": 1e-3, "table": 1e-6}
SWAPPED = 2  # tokens of a kept set that may differ: scores at the cut lie within 5e-6 of each other
# What the cases' configurations hold besides what the transformer is: the tokenizer's sizes, and how codes were drawn.
NOT_THE_MODEL = ("weights_name", "n_valid", "V", "Cvae", "ch", "ch_mult", "num_res_blocks", "cfg", "g_seed", "top_p")
NOT_THE_MODEL += ("more_smooth", "final_stage", "num_maskgit_iters", "labels", "top_k")
WATCHED = re.compile(r"s\d\d\.layer(\d+)\.attn\.x_first")  # of a layer whose pruned sub-layers are recorded


@dataclass
class HartRun:
    """One recorded case."""

    name: str
    settings: dict[str, Any]
    tensors: Tensors
    noise: Tensors  # holds the diffusion noise, which two cases share
    details: dict[str, Any]
    model: HartTransformer
    tokenizer: VqTokenizer
    decodes: bool  # whether the folder holds the image decoder

    @property
    def config(self) -> HartConfig:
        return self.model.config

    @property
    def prompt(self) -> Prompt:
        t = self.tensors
        return Prompt(t["context"], t["context_mask"].bool(), t["context_position_ids"].long())

    @property
    def sampling(self) -> Sampling:
        s = self.settings
        return Sampling(
            guidance_scale=s["cfg"],
            top_p=s.get("top_p", 0.0),
            smooth=s["more_smooth"],
            residual=s.get("final_stage", 0) == 0,
            final_iterations=s.get("num_maskgit_iters", 1),
        )

    @property
    def tolerance(self) -> dict[str, float]:
        return (SMOOTH if self.settings["more_smooth"] else HARD) | RESIDUAL | DIFFUSION

    def plan(self) -> GenerationPlan:
        schedule, depth = self.config.schedule, self.config.depth
        pruned = self.settings["upstream"] == "fastvar"
        return make_plan(schedule, fastvar_policy(schedule, depth) if pruned else DENSE, depth)

    def draws(self) -> Draws:
        return Draws(
            codes=lambda index, _: -1.0 - self.tensors[f"s{index:02d}.idx"].float(),
            gumbel=lambda index, _: self.tensors[f"s{index:02d}.gumbel_noise"],
            mixture=lambda index: self.tensors.get(f"s{index:02d}.h_soft"),
            diffusion=self.diffusion_noise,
            order=self.tensors.get("maskgit_orders"),
        )

    def diffusion_noise(self, index: int, shape: tuple[int, int, int]) -> Tensor:
        names = ["noise_init", *(f"noise_step{k}" for k in range(shape[0] - 1))]
        return torch.stack([self.noise[f"s{index:02d}.diff.{name}"].float() for name in names])


def load_hart_runs(folder: Path) -> Iterator[HartRun]:
    """Every case of a folder; widened integers, fp32 weights."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, case in manifest["cases"].items():
        settings = {**case["config"], "upstream": case["upstream"]}
        state = _fp32(folder / case["weights"])
        state = {k: v for k, v in state.items() if not k.endswith("zero_k_bias")}
        shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
        said = {key: value for key, value in case["config"].items() if key not in NOT_THE_MODEL}
        model = HartTransformer(infer_transformer(shapes, settings_of(said))).eval()
        model.load_state_dict(state)
        tokenizer, decodes = _tokenizer(_fp32(folder / case["tokenizer"]), case["config"])
        tensors = {k: _widened(v) for k, v in load_file(folder / f"{name}.safetensors").items()}
        details = json.loads((folder / f"{name}.json").read_text())
        elsewhere = re.search(r"(\w+\.safetensors) and are stored only there", case.get("note", ""))
        noise = load_file(folder / elsewhere[1]) if elsewhere else tensors
        yield HartRun(name, settings, tensors, noise, details, model, tokenizer, decodes)


def _tokenizer(state: Tensors, settings: dict[str, Any]) -> tuple[VqTokenizer, bool]:
    """The tokenizer without its encoder; where the decoder is not stored either, only the codebook and the phis."""
    decodes = "post_quant_conv.weight" in state
    config = VqTokenizerConfig(
        codes=settings["V"],
        code_channels=settings["Cvae"],
        base_channels=settings["ch"],
        channel_multipliers=tuple(settings["ch_mult"]),
        residual_blocks=settings.get("num_res_blocks", 2),
        max_scales=len(settings["patch_nums"]),
    )
    tokenizer = VqTokenizer(config).eval()
    missing, unexpected = tokenizer.load_state_dict(state, strict=False)
    needed = ("quantize.", "decoder.", "post_quant_conv.") if decodes else ("quantize.",)
    lacking = [k for k in missing if k.startswith(needed) and not k.endswith("ema_vocab_hit_SV")]
    assert not unexpected, unexpected
    assert not lacking, lacking
    return tokenizer, decodes


def compare_hart_reference(run: HartRun) -> Comparison:
    """The torch reference against the recording."""
    result = Comparison(f"{run.name}: torch reference", run.tolerance)
    compare_condition(run, result)
    compare_diffusion_tables(run, result)
    layers = {int(match[1]) for match in map(WATCHED.match, run.tensors) if match}
    watches = [SubLayerWatch(run.model, layer) for layer in sorted(layers)]
    plan = run.plan()
    for trace in generate_scales(run.model, run.tokenizer, run.prompt, plan, run.draws(), run.sampling):
        compare_pass(run, trace, result)
        if trace.step.prunes:
            compare_kept_sets(run, trace, result)
            for watch in watches:
                compare_kept(run, trace, watch, result)
    assert trace.summed is not None
    compare_far("end", "residual", trace.summed, run.tensors["f_hat_final"], result)
    if run.decodes:
        compare_crops(result, "end", "image", (run.tokenizer.decode(trace.summed) + 1) / 2, run.tensors, "img")
    return result


def compare_condition(run: HartRun, to: Comparison) -> None:
    conditioning = condition_rows(run.model, run.prompt, guided=True)
    to.tensor("text", "block_in.context", conditioning.context, run.tensors["cond_BD"])
    levels = torch.cat([run.model.level(scale) for scale in range(run.config.max_scales)])
    to.tensor("text", "block_in.levels", levels, run.tensors["lvl_embed_table"])
    schedule, head_dim = run.plan().schedule, run.config.head_dim
    for index, size in enumerate(schedule.sizes):
        # The angle of the first frequency, which is one, is the position itself.
        if (at := run.tensors.get(f"position_ids_s{index:02d}")) is not None:
            table = image_rotary(size, schedule.final, conditioning.offset, head_dim)
            to.tensor("text", "table.rotary", table[0, :, :, [0, head_dim // 2]], at.cos())


def compare_diffusion_tables(run: HartRun, to: Comparison) -> None:
    """The respaced schedule: timesteps exactly, variances as far as float64 goes."""
    steps, recorded = diffusion_steps(run.config.diffusion_steps)[::-1], run.details["diffusion"]
    to.same("timesteps", [step.timestep for step in steps] == recorded["timestep_map"])
    found = {
        "betas_respaced": [step.log_variance_high for step in steps],
        "posterior_log_variance_clipped": [step.log_variance_low for step in steps],
        "alphas_cumprod": [step.x0_from_x**-2 for step in steps],
    }
    for name, values in found.items():
        expected = torch.tensor(recorded[name], dtype=torch.float64)
        got = torch.tensor(values, dtype=torch.float64)
        to.tensor("text", f"table.{name}", got, expected.log() if name == "betas_respaced" else expected, -1)


def compare_pass(run: HartRun, trace: PassTrace, to: Comparison) -> None:
    prefix, scale = f"s{trace.index:02d}.", f"s{trace.index:02d}"
    rows = trace.block_in.shape[0] if trace.index == 0 else trace.codes.shape[0]
    compare_stored(run.tensors, prefix + "block_in", "block_in", trace.block_in[:rows], to)
    compare_stored(run.tensors, prefix + "block_out", "block_out", trace.layer_out[-1], to)
    compare_stored(run.tensors, prefix + "logits_cfg", "logits", trace.logits, to)
    if trace.mixture is not None:
        to.tensor(scale, "mixture", trace.mixture, run.tensors[prefix + "h_soft"])
    if trace.summed is not None and prefix + "f_hat" in run.tensors:
        recorded = run.tensors[prefix + "f_hat"]
        stride = trace.summed.shape[-1] // recorded.shape[-1]
        to.tensor(scale, "f_hat", trace.summed[..., ::stride, ::stride], recorded)
    if trace.diffusion:
        compare_diffusion(run, trace, prefix, to)


def compare_diffusion(run: HartRun, trace: PassTrace, prefix: str, to: Comparison) -> None:
    count = trace.codes.numel()
    assert trace.diffusion_rows is not None
    for half, name in enumerate(("z_cond", "z_uncond")):
        recorded = first_of(run.tensors, f"{prefix}diff.{name}")
        rows = trace.diffusion_rows[half * count : (half + 1) * count][: len(recorded)]
        to.tensor(prefix[:-1], f"diffusion_rows.{name}", rows, recorded)
    recorded = first_of(run.tensors, f"{prefix}diff.step0.net_out")
    to.tensor(prefix[:-1], "first_out", trace.diffusion[0].net_out[: len(recorded)], recorded)
    compare_far(prefix[:-1], "residual", trace.residual, run.tensors[prefix + "diff.residual"], to)


def compare_far(scale: str, name: str, got: Tensor, expected: Tensor, to: Comparison) -> None:
    """The largest error, and the share of elements that are further off than FAR."""
    to.tensor(scale, name, got, expected)
    share = ((got - expected).abs() > FAR).double().mean()
    to.errors[scale, f"{name}_share"] = float(share)


def compare_stored(tensors: Tensors, key: str, name: str, got: Tensor, to: Comparison) -> None:
    """A tensor against its recording: all its tokens, or the first and last of them."""
    scale = key.split(".")[0]
    if key in tensors:
        to.tensor(scale, name, got, tensors[key])
    for stored, expected in tensors.items():  # its name ends in the number of tokens, or not
        if stored.startswith(key + "_first"):
            to.tensor(scale, f"{name}.first", got[:, : expected.shape[1]], expected)
        if stored.startswith(key + "_last"):
            to.tensor(scale, f"{name}.last", got[:, -expected.shape[1] :], expected)


def first_of(tensors: Tensors, key: str) -> Tensor:
    """What is recorded under a key: all of it, or its first rows."""
    return next(tensor for name, tensor in tensors.items() if name == key or name.startswith(f"{key}_first"))


class SubLayerWatch:
    """What the sub-layers of one layer put out, before it is restored and added."""

    def __init__(self, model: HartTransformer, layer: int) -> None:
        self.out: dict[str, Tensor] = {}
        self.layer = layer
        block = model.layers[layer]
        for name, module in (("sa", block.attn.proj), ("ffn", block.ffn)):
            module.register_forward_hook(lambda _, __, out, name=name: self.out.__setitem__(name, out))


def compare_kept_sets(run: HartRun, trace: PassTrace, to: Comparison) -> None:
    """Which tokens every sub-layer of every layer kept."""
    prefix = f"s{trace.index:02d}."
    for layer, state in enumerate(trace.states):
        for ours, theirs in (("sa", "attn"), ("ffn", "ffn")):
            expected = run.tensors[f"sel.{prefix}layer{layer}.{theirs}"].long()
            swapped = [len(set(a.tolist()) - set(b.tolist())) for a, b in zip(state.kept[ours], expected, strict=True)]
            to.same(f"{prefix}kept {layer}.{ours}: {swapped} tokens differ", max(swapped) <= SWAPPED)


def compare_kept(run: HartRun, trace: PassTrace, watch: SubLayerWatch, to: Comparison) -> None:
    """What a watched layer computed for the tokens that it kept, cached, and restored."""
    prefix, layer = f"s{trace.index:02d}.", watch.layer
    stored, scale = f"{prefix}layer{layer}.", prefix[:-1]
    x, restored = trace.layer_out[layer - 1], torch.zeros(())
    for ours, theirs in (("sa", "attn"), ("ffn", "ffn")):
        recorded_x = first_of(run.tensors, f"{stored}{theirs}.x")
        to.tensor(scale, f"block_out.{theirs}", x[:, : recorded_x.shape[1]], recorded_x)
        recorded_out = first_of(run.tensors, f"{stored}{theirs}.kept_out")
        own, fresh = trace.states[layer].kept[ours], watch.out[ours]
        first = run.tensors[f"sel.{prefix}layer{layer}.{theirs}"][:, : recorded_out.shape[1]].long()
        place = (own.unsqueeze(1) == first.unsqueeze(2)).int().argmax(-1)  # [R, n]: where they stand in ours
        got = fresh.gather(1, place.unsqueeze(-1).expand(-1, -1, fresh.shape[-1]))
        to.tensor(scale, f"kept_out.{theirs}", got, recorded_out)
        for name, cache in run.tensors.items():
            if name.startswith(f"{stored}{theirs}.cache"):
                cached = trace.states[layer].outputs[ours][:, : cache.shape[1]]
                to.tensor(scale, f"kept_out.{theirs}_cache", cached, cache)
        recorded = first_of(run.tensors, f"{stored}{theirs}.unmerged")
        restored = restored + recorded
        count = recorded_x.shape[1]
        x = torch.cat((x[:, :count] + recorded[:, :count], x[:, count:]), dim=1)
    got = (trace.layer_out[layer] - trace.layer_out[layer - 1])[:, : restored.shape[1]]
    to.tensor(scale, "kept_out.restored", got, restored)


def compare_hart_folder(folder: Path) -> Iterator[Comparison]:
    """Every comparison a folder allows."""
    with torch.no_grad():
        for run in load_hart_runs(folder):
            yield compare_hart_reference(run)


def _fp32(path: Path) -> Tensors:
    return {key: tensor.float() for key, tensor in load_file(path).items()}


def _widened(tensor: Tensor) -> Tensor:
    return tensor.long() if tensor.dtype in (torch.int16, torch.int32) else tensor
