"""`fastvar batch`: a table of prompts becomes a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import ProgressColumn, TimeRemainingColumn

from ...console import sampling
from ...console.options import RequireSignature, TrustRemoteCode, local_bundle, progress_bar
from ...console.streams import tell
from ...errors import InputError

if TYPE_CHECKING:
    from ...bulk.run import Outcome


def batch(
    table: Annotated[
        Path,
        typer.Argument(
            metavar="TABLE",
            help="A .jsonl, .csv or .parquet file: prompt or class_label; and seed, guidance_scale, tau, top_p, top_k, "
            "negative_prompt, num_images, image, mask, keep_scales, fit, id where a row has its own.",
            show_default=False,
        ),
    ],
    bundle: Annotated[Path, typer.Option(help="Folder made by `fastvar build`, or hub:ORG/NAME.", show_default=False)],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder of images. What it holds is not drawn again.", show_default=False),
    ],
    workers: Annotated[int, typer.Option(min=1, help="Processes that draw, each with the whole bundle.")] = 1,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Draw on a Ray cluster; local for one of this machine.", show_default=False
        ),
    ] = None,
    gpus_per_worker: Annotated[float, typer.Option(min=0, help="GPUs that each worker holds, on Ray.")] = 0.0,
    image_format: Annotated[str, typer.Option("--format", help="png, webp or jpeg.")] = "png",
    quality: sampling.Quality = None,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Try images again that failed, or that processes died of.")
    ] = False,
    guidance_scale: sampling.GuidanceScale = None,
    tau: sampling.Tau = None,
    top_p: sampling.TopP = None,
    top_k: sampling.TopK = None,
    negative_prompt: sampling.NegativePrompt = None,
    threads: sampling.Threads = None,
    offload_text_encoder: sampling.OffloadTextEncoder = False,
    no_cuda_graphs: sampling.NoCudaGraphs = False,
    memory: sampling.Memory = None,
    max_batch: sampling.MaxBatch = None,
    trust_remote_code: TrustRemoteCode = False,
    require_signature: RequireSignature = None,
) -> None:
    """Draw every row of a table. Each image is written whole, under a key of all that decides it; a bad row becomes an
    entry of the index, and the rest goes on. Interrupted or killed, it goes on where it was.

    OUT/index.parquet has a row for every image: its file, seed, settings, or what is wrong with it.
    """
    from ...bulk.on_ray import draw_on_ray
    from ...bulk.processes import draw_in_processes
    from ...bulk.run import BulkRun
    from ...runtime.requests.params import SamplingParams

    if gpus_per_worker and ray is None:
        raise InputError("--gpus-per-worker without --ray", fix="say --ray ADDRESS, or leave it away")
    params = SamplingParams(guidance_scale, tau, top_p, top_k, None, 1, negative_prompt)
    trust = (trust_remote_code, require_signature)
    load_options = sampling.load_options(threads, offload_text_encoder, no_cuda_graphs, memory, *trust, max_batch)
    folder = local_bundle(bundle)
    wanted = BulkRun(table, folder, out, image_format, quality, workers, params, retry_errors, load_options)
    with progress_bar(_Rate(), TimeRemainingColumn()) as progress:
        task = progress.add_task("loading", total=None)

        def started(left: int, there: int) -> None:
            progress.update(task, description=f"drawing, {there} are there" if there else "drawing", total=left)

        draw = draw_in_processes if ray is None else draw_on_ray(ray, gpus_per_worker=gpus_per_worker)
        outcome = wanted.run(draw, started=started, ended=lambda _state: progress.advance(task))
    _tell(outcome)


def _tell(outcome: Outcome) -> None:
    """What came of it.

    Raises:
        InputError: nothing could be drawn.
    """
    tell(f"{outcome.drawn} drawn, {outcome.there} were there, {outcome.failed} failed: {outcome.index}")
    if outcome.failed and not outcome.drawn + outcome.there:
        raise InputError(
            "no image could be drawn", fix=f"see column error of {outcome.index}, or the files of errors/ beside it"
        )


class _Rate(ProgressColumn):
    """Images a second."""

    def render(self, task: Any) -> Any:
        from rich.text import Text

        return Text(f"{task.speed:.2f}/s" if task.speed else "")
