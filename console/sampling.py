"""What the commands that draw images share: their options, the progress, and the timings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from ..errors import InputError
from .family_facts import families_of_classes, families_with_setting, guidance_off
from .options import local_bundle

if TYPE_CHECKING:
    from ..runtime.output import Output, ScaleEvent
    from ..runtime.pipeline import Pipeline


Seed = Annotated[
    int | None, typer.Option(help="Seed of each prompt's first image; the next count up. [dim]default: drawn[/dim]")
]
GuidanceScale = Annotated[
    float | None,
    typer.Option(
        "--guidance-scale",
        "--cfg",
        help=f"Classifier-free guidance; off, and twice as fast, at {guidance_off()}. [dim]bundle's[/dim]",
    ),
]
Tau = Annotated[
    float | None,
    typer.Option("--tau", "--temperature", help="Sampling temperature; lower is tamer. [dim]bundle's[/dim]"),
]
TopP = Annotated[
    float | None,
    typer.Option(
        help="Drop the rarest values, 1 - top_p of the probability at most; 0 or 1: none. [dim]bundle's[/dim]"
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        min=0, help=f"Draw from so many codes only, 0 for all ({families_with_setting('top_k')}). [dim]bundle's[/dim]"
    ),
]
NumImages = Annotated[int, typer.Option("--num-images", "-n", help="Images per prompt.")]
NegativePrompt = Annotated[str | None, typer.Option(help="What to steer away from.")]
Out = Annotated[
    Path,
    typer.Option(
        "--out",
        "-o",
        help="A .png, .jpg or .webp file; a folder for files named PROMPT-SEED.png; or - for stdout. What is there "
        "is kept: a name that is taken gets a number.",
    ),
]
Format = Annotated[
    str | None, typer.Option("--format", help="png, jpeg or webp, in a folder or on stdout. [dim]default: png[/dim]")
]
Quality = Annotated[
    int | None,
    typer.Option(
        min=1, max=100, help="Of JPEG and WebP, 1 to 100; WebP is lossless at 100. [dim]default: 95, 90[/dim]"
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. [dim]default: the library's choice[/dim]")]
OffloadTextEncoder = Annotated[
    bool,
    typer.Option(
        "--offload-text-encoder", help="On a GPU: bring the text encoder for every prompt, and free its memory."
    ),
]
NoCudaGraphs = Annotated[
    bool, typer.Option("--no-cuda-graphs", help="On a GPU: make every launch by itself, to look for trouble.")
]
Memory = Annotated[
    str | None,
    typer.Option("--memory", metavar="BYTES", help="A budget, 15GiB say: refuse a bundle that would take more."),
]
MaxBatch = Annotated[
    int | None,
    typer.Option(
        "--batch",
        min=1,
        help="Most images in one pass, of the numbers that the bundle was built for. [dim]default: what fits[/dim]",
    ),
]
Timings = Annotated[bool, typer.Option("--timings", help="Print milliseconds per scale.")]

# Of the commands that start from an image.
GivenImage = Annotated[
    Path, typer.Argument(metavar="IMAGE", help="Any image file that Pillow reads.", show_default=False)
]
Prompt = Annotated[
    str | None, typer.Argument(metavar="PROMPT", help="What the whole image shows, in quotes.", show_default=False)
]
ClassLabel = Annotated[
    str | None,
    typer.Option(
        help=f"In place of a prompt, where the model draws classes ({families_of_classes()}): a class by number or "
        "name, or unconditional for none.",
        show_default=False,
    ),
]
Size = Annotated[
    str | None, typer.Option(help="Refuse a bundle that draws another size, WIDTHxHEIGHT: the bundle decides it.")
]
Fit = Annotated[
    str, typer.Option(help="An image of another aspect ratio: exact refuses it, crop cuts it around its centre.")
]


def subjects(pipe: Pipeline, given: list[str]) -> dict[str, Any]:
    """What the command line names, as the argument of the pipeline that it is for."""
    from ..runtime.requests.inputs import draws_labels

    return {"class_labels" if draws_labels(pipe.manifest) else "prompt": given}


def one_subject(prompt: str | None, class_label: str | None) -> str:
    """What an edited image shall show, however it was said.

    Raises:
        InputError: it was said twice, or not at all.
    """
    given = [text for text in (prompt, class_label) if text is not None]
    if len(given) != 1:
        raise InputError(
            "both a prompt and --class-label given" if given else "neither a prompt nor --class-label given",
            expected="one of them: what the whole image shows",
            fix="leave --class-label away where the model reads prompts, and the prompt where it draws classes"
            if given
            else "say it in quotes behind the image, or by --class-label where the model draws classes",
        )
    return given[0]


def edited_subject(pipe: Pipeline, prompt: str | None, class_label: str | None) -> dict[str, Any]:
    """The argument of the pipeline that says what an edited image shall show."""
    return subjects(pipe, [prompt]) if prompt is not None else {"class_labels": class_label}


def load(
    bundle: Path,
    threads: int | None,
    offload_text_encoder: bool,
    no_cuda_graphs: bool,
    memory: str | None,
    trust_remote_code: bool = False,
    require_signature: Path | None = None,
    batch: int | None = None,
) -> Pipeline:
    from ..runtime.pipeline import Pipeline

    trust = (trust_remote_code, require_signature)
    options = load_options(threads, offload_text_encoder, no_cuda_graphs, memory, *trust, batch)
    return Pipeline.load(local_bundle(bundle), **options)


def load_options(
    threads: int | None,
    offload_text_encoder: bool,
    no_cuda_graphs: bool,
    memory: str | None,
    trust_remote_code: bool,
    require_signature: Path | None,
    batch: int | None,
) -> dict[str, Any]:
    """Options of the command line, as arguments of `Pipeline.load`."""
    return {
        "threads": threads,
        "offload_text_encoder": offload_text_encoder,
        "cuda_graphs": not no_cuda_graphs,
        "memory_budget": memory,
        "trust_remote_code": trust_remote_code,
        "require_signature": require_signature,
        "batch": batch,
    }


def check_size(pipe: Pipeline, size: str | None) -> None:
    """Raises InputError where a size is asked for that the bundle does not draw."""
    from ..families import family_named

    family = family_named(pipe.manifest.family)
    wanted = pipe.size if size is None else family.size(size, pipe.manifest.transformer)
    if wanted != pipe.size:
        raise InputError(
            f"--size {wanted[1]}x{wanted[0]}, but this bundle draws {pipe.size[1]}x{pipe.size[0]}",
            expected="the size that the bundle was built for: its schedule and memory are static",
            fix=f"drop --size, or use a bundle built with --size {wanted[1]}x{wanted[0]}",
        )


def on_scale(progress: Progress, count: int) -> Callable[[ScaleEvent], None]:
    """A callback that shows the scale that was just drawn, of `count` over all images."""
    task = progress.add_task("drawing", total=count)

    def report(event: ScaleEvent) -> None:
        kept = f", {event.kept} kept" if event.kept < event.tokens else ""
        progress.update(task, description=f"scale {event.index}: {event.tokens} tokens{kept}", advance=1)

    return report


def show_timings(*outputs: Output) -> None:
    """Print milliseconds per scale, of every image."""
    from .tables import timing_table

    Console().print(timing_table([timings for output in outputs for timings in output.timings]))
