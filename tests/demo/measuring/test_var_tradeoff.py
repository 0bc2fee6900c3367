"""What the comparison of pruning policies is made of; nothing is drawn here."""

import numpy as np
import pytest

from demo.draw_scene import render
from demo.measuring.var_tradeoff import COLUMNS, PUBLISHED, Drawn, markdown, policies
from demo.training.var.codec import CLASSES, class_scene
from fastvar.core.plan import make_plan
from fastvar.families.var import TRANSFORMERS


@pytest.mark.parametrize("name", PUBLISHED)
def test_policies_are_named_by_what_they_keep(name: str):
    model = TRANSFORMERS[name]
    found = policies(model.schedule, model.depth)
    plans = {key: make_plan(model.schedule, policy, model.depth) for key, policy in found.items()}
    shares = [step.kept / step.tokens for step in plans["keep 0.75, 0.5, 0.25"].steps[-3:]]
    assert shares == pytest.approx([0.75, 0.5, 0.25], abs=0.01)
    assert plans["keep 0.75, 0.5, 0.25"].cached_size == model.schedule.sizes[-4]
    assert len(plans["last scale left out"].steps) == len(model.schedule) - 1
    guided = plans["keep 0.5, guidance off at the last scale"]
    assert [step.guided for step in guided.steps[-2:]] == [True, False]
    later = found["keep 0.5, 0.25 from layer 2"]
    assert [later.prunes(layer) for layer in (1, 2, model.depth - 1)] == [False, True, True]


def test_a_policy_is_compared_image_by_image():
    rng = np.random.default_rng(0)
    images = [render(class_scene(label, rng)) for label in (0, 1, 2)]
    dense, pruned = Drawn(), Drawn()
    for i, image in enumerate(images):
        dense.add(image, image, min(i, 1), 10.0)  # the third shows another class
        pruned.add(images[0], image, min(i, 1), 5.0)  # always draws the first
    found = pruned.summary(dense)
    assert (found["accuracy"], found["lost"], found["won"]) == (pytest.approx(1 / 3), 1, 0)
    assert found["color_accuracy"] == 1.0  # all three are red
    assert found["times_dense"] == 2.0
    assert found["ssim_mean"] < 1
    assert dense.summary(dense)["psnr_db_median"] is None
    result = {
        "policies": {"dense": {**dense.summary(dense), "flop": 1.0}},
        "published_flop": {name: {"dense": 1.0} for name in PUBLISHED},
    }
    assert markdown(result).splitlines()[2].count("|") == len(COLUMNS) + 1
    assert len(CLASSES) == 18
