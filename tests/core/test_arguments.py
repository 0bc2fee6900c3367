from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from fastvar.core.arguments import byte_count, callback, flag, number, seconds, whole
from fastvar.errors import InputError, PlanError


@pytest.mark.parametrize(
    ("given", "found"),
    [(4, 4), (0.5, 0.5), (np.float32(0.5), 0.5), (np.int8(4), 4), (np.array(0.5), 0.5), (Fraction(1, 2), 0.5)],
)
def test_numbers_become_plain(given: object, found: float):
    assert (number("tau", given), type(number("tau", given))) == (found, type(found))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("4", "tau '4' is text"),
        (True, "tau True is a bool"),
        (np.True_, "is a bool"),
        (None, "tau None is a NoneType"),
        ([4], r"tau \[4\] is a list"),
        (np.array([4.0]), r"tau array\(\[4\.\]\) is a ndarray"),
        (1j, "tau 1j is a complex"),
        (Decimal(4), "is a Decimal"),
        (10**400, "tau is out of range"),
        (list(range(1000)), r"tau \[0, 1, 2, 3, 4, 5, \.\.\.\] is a list"),
    ],
)
def test_what_is_no_number(given: object, named: str):
    with pytest.raises(InputError, match=named) as error:
        number("tau", given)
    assert "number" in error.value.expected


@pytest.mark.parametrize("given", [1, 4, np.int64(2), np.uint8(3), np.array(2)])
def test_whole_numbers_become_plain(given: object):
    assert type(whole("num_images", given, 1, 4)) is int
    assert whole("num_images", given, 1, 4) == given


@pytest.mark.parametrize("given", [0, 5, 2.0, np.float64(2), "2", True, None, [2], math.nan])
def test_what_is_no_whole_number_in_range(given: object):
    with pytest.raises(InputError, match=r"num_images .* is out of range") as error:
        whole("num_images", given, 1, 4)
    assert error.value.expected == "a whole number from 1 to 4"


def test_seconds():
    assert [seconds("timeout", given) for given in (None, 0, 2, np.float32(1), math.inf)] == [None, 0, 2, 1, math.inf]
    for wrong in (-1, math.nan, "2", True, [2]):
        with pytest.raises(InputError, match=r"^timeout "):
            seconds("timeout", wrong)


def test_amounts_of_memory():
    assert [byte_count("memory_budget", given) for given in ("1KiB", 7, np.int64(9))] == [1024, 7, 9]
    for wrong in (0, -1, 1.5, True, [1], b"1KiB", "much", None):
        with pytest.raises(PlanError, match="memory"):
            byte_count("memory_budget", wrong)


def test_numbers_that_python_does_not_write():
    with pytest.raises(InputError, match="tau is out of range"):
        number("tau", 10**5000)
    with pytest.raises(InputError, match="threads of thousands of digits is out of range"):
        whole("threads", 10**5000, 1, 4)


def test_flags():
    assert (flag("composite", True), flag("composite", np.False_)) == (True, False)
    for wrong in ("no", 0, None, []):
        with pytest.raises(InputError, match=r"^composite ") as error:
            flag("composite", wrong)
        assert error.value.expected == "True or False"


def test_callbacks():
    assert (callback("listener", None), callback("listener", print)) == (None, print)
    with pytest.raises(InputError, match="listener 'print' cannot be called"):
        callback("listener", "print")
