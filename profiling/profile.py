"""Measures a bundle, alone or in turns with another: whole images, images launch by launch, memory, kept tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

from ..engines.bundle import Bundle
from ..engines.cuda import CudaDevice
from ..engines.device import Device
from ..engines.manifest import Manifest
from ..errors import InputError
from ..runtime.events import ImageTimings
from ..runtime.noise import check_seed
from .costs import engine_costs
from .environment import environment
from .figures import pixels
from .memory_run import memory_run_apart
from .records import BundleProfile, MemoryRun, Profile, Request
from .rows import engine_rows, launch_medians, stage_rows, totals
from .subject import ProfiledBundle, given_of, settings_of

Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much
LAUNCH_WARM_UP = 1  # launches one by one take another path than whole images: warmed up by themselves


@dataclass
class Measured:
    """What the runs of one bundle gave: a timing per image, and milliseconds of every launch per image."""

    images: list[ImageTimings] = field(default_factory=list)
    launches: list[list[float]] = field(default_factory=list)


def profile(
    bundle: Bundle, request: Request, *, against: Bundle | None = None, progress: Progress | None = None
) -> Profile:
    """Measure. With `against` the runs alternate: one image of the one, one of the other, in the same process.

    Raises:
        InputError: the two bundles do not draw the same image, or a setting is out of range.
        BackendError: a device, library or driver is missing.
    """
    bundles = [bundle] if against is None else [bundle, against]
    check_request(bundles, request)
    tell = progress or (lambda _what, _done, _total: None)
    memory = []
    for number, one in enumerate(bundles):
        tell("memory", number, len(bundles))
        memory.append(memory_run_apart(one.path, request))
    subjects = [ProfiledBundle(one, request) for one in bundles]
    measured = measure(subjects, request, tell)
    labels = labels_of(bundles)
    found = [_bundle_profile(*parts) for parts in zip(labels, bundles, subjects, measured, memory, strict=True)]
    return Profile(
        when=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        settings=_settings(subjects[0], request),
        environment=environment(bundle.manifest) | _gpu(subjects[0].device),
        budget_bytes=request.budget_bytes,
        subject=found[0],
        against=found[1] if against is not None else None,
    )


def check_request(bundles: Sequence[Bundle], request: Request) -> None:
    """Refuse before anything is loaded.

    Raises:
        InputError: no runs, a prompt or a setting out of range, or two bundles that cannot be compared.
        BundleError: no engines for the guidance that is asked for.
    """
    if request.runs < 1 or request.warm_up < 1:
        raise InputError(f"{request.runs} runs after {request.warm_up} to warm up", expected="at least 1 of each")
    check_seed(request.seed)
    for bundle in bundles:
        given_of(bundle, request)
        bundle.manifest.engine_set(settings_of(bundle, request).rows)
    if len(bundles) == 2:
        _check_comparable(*(bundle.manifest for bundle in bundles))


def _check_comparable(one: Manifest, other: Manifest) -> None:
    described = [f"{m.model} at {pixels(m.plan.schedule.pixels)}" for m in (one, other)]
    if one.plan.schedule != other.plan.schedule:
        raise InputError(
            f"the bundles draw other sizes: {described[0]}, and {described[1]}",
            expected="two bundles of the same model and size, dense and pruned say",
        )
    if (one.transformer, one.image_tokenizer) != (other.transformer, other.image_tokenizer):
        raise InputError(
            f"the bundles are of other models: {described[0]}, and {described[1]}",
            expected="two bundles of the same model and size, dense and pruned say",
        )


def measure(subjects: Sequence[ProfiledBundle], request: Request, tell: Progress) -> list[Measured]:
    """Whole images first, then launch by launch; subjects take turns. Runs below 0 warm up and are not kept."""
    measured = [Measured() for _ in subjects]
    total = 2 * request.runs + request.warm_up + LAUNCH_WARM_UP
    for done, run in enumerate(range(-request.warm_up, request.runs)):
        tell("whole images", done, total)
        for subject, found in zip(subjects, measured, strict=True):
            timings = subject.timed_image()
            if run >= 0:
                found.images.append(timings)
    for done, run in enumerate(range(-LAUNCH_WARM_UP, request.runs), start=request.warm_up + request.runs):
        tell("launch by launch", done, total)
        for subject, found in zip(subjects, measured, strict=True):
            launches = [ms for _, _, ms in subject.launches()]
            if run >= 0:
                found.launches.append(launches)
    return measured


def labels_of(bundles: Sequence[Bundle]) -> list[str]:
    """Short names: the folders', else the policies', else numbered."""
    folders = [bundle.path.resolve().name for bundle in bundles]
    for names in (folders, [bundle.manifest.plan.policy.name for bundle in bundles]):
        if len(set(names)) == len(names):
            return names
    return [f"{folder} {number}" for number, folder in enumerate(folders, start=1)]


def _bundle_profile(
    label: str, bundle: Bundle, subject: ProfiledBundle, measured: Measured, memory: MemoryRun
) -> BundleProfile:
    manifest = bundle.manifest if subject.prompt is not None else replace(bundle.manifest, text_encoder="")
    costs = engine_costs(manifest, subject.settings.rows)
    kept = tuple(subject.kept_maps())
    return BundleProfile(
        label=label,
        facts=_facts(bundle, subject),
        totals=totals(measured.images),
        stages=stage_rows(manifest, costs, measured.images, memory.launches),
        engines=engine_rows(manifest, costs, measured.launches, memory.launches),
        launches=launch_medians(costs, measured.launches),
        memory=memory,
        kv_cache_bytes=costs.kv_cache_bytes,
        kept=kept,
        image_png=subject.image_png(),
    )


def _facts(bundle: Bundle, subject: ProfiledBundle) -> dict[str, Any]:
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
        "text": "prompt" if subject.prompt is not None else "random features",
        "weight_bytes": manifest.weights.size_bytes,
        "forwarded_tokens": manifest.plan.forwarded_tokens,
    }


def _settings(subject: ProfiledBundle, request: Request) -> dict[str, Any]:
    return {
        "prompt": subject.prompt,
        "seed": request.seed,
        **vars(subject.settings),
        "guidance_rows": subject.settings.rows,
        "runs": request.runs,
        "warm_up": request.warm_up,
        "threads": request.threads,
    }


def _gpu(device: Device) -> dict[str, Any]:
    return {"gpu": vars(device.facts())} if isinstance(device, CudaDevice) else {}
