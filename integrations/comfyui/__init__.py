"""Nodes for ComfyUI: load a fastvar bundle, draw, enlarge, in-paint. V3 schema; put this folder into custom_nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io

from fastvar.errors import FastvarError

from . import drawing

KEY, CATEGORY = "fastvar", "fastvar"
PREVIEW_PIXELS = 512
PipelineType = io.Custom("FASTVAR_PIPELINE")
MAX_SEED = 2**63 - 1

folder_paths.add_model_folder_path(KEY, str(Path(folder_paths.models_dir) / KEY))


def _folders() -> list[str]:
    return list(folder_paths.get_folder_paths(KEY))


def _shared(*, count: bool = True) -> list[Any]:
    """Inputs of every node that draws."""
    own = drawing.BUNDLES_OWN
    about = "-1: the bundle's own"
    inputs = [
        PipelineType.Input("pipeline"),
        io.String.Input("prompt", multiline=True, tooltip="A text; or a class by number or name, of VAR."),
        io.Int.Input("seed", default=0, min=0, max=MAX_SEED, control_after_generate=True),
    ]
    inputs += [io.Int.Input("images", default=1, min=1, max=64, tooltip="Their seeds count up.")] if count else []
    return [
        *inputs,
        io.String.Input("negative", default="", multiline=True, optional=True),
        io.Float.Input("guidance", default=own, min=own, max=100, step=0.1, optional=True, tooltip=about),
        io.Float.Input("tau", default=own, min=own, max=100, step=0.05, optional=True, tooltip=about),
        io.Float.Input("top_p", default=own, min=own, max=1, step=0.01, optional=True, tooltip=about),
    ]


def _draw(pipeline: Any, prompt: str, seed: int, images: int, given: dict[str, Any], **more: Any) -> io.NodeOutput:
    """Draw in a thread, with ComfyUI's bar, previews and interruption."""
    bar = comfy.utils.ProgressBar(1)

    def preview(done: int, total: int, image: Any) -> None:
        bar.update_absolute(done, total, ("JPEG", image, PREVIEW_PIXELS))

    own = drawing.BUNDLES_OWN
    chosen = drawing.settings(seed, given.get("guidance", own), given.get("tau", own), given.get("top_p", own))
    interrupt = comfy.model_management.throw_exception_if_processing_interrupted
    try:
        drawn = drawing.draw(pipeline, prompt, images, chosen, given.get("negative", ""), preview, interrupt, **more)
    except FastvarError as error:
        raise drawing.in_words(error) from None
    return io.NodeOutput(torch.from_numpy(drawn))


class LoadBundle(io.ComfyNode):
    """A bundle of models/fastvar, loaded."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        names = list(drawing.bundles(_folders())) or ["(no bundle in models/fastvar)"]
        return io.Schema(
            node_id="FastvarLoadBundle",
            display_name="Load fastvar bundle",
            category=CATEGORY,
            description="Folders made by `fastvar build`, in models/fastvar.",
            inputs=[
                io.Combo.Input("bundle", options=names),
                io.Int.Input("threads", default=0, min=0, max=1024, optional=True, tooltip="0: the library's choice"),
                io.String.Input("memory", default="", optional=True, tooltip="A budget, as 15GiB; empty: none"),
            ],
            outputs=[PipelineType.Output(display_name="pipeline")],
        )

    @classmethod
    def fingerprint_inputs(cls, bundle: str, **_: Any) -> Any:
        """A bundle that was built anew is loaded anew."""
        found = drawing.bundles(_folders()).get(bundle)
        return (bundle, (found / drawing.MANIFEST).stat().st_mtime_ns if found else 0)

    @classmethod
    def execute(cls, bundle: str, threads: int = 0, memory: str = "") -> io.NodeOutput:
        try:
            return io.NodeOutput(drawing.load(bundle, _folders(), threads, memory))
        except FastvarError as error:
            raise drawing.in_words(error) from None


class Generate(io.ComfyNode):
    """Images of a prompt or a class."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FastvarGenerate",
            display_name="fastvar: generate",
            category=CATEGORY,
            inputs=_shared(),
            outputs=[io.Image.Output(display_name="images")],
        )

    @classmethod
    def execute(cls, pipeline: Any, prompt: str, seed: int, images: int = 1, **given: Any) -> io.NodeOutput:
        return _draw(pipeline, prompt, seed, images, given)


class Upscale(io.ComfyNode):
    """Images enlarged to the bundle's size: coarse scales are theirs, finer ones are drawn."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FastvarUpscale",
            display_name="fastvar: upscale",
            category=CATEGORY,
            inputs=[
                io.Image.Input("image"),
                *_shared(count=False),
                io.Int.Input(
                    "keep_scales", default=0, min=0, max=64, optional=True, tooltip="0: those that the image fills"
                ),
                io.Combo.Input("fit", options=["exact", "crop"], default="exact", optional=True),
            ],
            outputs=[io.Image.Output(display_name="images")],
        )

    @classmethod
    def execute(cls, image: Any, pipeline: Any, prompt: str, seed: int, **given: Any) -> io.NodeOutput:
        keep = given.pop("keep_scales", 0) or None
        fit = given.pop("fit", "exact")
        return _draw(pipeline, prompt, seed, 1, given, image=_array(image), keep_scales=keep, fit=fit)


class InPaint(io.ComfyNode):
    """Images of which the masked part is drawn anew."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FastvarInPaint",
            display_name="fastvar: in-paint",
            category=CATEGORY,
            inputs=[
                io.Image.Input("image"),
                io.Mask.Input("mask", tooltip="1 is drawn anew"),
                *_shared(count=False),
                io.Combo.Input("fit", options=["exact", "crop"], default="exact", optional=True),
            ],
            outputs=[io.Image.Output(display_name="images")],
        )

    @classmethod
    def execute(cls, image: Any, mask: Any, pipeline: Any, prompt: str, seed: int, **given: Any) -> io.NodeOutput:
        fit = given.pop("fit", "exact")
        return _draw(pipeline, prompt, seed, 1, given, image=_array(image), mask=_array(mask), fit=fit)


def _array(tensor: Any) -> Any:
    return tensor.detach().cpu().numpy().clip(0, 1)


class FastvarExtension(ComfyExtension):
    """The pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadBundle, Generate, Upscale, InPaint]


async def comfy_entrypoint() -> ComfyExtension:
    return FastvarExtension()
