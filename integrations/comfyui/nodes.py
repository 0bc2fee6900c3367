"""The nodes. What they do is in bundles.py and drawing.py; here are their inputs, and what they need of ComfyUI."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import args
from comfy_api.latest import io
from comfy_execution.utils import get_executing_context
from server import PromptServer

from fastvar.errors import FastvarError, InputError

from . import bundles, drawing

KEY, CATEGORY = "fastvar", "fastvar"
PipelineType = io.Custom("FASTVAR_PIPELINE")
MAX_SEED = 2**63 - 1
MOST_IMAGES = 64
OWN = drawing.BUNDLES_OWN
log = logging.getLogger("fastvar")

folder_paths.add_model_folder_path(KEY, str(Path(folder_paths.models_dir) / KEY))


def _folders() -> list[str]:
    return list(folder_paths.get_folder_paths(KEY))


def _tell(line: str) -> None:
    """Show a line on the node that is running, to whoever has it run."""
    server, context = PromptServer.instance, get_executing_context()
    if context is not None:
        server.send_progress_text(line, context.node_id, server.client_id)


def _make_room() -> None:
    """Free what ComfyUI's own models hold of the device: it cannot know what an engine needs."""
    log.info("fastvar: too little free memory on the device, unloading ComfyUI's models")
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache(True)


def _in_words(error: FastvarError) -> FastvarError:
    """What the user has done wrong, without the way to where it was found: ComfyUI shows a traceback with it."""
    return error.with_traceback(None)


def _subject() -> list[Any]:
    return [
        PipelineType.Input("pipeline", tooltip="Of a Load Bundle node."),
        io.String.Input(
            "prompt",
            multiline=True,
            dynamic_prompts=True,
            placeholder="a text; or a class, by number or name",
            tooltip="What the image shows. Of bundles that draw classes (VAR): a class by number or name, or "
            '"unconditional".',
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=MAX_SEED,
            control_after_generate=True,
            tooltip="The same seed and settings give the same image. Of several images, seeds count up.",
        ),
    ]


def _sampling() -> list[Any]:
    return [
        io.String.Input(
            "negative",
            default="",
            multiline=True,
            dynamic_prompts=True,
            optional=True,
            placeholder="what to steer away from",
            tooltip="What to steer away from. Of bundles that draw from texts, with guidance. Empty: none.",
        ),
        _own_by_default("guidance", 100, 0.5, 0.001, "Classifier-free guidance, 0 to 100."),
        _own_by_default(
            "tau", 100, 0.1, 0.0001, "Sampling temperature, above 0: less is likelier, more is more various."
        ),
        _own_by_default(
            "top_p", 1, 0.05, 0.001, "Share of likely codes that are sampled from, 0 to 1; both ends are all of them."
        ),
    ]


def _own_by_default(name: str, most: float, step: float, precision: float, tooltip: str) -> Any:
    return io.Float.Input(
        name,
        default=OWN,
        min=OWN,
        max=most,
        step=step,
        round=precision,
        optional=True,
        tooltip=f"{tooltip} {OWN:g} is the bundle's own value, which the node shows when it runs.",
    )


def _fit() -> Any:
    return io.Combo.Input(
        "fit",
        options=list(drawing.FITS),
        default=drawing.FITS[0],
        optional=True,
        tooltip="An image of another aspect ratio than the bundle's: crop cuts it around the centre, exact refuses it.",
    )


def _image() -> Any:
    return io.Image.Input("image", tooltip="One or several; of several each is drawn, with seeds that count up.")


def _images_out() -> Any:
    return io.Image.Output(display_name="images", tooltip="A batch, of the bundle's size.")


def _known_fit(fit: str | None) -> bool | str:
    """ComfyUI does not check what is chosen of a list. None comes over a link, later."""
    if fit is None or fit in drawing.FITS:
        return True
    return str(InputError(f"fit {fit!r} is unknown", expected=" or ".join(drawing.FITS)))


def _draw(pipeline: Any, prompt: str, seed: int, images: int, given: dict[str, Any], **more: Any) -> io.NodeOutput:
    """Draw with ComfyUI's bar, previews and interruption."""
    bar = comfy.utils.ProgressBar(1)

    def preview(done: int, total: int, image: Any) -> None:
        bar.update_absolute(done, total, ("JPEG", image, args.preview_size))

    lines: list[str] = []

    def told(line: str) -> None:
        lines.append(line)
        _tell("\n".join(lines))

    def warned(line: str) -> None:
        log.warning("fastvar: %s", line)
        told(line)

    chosen = drawing.settings(seed, *(given.get(name, OWN) for name in ("guidance", "tau", "top_p")))
    interrupt = comfy.model_management.throw_exception_if_processing_interrupted
    negative = given.get("negative", "")
    try:
        drawn = drawing.draw(pipeline, prompt, images, chosen, negative, preview, interrupt, warned, told, **more)
    except FastvarError as error:
        raise _in_words(error) from None
    return io.NodeOutput(torch.from_numpy(drawn))


