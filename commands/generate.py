"""`fastvar generate`: prompts become images."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from .. import __version__
from ..errors import InputError
from .options import BundlePath, progress_bar

if TYPE_CHECKING:
    from ..runtime.events import Output, ScaleEvent

SEED_BITS = 32  # of a seed drawn for the user: short enough to type again
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


def generate(
    bundle: BundlePath,
    prompts: Annotated[
        list[str],
        typer.Argument(metavar="PROMPT...", help="One text per image, each in quotes.", show_default=False),
    ],
    seed: Annotated[
        int | None, typer.Option(help="Seed of each prompt's first image; the next count up. [dim]default: drawn[/dim]")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            "--guidance-scale",
            "--cfg",
            help="Classifier-free guidance; 1 is off and twice as fast. [dim]bundle's[/dim]",
        ),
    ] = None,
    tau: Annotated[float | None, typer.Option(help="Sampling temperature; lower is tamer. [dim]bundle's[/dim]")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Drop a bit's rarer value at a probability of 1 - top_p or less. [dim]bundle's[/dim]"),
    ] = None,
    num_images: Annotated[int, typer.Option("--num-images", "-n", help="Images per prompt.")] = 1,
    negative_prompt: Annotated[str | None, typer.Option(help="What to steer away from.")] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="A .png file, or a folder for files named PROMPT-SEED.png.")
    ] = Path(),
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads. [dim]default: the library's choice[/dim]")
    ] = None,
    offload_text_encoder: Annotated[
        bool,
        typer.Option(
            "--offload-text-encoder", help="On a GPU: bring the text encoder for every prompt, and free its memory."
        ),
    ] = False,
    no_cuda_graphs: Annotated[
        bool, typer.Option("--no-cuda-graphs", help="On a GPU: make every launch by itself, to look for trouble.")
    ] = False,
    timings: Annotated[bool, typer.Option("--timings", help="Print milliseconds per scale.")] = False,
) -> None:
    """Draw images. PNG files carry prompt, seed, settings and bundle digest as metadata."""
    from ..runtime.pipeline import Pipeline
    from ..runtime.png import check_writable

    is_file = _is_file(out, len(prompts) * num_images)
    check_writable(out.parent if is_file else out)
    pipe = Pipeline.load(
        bundle, threads=threads, offload_text_encoder=offload_text_encoder, cuda_graphs=not no_cuda_graphs
    )
    count = len(prompts) * num_images * len(pipe.manifest.plan.steps)
    with progress_bar() as progress:
        output = pipe(
            prompts,
            seed=secrets.randbits(SEED_BITS) if seed is None else seed,
            guidance_scale=guidance_scale,
            tau=tau,
            top_p=top_p,
            num_images=num_images,
            negative_prompt=negative_prompt,
            callback_on_scale_end=_on_scale(progress, count),
        )
    _save(output, out, is_file, pipe.bundle.digest)
    if timings:
        from .tables import timing_table

        Console().print(timing_table(output.timings))


def _is_file(out: Path, images: int) -> bool:
    """Whether --out names a file rather than a folder."""
    if out.is_dir() or out.suffix.lower() not in IMAGE_SUFFIXES:
        return False
    if out.suffix.lower() != ".png":
        raise InputError(f"cannot write {out}", expected="a .png file: it carries the metadata", fix="name it .png")
    if images > 1:
        raise InputError(f"--out names one file for {images} images", fix="give a folder")
    return True


def _on_scale(progress: Progress, count: int) -> Callable[[ScaleEvent], None]:
    task = progress.add_task("drawing", total=count)

    def report(event: ScaleEvent) -> None:
        kept = f", {event.kept} kept" if event.kept < event.tokens else ""
        progress.update(task, description=f"scale {event.index}: {event.tokens} tokens{kept}", advance=1)

    return report


def _save(output: Output, out: Path, is_file: bool, digest: str) -> None:
    from ..runtime.png import free_path, save_png, slug

    for image, prompt, seed, timing in zip(output.images, output.prompts, output.seeds, output.timings, strict=True):
        path = free_path(out if is_file else out / f"{slug(prompt)}-{seed}.png")
        settings = json.dumps(output.settings, sort_keys=True)
        told = {"prompt": prompt, "seed": str(seed), "settings": settings, "bundle": digest, "fastvar": __version__}
        save_png(image, path, told)
        typer.echo(f"wrote {path} (seed {seed}, {timing.total_ms / 1e3:.2f} s)")
