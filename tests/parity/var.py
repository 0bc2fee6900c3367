"""Recorded runs of VAR's published program against the torch reference: comparisons for `python -m tests.parity`.

A folder holds `manifest.json` with `weights_var`, `weights_vae`, `run_*`, `quant_and_teacher` and `decode` (all
`.safetensors`). What is not there is not compared; a tensor of a run that is not known is a failure. What the weights
do not say of the models, and how codes were drawn, is in the manifest. Codes, and in smooth runs their mixtures, are
forced on the reference, so every tensor is comparable.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastvar.core.plan import make_plan
from fastvar.core.policy import DENSE
from fastvar.export.checkpoints.tensor_files import read_json
from fastvar.export.models.codebook.reference import teacher_inputs
from fastvar.export.models.codebook.tokenizer import VqTokenizer
from fastvar.export.models.common.tensor_shapes import shapes_of, without_derived
from fastvar.export.models.var.model import DERIVED, VarTransformer, infer_transformer
from fastvar.export.models.var.reference import Noise, ScaleTrace, VarSampling, generate_scales, teacher_logits
from fastvar.families.codebook import VqTokenizerConfig
from fastvar.families.var import VAR
from tests.parity.comparison import Comparison, Tensors, compare_crops

TOLERANCE = {"block_in": 1e-4, "block_out": 5e-4, "logits": 5e-4, "f_hat": 1e-5, "img": 1e-3, "tf_logits": 5e-4}
SMOOTH_TOLERANCE = {"codes": 5e-3, "logits": 5e-3, "mixture": 5e-3, "f_hat": 1e-5}
MODEL = ("depth", "embed_dim", "num_heads", "mlp_ratio", "num_classes", "shared_aln", "attn_l2_norm", "patch_nums")
MODEL += ("norm_eps",)  # entries of the manifest's configuration that say what the model is
SETTINGS = ("cfg", "top_k", "top_p")  # of a run NAME: such an entry with _NAME behind it, or by itself
KNOWN = re.compile(
    r"label_B|f_hat_final|img(_\w+)?|s\d\d\.(idx|kept|block_in|block_out|logits_cfg|f_hat|gumbel_noise|h_BChw|soft_probs)"
    r"(_(first|last)\d*)?"
)
# The published program runs the unconditional rows whatever the guidance; ours does where the scale is not 0.
UNGUIDED = 5e-324


@dataclass(frozen=True)
class Recorded:
    """A folder's models and what was recorded of them."""

    folder: Path
    meta: dict[str, Any]
    model: VarTransformer
    tokenizer: VqTokenizer

    def tensors(self, name: str) -> Tensors:
        """One file of the folder; empty where it is not there."""
        path = self.folder / f"{name}.safetensors"
        return load_file(path) if path.exists() else {}

    @property
    def tolerance(self) -> dict[str, float]:
        given = self.meta.get("tolerances", {})
        limits = {**given.get("hard", {}), **given.get("quantizer", {}), "tf_logits": given.get("tf_logits")}
        found = {name: limit["atol"] for name, limit in limits.items() if isinstance(limit, dict)}
        return TOLERANCE | found | ({"logits": found["logits_cfg"]} if "logits_cfg" in found else {})

    @property
    def runs(self) -> dict[str, Tensors]:
        """What was recorded of whole generations, by name."""
        return {path.stem: load_file(path) for path in sorted(self.folder.glob("run_*.safetensors"))}

    def sampling(self, name: str, tensors: Tensors) -> VarSampling:
        """How the codes of a run were drawn; a smooth one has recorded noise for its mixtures."""
        config, own = self.meta["config"], name.removeprefix("run_")
        scale, top_k, top_p = (config.get(f"{key}_{own}", config.get(key)) for key in SETTINGS)
        smooth = any(found.endswith(".gumbel_noise") for found in tensors)
        return VarSampling(scale or UNGUIDED, top_k, top_p, smooth)

    @property
    def decodes(self) -> bool:
        """Whether the folder holds the weights of the decoder."""
        return any(name.startswith("decoder.") for name in self.tensors("weights_vae"))

    def token_maps(self, flat: Tensor) -> list[Tensor]:
        """Indices of all scales [B, L] -> per scale [B, h, w]."""
        sides = self.model.config.scales
        parts = flat.long().split([side * side for side in sides], dim=1)
        return [part.unflatten(1, (side, side)) for part, side in zip(parts, sides, strict=True)]


