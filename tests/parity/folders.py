"""Every comparison that a folder of recorded runs allows, of whichever family its files are."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.parity.comparison import Comparison
from tests.parity.hart import compare_hart_folder
from tests.parity.hart_engines import compare_hart_engines
from tests.parity.image_tokenizer import compare_coder_engines, compare_decoder_stages, compare_image_tokenizer
from tests.parity.infinity import checkpoint_of, compare_engines, compare_reference, load_runs
from tests.parity.var import compare_var_folder
from tests.parity.var_engines import compare_var_engines


def compare_folder(folder: Path, backend: str = "onnxruntime") -> Iterator[Comparison]:
    """The torch references first, then engines of a backend."""
    manifest = json.loads((folder / "manifest.json").read_text()) if (folder / "manifest.json").exists() else {}
    with tempfile.TemporaryDirectory() as cache:
        if (folder / "weights_var.safetensors").exists():
            yield from compare_var_folder(folder)
            yield from compare_var_engines(folder, backend, Path(cache))
        elif "cases" in manifest:
            yield from compare_hart_folder(folder)
            yield from compare_hart_engines(folder, backend, Path(cache))
        else:
            yield from _compare_infinity(folder, backend, Path(cache))


@torch.no_grad()
def _compare_infinity(folder: Path, backend: str, cache: Path) -> Iterator[Comparison]:
    for run in load_runs(folder):
        yield compare_reference(run)
        yield compare_engines(run, checkpoint_of(run), backend, cache)
    if (folder / "vae.json").exists():
        yield compare_image_tokenizer(folder)
        yield compare_decoder_stages(folder)
        yield compare_coder_engines(folder, backend)
