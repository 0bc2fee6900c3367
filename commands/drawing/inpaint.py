"""`fastvar inpaint`: a part of an image, drawn anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...console import sampling
from ...console.options import BundlePath, RequireSignature, TrustRemoteCode, progress_bar
from ...console.saving import destination


def inpaint(
    bundle: BundlePath,
    image: sampling.GivenImage,
    mask: Annotated[
        Path,
        typer.Option(help="Image of the same aspect ratio: WHITE is redrawn, black is kept.", show_default=False),
    ],
    prompt: sampling.Prompt = None,
    class_label: sampling.ClassLabel = None,
    no_composite: Annotated[
        bool,
        typer.Option(
            "--no-composite", help="Leave the outside as the model decodes it: do not put the image's own pixels back."
        ),
    ] = False,
    size: sampling.Size = None,
    fit: sampling.Fit = "exact",
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
    trust_remote_code: TrustRemoteCode = False,
    require_signature: RequireSignature = None,
    timings: sampling.Timings = False,
) -> None:
    """Redraw the white part of a mask. A token of 16x16 pixels is redrawn if the mask touches it; outside, the image's
    own pixels are put back with a soft edge. Needs a bundle --with-encoder.
    """
    from ...runtime.requests.params import SamplingParams

    params = SamplingParams(guidance_scale, tau, top_p, top_k, seed, num_images, negative_prompt)
    subject = sampling.one_subject(prompt, class_label)
    with destination(out, image_format, quality, [subject], num_images, [negative_prompt]) as target:
        trust = (trust_remote_code, require_signature)
        pipe = sampling.load(bundle, threads, offload_text_encoder, no_cuda_graphs, memory, *trust)
        sampling.check_size(pipe, size)
        with progress_bar() as progress:
            output = pipe.inpaint(
                image,
                mask,
                params=params,
                **sampling.edited_subject(pipe, prompt, class_label),
                fit=fit,
                composite=not no_composite,
                callback_on_scale_end=sampling.on_scale(progress, num_images * len(pipe.manifest.plan.steps)),
                callback_on_image_end=target.saver(pipe.bundle.digest),
            )
        if timings:
            sampling.show_timings(output)
