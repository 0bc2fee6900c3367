"""The order in which choices are tried, and what is said where none fits."""

from __future__ import annotations

import pytest

from fastvar.profiling.estimates.fitting import Change, Fit, Limits, MemoryOptions, choices, first_fit, smallest_change
from fastvar.profiling.estimates.memory_plan import MemoryPlan
from fastvar.runtime.memory.fit import DeviceNeed

ALL = Limits(text_encoder=True, quantised_weights=True, latent_rows=64)


def plan_of(choice: MemoryOptions) -> MemoryPlan:
    """100 bytes; a tile saves as many as it is smaller than 64, the encoder 100 more, 8-bit weights 1000."""
    total = 2000 - (64 - (choice.decoder_tile or 64)) - 100 * choice.offload_text_encoder
    return MemoryPlan(2, DeviceNeed(total - 1000 * (choice.weights == "int8"), 0), ())


def test_cheaper_choices_come_first():
    order = list(choices(MemoryOptions(), ALL))
    assert order[:5] == [
        MemoryOptions(),
        MemoryOptions(32),
        MemoryOptions(16),
        MemoryOptions(8),
        MemoryOptions(None, True),
    ]
    assert order[8] == MemoryOptions(None, False, "int8")
    assert order[-1] == MemoryOptions(8, True, "int8")
    assert len(order) == len(set(order)) == 16


def test_what_was_asked_for_is_never_taken_back():
    order = list(choices(MemoryOptions(16, True, "fp8"), ALL))
    assert order == [MemoryOptions(16, True, "fp8"), MemoryOptions(8, True, "fp8")]


def test_what_a_model_does_not_have_is_not_tried():
    limits = Limits(text_encoder=False, quantised_weights=False, latent_rows=16)
    assert list(choices(MemoryOptions(), limits)) == [MemoryOptions(), MemoryOptions(8)]


@pytest.mark.parametrize(
    ("budget", "choice"),
    [
        (2000, MemoryOptions()),
        (1999, MemoryOptions(32)),
        (1950, MemoryOptions(8)),
        (1940, MemoryOptions(None, True)),
        (1860, MemoryOptions(16, True)),
        (1840, MemoryOptions(None, False, "int8")),
        (844, MemoryOptions(8, True, "int8")),
    ],
)
def test_the_first_that_fits_is_chosen(budget: int, choice: MemoryOptions):
    fit = first_fit(plan_of, MemoryOptions(), ALL, budget)
    assert fit == Fit(choice, plan_of(choice))


def test_nothing_fits():
    assert first_fit(plan_of, MemoryOptions(), ALL, 843) is None


def test_what_cannot_fit_is_planned_once():
    asked: list[MemoryOptions] = []

    def counting(choice: MemoryOptions) -> MemoryPlan:
        asked.append(choice)
        return plan_of(choice)

    first_fit(counting, MemoryOptions(), ALL, 1)
    assert asked == [MemoryOptions(8, True, "int8")]


def test_the_smallest_change_is_the_first_under_which_something_fits():
    def half(choice: MemoryOptions) -> MemoryPlan:
        return MemoryPlan(2, DeviceNeed(plan_of(choice).need.total_bytes // 2, 0), ())

    changes = [Change("none", plan_of, ALL), Change("half", half, ALL), Change("never asked", plan_of, ALL)]
    found = smallest_change(iter(changes), MemoryOptions(), 500)
    assert found is not None
    assert (found[0].what, found[1].choice) == ("half", MemoryOptions(None, False, "int8"))
    assert smallest_change(changes, MemoryOptions(), 1) is None


def test_choices_in_words_and_options():
    chosen = MemoryOptions(16, True, "int8")
    assert chosen.build_options() == ["--decoder-tile 16", "--weights int8"]
    assert chosen.load_options() == ["--offload-text-encoder"]
    assert len(chosen.differences(MemoryOptions())) == 3
    assert chosen.differences(MemoryOptions(16, True, "int8")) == []
