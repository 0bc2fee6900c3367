"""The order in which choices are tried, and what is said where none fits."""

from __future__ import annotations

import pytest

from fastvar.profiling.estimates.fitting import Change, Choice, Fit, Limits, choices, first_fit, smallest_change
from fastvar.profiling.estimates.memory_plan import MemoryPlan
from fastvar.runtime.memory.fit import DeviceNeed

ALL = Limits(text_encoder=True, quantised_weights=True, latent_rows=64)


def plan_of(choice: Choice) -> MemoryPlan:
    """100 bytes; a tile saves as many as it is smaller than 64, the encoder 100 more, 8-bit weights 1000."""
    total = 2000 - (64 - (choice.decoder_tile or 64)) - 100 * choice.offload_text_encoder
    return MemoryPlan(2, DeviceNeed(total - 1000 * (choice.weights == "int8"), 0), ())


def test_cheaper_choices_come_first():
    order = list(choices(Choice(), ALL))
    assert order[:5] == [Choice(), Choice(32), Choice(16), Choice(8), Choice(None, True)]
    assert order[8] == Choice(None, False, "int8")
    assert order[-1] == Choice(8, True, "int8")
    assert len(order) == len(set(order)) == 16


def test_what_was_asked_for_is_never_taken_back():
    order = list(choices(Choice(16, True, "fp8"), ALL))
    assert order == [Choice(16, True, "fp8"), Choice(8, True, "fp8")]


def test_what_a_model_does_not_have_is_not_tried():
    limits = Limits(text_encoder=False, quantised_weights=False, latent_rows=16)
    assert list(choices(Choice(), limits)) == [Choice(), Choice(8)]


@pytest.mark.parametrize(
    ("budget", "choice"),
    [
        (2000, Choice()),
        (1999, Choice(32)),
        (1950, Choice(8)),
        (1940, Choice(None, True)),
        (1860, Choice(16, True)),
        (1840, Choice(None, False, "int8")),
        (844, Choice(8, True, "int8")),
    ],
)
def test_the_first_that_fits_is_chosen(budget: int, choice: Choice):
    fit = first_fit(plan_of, Choice(), ALL, budget)
    assert fit == Fit(choice, plan_of(choice))


def test_nothing_fits():
    assert first_fit(plan_of, Choice(), ALL, 843) is None


def test_what_cannot_fit_is_planned_once():
    asked: list[Choice] = []

    def counting(choice: Choice) -> MemoryPlan:
        asked.append(choice)
        return plan_of(choice)

    first_fit(counting, Choice(), ALL, 1)
    assert asked == [Choice(8, True, "int8")]


def test_the_smallest_change_is_the_first_under_which_something_fits():
    def half(choice: Choice) -> MemoryPlan:
        return MemoryPlan(2, DeviceNeed(plan_of(choice).need.total_bytes // 2, 0), ())

    changes = [Change("none", plan_of, ALL), Change("half", half, ALL), Change("never asked", plan_of, ALL)]
    found = smallest_change(iter(changes), Choice(), 500)
    assert found is not None
    assert (found[0].what, found[1].choice) == ("half", Choice(None, False, "int8"))
    assert smallest_change(changes, Choice(), 1) is None


def test_choices_in_words_and_options():
    chosen = Choice(16, True, "int8")
    assert chosen.build_options() == ["--decoder-tile 16", "--weights int8"]
    assert chosen.load_options() == ["--offload-text-encoder"]
    assert len(chosen.differences(Choice())) == 3
    assert chosen.differences(Choice(16, True, "int8")) == []
