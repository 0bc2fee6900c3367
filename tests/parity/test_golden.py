"""A recorded run of the published pruned program, in the repository; `python -m tests.parity` takes whole folders."""

from contextlib import closing
from pathlib import Path

import pytest

from tests.parity.comparison import Comparison
from tests.parity.folders import compare_folder

FOLDER = Path(__file__).parents[1] / "golden" / "infinity_tiny"


def check(comparison: Comparison) -> None:
    assert len(comparison.errors) > 30
    assert comparison.checked_sets == 12  # three layers and sub-layers by sums, layer 3 as sets besides
    assert comparison.failures == []
    assert max(comparison.errors.values()) < 2e-5


def test_the_reference_reproduces_a_recorded_run():
    with closing(compare_folder(FOLDER)) as comparisons:
        first = next(comparisons)
    assert first.title.endswith(": torch reference")
    check(first)


@pytest.mark.slow
def test_reference_and_engines_reproduce_it():
    comparisons = list(compare_folder(FOLDER))
    assert [c.title.split(": ")[1] for c in comparisons] == ["torch reference", "onnxruntime engines"]
    for comparison in comparisons:
        check(comparison)
