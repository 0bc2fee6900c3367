"""A function in a fresh process: what it takes of memory, and what it leaves behind, is its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

from ..errors import DeviceMemoryError

Result = TypeVar("Result")


def run_apart(what: str, function: Callable[..., Result], *arguments: object) -> Result:
    """Call a function of a module; `what` names the process in an error.

    Raises:
        Exception: whatever stopped it there.
        DeviceMemoryError: the operating system stopped it.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        try:
            return process.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise DeviceMemoryError(
                f"the process that {what} was stopped from outside",
                expected="enough memory to load it and to draw one image",
                fix="close what else runs on this machine, or choose a smaller model",
            ) from error
