"""Measures a bundle, alone or alternately with another: whole images, single launches, memory, kept tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

from ..core.noise import check_seed
from ..engines.bundle.bundle import Bundle
from ..engines.bundle.manifest import Manifest
from ..engines.device import Device
from ..errors import InputError
from ..runtime.output import ImageTimings
from .environment import environment
from .estimates.costs import engine_costs
from .formatting import pixels
from .memory_run import memory_run_apart
from .profiled_bundle import ProfiledBundle, given_of, settings_of
from .records import BundleProfile, MemoryRun, Profile, Request
from .rows import engine_rows, launch_medians, stage_rows, totals

Progress = Callable[[str, int, int], None]  # activity, steps done, steps in all
LAUNCH_WARM_UP = 1  # images; single launches take another path than whole images


@dataclass
class Measured:
    """The timings of one bundle: of each whole image, and of each launch of the images drawn launch by launch."""

    images: list[ImageTimings] = field(default_factory=list)
    launches: list[list[float]] = field(default_factory=list)


def profile(
    bundle: Bundle, request: Request, *, against: Bundle | None = None, progress: Progress | None = None
) -> Profile:
    """Measure a bundle. With `against` the runs of the two bundles alternate, image by image, in one process.

    Raises:
        InputError: the bundles are of another model or size, or a setting is out of range.
        BackendError: a device, library or driver is missing.
    """
    bundles = [bundle] if against is None else [bundle, against]
    check_request(bundles, request)
    tell = progress or (lambda _what, _done, _total: None)
    memory = []
    for number, one in enumerate(bundles):
        tell("memory", number, len(bundles))
        memory.append(memory_run_apart(one.path, request, one.opening))
    profiled = [ProfiledBundle(one, request) for one in bundles]
    measured = measure(profiled, request, tell)
    labels = labels_of(bundles)
    found = [_bundle_profile(*parts) for parts in zip(labels, bundles, profiled, measured, memory, strict=True)]
    return Profile(
        when=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        settings=_settings(profiled[0], request),
        environment=environment(bundle.manifest) | _gpu(profiled[0].device),
        budget_bytes=request.budget_bytes,
        subject=found[0],
        against=found[1] if against is not None else None,
    )


def check_request(bundles: Sequence[Bundle], request: Request) -> None:
    """Refuse a request before anything is loaded.

    Raises:
        InputError: no runs, a prompt or a setting out of range, or two bundles that cannot be compared.
        BundleError: no engines for the guidance that is asked for.
    """
    if request.runs < 1 or request.warm_up < 1:
        raise InputError(f"{request.runs} runs after {request.warm_up} to warm up", expected="at least 1 of each")
    check_seed(request.seed)
    for bundle in bundles:
        given_of(bundle, request)
        bundle.manifest.engine_set(settings_of(bundle, request).rows, request.batch)
    if len(bundles) == 2:
        _check_comparable(*(bundle.manifest for bundle in bundles))


def _check_comparable(one: Manifest, other: Manifest) -> None:
    expected = "two bundles of the same model and size, dense and pruned say"
    described = ", and ".join(f"{m.model} at {pixels(m.plan.schedule.pixels)}" for m in (one, other))
    if one.plan.schedule != other.plan.schedule:
        raise InputError(f"the bundles draw other sizes: {described}", expected=expected)
    if (one.transformer, one.image_tokenizer) != (other.transformer, other.image_tokenizer):
        raise InputError(f"the bundles are of other models: {described}", expected=expected)


def measure(bundles: Sequence[ProfiledBundle], request: Request, tell: Progress) -> list[Measured]:
    """Draw whole images, then images launch by launch; bundles alternate. The first of each are warm-up, not kept."""
    measured = [Measured() for _ in bundles]
    whole, single = request.warm_up + request.runs, LAUNCH_WARM_UP + request.runs
    for done in range(whole + single):
        tell("whole images" if done < whole else "launch by launch", done, whole + single)
        for bundle, found in zip(bundles, measured, strict=True):
            if done < whole:
                found.images.append(bundle.timed_image())
            else:
                found.launches.append([ms for _, _, ms in bundle.launches()])
    for found in measured:
        del found.images[: request.warm_up], found.launches[:LAUNCH_WARM_UP]
    return measured


def labels_of(bundles: Sequence[Bundle]) -> list[str]:
    """Distinct short names: of the folders, else of the policies, else numbered folders."""
    folders = [bundle.path.resolve().name for bundle in bundles]
    for names in (folders, [bundle.manifest.plan.policy.name for bundle in bundles]):
        if len(set(names)) == len(names):
            return names
    return [f"{folder} {number}" for number, folder in enumerate(folders, start=1)]


def _bundle_profile(
    label: str, bundle: Bundle, profiled: ProfiledBundle, measured: Measured, memory: MemoryRun
) -> BundleProfile:
    manifest = bundle.manifest if profiled.prompt is not None else replace(bundle.manifest, text_encoder="")
    costs = engine_costs(manifest, profiled.settings.rows, profiled.images)
    kept = tuple(profiled.kept_maps())
    return BundleProfile(
        label=label,
        facts=_facts(bundle, profiled),
        totals=totals(measured.images),
        stages=stage_rows(manifest, costs, measured.images, memory.launches),
        engines=engine_rows(manifest, costs, measured.launches, memory.launches),
        launches=launch_medians(costs, measured.launches),
        memory=memory,
        kv_cache_bytes=costs.kv_cache_bytes,
        kept=kept,
        image_png=profiled.image_png(),
    )


def _facts(bundle: Bundle, profiled: ProfiledBundle) -> dict[str, Any]:
    manifest = bundle.manifest
    engine, policy = manifest.any_engine, manifest.plan.policy
    return {
        "path": str(bundle.path),
        "digest": bundle.digest,
        "model": manifest.model,
        "size": pixels(manifest.plan.schedule.pixels),
        "policy": policy.name,
        "pruned_layers": [policy.first_layer, policy.stop_layer],
        "layers": manifest.plan.depth,
        "precision": manifest.precision.label,
        "backend": f"{engine.backend} {engine.library_version}",
        "target": engine.target,
        "text": "prompt" if profiled.prompt is not None else "random features",
        "weight_bytes": manifest.weights.size_bytes,
        "forwarded_tokens": manifest.plan.forwarded_tokens,
        "batch": profiled.images,
    }


def _settings(profiled: ProfiledBundle, request: Request) -> dict[str, Any]:
    return {
        "prompt": profiled.prompt,
        "seed": request.seed,
        **vars(profiled.settings),
        "guidance_rows": profiled.settings.rows,
        "batch": request.batch,
        "runs": request.runs,
        "warm_up": request.warm_up,
        "threads": request.threads,
    }


def _gpu(device: Device) -> dict[str, Any]:
    facts = device.gpu_facts()
    return {} if facts is None else {"gpu": vars(facts)}
