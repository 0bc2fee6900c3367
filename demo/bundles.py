"""The demo checkpoint as two bundles, dense and pruned, built where they are missing or out of date."""

from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import fastvar
from fastvar.engines.bundle import Bundle
from fastvar.engines.manifest import SamplingDefaults
from fastvar.errors import BundleError, CheckpointError

ROOT = Path(__file__).parent
CHECKPOINT = ROOT / "checkpoint"
OUT = ROOT / "out"
SIZE = "256x256"
POLICIES = ("dense", "fastvar")
SAMPLING = SamplingDefaults(guidance_scale=3.0, tau=0.5, top_p=0.97)  # tuned on captions outside the scored ones


def build_bundles(out: Path = OUT, *, only_missing: bool = False) -> dict[str, Path]:
    """Build the demo checkpoint for every policy; returns policy -> bundle folder.

    Args:
        only_missing: keep a bundle that is there and whole.

    Raises:
        FastvarError: the checkpoint is missing or damaged, or the folder cannot be written.
    """
    paths = {policy: out / policy for policy in POLICIES}
    for policy, path in paths.items():
        if not (only_missing and _is_whole(path)):
            _build(policy, path)
    return paths


def _is_whole(path: Path) -> bool:
    try:
        Bundle.open(path)
    except BundleError:
        return False
    return True


def _build(policy: str, path: Path) -> None:
    if not (CHECKPOINT / "transformer.pth").is_file():
        raise CheckpointError(
            f"no demo transformer in {CHECKPOINT}", expected="transformer.pth", fix="train it with `make train-demo`"
        )
    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(f"building {policy}", total=None)

        def report(what: str, done: int, total: int) -> None:
            progress.update(task, description=f"{policy}: {what}", completed=done, total=total)

        built = fastvar.build(CHECKPOINT, size=SIZE, policy=policy, out=path, sampling=SAMPLING, progress=report)
    counts = f"{built.graphs_traced} graphs exported, {built.graphs_cached} from the cache"
    print(f"built {path} in {built.seconds:.1f} s: {counts}, engines {built.engine_bytes / 2**20:.1f} MiB")
