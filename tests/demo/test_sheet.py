from demo.scenes import held_out_scenes, is_held_out
from demo.sheet import held_out_captions, prompt_times
from fastvar.runtime.output import ImageTimings, ScaleTiming


def test_captions_are_of_scenes_never_trained_on():
    assert all(is_held_out(scene) for scene in held_out_scenes(9, seed=3))
    assert held_out_captions(9, seed=3) == held_out_captions(9, seed=3)


def test_the_time_of_a_prompt_is_the_median_of_its_own_runs():
    def timing(ms: float) -> ImageTimings:
        return ImageTimings(1.0, (ScaleTiming(0, (1, 1), 1, 1, ms),), 2.0)

    runs = {"dense": [timing(ms) for ms in (10, 20, 11, 21, 90, 22)], "fastvar": [timing(5)] * 6}
    assert prompt_times(runs, 2) == [(14.0, 8.0), (24.0, 8.0)]
