import pytest

from demo.measuring.splits import TUNING_COUNT, scored_scenes, tuning_scenes
from demo.scenes import RICH, SIMPLE, World, held_out_scenes, is_held_out


@pytest.mark.parametrize("world", [SIMPLE, RICH], ids=["simple", "rich"])
def test_no_scene_is_scored_that_a_policy_was_chosen_on(world: World):
    tuned = tuning_scenes(world)
    assert tuned == held_out_scenes(TUNING_COUNT, 0, world)
    for seed in (0, 1):
        scored = scored_scenes(150, seed, world)
        assert len(set(scored)) == 150
        assert not set(scored) & set(tuned)
        assert all(is_held_out(scene) for scene in scored)
