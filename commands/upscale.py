"""`fastvar upscale`: an image, enlarged to the bundle's size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..console import sampling as drawing
from ..console.options import BundlePath, RequireSignature, TrustRemoteCode, progress_bar
from ..console.saving import destination


def upscale(
    bundle: BundlePath,
    image: drawing.GivenImage,
    prompt: drawing.Prompt,
    keep_scales: Annotated[
        int | None,
        typer.Option(
            help="Keep this many scales of the image, as `fastvar inspect` counts them. "
            "[dim]default: those whose tokens, of 16x16 pixels, fit into it[/dim]"
        ),
    ] = None,
    no_consistency: Annotated[
        bool,
        typer.Option("--no-consistency", help="Do not correct the result to give the image again when averaged down."),
    ] = False,
    size: drawing.Size = None,
    fit: drawing.Fit = "exact",
    seed: drawing.Seed = None,
    guidance_scale: drawing.GuidanceScale = None,
    tau: drawing.Tau = None,
    top_p: drawing.TopP = None,
    num_images: drawing.NumImages = 1,
    negative_prompt: drawing.NegativePrompt = None,
    out: drawing.Out = Path(),
    image_format: drawing.Format = None,
    quality: drawing.Quality = None,
    threads: drawing.Threads = None,
    offload_text_encoder: drawing.OffloadTextEncoder = False,
    no_cuda_graphs: drawing.NoCudaGraphs = False,
    memory: drawing.Memory = None,
    trust_remote_code: TrustRemoteCode = False,
    require_signature: RequireSignature = None,
    timings: drawing.Timings = False,
) -> None:
    """Enlarge an image: its coarse scales are kept, the model draws the finer ones. Needs a bundle --with-encoder."""
    with destination(out, image_format, quality, [prompt], num_images, negative_prompt) as target:
        trust = (trust_remote_code, require_signature)
        pipe = drawing.load(bundle, threads, offload_text_encoder, no_cuda_graphs, memory, *trust)
        drawing.check_size(pipe, size)
        with progress_bar() as progress:
            output = pipe.upscale(
                image,
                prompt,
                keep_scales=keep_scales,
                fit=fit,
                consistency=not no_consistency,
                seed=seed,
                guidance_scale=guidance_scale,
                tau=tau,
                top_p=top_p,
                num_images=num_images,
                negative_prompt=negative_prompt,
                callback_on_scale_end=drawing.on_scale(progress, num_images * len(pipe.manifest.plan.steps)),
                callback_on_image_end=target.saver(pipe.bundle.digest),
            )
        if timings:
            drawing.show_timings(output)
