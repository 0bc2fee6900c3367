"""What 16 bits and 8-bit weights cost in quality: the demo drawn in every precision, scored, and compared with fp32.

`python -m demo.measuring.precisions`. No library runs bfloat16 graphs without a GPU: the bundles built for one draw
here from their own weights through the step modules themselves. fp32 and fp16 are engines on onnxruntime.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import fastvar
from demo.bundles import CHECKPOINT, OUT, SAMPLING, SIZE, exit_on_user_error
from demo.measuring.score import evaluate
from fastvar import Pipeline
from fastvar.doctor import examine
from fastvar.engines.bundle.bundle import Bundle
from fastvar.export.checkpoints.checkpoint import load_checkpoint
from fastvar.export.module_backend import ModuleBackend
from fastvar.export.options import BuildOptions

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "demo-256x256-precisions.json"
FP32 = BuildOptions(size=SIZE, guidance="on", sampling=SAMPLING)
BF16 = FP32.changed(backend="tensorrt-rtx", target="sm89")
BUILDS = {
    "fp32": FP32,
    "fp16": FP32.changed(precision="fp16"),
    "bf16": BF16,
    "bf16, int8 weights": BF16.changed(weights="int8"),
    "bf16, fp8 weights": BF16.changed(weights="fp8"),
}


def load(name: str, text_encoder: Any, out: Path) -> Pipeline:
    """Build the demo in a precision, and open it on what runs it without a GPU."""
    path = out / f"precision-{name.replace(', ', '-').replace(' ', '-')}"
    fastvar.build(CHECKPOINT, out=path, options=BUILDS[name])
    bundle = Bundle.open(path)
    on_modules = bundle.manifest.backend != "onnxruntime"
    return Pipeline(bundle, backend=ModuleBackend(bundle.manifest, text_encoder) if on_modules else None)


def table(result: dict[str, Any]) -> Table:
    """One row per precision."""
    shown = Table("precision", "accuracy", "PSNR to fp32, dB", "SSIM to fp32", "equal images")
    for column in shown.columns[1:]:
        column.justify = "right"
    for name, shares in result["accuracy"].items():
        alike = result["likeness"].get(name)
        cells = (
            (f"{alike['psnr_db_median']:.1f}", f"{alike['ssim_mean']:.3f}", str(alike["identical"])) if alike else ()
        )
        shown.add_row(name, f"{shares['overall']:.3f}", *cells)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="number of held-out captions")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes, and of the first image")
    parser.add_argument("--json", type=Path, default=RESULT, help="where the figures go")
    arguments = parser.parse_args()
    text_encoder = load_checkpoint(CHECKPOINT).text_encoder
    pipes = {name: load(name, text_encoder, OUT) for name in BUILDS}
    result = evaluate(pipes, arguments.count, arguments.seed)
    Console().print(table(result))
    facts = examine()
    result["machine"] = {key: facts[key] for key in ("cpu", "cpu_cores", "python", "packages")}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {arguments.json}")


if __name__ == "__main__":
    exit_on_user_error(main)
