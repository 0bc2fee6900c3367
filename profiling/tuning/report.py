"""The results of a policy search: table, JSON record, plot, and a policy file for each member of the front."""

from __future__ import annotations

import math
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.table import Table

from ...core.files import write_json, write_text
from ...core.policy import policy_to_json, policy_to_toml
from ...engines.bundle.bundle import Bundle
from ...engines.bundle.manifest import Manifest
from ...errors import InputError
from ..environment import environment
from ..formatting import pixels
from ..report.columns import Column, text_table
from .charts import Point, scatter
from .search import Trial, Tuning
from .trials import TuningSetup

BEST = "best.toml"
FRONT_FOLDER = "front"


def write_all(
    tuning: Tuning, bundle: Bundle, setup: TuningSetup, out: Path, *, data: Path | None = None, plot: Path | None = None
) -> list[Path]:
    """Write the JSON record, the plot, a TOML file for each member of the front, and one for the best policy.

    Args:
        out: folder of all files; `data` and `plot` are other paths of the record and the plot.

    Raises:
        InputError: a file cannot be written.
    """
    title = f"{bundle.manifest.model}, {pixels(bundle.manifest.plan.schedule.pixels)}: pruning policies"
    written = [write_json(data or out / "tune.json", record(tuning, bundle, setup))]
    written.append(write_text(plot or out / "tune.svg", front_plot(tuning, title)))
    return [*written, *write_policies(tuning, out)]


def record(tuning: Tuning, bundle: Bundle, setup: TuningSetup) -> dict[str, Any]:
    """All trials, the set-up and the machine, ready for json.dumps. The PSNR of equal images is None."""
    return {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": bundle.manifest.model,
        "checkpoint_digest": bundle.manifest.checkpoint_digest,
        "environment": environment(bundle.manifest),
        "sampling": vars(bundle.manifest.sampling),
        "subject": vars(setup),
        "batch": 1,
        "batches_of_bundle": batches_of(bundle.manifest),
        "reference": tuning.reference.name,
        "constraints": vars(tuning.constraints),
        "best": tuning.best.policy.name,
        "front": [trial.policy.name for trial in tuning.front],
        "trials": [_trial(trial) for trial in tuning.trials],
    }


def batches_of(manifest: Manifest) -> list[int]:
    """How many images the passes of a bundle draw, in rising order."""
    return sorted({own.images for own in manifest.sets})


def batch_line(manifest: Manifest) -> str | None:
    """Of a bundle with passes of several images, with which of them policies were tried."""
    batches = batches_of(manifest)
    if len(batches) == 1:
        return None
    told = ", ".join(map(str, batches))
    return f"tried with one image a pass, of the bundle's {told}: a policy keeps the same tokens of an image in each"


def _trial(trial: Trial) -> dict[str, Any]:
    timing, psnr_db = trial.timing, trial.quality.psnr_db
    return {
        "policy": policy_to_json(trial.policy),
        "forwarded_share": trial.share,
        **vars(trial.quality),
        "psnr_db": psnr_db if math.isfinite(psnr_db) else None,
        "timing": None if timing is None else {**vars(timing), "ratio": timing.ratio},
    }


def front_table(tuning: Tuning) -> Table:
    """The front, the fastest first."""
    scored = tuning.dense.quality.accuracy is not None
    columns = [
        Column("policy", "policy.name", justify="left", overflow="fold"),
        Column("times faster", lambda trial: 1 / trial.ratio, "{:.2f}".format),
        Column("tokens", "share", "{:.2f}".format),
        Column("PSNR, dB", "quality.psnr_db", lambda db: "equal" if math.isinf(db) else f"{db:.1f}"),
        Column("SSIM", "quality.ssim", "{:.3f}".format),
        *([Column("accuracy", "quality.accuracy", "{:.3f}".format)] if scored else []),
    ]
    caption = "times faster: all scales, drawn in turn with dense; tokens: forwarded, against dense"
    return text_table(columns, tuning.front, lambda trial: "bold" if trial is tuning.best else None, caption=caption)


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
    """SVG: PSNR over time of all timed trials but those with images equal to the dense ones.

    Raises:
        InputError: there are no others.
    """
    front, best = tuning.front, tuning.best
    points = [
        Point(t.ratio, t.quality.psnr_db, t.policy.name, t in front, named=t is best or t.policy == tuning.reference)
        for t in tuning.timed
        if math.isfinite(t.quality.psnr_db)
    ]
    if not points:
        raise InputError("every policy drew the dense images", fix="draw more images")
    judged = "time, PSNR, SSIM" if tuning.dense.quality.accuracy is None else "time, PSNR, SSIM, accuracy"
    legend = (f"beaten by none in {judged}", "beaten by another")
    return scatter(title, "time of all scales, dense = 1", "PSNR against dense, dB (median)", points, legend)


def write_policies(tuning: Tuning, folder: Path) -> list[Path]:
    """Write a TOML file for each member of the front, and one for the best policy.

    Raises:
        InputError: the folder cannot be written.
    """
    texts = {f"{FRONT_FOLDER}/{trial.policy.name}.toml": _toml(tuning, trial) for trial in tuning.front}
    texts[BEST] = _toml(tuning, tuning.best)
    return [write_text(folder / name, text) for name, text in texts.items()]


def _toml(tuning: Tuning, trial: Trial) -> str:
    told = f"{trial.policy.name}: {trial.ratio:.2f} of the dense time, {_told(trial)}"
    return f"# {told}\n{policy_to_toml(trial.policy)}"
