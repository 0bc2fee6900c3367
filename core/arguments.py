"""What a caller passes: numbers, flags and callbacks, checked in words and made plain Python before anything is drawn.

numpy's scalars count as numbers. True, False and text never do: "4" and True are mistakes, even where Python would
calculate with them.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, TypeVar

import numpy as np

from ..errors import InputError, PlanError
from .dtypes import parse_bytes

EXACT = 2**53  # up to here every whole number is a float
Called = TypeVar("Called", bound=Callable[..., Any])


def number(name: str, value: Any) -> float:
    """An int or a float; its range is the business of whoever asked.

    Raises:
        InputError: text, a truth value, a list, or something else that is no single number.
    """
    single = _single(value)
    if isinstance(single, bool) or not isinstance(single, Real):
        raise InputError(f"{name} {shown(value)} is {_kind(value)}", expected="a number")
    try:
        found = float(single)
    except OverflowError:
        raise InputError(f"{name} is out of range", expected="a number that is not astronomic") from None
    return int(single) if isinstance(single, Integral) and abs(found) < EXACT else found


def whole(name: str, value: Any, low: int, high: int) -> int:
    """An int from `low` to `high`, both included.

    Raises:
        InputError: no whole number, or one out of range.
    """
    single = _single(value)
    if isinstance(single, bool) or not isinstance(single, Integral) or not low <= int(single) <= high:
        raise InputError(f"{name} {shown(value)} is out of range", expected=f"a whole number from {low} to {high}")
    return int(single)


def byte_count(name: str, value: Any) -> int:
    """Bytes: a whole number of them, or text as "15GiB".

    Raises:
        PlanError: no amount of memory.
    """
    if isinstance(value, str):
        return parse_bytes(value)
    single = _single(value)
    if isinstance(single, bool) or not isinstance(single, Integral) or single < 1:
        raise PlanError(f"{name} {shown(value)} is no amount of memory", expected='"15GiB", or a whole number of bytes')
    return int(single)


def seconds(name: str, value: Any) -> float | None:
    """A time to wait; None stays None, infinity is allowed.

    Raises:
        InputError: no number, a negative one, or NaN.
    """
    if value is None:
        return None
    found = float(number(name, value))
    if math.isnan(found) or found < 0:
        raise InputError(f"{name} {shown(value)} is out of range", expected="seconds, 0 or more, or None")
    return found


def flag(name: str, value: Any) -> bool:
    """True or False.

    Raises:
        InputError: something else, which Python would take for true or false without a word: "no" is true.
    """
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{name} {shown(value)} is {_kind(value)}", expected="True or False")
    return bool(value)


def callback(name: str, value: Called | None) -> Called | None:
    """A function, or None.

    Raises:
        InputError: something that cannot be called.
    """
    if value is not None and not callable(value):
        raise InputError(f"{name} {shown(value)} cannot be called", expected="a function of one argument, or None")
    return value


def shown(value: Any) -> str:
    """How a value is written, without the middle where that is long."""
    try:
        return repr(value) if isinstance(value, Real) else reprlib.repr(value)
    except ValueError:  # Python does not write numbers of thousands of digits
        return "of thousands of digits"


def _single(value: Any) -> Any:
    return value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value


def _kind(value: Any) -> str:
    return "text" if isinstance(value, str) else f"a {type(value).__name__}"
