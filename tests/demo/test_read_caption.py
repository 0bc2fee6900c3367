import numpy as np
import pytest

from demo.read_caption import read_caption
from demo.scenes import RICH, SIMPLE, World, caption, sample_scene


@pytest.mark.parametrize("world", [SIMPLE, RICH], ids=["simple", "rich"])
def test_every_phrasing_leads_back_to_its_scene(world: World):
    rng = np.random.default_rng(0)
    for _ in range(2000):
        scene = sample_scene(rng, world)
        text = caption(scene, rng)
        assert read_caption(text) == scene, text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat",
        "a red circle on a pink background",
        "a red circle on a white background",
        "a red circle in the centre on a white background",
        "in the centre on a white background",
        "a red circle above a blue square in the centre on a white background",
    ],
)
def test_other_texts(text: str):
    with pytest.raises(ValueError, match="no caption"):
        read_caption(text)
