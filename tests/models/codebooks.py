"""Codebooks as the runtime knows them, of tensors by their official names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.torch import load_file  # which knows 8-bit floats

from fastvar.runtime.editing.codebook import Codebook

RECORDED = Path(__file__).parents[1] / "golden/var_tiny"


def codebook_of(state: Mapping[str, np.ndarray]) -> Codebook:
    """From tensors without the tokenizer's prefix."""
    phis = {
        i: tuple(state[f"quant_resi.qresi_ls.{i}.{kind}"].astype(np.float64) for kind in ("weight", "bias"))
        for i in range(4)
    }
    return Codebook(state["embedding.weight"].astype(np.float64), phis, 0.5)


def recorded_codebook() -> Codebook:
    """That of the recorded VAR run."""
    stored = load_file(RECORDED / "weights_vae.safetensors")
    prefix = "quantize."
    return codebook_of({n.removeprefix(prefix): t.float().numpy() for n, t in stored.items() if n.startswith(prefix)})
