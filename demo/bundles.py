"""The demo checkpoint as bundles of one image size: dense and pruned, and others that are scored beside them.

`python -m demo.bundles` builds the two. Who draws calls `ensure_bundles`, which does so in another process: what is
timed then shares its process with neither torch nor the threads of a build.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

import fastvar
from fastvar.errors import CheckpointError, FastvarError
from fastvar.families.base import SamplingDefaults

ROOT = Path(__file__).parent
CHECKPOINT = ROOT / "checkpoint"
OUT = ROOT / "out"
SIZE = "256x256"  # unless another is asked for
SIDES = (256, 512)
POLICIES = ("dense", "fastvar")  # the variants that are drawn and timed
SAMPLING = SamplingDefaults(guidance_scale=3.0, tau=0.5, top_p=0.97)


@dataclass(frozen=True)
class Variant:
    """How a bundle is built; None is the build's own choice."""

    policy: str
    backend: str | None = None
    precision: str | None = None
    weights: str | None = None


VARIANTS = {
    **{policy: Variant(policy) for policy in (*POLICIES, "fastvar-strong")},
    "w8a8": Variant("fastvar", "aotinductor", "bf16", "w8a8"),
}


def bundle_paths(out: Path = OUT, size: str = SIZE, variants: Sequence[str] = POLICIES) -> dict[str, Path]:
    """Variant -> bundle folder; sizes but the usual one have a folder of their own."""
    return {name: (out if size == SIZE else out / size) / name for name in variants}


def ensure_bundles(
    out: Path = OUT, *, checkpoint: Path = CHECKPOINT, size: str = SIZE, variants: Sequence[str] = POLICIES
) -> dict[str, Path]:
    """Build the checkpoint in every variant, in a process of its own; ends this one where that fails.

    Always builds: with the engine cache an unchanged bundle takes a second, and a stale one is never scored.
    """
    paths = bundle_paths(out, size, variants)
    places = ("--checkpoint", str(checkpoint), "--out", str(out))
    options = (*places, "--side", size.split("x")[0], "--variants", *variants)
    command = [sys.executable, "-m", "demo.bundles", *options]
    done = subprocess.run(command, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return paths


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run a program of the demo; what the user can mend is said in one piece, with exit code 2."""
    try:
        main()
    except FastvarError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def build_bundles(checkpoint: Path, out: Path, size: str = SIZE, variants: Sequence[str] = POLICIES) -> None:
    """Build one bundle for every variant, showing progress.

    Raises:
        FastvarError: the checkpoint is missing or damaged, or the folder cannot be written.
    """
    if not (checkpoint / "transformer.pth").is_file():
        raise CheckpointError(
            f"no demo transformer in {checkpoint}", expected="transformer.pth", fix="train it with `make train-demo`"
        )
    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    for name, path in bundle_paths(out, size, variants).items():
        given = {option: value for option, value in asdict(VARIANTS[name]).items() if value is not None}
        with Progress(*columns, transient=True, disable=not sys.stdout.isatty()) as progress:
            task = progress.add_task(f"building {name}", total=None)
            built = fastvar.build(
                checkpoint,
                size=size,
                guidance="on",
                with_encoder=True,
                out=path,
                sampling=SAMPLING,
                progress=partial(_show, progress, task, name),
                **given,
            )
        counts = f"{built.graphs_traced} graphs exported, {built.graphs_cached} from the cache"
        print(f"built {path} in {built.seconds:.1f} s: {counts}, engines {built.engine_bytes / 2**20:.1f} MiB")


def _show(progress: Progress, task: TaskID, name: str, what: str, done: int, total: int) -> None:
    progress.update(task, description=f"{name}: {what}", completed=done, total=total)


def add_side(parser: argparse.ArgumentParser) -> None:
    """The option that chooses the image size."""
    parser.add_argument("--side", type=int, choices=SIDES, default=SIDES[0], help="of the images, in pixels")


def square(side: int) -> str:
    """256 -> "256x256"."""
    return f"{side}x{side}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="folder in the official format")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the bundles")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=POLICIES, help="which are built")
    add_side(parser)
    arguments = parser.parse_args()
    build_bundles(arguments.checkpoint, arguments.out, square(arguments.side), arguments.variants)


if __name__ == "__main__":
    exit_on_user_error(main)
