"""`fastvar build`: a checkpoint becomes a bundle of engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress

from ..errors import InputError
from .options import progress_bar

if TYPE_CHECKING:
    from ..export.checkpoint import Checkpoint


def build(
    out: Annotated[Path, typer.Option("--out", "-o", help="Bundle folder; an older bundle there is replaced.")],
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            help="Checkpoint folder (transformer, image_tokenizer, text_encoder/), or the transformer file alone.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        str, typer.Option(help="Image size WIDTHxHEIGHT in pixels, or a shape as 16:9; see `fastvar sizes`.")
    ] = "1024x1024",
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
    decoder_tile: Annotated[
        int | None,
        typer.Option(
            metavar="ROWS",
            min=1,
            help="Decode the image in stripes of so many latent rows: less memory, the same image. "
            "[dim]default: whole[/dim]",
        ),
    ] = None,
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
    from ..engines.registry import get_backend
    from ..precision import parse_precision
    from ..schedule import parse_size, schedule_for

    # What is wrong with the options is told before torch takes its seconds to import.
    schedule_for(parse_size(size))
    compiler = get_backend(backend)
    compiler.resolve_target(target, parse_precision(precision, weights, default=compiler.precisions[0]))
    from ..export.build import build as build_bundle

    with progress_bar() as progress:
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
            decoder_tile=decoder_tile,
            image_tokenizer=image_tokenizer,
            text_encoder=text_encoder,
            cache=False if no_cache else cache or True,
            jobs=jobs,
            progress=_on_graph(progress),
        )
    from .tables import build_lines

    for line in build_lines(report):
        typer.echo(line)


def _source(checkpoint: Path | None, random_weights: str | None, with_text_encoder: bool) -> Path | Checkpoint:
    if (checkpoint is None) == (random_weights is None):
        raise InputError(
            "nothing to build from" if checkpoint is None else "CHECKPOINT and --random-weights exclude each other",
            expected="either a CHECKPOINT or --random-weights MODEL",
        )
    if random_weights is not None:
        from ..export.random_weights import random_checkpoint

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
