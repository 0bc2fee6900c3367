"""Recorded runs of VAR's published program against chained engines: comparisons for `python -m tests.parity`.

Engines draw one image at a time, so the images of a run are drawn one after another. Codes are forced; in the smooth
run the sum and the next tokens are put right after every scale, so that no drift adds up.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastvar.core.noise import CHOICE
from fastvar.core.plan import GenerationPlan, SamplingMode
from fastvar.core.policy import DENSE
from fastvar.engines.bundle.bundle import Bundle
from fastvar.export.build import build_bundle
from fastvar.export.checkpoints.checkpoint import Checkpoint
from fastvar.export.checkpoints.random_weights import random_checkpoint_for
from fastvar.export.models.var.reference import Noise, ScaleTrace, VarSampling, generate_scales
from fastvar.export.options import BuildOptions
from fastvar.export.toolchain import make_toolchain
from fastvar.families.var import VAR
from fastvar.runtime.memory.layout import StepCalls
from fastvar.runtime.requests.inputs import LabelInput
from fastvar.runtime.requests.settings import SamplingSettings
from fastvar.runtime.session import Session
from fastvar.runtime.workspace import Workspace
from tests.parity.comparison import Comparison, Tensors, compare_crops
from tests.parity.var import SMOOTH_TOLERANCE, Recorded, compare, read_folder

ROWS = 2


def compare_var_engines(folder: Path, backend: str, cache: Path) -> Iterator[Comparison]:
    """Every run that a folder holds."""
    with torch.no_grad():
        recorded = read_folder(folder)
        for name, tensors in recorded.runs.items():
            yield compare_run(recorded, name, tensors, backend, cache)


def compare_run(recorded: Recorded, name: str, tensors: Tensors, backend: str, cache: Path) -> Comparison:
    """All images of a run."""
    sampling = recorded.sampling(name, tensors)
    smooth, scale = sampling.smooth, sampling.guidance_scale
    result = Comparison(f"VAR {name}: {backend} engines", SMOOTH_TOLERANCE if smooth else recorded.tolerance)
    config = recorded.model.config
    plan = VAR.plan(config.schedule, DENSE, config, SamplingMode(smooth=smooth))
    with tempfile.TemporaryDirectory() as made:
        out = Path(made) / "bundle"
        tools = make_toolchain(backend, precision="fp32")
        build_bundle(checkpoint_of(recorded), plan, out, BuildOptions(guidance="on"), toolchain=tools, cache=cache)
        workspace = Session(Bundle.open(out)).workspace(ROWS)
        for image, label in enumerate(tensors["label_B"].tolist()):
            workspace.give(LabelInput(label))
            own = image_of(tensors, image)
            expected = reference(recorded, own, plan, sampling)
            settings = SamplingSettings(scale, None, sampling.top_p, sampling.top_k, VAR.guidance_off)
            for seen, (calls, _) in enumerate(workspace.run_scales(forcing(own), settings)):
                compare_scale(workspace, calls, own, result)
                if smooth:
                    drawn = as_batch(workspace.summed_codes(calls))
                    result.tensor(f"s{calls.step.index:02d}", "codes", drawn, expected[seen].summed)
                    put_right(workspace, calls, expected, seen)
            compare(result, "end", "f_hat", as_batch(workspace.summed_codes(calls)), own, "f_hat_final")
            if recorded.decodes:
                compare_crops(result, "end", "img", (as_batch(workspace.decode()) + 1) / 2, own, "img")
    return result


def checkpoint_of(recorded: Recorded) -> Checkpoint:
    """The recorded weights; where the decoder's were not stored, random ones: nothing compared depends on them."""
    made = random_checkpoint_for(recorded.model.config, recorded.tokenizer.config, name="recorded")
    images = dict(made.image_tokenizer_weights) | dict(recorded.tokenizer.state_dict())
    return Checkpoint(
        **{
            **made.__dict__,
            "transformer_weights": dict(recorded.model.state_dict()),
            "image_tokenizer_weights": images,
        }
    )


def image_of(tensors: Tensors, image: int) -> Tensors:
    """The part of a recording that is of one image, its guidance rows included."""
    count = len(tensors["label_B"])
    rows = {2 * count: [image, image + count], count: [image]}
    return {name: tensor[rows[len(tensor)]] if len(tensor) in rows else tensor for name, tensor in tensors.items()}


def reference(recorded: Recorded, own: Tensors, plan: GenerationPlan, sampling: VarSampling) -> list[ScaleTrace]:
    """What the torch reference makes of the same codes, for values to put right with."""
    noise = Noise(
        uniform=lambda i, _: -1.0 - own[f"s{i:02d}.idx"],
        gumbel=lambda i, shape: own.get(f"s{i:02d}.gumbel_noise", torch.zeros(shape)),
        codes=lambda i: own.get(f"s{i:02d}.h_BChw"),
    )
    return list(generate_scales(recorded.model, recorded.tokenizer.quantize, own["label_B"], plan, noise, sampling))


def forcing(own: Tensors):
    def noise(scale: int, shape: tuple[int, ...], stream: str = CHOICE):
        if stream == CHOICE:
            return (-1.0 - own[f"s{scale:02d}.idx"]).view(shape).numpy()
        return own[f"s{scale:02d}.gumbel_noise"].view(shape).numpy()

    return noise


def compare_scale(workspace: Workspace, calls: StepCalls, own: Tensors, to: Comparison) -> None:
    scale = f"s{calls.step.index:02d}"
    out = torch.from_numpy(workspace.read(calls.layers[-1], "x_out").copy())
    by_row = out.view(-1, ROWS, out.shape[-1]).transpose(0, 1)
    compare(to, scale, "block_out", by_row, own)
    compare(to, scale, "logits", as_batch(workspace.read(calls.sampling_head, "logits")), own, f"{scale}.logits_cfg")
    compare(to, scale, "f_hat", as_batch(workspace.summed_codes(calls)), own)


def put_right(workspace: Workspace, calls: StepCalls, expected: list[ScaleTrace], seen: int) -> None:
    """The forced embeddings' sum, and the next scale's tokens, in place of the engine's own."""
    workspace.write(calls.sampling_head, "summed_out", expected[seen].summed.numpy())
    if "x_next" in calls.sampling_head.tensors:
        following = expected[seen + 1].block_in.transpose(0, 1).flatten(0, 1)
        workspace.write(calls.sampling_head, "x_next", following.numpy())


def as_batch(array) -> Tensor:
    """A copy with a batch of one before it."""
    return torch.from_numpy(array.copy())[None]
