"""The `fastvar` command: build, generate, inspect, doctor.

Start-up stays light: torch, onnxruntime and numpy are imported by the commands that need them, never here.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from . import __version__
from .errors import FastvarError, InputError

if TYPE_CHECKING:
    from .export.checkpoint import Checkpoint
    from .runtime.events import Output, ScaleEvent

USER_ERROR = 2  # exit code of everything a user can cause; click uses the same for a wrong option
SEED_BITS = 32  # of a seed drawn for the user: short enough to type again
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}

app = typer.Typer(
    name="fastvar",
    help="Ahead-of-time engines for next-scale visual autoregressive image models with cached token pruning.",
    epilog="Start with: fastvar build CHECKPOINT --out bundle, then: fastvar generate bundle 'a red circle'",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a bug shows its plain traceback, ready for a report
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

BundlePath = Annotated[Path, typer.Argument(help="Folder made by `fastvar build`.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit: 0 done, 2 the user's error in plain words, 130 interrupted; a bug is a traceback."""
    try:
        app(args=arguments, prog_name="fastvar")
    except FastvarError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(USER_ERROR)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted", err=True)
        sys.exit(130)
    sys.exit(0)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastvar {__version__}")
        raise typer.Exit


@app.callback()
def _fastvar(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    pass


@app.command()
def build(
    out: Annotated[Path, typer.Option("--out", "-o", help="Bundle folder; an older bundle there is replaced.")],
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            help="Checkpoint folder (transformer, image_tokenizer, text_encoder/), or the transformer file alone.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[str, typer.Option(help="Image size in pixels, WIDTHxHEIGHT.")] = "1024x1024",
    policy: Annotated[str, typer.Option(help="Token pruning: fastvar, dense, or a TOML policy file.")] = "fastvar",
    backend: Annotated[str, typer.Option(help="Backend that compiles the engines; see `fastvar doctor`.")] = (
        "onnxruntime"
    ),
    target: Annotated[
        str | None,
        typer.Option(
            help="Devices the engines are for: cpu; or GPUs as sm86,sm89,sm120; or current. "
            "[dim]default: cpu, or the GPU in this machine[/dim]"
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="bf16, fp16 or fp32. [dim]default: bf16 on GPUs, fp32 with onnxruntime[/dim]"),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Store the layers' matrices in 8 bits: int8, or fp8 from sm89 on. [dim]default: as --precision[/dim]"
        ),
    ] = None,
    allow_unfused: Annotated[
        bool, typer.Option("--allow-unfused", help="Accept GPU engines whose attention is not one kernel.")
    ] = False,
    via: Annotated[
        str, typer.Option(help="From graph to TensorRT engine: onnx, or torch-tensorrt on a GPU machine that has it.")
    ] = "onnx",
    guidance: Annotated[
        str, typer.Option(help="Engines with classifier-free guidance (on), without (off), or both.")
    ] = "both",
    text_length: Annotated[
        int | None,
        typer.Option(help="Longest prompt in tokens; shorter is faster. [dim]default: the model's[/dim]", min=1),
    ] = None,
    image_tokenizer: Annotated[
        Path | None, typer.Option(help="Image tokenizer file, where it is not in the checkpoint folder.")
    ] = None,
    text_encoder: Annotated[
        Path | None, typer.Option(help="T5 encoder folder, where it is not in the checkpoint folder.")
    ] = None,
    random_weights: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Random weights of a named size, infinity_2b say, instead of CHECKPOINT."),
    ] = None,
    with_text_encoder: Annotated[
        bool, typer.Option("--with-text-encoder", help="With --random-weights: a random flan-t5-xl encoder too.")
    ] = False,
    with_encoder: Annotated[
        bool, typer.Option("--with-encoder", help="Include the image encoder, which images are edited through.")
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", help="Processes that trace graphs. [dim]default: one per core[/dim]", min=1),
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Neither read nor fill the engine cache.")] = False,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Engine cache folder. [dim]default: see `fastvar doctor`[/dim]")
    ] = None,
) -> None:
    """Turn a checkpoint into a bundle of engines. No GPU is needed."""
    from .engines.registry import get_backend
    from .precision import parse_precision
    from .schedule import parse_size, schedule_for

    # What is wrong with the options is told before torch takes its seconds to import.
    schedule_for(parse_size(size))
    compiler = get_backend(backend)
    compiler.resolve_target(target, parse_precision(precision, weights, default=compiler.precisions[0]))
    from .export.build import build as build_bundle

    with _progress() as progress:
        report = build_bundle(
            _source(checkpoint, random_weights, with_text_encoder),
            size=size,
            out=out,
            policy=policy,
            backend=backend,
            target=target,
            precision=precision,
            weights=weights,
            allow_unfused=allow_unfused,
            via=via,
            guidance=guidance,
            text_length=text_length,
            with_encoder=with_encoder,
            image_tokenizer=image_tokenizer,
            text_encoder=text_encoder,
            cache=False if no_cache else cache or True,
            jobs=jobs,
            progress=_on_graph(progress),
        )
    from .cli_tables import build_lines

    for line in build_lines(report):
        typer.echo(line)


