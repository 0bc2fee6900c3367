"""What a search found, to be read and to be used again: table, JSON record, plot, and a policy file for each member."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.table import Table

from ..engines.bundle import Bundle
from ..errors import InputError
from ..plan import policy_to_json, policy_to_toml
from .charts import Point, scatter
from .environment import environment
from .figures import pixels
from .tune import Trial, Tuning
from .tune_images import TuningSetup

BEST = "best.toml"
FRONT_FOLDER = "front"


def write_all(
    tuning: Tuning, bundle: Bundle, setup: TuningSetup, out: Path, *, data: Path | None = None, plot: Path | None = None
) -> list[Path]:
    """Write the JSON record, the plot, a TOML file for each member of the front, and one for the best.

    Args:
        out: folder of it all; `data` and `plot` may lie elsewhere.

    Raises:
        InputError: a file cannot be written.
    """
    title = f"{bundle.manifest.model}, {pixels(bundle.manifest.plan.schedule.pixels)}: pruning policies"
    written = [write_json(data or out / "tune.json", record(tuning, bundle, setup))]
    written.append(write_text(plot or out / "tune.svg", front_plot(tuning, title)))
    return [*written, *write_policies(tuning, out)]


def record(tuning: Tuning, bundle: Bundle, setup: TuningSetup) -> dict[str, Any]:
    """Every trial and what it was made on, ready for json.dumps; an infinite PSNR, that of equal images, is None."""
    return {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": bundle.manifest.model,
        "checkpoint_digest": bundle.manifest.checkpoint_digest,
        "environment": environment(bundle.manifest),
        "sampling": vars(bundle.manifest.sampling),
        "subject": vars(setup),
        "reference": tuning.reference.name,
        "constraints": vars(tuning.constraints),
        "best": tuning.best.policy.name,
        "front": [trial.policy.name for trial in tuning.front],
        "trials": [_trial(trial) for trial in tuning.trials],
    }


def _trial(trial: Trial) -> dict[str, Any]:
    timing = trial.timing
    return {
        "policy": policy_to_json(trial.policy),
        "forwarded_share": trial.share,
        "psnr_db": _finite(trial.quality.psnr_db),
        "ssim": trial.quality.ssim,
        "accuracy": trial.quality.accuracy,
        "timing": None if timing is None else {**vars(timing), "ratio": timing.ratio},
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def front_table(tuning: Tuning) -> Table:
    """The front, the fastest first."""
    scored = tuning.dense.quality.accuracy is not None
    table = Table(caption="times faster: all scales, drawn in turn with dense; tokens: forwarded, against dense")
    table.add_column("policy", overflow="fold")
    for heading in ("times faster", "tokens", "PSNR, dB", "SSIM", *(("accuracy",) if scored else ())):
        table.add_column(heading, justify="right")
    for trial in tuning.front:
        table.add_row(*_cells(trial), style="bold" if trial is tuning.best else None)
    return table


def _cells(trial: Trial) -> list[str]:
    quality = trial.quality
    psnr = "equal" if math.isinf(quality.psnr_db) else f"{quality.psnr_db:.1f}"
    cells = [trial.policy.name, f"{1 / trial.ratio:.2f}", f"{trial.share:.2f}", psnr]
    return [*cells, f"{quality.ssim:.3f}", *([] if quality.accuracy is None else [f"{quality.accuracy:.3f}"])]


def best_line(tuning: Tuning) -> str:
    """The best policy in one line."""
    best, dense = tuning.best, tuning.dense
    if best is dense:
        return "best: dense; no faster policy meets the constraints"
    told = f"best: {best.policy.name}, {1 / best.ratio:.2f} times as fast as dense, {_told(best)}"
    if best.quality.accuracy is None:
        return told
    return f"{told}, accuracy {best.quality.accuracy:.3f} (dense {dense.quality.accuracy:.3f})"


def _told(trial: Trial) -> str:
    psnr = "equal images" if math.isinf(trial.quality.psnr_db) else f"PSNR {trial.quality.psnr_db:.1f} dB"
    return f"{psnr}, SSIM {trial.quality.ssim:.3f}"


def front_plot(tuning: Tuning, title: str) -> str:
    """SVG: PSNR over time, of everything that was timed. Equal images have no PSNR to show."""
    on_front = {id(trial) for trial in tuning.front}
    shown = [trial for trial in tuning.timed if math.isfinite(trial.quality.psnr_db)]
    named = {id(tuning.best), *(id(trial) for trial in shown if trial.policy == tuning.reference)}
    points = [
        Point(
            trial.ratio,
            trial.quality.psnr_db,
            trial.policy.name,
            on_front=id(trial) in on_front,
            named=id(trial) in named,
        )
        for trial in shown
    ]
    if not points:
        raise InputError("every policy drew the dense images", fix="draw more images")
    judged = "time, PSNR, SSIM" if tuning.dense.quality.accuracy is None else "time, PSNR, SSIM, accuracy"
    legend = (f"beaten by none in {judged}", "beaten by another")
    return scatter(title, "time of all scales, dense = 1", "PSNR against dense, dB (median)", points, legend)


def write_policies(tuning: Tuning, folder: Path) -> list[Path]:
    """A TOML file for each member of the front, and one for the best.

    Raises:
        InputError: the folder cannot be written.
    """
    texts = {f"{FRONT_FOLDER}/{trial.policy.name}.toml": _toml(tuning, trial) for trial in tuning.front}
    texts[BEST] = _toml(tuning, tuning.best)
    return [write_text(folder / name, text) for name, text in texts.items()]


def _toml(tuning: Tuning, trial: Trial) -> str:
    told = f"{trial.policy.name}: {trial.ratio:.2f} of the dense time, {_told(trial)}"
    return f"# {told}\n{policy_to_toml(trial.policy)}"


def write_json(path: Path, data: dict[str, Any]) -> Path:
    return write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> Path:
    """Write a file and the folders it lies in.

    Raises:
        InputError: it cannot be written.
    """
    make_folder(path.parent)
    with _writing(path):
        path.write_text(text, encoding="utf-8")
    return path


def make_folder(path: Path) -> None:
    """The folder and those it lies in, where they are not there.

    Raises:
        InputError: it cannot be made.
    """
    with _writing(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}", fix="check the path and its permissions") from error
