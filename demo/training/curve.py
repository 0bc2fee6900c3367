"""The curve of a training: a CSV with a row every so many steps, which a resumed run continues without a gap."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


class Curve:
    """Collects values step by step, and writes their means. Rows behind the step that a run resumes at are dropped."""

    def __init__(self, file: Path, columns: Sequence[str], step: int) -> None:
        self.file, self.columns = file, ("step", "cpu_s", *columns)
        self.values: dict[str, list[float]] = {}
        rows = [row for row in read(file) if int(row["step"]) <= step] if file.exists() else []
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", newline="") as f:
            writer = csv.DictWriter(f, self.columns, restval="")
            writer.writeheader()
            writer.writerows({name: row.get(name, "") for name in self.columns} for row in rows)

    def add(self, values: Mapping[str, float]) -> None:
        """Values of one step; a column may be missing."""
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def write(self, step: int, cpu_s: float) -> str:
        """Append the means since the last row; returns them as a line to print."""
        means = {name: f"{np.mean(self.values[name]):.4f}" for name in self.columns if name in self.values}
        self.values = {}
        with self.file.open("a", newline="") as f:
            csv.DictWriter(f, self.columns, restval="").writerow({"step": step, "cpu_s": f"{cpu_s:.0f}", **means})
        return f"step {step} {cpu_s:.0f} s " + " ".join(f"{name} {value}" for name, value in means.items())


def read(file: Path) -> list[dict[str, str]]:
    """The rows of a curve."""
    with file.open(newline="") as f:
        return list(csv.DictReader(f))