def _source(checkpoint: Path | None, random_weights: str | None, with_text_encoder: bool) -> Path | Checkpoint:
    if (checkpoint is None) == (random_weights is None):
        raise InputError(
            "nothing to build from" if checkpoint is None else "CHECKPOINT and --random-weights exclude each other",
            expected="either a CHECKPOINT or --random-weights MODEL",
        )
    if random_weights is not None:
        from .export.random_weights import random_checkpoint

        return random_checkpoint(random_weights, text_encoder=with_text_encoder)
    assert checkpoint is not None
    if with_text_encoder:
        raise InputError(
            "--with-text-encoder goes with --random-weights", fix="drop it: a checkpoint brings its text encoder"
        )
    if not checkpoint.exists():
        raise InputError(f"no checkpoint {checkpoint}", expected="a folder or a transformer file", fix="check the path")
    return checkpoint


def _on_graph(progress: Progress) -> Callable[[str, int, int], None]:
    task = progress.add_task("reading the checkpoint", total=None)

    def report(what: str, done: int, total: int) -> None:
        progress.update(task, description=what, completed=done, total=total)

    return report


@app.command()
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
    from .runtime.pipeline import Pipeline
    from .runtime.png import check_writable

    is_file = _is_file(out, len(prompts) * num_images)
    check_writable(out.parent if is_file else out)
    pipe = Pipeline.load(
        bundle, threads=threads, offload_text_encoder=offload_text_encoder, cuda_graphs=not no_cuda_graphs
    )
    count = len(prompts) * num_images * len(pipe.manifest.plan.steps)
    with _progress() as progress:
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
        from .cli_tables import timing_table

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
    from .runtime.png import free_path, save_png, slug

    for image, prompt, seed, timing in zip(output.images, output.prompts, output.seeds, output.timings, strict=True):
        path = free_path(out if is_file else out / f"{slug(prompt)}-{seed}.png")
        settings = json.dumps(output.settings, sort_keys=True)
        told = {"prompt": prompt, "seed": str(seed), "settings": settings, "bundle": digest, "fastvar": __version__}
        save_png(image, path, told)
        typer.echo(f"wrote {path} (seed {seed}, {timing.total_ms / 1e3:.2f} s)")


@app.command()
def inspect(
    bundle: BundlePath,
    as_json: AsJson = False,
    engines: Annotated[bool, typer.Option("--engines", help="List every engine as well.")] = False,
    verify: Annotated[
        str, typer.Option(help="auto hashes engines, and weights up to 256 MiB; all hashes everything.")
    ] = "auto",
) -> None:
    """Show what a bundle does, scale by scale, after checking its files."""
    from .cli_tables import bundle_facts, engine_table, header_table, plan_table
    from .engines.bundle import Bundle

    opened = Bundle.open(bundle, verify=verify)
    facts = bundle_facts(opened)
    if as_json:
        _print_json(facts)
        return
    console = Console()
    console.print(header_table(facts))
    console.print(plan_table(facts))
    if engines:
        console.print(engine_table(facts))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is installed, what each backend needs, and what this machine offers."""
    from .cli_tables import doctor_tables
    from .doctor import examine

    facts = examine()
    if as_json:
        _print_json(facts)
        return
    Console().print(*doctor_tables(facts), sep="\n")


def _print_json(data: dict[str, Any]) -> None:
    typer.echo(json.dumps(data, indent=2))


def _progress() -> Progress:
    """On stderr, so that stdout can be piped; silent where that is no terminal, gone when done."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    return Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal)


if __name__ == "__main__":
    main()
