"""Contenders in turn, a line of the journal a round, and what sums rounds up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

from benchmarks.contenders import Contender
from benchmarks.gpu.sections import Context
from benchmarks.timing import Ratio, one_image, paired

Round = dict[str, dict[str, Any]]  # contender -> its image
DECODED = 2  # rounds that run the decoder too


def image_rounds(context: Context, runs: int, openers: Mapping[str, Callable[[], Contender]]) -> list[Round]:
    """Rounds of one image each; those that the journal has, of the same contenders, are taken from it. Contenders are
    opened if one is missing.

    The first round of a process warms up, and is not counted. A contender that fails has a line that says so, and
    leaves.
    """
    contenders: dict[str, Contender] = {}

    def each(names: Iterable[str], what: str, function: Callable[[str], Any]) -> dict[str, Any]:
        found = {}
        for name in list(names):
            try:
                found[name] = function(name)
            except Exception as error:  # noqa: BLE001 the others go on
                context.log.note_error(f"{name}, {what}", error, 0.0)
                contenders.pop(name, None)
        if not found:
            raise ValueError("no contender is left")
        return found

    def play(number: int) -> Round:
        if not contenders:
            contenders.update(each(openers, "opening", lambda name: openers[name]()))
            each(contenders, "warming up", lambda name: one_image(contenders[name], 0, decode=True))
        decode = number < DECODED
        images = each(contenders, f"round {number}", lambda name: one_image(contenders[name], number, decode=decode))
        return {name: {"scales_ms": run.scales_ms, **vars(run)} for name, run in images.items()}

    who = ", ".join(openers)
    found = [context.log.measure(f"round {number} of {who}", partial(play, number)) for number in range(runs)]
    return [one for one in found if one is not None]


def medians(rounds: Sequence[Round]) -> dict[str, Any]:
    """Contender -> medians of its images over the rounds that it took part in."""
    found = {}
    for name in dict.fromkeys(name for each in rounds for name in each):
        images = [each[name] for each in rounds if name in each]
        decoded = [image["decode_ms"] for image in images if image["decode_ms"] is not None]
        found[name] = {
            "rounds": len(images),
            "text_ms": median(image["text_ms"] for image in images),
            "scales_ms": median(image["scales_ms"] for image in images),
            "scale_ms": [median(scale) for scale in zip(*(image["scale_ms"] for image in images), strict=True)],
            "decode_ms": median(decoded) if decoded else None,
        }
    return found


def ratio_of(rounds: Sequence[Round], slower: str, faster: str) -> Ratio:
    """How many times faster one is than the other, round by round.

    Raises:
        ValueError: no round has both.
    """
    both = [each for each in rounds if slower in each and faster in each]
    found = paired([each[slower]["scales_ms"] for each in both], [each[faster]["scales_ms"] for each in both])
    if found is None:
        raise ValueError(f"no round has both {slower} and {faster}")
    return found
