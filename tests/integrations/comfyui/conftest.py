"""Bundles for the nodes, and a ComfyUI that has them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from .process import ComfyUI, comfyui
from .workflows import Info


@pytest.fixture(scope="session")
def bundles(tiny_bundle: Path, batched_bundle: Path, var_editing_bundle: Path) -> dict[str, Path]:
    """By name: "demo", that of the example workflows, draws several images in a pass, "classes" draws classes of them.
    All but "plain" have an image encoder.
    """
    return {"demo": batched_bundle, "classes": var_editing_bundle, "plain": tiny_bundle}


@pytest.fixture(scope="session")
def server(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUI]:
    """A running ComfyUI; for tests that are marked `needs_comfyui`."""
    base = tmp_path_factory.mktemp("comfyui")
    with comfyui(base, bundles) as found:
        photo(hole=True).save(base / "input" / "example.png")  # the picture that ComfyUI brings, with a mask painted
        yield found


@pytest.fixture(scope="session")
def infos(server: ComfyUI) -> dict[str, Info]:
    return server.infos()


def photo(width: int = 256, height: int = 256, hole: bool = False, turned: bool = False) -> Image.Image:
    """A picture; with a hole, where it is transparent, as ComfyUI's mask editor leaves it."""
    grey = Image.linear_gradient("L").resize((width, height))
    colours = Image.merge("RGB", (grey, grey.rotate(90 if width == height else 180), grey.rotate(180)))
    if turned:
        colours = colours.transpose(Image.Transpose.ROTATE_90)
    if hole:
        alpha = Image.new("L", (width, height), 255)
        alpha.paste(0, (width // 4, height // 4, 3 * width // 4, 3 * height // 4))
        colours.putalpha(alpha)
    return colours
