"""What the sheet of class-conditional editing shows; nothing is drawn here."""

import numpy as np
import pytest

from demo.draw_scene import render
from demo.measuring.inpaint_var import CHANGES, build, label_of
from demo.training.var.codec import CLASSES, read_class
from fastvar.errors import CheckpointError


def test_every_change_is_of_one_class_into_another():
    for shown in CHANGES:
        before, after = (read_class(render(scene)) for scene in (shown.scene, shown.wanted))
        assert (before != after, after) == (True, label_of(shown))
        changed = (render(shown.scene) != render(shown.wanted)).any(-1)
        assert changed.any()
        assert (np.asarray(shown.mask)[changed] == 255).all(), "the mask takes all that changes"
    assert len({label_of(shown) for shown in CHANGES}) == len(CHANGES) < len(CLASSES)


def test_without_a_trained_model_it_says_how_to_get_one(tmp_path):
    with pytest.raises(CheckpointError, match="no transformer in") as error:
        build(tmp_path)
    assert "demo.training.var" in error.value.fix
