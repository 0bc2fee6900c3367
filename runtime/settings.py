"""Settings of an image: the bundle's own, what the caller asked for in their place, and what the bundle can draw."""

from __future__ import annotations

from typing import Any

from ..engines.manifest import Manifest
from ..errors import BundleError, InputError
from .generation import SamplingSettings, default_settings, with_overrides


def chosen_settings(manifest: Manifest, **given: Any) -> SamplingSettings:
    """The bundle's settings with those replaced that were given; None is not given.

    Raises:
        InputError: no number, out of range, or unknown to the family.
        BundleError: the bundle has no engines for drawing with guidance, or none for drawing without.
    """
    defaults = default_settings(manifest)
    for name in ("tau", "top_k"):
        if given.get(name) is not None and getattr(defaults, name) is None:
            raise InputError(f"{manifest.family} models have no {name}", fix="leave it away")
    settings = with_overrides(defaults, **given)
    if settings.rows not in {found.rows for found in manifest.sets}:
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
