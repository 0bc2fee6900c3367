"""What a caller asks of a drawing: sampling parameters, checked once, in whatever way they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ...core.arguments import number, shown, whole
from ...core.noise import check_seed, seeds_from
from ...errors import InputError

MAX_IMAGES = 1024
MIN_TAU = 1e-4  # what is divided by less is no number any more
MAX_TOP_K = (1 << 31) - 1  # an int32 in the engines
ALIASES = {"temperature": "tau"}  # the field's word, and that of the published programs


@dataclass(frozen=True)
class SamplingParams:
    """How images are sampled: of a call, an edit, a stream or a request. None is the bundle's own value.

    numpy's scalars count as numbers; every field is plain Python when it has been checked.

    Args:
        guidance_scale: classifier-free guidance, 0 to 100. The family's `guidance_off`, 1 or 0, switches it off and
            runs half the work.
        tau: sampling temperature, 0.0001 to 100, of families that have one; `temperature` is the same.
        top_p: the rarest values of a choice go, as long as their probabilities sum to at most 1 - top_p; 0 and 1 are
            off.
        top_k: only so many codes are sampled from, 0 for all; of families that leave it to the caller.
        seed: of the first image of each prompt or label, 0 to 2^63 - 1; the next ones count up from it. None draws
            one, which the output tells.
        num_images: images of each prompt or label, 1 to 1024.
        negative_prompt: what to steer away from, in place of the learned unconditional text; "" is none.

    Raises:
        InputError: a value of another kind, or out of range.
    """

    guidance_scale: float | None = None
    tau: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    num_images: int = 1
    negative_prompt: str | None = None

    def __post_init__(self) -> None:
        plain = {name: number(name, value) for name in REALS if (value := getattr(self, name)) is not None}
        plain["num_images"] = whole("num_images", self.num_images, 1, MAX_IMAGES)
        if self.top_k is not None:
            plain["top_k"] = whole("top_k", self.top_k, 0, MAX_TOP_K)
        if self.seed is not None:
            plain["seed"] = check_seed(self.seed)
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "negative_prompt", stated(self.negative_prompt))
        check_ranges(self.guidance_scale, self.tau, self.top_p)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides an engine's scalars, by name; None is the bundle's own."""
        return {name: getattr(self, name) for name in (*REALS, "top_k")}

    def changed(self, **changes: Any) -> SamplingParams:
        """These parameters with some replaced, by name.

        Raises:
            InputError: no parameter of that name, or one that is given by two names.
        """
        for alias, name in ALIASES.items():
            if alias in changes:
                rename(changes, alias, name)
        known = [field.name for field in fields(self)]
        if unknown := sorted(changes.keys() - set(known)):
            raise InputError(
                f"no sampling parameter {', '.join(unknown)}",
                expected=f"some of {', '.join((*known, *ALIASES))}",
                fix="check the spelling",
            )
        return replace(self, **changes) if changes else self


def rename(changes: dict[str, Any], alias: str, name: str) -> None:
    """Put a parameter under the name that it has here.

    Raises:
        InputError: it is given under both.
    """
    if changes.get(name) is not None:
        raise InputError(f"{alias} and {name} are the same parameter", fix="give one of them")
    changes[name] = changes.pop(alias)


def params_of_each(
    params: SamplingParams | Sequence[SamplingParams] | None, changes: dict[str, Any], count: int
) -> list[SamplingParams]:
    """The parameters of each of `count` prompts or labels.

    `params`, and every change but num_images, may be a list with an entry for each of them. A list of seeds may have
    one for each image instead: see `seeds_of_each`.

    Raises:
        InputError: a list of another length, or something else that is no parameter.
    """
    each: list[Any] = list(params) if isinstance(params, list | tuple) else [params or SamplingParams()] * count
    _check_length("params", each, count)
    for own in each:
        if not isinstance(own, SamplingParams):
            raise InputError(f"params {shown(own)} is a {type(own).__name__}", expected="SamplingParams")
    lists = {name: list(value) for name, value in changes.items() if isinstance(value, list | tuple)}
    for name, values in lists.items():
        _check_length(name, values, count)
    same = {name: value for name, value in changes.items() if name not in lists}
    return [
        own.changed(**same, **{name: values[place] for name, values in lists.items()}) for place, own in enumerate(each)
    ]


def seeds_of_each(params: Sequence[SamplingParams], seeds: Sequence[int] | None = None) -> list[list[int]]:
    """The seeds of each prompt's images. `seeds`: one for each image, in order; else they follow each prompt's own.

    Raises:
        InputError: a seed out of range, or not one for each image.
    """
    if seeds is None:
        return [seeds_from(own.seed, own.num_images) for own in params]
    left = [check_seed(seed) for seed in seeds]
    total = sum(own.num_images for own in params)
    if len(left) != total:
        raise InputError(
            f"{len(left)} seeds for {len(params)} prompts or labels and {total} images",
            expected="one for each of these or of those",
        )
    return [[left.pop(0) for _ in range(own.num_images)] for own in params]


def _check_length(name: str, values: Sequence[object], count: int) -> None:
    if len(values) != count:
        raise InputError(
            f"{name} is a list of {len(values)}, for {count} prompts or labels",
            expected=f"one value, or a list of {count}",
            fix="give each its own, in the order of the prompts",
        )


REALS = ("guidance_scale", "tau", "top_p")


def check_ranges(guidance_scale: float | None, tau: float | None, top_p: float | None) -> None:
    """Refuse values that no model is sampled with; NaN and infinity are out of every range.

    Raises:
        InputError: one is.
    """
    if guidance_scale is not None and not 0 <= guidance_scale <= 100:
        raise InputError(f"guidance_scale {guidance_scale} is out of range", expected="a number from 0 to 100")
    if tau is not None and not MIN_TAU <= tau <= 100:
        raise InputError(
            f"tau {tau} is out of range",
            expected=f"a temperature from {MIN_TAU:g} to 100",
            fix=f"give {MIN_TAU:g} for the likeliest codes" if 0 <= tau < MIN_TAU else "",
        )
    if top_p is not None and not 0 <= top_p <= 1:
        raise InputError(f"top_p {top_p} is out of range", expected="a share from 0 to 1; 0, as 1, is off")


def stated(negative: str | None) -> str | None:
    """A negative prompt, or None: forms send an empty text for none."""
    return None if isinstance(negative, str) and not negative.strip() else negative
