"""`python -m tests.record_var FOLDER`: runs of the torch reference, recorded as those of VAR's published program are.

For models that no recording was published of: other scales, heads, classes. `python -m tests.parity FOLDER` compares
engines with it; the reference itself, from which it comes, it finds equal.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor

from fastvar.core.plan import make_plan
from fastvar.core.policy import DENSE
from fastvar.export.checkpoints.random_weights import RandomWeights
from fastvar.export.models.codebook.reference import teacher_inputs
from fastvar.export.models.codebook.tokenizer import VqTokenizer
from fastvar.export.models.common.tensor_shapes import shapes_of
from fastvar.export.models.var.model import VarTransformer
from fastvar.export.models.var.reference import Noise, VarSampling, generate_scales, teacher_logits
from fastvar.families.codebook import VqTokenizerConfig
from fastvar.families.var import VarConfig
from tests.parity.comparison import Tensors, crop

# Nothing here is as published: 12 channels a head, an uneven schedule, no scales of heads.
ODD = VarConfig(
    depth=3,
    width=36,
    heads=3,
    mlp_width=72,
    classes=7,
    codes=50,
    code_channels=6,
    scales=(1, 2, 3, 5, 8),
    unit_queries=False,
)
IMAGES = VqTokenizerConfig(
    codes=50, code_channels=6, base_channels=32, channel_multipliers=(1, 1, 1, 1, 1), residual_blocks=1, max_scales=5
)
LONG, ENDS = 20, 16  # a scale of more tokens holds the first and the last of some tensors
CROPS = ("tl20", "br20", "center20", "stride3")
GAIN = 4.0  # of the head: logits as far apart as a trained model's


@dataclass(frozen=True)
class Run:
    """A generation to record."""

    labels: tuple[int, ...]
    sampling: VarSampling


RUNS = {
    "run_hard": Run((2, 6), VarSampling(1.5, 20, 0.0)),
    "run_smooth": Run((5,), VarSampling(4.0, 30, 0.0, smooth=True)),
}


@torch.no_grad()
def record(
    folder: Path,
    config: VarConfig = ODD,
    images: VqTokenizerConfig = IMAGES,
    runs: dict[str, Run] | None = None,
    seed: int = 0,
) -> None:
    """Write a folder of recorded runs on random weights."""
    runs = RUNS if runs is None else runs
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = make_models(config, images, seed)
    decoding = ("decoder.", "post_quant_conv.", "quantize.embedding", "quantize.quant_resi")
    files = {
        "weights_var": model.state_dict(),
        "weights_vae": {k: v for k, v in tokenizer.state_dict().items() if k.startswith(decoding)},
    }
    files = {name: {k: v.half() for k, v in state.items()} for name, state in files.items()}
    files |= {name: record_run(model, tokenizer, run, seed) for name, run in runs.items()}
    files["quant_and_teacher"] = record_teacher(model, tokenizer, seed)
    files["decode"] = record_decoder(tokenizer, config, seed)
    for name, tensors in files.items():
        save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
    (folder / "manifest.json").write_text(json.dumps(manifest(config, images, runs, files, seed)))


def make_models(config: VarConfig, images: VqTokenizerConfig, seed: int) -> tuple[VarTransformer, VqTokenizer]:
    """Both models on random weights that 16 bits hold exactly."""
    models = VarTransformer(config), VqTokenizer(images)
    for model in models:
        shapes = shapes_of(model.state_dict())
        model.load_state_dict({name: tensor.float() for name, tensor in RandomWeights(shapes, seed).items()})
        model.eval().requires_grad_(False)
    models[0].head.weight.mul_(GAIN)
    return models


def record_run(model: VarTransformer, tokenizer: VqTokenizer, run: Run, seed: int) -> Tensors:
    """A whole generation, scale after scale."""
    generator = torch.Generator().manual_seed(seed)
    gumbels: dict[int, Tensor] = {}

    def gumbel(scale: int, shape: tuple[int, ...]) -> Tensor:
        gumbels[scale] = -torch.empty(shape).exponential_(generator=generator).log()
        return gumbels[scale]

    noise = Noise(uniform=lambda _, shape: torch.rand(shape, generator=generator), gumbel=gumbel)
    labels = torch.tensor(run.labels)
    found: Tensors = {"label_B": labels}
    plan = make_plan(model.config.schedule, DENSE, model.config.depth)
    for trace in generate_scales(model, tokenizer.quantize, labels, plan, noise, run.sampling):
        scale, count = f"s{trace.step.index:02d}.", trace.step.tokens
        found[f"{scale}idx"] = trace.token_map.flatten(1).int()
        found[f"{scale}logits_cfg"] = trace.logits
        if run.sampling.smooth:
            assert trace.mixture is not None
            found |= {f"{scale}gumbel_noise": gumbels[trace.step.index], f"{scale}h_BChw": trace.codes}
            found[f"{scale}soft_probs_first4"] = trace.mixture[:, :4]
        else:
            found[f"{scale}block_in"] = trace.block_in[: len(labels)] if trace.step.index else trace.block_in
            found |= ends_of(f"{scale}block_out", trace.layer_out[-1], count)
            found |= {f"{scale}kept": trace.kept_codes.byte(), f"{scale}f_hat": trace.summed}
    found["f_hat_final"] = trace.summed
    return found | crops_of("img", (tokenizer.decode(trace.summed) + 1) / 2)


def ends_of(name: str, tensor: Tensor, tokens: int) -> Tensors:
    """All tokens [B, L, ...] of a short scale, the first and the last ones of a long one."""
    if tokens <= LONG:
        return {name: tensor}
    return {f"{name}_first{ENDS}": tensor[:, :ENDS], f"{name}_last{ENDS}": tensor[:, -ENDS:]}


def crops_of(prefix: str, image: Tensor) -> Tensors:
    found = {}
    for name in CROPS:
        part = crop(image, name)
        assert part is not None
        found[f"{prefix}_{name}"] = part.clone()
    return found


def record_teacher(model: VarTransformer, tokenizer: VqTokenizer, seed: int) -> Tensors:
    """Residual quantisation of a latent, and the training forward on it."""
    config, quantizer = model.config, tokenizer.quantize
    final = config.schedule.final
    latent = torch.randn(1, config.code_channels, *final, generator=torch.Generator().manual_seed(seed))
    token_maps, total = quantizer.quantize(latent, config.schedule.sizes)
    sums = list(quantizer.sums([quantizer.lookup(own) for own in token_maps], final))
    inputs, labels = teacher_inputs(quantizer, token_maps), torch.tensor([config.classes - 1])
    return {
        "f_in": latent,
        "idx_cat": torch.cat([own.flatten(1) for own in token_maps], dim=1).int(),
        "f_hat_last": total,
        "f_hat_s02": sums[2],
        "var_input_BLC": inputs,
        "label_B": labels,
        **ends_of("tf_logits", teacher_logits(model, labels, inputs), config.tokens),
    }


def record_decoder(tokenizer: VqTokenizer, config: VarConfig, seed: int) -> Tensors:
    """A latent, and the image that it decodes to: before the clamp, and after."""
    latent = torch.randn(1, config.code_channels, *config.schedule.final, generator=torch.Generator().manual_seed(seed))
    raw = tokenizer.decoder(tokenizer.post_quant_conv(latent))
    return {"f_hat": latent, **crops_of("img", raw.clamp(-1, 1)), "raw_tl20": raw[..., :20, :20].clone()}


def manifest(
    config: VarConfig, images: VqTokenizerConfig, runs: dict[str, Run], files: dict[str, Tensors], seed: int
) -> dict[str, Any]:
    """The folder's description, in upstream's names."""
    said: dict[str, Any] = {
        "depth": config.depth,
        "embed_dim": config.width,
        "num_heads": config.heads,
        "mlp_ratio": config.mlp_width / config.width,
        "num_classes": config.classes,
        "shared_aln": config.shared_modulation,
        "attn_l2_norm": config.unit_queries,
        "patch_nums": list(config.scales),
        "norm_eps": 1e-6,
        "V": images.codes,
        "Cvae": images.code_channels,
        "ch": images.base_channels,
        "ch_mult": list(images.channel_multipliers),
        "num_res_blocks": images.residual_blocks,
    }
    for name, run in runs.items():
        end = "" if name == "run_hard" else "_" + name.removeprefix("run_")
        given = run.sampling
        said |= {f"cfg{end}": given.guidance_scale, f"top_k{end}": given.top_k, f"top_p{end}": given.top_p}
    described = {
        f"{name}.safetensors": {"tensors": {key: [list(t.shape), str(t.dtype)] for key, t in tensors.items()}}
        for name, tensors in files.items()
    }
    return {"config": said, "seed": seed, "files": described, "torch": torch.__version__}


if __name__ == "__main__":
    typer.run(lambda folder: record(Path(folder)))
