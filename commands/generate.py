"""`fastvar generate`: prompts or class labels become images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..console import sampling
from ..console.family_facts import families_of_classes
from ..console.options import BundlePath, RequireSignature, TrustRemoteCode, progress_bar
from ..console.saving import destination


def generate(
    bundle: BundlePath,
    prompts: Annotated[
        list[str],
        typer.Argument(
            metavar="PROMPT...",
            help="One text per image, each in quotes; a class by number or name where the model draws classes "
            f"({families_of_classes()}).",
            show_default=False,
        ),
    ],
    seed: sampling.Seed = None,
    guidance_scale: sampling.GuidanceScale = None,
    tau: sampling.Tau = None,
    top_p: sampling.TopP = None,
    top_k: sampling.TopK = None,
    num_images: sampling.NumImages = 1,
    negative_prompt: sampling.NegativePrompt = None,
    out: sampling.Out = Path(),
    image_format: sampling.Format = None,
    quality: sampling.Quality = None,
    threads: sampling.Threads = None,
    offload_text_encoder: sampling.OffloadTextEncoder = False,
    no_cuda_graphs: sampling.NoCudaGraphs = False,
    memory: sampling.Memory = None,
    batch: sampling.MaxBatch = None,
    trust_remote_code: TrustRemoteCode = False,
    require_signature: RequireSignature = None,
    timings: sampling.Timings = False,
) -> None:
    """Draw images, each saved as it is drawn. Files carry prompt, seed, settings and bundle digest as metadata."""
    from ..runtime.params import SamplingParams

    params = SamplingParams(guidance_scale, tau, top_p, top_k, seed, num_images, negative_prompt)
    with destination(out, image_format, quality, prompts, num_images, negative_prompt) as target:
        trust = (trust_remote_code, require_signature)
        pipe = sampling.load(bundle, threads, offload_text_encoder, no_cuda_graphs, memory, *trust, batch)
        count = len(prompts) * num_images * len(pipe.manifest.plan.steps)
        with progress_bar() as progress:
            output = pipe(
                **sampling.subjects(pipe, prompts),
                params=params,
                callback_on_scale_end=sampling.on_scale(progress, count),
                callback_on_image_end=target.saver(pipe.bundle.digest),
            )
        if timings:
            sampling.show_timings(output)
