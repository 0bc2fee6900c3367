"""A pipeline sent elsewhere: its path and the arguments it was loaded with, and the bundle that must lie there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BundleError, InputError

if TYPE_CHECKING:
    from .pipeline import Pipeline


def reduced(pipe: Pipeline, origin: tuple[Path, dict[str, Any]] | None) -> tuple[Any, ...]:
    """What `__reduce__` gives; origin: path and arguments of `load`.

    Raises:
        InputError: it was not made by `load`.
    """
    if origin is None:
        raise InputError(
            "this Pipeline was not made by Pipeline.load, so it cannot be pickled or copied",
            fix="send the bundle's path, and load it where it is needed",
        )
    return load_again, (type(pipe), *origin, pipe.bundle.digest)


def load_again(cls: type[Pipeline], path: Path, arguments: dict[str, Any], digest: str) -> Pipeline:
    """What a pickled pipeline becomes.

    Raises:
        BundleError: another bundle lies there by now, besides what `load` raises.
    """
    pipe = cls.load(path, **arguments)
    if pipe.bundle.digest != digest:
        raise BundleError(
            f"{path} is another bundle than the one whose Pipeline was pickled",
            expected=f"digest {digest[:16]}, found {pipe.bundle.digest[:16]}",
            fix="load the bundle by its path, or put the former one back",
        )
    return pipe