def read_folder(folder: Path) -> Recorded:
    """Both models with their recorded weights, the unrecorded encoder left as it is made."""
    meta = read_json(folder / "manifest.json")
    state = without_derived(_weights(folder / "weights_var.safetensors"), DERIVED)
    images = _weights(folder / "weights_vae.safetensors")
    said = {name: meta["config"][name] for name in MODEL if name in meta["config"]}
    config = infer_transformer(shapes_of(state), VAR.settings_from_json(said))
    model = VarTransformer(config).eval().requires_grad_(False)
    model.load_state_dict(state)
    tokenizer = VqTokenizer(tokenizer_config(meta["config"])).eval().requires_grad_(False)
    unexpected = tokenizer.load_state_dict(images, strict=False).unexpected_keys
    if unexpected:
        raise SystemExit(f"{folder}: weights_vae does not fit, extra {unexpected[:3]}")
    return Recorded(folder, meta, model, tokenizer)


def tokenizer_config(meta: dict[str, Any]) -> VqTokenizerConfig:
    return VqTokenizerConfig(
        codes=meta["V"],
        code_channels=meta["Cvae"],
        base_channels=meta["ch"],
        channel_multipliers=tuple(meta["ch_mult"]),
        residual_blocks=meta["num_res_blocks"],
        max_scales=len(meta["patch_nums"]),
    )


def compare_var_folder(folder: Path) -> Iterator[Comparison]:
    """Every comparison a folder allows."""
    with torch.no_grad():
        recorded = read_folder(folder)
        for name, tensors in recorded.runs.items():
            yield compare_run(recorded, name, tensors)
        if tensors := recorded.tensors("quant_and_teacher"):
            yield compare_quantizer(recorded, tensors)
            yield compare_teacher(recorded, tensors)
        if tensors := recorded.tensors("decode"):
            yield compare_decoder(recorded, tensors)


def compare_run(recorded: Recorded, name: str, tensors: Tensors) -> Comparison:
    """A whole generation, scale after scale."""
    sampling = recorded.sampling(name, tensors)
    result = Comparison(f"VAR {name}: torch reference", SMOOTH_TOLERANCE if sampling.smooth else recorded.tolerance)
    result.mismatches += [f"{found}: not a tensor that is known" for found in tensors if not KNOWN.fullmatch(found)]
    noise = Noise(
        uniform=lambda i, _: -1.0 - tensors[f"s{i:02d}.idx"],  # forces the recorded codes
        gumbel=lambda i, shape: tensors.get(f"s{i:02d}.gumbel_noise", torch.zeros(shape)),
        codes=lambda i: tensors.get(f"s{i:02d}.h_BChw"),
    )
    config = recorded.model.config
    plan = make_plan(config.schedule, DENSE, config.depth)
    traces = generate_scales(recorded.model, recorded.tokenizer.quantize, tensors["label_B"], plan, noise, sampling)
    for trace in traces:
        compare_scale(trace, tensors, result)
    compare(result, "end", "f_hat", trace.summed, tensors, "f_hat_final")
    if recorded.decodes:
        image = (recorded.tokenizer.decode(trace.summed) + 1) / 2
        compare_crops(result, "end", "img", image, tensors, "img")
    return result


