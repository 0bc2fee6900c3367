"""`fastvar tune`: which pruning policy suits a bundle's model, by quality and speed."""

from __future__ import annotations

import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..console.options import BundlePath, RequireSignature, TrustRemoteCode, local_bundle
from ..console.prompt_file import plain_prompts
from ..console.streams import tell
from ..errors import InputError

if TYPE_CHECKING:
    from ..profiling.tuning.trials import Scorer


def tune(
    bundle: BundlePath,
    prompts: Annotated[Path, typer.Option(help="Text file of prompts, one a line, or JSON Lines.", show_default=False)],
    images: Annotated[
        int | None, typer.Option(help="Images to compare. [dim]default: one for each prompt[/dim]", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first image; the next count up.", min=0)] = 0,
    runs: Annotated[int, typer.Option(help="Timed images of each policy, after one warm-up.", min=3)] = 9,
    budget_minutes: Annotated[
        float, typer.Option("--budget-minutes", help="Wall clock to spend; what was found by then is told.")
    ] = 30.0,
    min_psnr: Annotated[
        float | None, typer.Option("--min-psnr", help="Least PSNR against the dense images, dB.")
    ] = None,
    max_psnr_drop: Annotated[
        float | None,
        typer.Option("--max-psnr-drop", help="PSNR may be so far below that of the bundle's own policy, dB."),
    ] = None,
    min_ssim: Annotated[float | None, typer.Option("--min-ssim", help="Least SSIM against the dense images.")] = None,
    min_accuracy: Annotated[
        float | None,
        typer.Option("--min-accuracy", help="Least share of the dense images' accuracy; needs --scorer."),
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Python function that is given images (uint8 arrays [H, W, 3]) and their prompts, "
            "and returns their accuracy, 0 to 1.",
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Folder for best.toml, front/*.toml, tune.svg and tune.json. Bundles that are tried lie there "
            "meanwhile: on the file system of BUNDLE they share its weights.",
        ),
    ] = Path("tuning"),
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads. [dim]default: the library's choice[/dim]")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", help="Processes that trace graphs. [dim]default: one per core[/dim]", min=1),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Engine cache folder. [dim]default: see `fastvar doctor`[/dim]")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    require_signature: RequireSignature = None,
) -> None:
    """Search pruning policies, and show the front of quality and speed against dense images at equal seeds."""
    from ..core.files import make_folder
    from ..engines.bundle.bundle import Bundle
    from ..profiling.tuning.rebuilder import Rebuilder
    from ..profiling.tuning.report import batch_line, best_line, front_table, write_all
    from ..profiling.tuning.search import Constraints
    from ..profiling.tuning.trials import TuningSetup, tune_bundle

    constraints = Constraints(min_psnr, max_psnr_drop, min_ssim, min_accuracy)
    if min_accuracy is not None and scorer is None:
        raise InputError("--min-accuracy needs an accuracy", fix="give --scorer MODULE:FUNCTION")
    texts = plain_prompts(prompts)
    setup = TuningSetup(texts, images or len(texts), seed, runs)
    found = None if scorer is None else load_scorer(scorer)
    bundle = local_bundle(bundle)
    opened = Bundle.open(bundle, trust_remote_code=trust_remote_code, require_signature=require_signature)
    make_folder(out)
    with (
        tempfile.TemporaryDirectory(dir=out, prefix=".bundles-") as folder,
        Rebuilder(bundle, Path(folder), cache=cache or True, jobs=jobs, opening=opened.opening) as rebuilder,
        Console(stderr=True).status("starting") as status,
    ):
        tuning = tune_bundle(
            opened.manifest,
            rebuilder.build,
            setup,
            constraints,
            scorer=found,
            minutes=budget_minutes,
            threads=threads,
            told=status.update,
        )
    written = write_all(tuning, opened, setup, out)
    Console().print(front_table(tuning))
    tell(best_line(tuning))
    if (told := batch_line(opened.manifest)) is not None:
        tell(told)
    for path in written:
        tell(f"wrote {path}")


def load_scorer(name: str) -> Scorer:
    """The function MODULE:FUNCTION; modules in the current folder are found too.

    Raises:
        InputError: no such module or function.
    """
    module, _, function = name.partition(":")
    fix = "check the spelling, and that it can be imported from here"
    if not module or not function:
        raise InputError(f"scorer {name!r} not understood", expected="MODULE:FUNCTION")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = getattr(import_module(module), function)
    except ImportError as error:
        raise InputError(f"cannot import the scorer's module {module!r}: {error}", fix=fix) from error
    except AttributeError as error:
        raise InputError(f"{module!r} has no function {function!r}", fix=fix) from error
    if not callable(found):
        raise InputError(f"{name} is a {type(found).__name__}", expected="a function")
    scorer: Scorer = found
    return scorer
