"""Settings of an image: the bundle's own, what the caller asked for in their place, and what the bundle can draw."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ...core.arguments import number, whole
from ...engines.bundle.manifest import Manifest
from ...errors import BundleError, InputError
from ...families import family_named
from .params import MAX_TOP_K, check_ranges


def chosen_settings(manifest: Manifest, *, steered: bool = True, **given: Any) -> SamplingSettings:
    """The bundle's settings with those replaced that were given; None is not given.

    `steered`: whether a subject differs from what guidance steers away from. Where none does, both rows are equal and
    guidance changes nothing: then it is off, unless a scale was given or the bundle always draws with guidance.

    Raises:
        InputError: no number, out of range, or unknown to the family.
        BundleError: the bundle has no engines for drawing with guidance, or none for drawing without.
    """
    defaults = default_settings(manifest)
    rows = {found.rows for found in manifest.sets}
    if not steered and 1 in rows:
        defaults = replace(defaults, guidance_scale=defaults.guidance_off)
    for name in ("tau", "top_k"):
        if given.get(name) is not None and getattr(defaults, name) is None:
            raise InputError(f"{manifest.family} models have no {name}", fix="leave it away")
    settings = with_overrides(defaults, **given)
    if settings.rows not in rows:
        raise _no_engines(settings, is_default=given.get("guidance_scale") is None)
    return settings


def recorded(manifest: Manifest, settings: SamplingSettings, negative_prompt: str | None) -> dict[str, Any]:
    """What an output tells of its settings."""
    height, width = manifest.plan.schedule.pixels
    return {
        "guidance_scale": settings.guidance_scale,
        **{name: value for name, value in (("tau", settings.tau), ("top_k", settings.top_k)) if value is not None},
        "top_p": settings.top_p,
        "negative_prompt": negative_prompt,
        "policy": manifest.plan.policy.name,
        "model": manifest.model,
        "size": f"{width}x{height}",
    }


def _no_engines(settings: SamplingSettings, is_default: bool) -> BundleError:
    scale, off = f"guidance_scale {settings.guidance_scale:g}", f"{settings.guidance_off:g}"
    rebuild = "rebuild the bundle with --guidance both"
    if settings.rows == 1:
        return BundleError(
            f"{scale} switches guidance off, and this bundle has engines for drawing with guidance only",
            expected=f"a guidance_scale other than {off}",
            fix=f"leave guidance_scale away, or {rebuild}",
        )
    return BundleError(
        f"{scale}{', the default,' if is_default else ''} draws with guidance, and this bundle has engines for drawing "
        "without guidance only",
        expected=f"guidance_scale {off}, which switches guidance off",
        fix=f"say guidance_scale={off} (--guidance-scale {off}), or {rebuild}",
    )


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of one image, validated. None: the family knows no such setting.

    `guidance_off` is the guidance scale at which the unconditional row has no weight.
    """

    guidance_scale: float
    tau: float | None
    top_p: float
    top_k: int | None = None
    guidance_off: float = 1.0

    def __post_init__(self) -> None:
        check_ranges(self.guidance_scale, self.tau, self.top_p)
        if self.top_k is not None and (isinstance(self.top_k, bool) or not 0 <= self.top_k <= MAX_TOP_K):
            raise InputError(f"top_k {self.top_k} is out of range", expected="a number of codes, or 0 for all")

    @property
    def scalars(self) -> dict[str, float]:
        """Inputs [1] of the engines that draw codes, by name."""
        found = {"guidance": self.guidance_scale, "tau": self.tau, "cut": 1 - (self.top_p or 1), "top_k": self.top_k}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def rows(self) -> int:
        """Guidance rows to run: without guidance the unconditional row is not computed at all."""
        return 1 if self.guidance_scale == self.guidance_off else 2


def with_overrides(defaults: SamplingSettings, **values: Any) -> SamplingSettings:
    """Settings with those replaced that were given.

    Raises:
        InputError: a value that is no number, or one out of range.
    """
    given = {name: value for name, value in values.items() if value is not None}
    checked: dict[str, Any] = {
        name: whole(name, value, 0, MAX_TOP_K) if name == "top_k" else number(name, value)
        for name, value in given.items()
    }
    return replace(defaults, **checked)


def default_settings(manifest: Manifest) -> SamplingSettings:
    """The bundle's own settings."""
    d = manifest.sampling
    return SamplingSettings(d.guidance_scale, d.tau, d.top_p, d.top_k, family_named(manifest.family).guidance_off)
