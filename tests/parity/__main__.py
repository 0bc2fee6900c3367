"""`python -m tests.parity FOLDER`: recorded runs of the published programs against torch references and engines."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from tests.parity.comparison import Comparison
from tests.parity.folders import compare_folder


def show(console: Console, result: Comparison) -> None:
    names = list(dict.fromkeys(name for _, name in result.errors))
    table = Table("scale", *names, title=result.title, title_justify="left")
    for scale in dict.fromkeys(scale for scale, _ in result.errors):
        cells = [f"{result.errors[scale, n]:.1e}" if (scale, n) in result.errors else "" for n in names]
        table.add_row(scale, *cells)
    console.print(table)
    verdict = "[green]ok[/green]" if not result.failures else f"[red]{len(result.failures)} failures[/red]"
    console.print(f"{verdict}: largest {max(result.errors.values()):.1e}, {result.checked_sets} sets compared\n")
    for failure in result.failures[:10]:
        console.print(f"  {failure}", style="red")


def main(folder: Path, backend: str = "onnxruntime") -> None:
    """Compare the torch reference and the chained engines with every recorded run in FOLDER."""
    console = Console(width=150)
    results = []
    for result in compare_folder(folder, backend):
        show(console, result)
        results.append(result)
    if not results:
        raise SystemExit(f"{folder} holds no recorded run")
    failed = [r.title for r in results if r.failures]
    console.print(f"{len(results) - len(failed)} of {len(results)} comparisons within tolerance")
    raise typer.Exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