class LoadBundle(io.ComfyNode):
    """A bundle of models/fastvar, loaded."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        names = list(bundles.bundles(_folders())) or [bundles.NO_BUNDLE]
        return io.Schema(
            node_id="FastvarLoadBundle",
            display_name="Load Bundle (fastvar)",
            category=CATEGORY,
            description="Load a bundle, a folder made by `fastvar build`, from models/fastvar.",
            inputs=[
                io.Combo.Input("bundle", options=names, tooltip="Folders in models/fastvar that hold a manifest.json."),
                io.String.Input(
                    "memory",
                    default="",
                    optional=True,
                    placeholder="15GiB",
                    tooltip="Refuse a bundle that would take more than so much memory, as 15GiB. Empty: no limit.",
                ),
            ],
            outputs=[PipelineType.Output(display_name="pipeline", tooltip="For the other fastvar nodes.")],
        )

    @classmethod
    def validate_inputs(cls, bundle: str | None) -> bool | str:
        """ComfyUI does not check what is chosen of a list. None comes over a link, later."""
        try:
            if bundle is not None:
                bundles.bundle_named(bundle, _folders())
        except InputError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, bundle: str, **_: Any) -> Any:
        """A bundle that was built anew is loaded anew."""
        found = bundles.bundles(_folders()).get(bundle)
        return bundle, bundles.version(found) if found else 0

    @classmethod
    def execute(cls, bundle: str, memory: str = "") -> io.NodeOutput:
        try:
            pipeline = bundles.load(bundle, _folders(), memory, _make_room)
        except FastvarError as error:
            raise _in_words(error) from None
        _tell(bundles.described(pipeline))
        return io.NodeOutput(pipeline)


class Generate(io.ComfyNode):
    """Images of a prompt or a class."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FastvarGenerate",
            display_name="Generate (fastvar)",
            category=CATEGORY,
            description="Draw images of a prompt, or of a class. Every scale is previewed.",
            inputs=[
                *_subject(),
                io.Int.Input("images", default=1, min=1, max=MOST_IMAGES, tooltip="How many; they come as one batch."),
                *_sampling(),
            ],
            outputs=[_images_out()],
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
            display_name="Upscale (fastvar)",
            category=CATEGORY,
            description="Enlarge images to the bundle's size: coarse scales are the image's, the finer ones are drawn. "
            "Needs a bundle built --with-encoder.",
            inputs=[
                _image(),
                *_subject(),
                io.Int.Input(
                    "keep_scales",
                    default=0,
                    min=0,
                    max=64,
                    optional=True,
                    tooltip="How many scales stay the image's. 0: those that its pixels fill.",
                ),
                _fit(),
                *_sampling(),
            ],
            outputs=[_images_out()],
        )

    @classmethod
    def validate_inputs(cls, fit: str | None = None) -> bool | str:
        return _known_fit(fit)

    @classmethod
    def execute(
        cls, image: Any, pipeline: Any, prompt: str, seed: int, keep_scales: int = 0, fit: str = "crop", **given: Any
    ) -> io.NodeOutput:
        keep = keep_scales or None
        return _draw(pipeline, prompt, seed, 1, given, image=_array(image), keep_scales=keep, fit=fit)


class InPaint(io.ComfyNode):
    """Images of which the masked part is drawn anew."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FastvarInPaint",
            display_name="Inpaint (fastvar)",
            category=CATEGORY,
            description="Draw the masked part of images anew. Needs a bundle built --with-encoder.",
            inputs=[
                _image(),
                io.Mask.Input("mask", tooltip="1 is drawn anew: one mask for all images, or one for each."),
                *_subject(),
                _fit(),
                *_sampling(),
            ],
            outputs=[_images_out()],
        )

    @classmethod
    def validate_inputs(cls, fit: str | None = None) -> bool | str:
        return _known_fit(fit)

    @classmethod
    def execute(
        cls, image: Any, mask: Any, pipeline: Any, prompt: str, seed: int, fit: str = "crop", **given: Any
    ) -> io.NodeOutput:
        return _draw(pipeline, prompt, seed, 1, given, image=_array(image), mask=_array(mask), fit=fit)


def _array(tensor: Any) -> Any:
    return tensor.detach().cpu().numpy().clip(0, 1)
