"""Bundles for the nodes: one that draws of texts, of several images in a pass, and one that draws classes."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def bundles(tiny_bundle: Path, batched_bundle: Path, var_editing_bundle: Path) -> dict[str, Path]:
    """By name; "demo" is that of the example workflows. All but "plain" have an image encoder."""
    return {"demo": batched_bundle, "classes": var_editing_bundle, "plain": tiny_bundle}
