"""`fastvar generate`: prompts or class labels become images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...console import sampling
from ...console.family_facts import families_of_classes
from ...console.options import BundlePath, RequireSignature, TrustRemoteCode, progress_bar
from ...console.prompt_file import PromptLine, check_lines, params_of, read_prompt_file, subjects_of
from ...console.saving import destination
from ...errors import InputError

if TYPE_CHECKING:
    from ...runtime.output import Output
    from ...runtime.pipeline import Pipeline
    from ...runtime.requests.params import SamplingParams

Load = Callable[[], "Pipeline"]
Line = tuple[PromptLine, "SamplingParams"]
Show = Callable[..., None]
Going = tuple[Path, str | None, int | None]  # --out, --format, --quality


def generate(
    bundle: BundlePath,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT...",
            help="One text per image, each in quotes; a class by number or name where the model draws classes "
            f"({families_of_classes()}).",
            show_default=False,
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="A text file with a prompt a line, or JSON Lines: objects with prompt or class_label, and settings of "
            "their own; - is stdin. Names of images begin with the line's number.",
        ),
    ] = None,
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
    from ...runtime.requests.params import SamplingParams

    params = SamplingParams(guidance_scale, tau, top_p, top_k, seed, num_images, negative_prompt)
    if prompts and prompt_file is not None:
        raise InputError("PROMPT and --prompts exclude each other", fix="leave one of them away")
    load = partial(sampling.load, bundle, threads, offload_text_encoder, no_cuda_graphs, memory)
    load = partial(load, trust_remote_code, require_signature, batch)
    going = (out, image_format, quality)
    show = sampling.show_timings if timings else _show_nothing
    if prompts:
        _draw_given(load, prompts, params, going, show)
    elif prompt_file is not None:
        _draw_file(load, prompt_file, params, going, show)
    else:
        raise InputError("nothing to draw", expected="PROMPT..., each in quotes, or --prompts FILE")


def _show_nothing(*outputs: Output) -> None:
    pass


def _draw_given(load: Load, prompts: list[str], params: SamplingParams, going: Going, show: Show) -> None:
    """What the command line names, in one call."""
    count = len(prompts) * params.num_images
    with destination(*going, prompts, count, [params.negative_prompt]) as target:
        pipe = load()
        with progress_bar() as progress:
            output = pipe(
                **sampling.subjects(pipe, prompts),
                params=params,
                callback_on_scale_end=sampling.on_scale(progress, count * len(pipe.manifest.plan.steps)),
                callback_on_image_end=target.saver(pipe.bundle.digest),
            )
        show(output)


def _draw_file(load: Load, file: Path, params: SamplingParams, going: Going, show: Show) -> None:
    """Line after line of a file, all of which are checked before."""
    from ...runtime.requests.inputs import draws_labels

    lines = read_prompt_file(file)
    asked = params_of(lines, params)
    count = sum(one.num_images for one in asked)
    subjects = [str(line.subject) for line in lines]
    with destination(*going, subjects, count, [one.negative_prompt for one in asked]) as target:
        pipe = load()
        check_lines(pipe, lines, asked)
        outputs = []
        with progress_bar() as progress:
            told = sampling.on_scale(progress, count * len(pipe.manifest.plan.steps))
            most = max(size for sizes in pipe.batch_sizes.values() for size in sizes)
            for some in together(list(zip(lines, asked, strict=True)), most):
                prefixes = [line.prefix(lines) for line, one in some for _ in range(one.num_images)]
                output = pipe(
                    **subjects_of([line for line, _ in some], draws_labels(pipe.manifest)),
                    params=[one for _, one in some],
                    callback_on_scale_end=told,
                    callback_on_image_end=target.saver(pipe.bundle.digest, prefixes),
                )
                outputs.append(replace(output, images=[]))  # they are saved
        show(*outputs)


def together(lines: list[Line], most: int) -> Iterator[list[Line]]:
    """Lines that are drawn in one call: as many as a pass may hold images of, so that few images wait in memory."""
    some: list[Line] = []
    for line in lines:
        if some and sum(one.num_images for _, one in (*some, line)) > most:
            yield some
            some = []
        some.append(line)
    if some:
        yield some
