from demo.bundles import CHECKPOINT
from demo.measuring.lossy import DEPTH, OPTIONS
from fastvar.export.checkpoints.checkpoint import load_checkpoint


def test_the_options_are_those_of_the_shipped_model():
    assert load_checkpoint(CHECKPOINT).transformer.depth == DEPTH
    assert {option.policy.stop_layer for option in OPTIONS.values() if option.policy.rules} == {DEPTH}