def compare_scale(trace: ScaleTrace, tensors: Tensors, to: Comparison) -> None:
    scale = f"s{trace.step.index:02d}"
    images = len(trace.token_map)
    block_in = trace.block_in[:images] if trace.step.index else trace.block_in  # all rows are alike but in the first
    compare(to, scale, "block_in", block_in, tensors)
    compare(to, scale, "block_out", trace.layer_out[-1], tensors)
    compare(to, scale, "logits", trace.logits, tensors, f"{scale}.logits_cfg")
    compare(to, scale, "f_hat", trace.summed, tensors)
    if f"{scale}.kept" in tensors:
        to.same(f"{scale} kept codes", torch.equal(trace.kept_codes, tensors[f"{scale}.kept"].bool()))
    to.same(f"{scale} token map", torch.equal(trace.token_map.view(images, -1), tensors[f"{scale}.idx"].long()))
    if trace.mixture is not None and f"{scale}.gumbel_noise" in tensors:
        compare(to, scale, "mixture", trace.mixture, tensors, f"{scale}.soft_probs")
        compare(to, scale, "codes", trace.codes, tensors, f"{scale}.h_BChw")


def compare(to: Comparison, scale: str, name: str, got: Tensor, tensors: Tensors, key: str = "") -> None:
    """Whatever is recorded under a key: all of it, or its first and last tokens (dimension 1)."""
    key = key or f"{scale}.{name}"
    for found, expected in tensors.items():
        if found == key:
            to.tensor(scale, name, got, expected)
            continue
        end = found.removeprefix(f"{key}_")
        if end != found and end.startswith(("first", "last")):
            count = expected.shape[1]  # its name ends in the number of tokens, or not
            part = got[:, :count] if end.startswith("first") else got[:, -count:]
            to.tensor(scale, f"{name}.{end}", part, expected)


def compare_quantizer(recorded: Recorded, tensors: Tensors) -> Comparison:
    """Residual quantisation of a latent, and what a transformer is taught on it."""
    result = Comparison("VAR quantiser: torch reference", recorded.tolerance)
    quantizer, sizes = recorded.tokenizer.quantize, recorded.model.config.schedule.sizes
    token_maps, total = quantizer.quantize(tensors["f_in"], sizes)
    expected = recorded.token_maps(tensors["idx_cat"])
    for i, (found, own) in enumerate(zip(token_maps, expected, strict=True)):
        result.same(f"scale {i} token map", torch.equal(found, own))
    result.tensor("end", "f_hat", total, tensors["f_hat_last"])
    for i, partial in enumerate(quantizer.sums([quantizer.lookup(own) for own in expected], sizes[-1])):
        if f"f_hat_s{i:02d}" in tensors:
            result.tensor(f"s{i:02d}", "f_hat", partial, tensors[f"f_hat_s{i:02d}"])
    result.tensor("all", "var_input", teacher_inputs(quantizer, expected), tensors["var_input_BLC"])
    return result


def compare_teacher(recorded: Recorded, tensors: Tensors) -> Comparison:
    """The training forward over all scales at once."""
    result = Comparison("VAR training forward: torch reference", recorded.tolerance)
    logits = teacher_logits(recorded.model, tensors["label_B"], tensors["var_input_BLC"])
    compare(result, "all", "tf_logits", logits, tensors, "tf_logits")
    return result


def compare_decoder(recorded: Recorded, tensors: Tensors) -> Comparison:
    """A latent to its image: before the clamp, and after."""
    result = Comparison("VAR decoder: torch reference", recorded.tolerance)
    tokenizer = recorded.tokenizer
    raw = tokenizer.decoder(tokenizer.post_quant_conv(tensors["f_hat"]))
    compare_crops(result, "end", "img.raw", raw, tensors, "raw")
    compare_crops(result, "end", "img", tokenizer.decode(tensors["f_hat"]), tensors, "img")
    return result


def _weights(path: Path) -> Tensors:
    """fp32 of what is stored in fewer bits, exactly."""
    return {name: tensor.float() for name, tensor in load_file(path).items()}
