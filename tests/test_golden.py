"""A recorded run of the published pruned program, in the repository; `python -m tests.parity` takes whole folders."""

from pathlib import Path

import pytest

from tests.comparison import Comparison
from tests.parity import compare_folder

FOLDER = Path(__file__).parent / "golden" / "infinity_tiny"


@pytest.fixture(scope="module")
def comparisons() -> list[Comparison]:
    return list(compare_folder(FOLDER))


def test_reference_and_engines_were_both_compared(comparisons: list[Comparison]):
    assert [c.title.split(": ")[1] for c in comparisons] == ["torch reference", "onnxruntime engines"]
    for comparison in comparisons:
        assert len(comparison.errors) > 30
        assert comparison.checked_sets == 12  # three layers and sub-layers by sums, layer 3 as sets besides


@pytest.mark.parametrize("side", [0, 1], ids=["reference", "engines"])
def test_recorded_run_is_reproduced(comparisons: list[Comparison], side: int):
    assert comparisons[side].failures == []
    assert max(comparisons[side].errors.values()) < 2e-5
