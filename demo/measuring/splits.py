"""Which held-out scenes policies were chosen on, and which are left to score them by."""

from demo.scenes import SHIPPED, Scene, World, held_out_scenes

TUNING_COUNT, TUNING_SEED = 200, 0  # the preset of 256x256, fastvar-strong and `make tune-demo` were chosen on these


def tuning_scenes(world: World = SHIPPED) -> list[Scene]:
    """Held-out scenes that policies are chosen on."""
    return held_out_scenes(TUNING_COUNT, TUNING_SEED, world)


def scored_scenes(count: int, seed: int, world: World = SHIPPED) -> list[Scene]:
    """`count` different held-out scenes that no policy was chosen on."""
    seen = set(tuning_scenes(world))
    return [scene for scene in held_out_scenes(count + TUNING_COUNT, seed, world) if scene not in seen][:count]
