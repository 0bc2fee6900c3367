"""Images of a pass against the same images alone, on compiled engines: logits of every scale on forced choices.

`python -m tests.export.batch_equality` builds every case and prints the largest differences. Choices are forced, so
that a last bit of one scale decides nothing in the next; of edited images they are those of a given image.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from fastvar.console.options import batch_sizes
from fastvar.core.noise import CHOICE, Noise, uniform_noise
from fastvar.core.policy import PruningPolicy, ScaleRule
from fastvar.engines.bundle.bundle import Bundle
from fastvar.engines.bundle.manifest import Manifest
from fastvar.export.build import build_bundle
from fastvar.export.options import BuildOptions
from fastvar.export.toolchain import make_toolchain
from fastvar.runtime.editing.given_tokens import FORCE_ONE, FORCE_ZERO, given_tokens
from fastvar.runtime.requests.inputs import LabelInput
from fastvar.runtime.session import Session
from tests.conftest import trace_fast
from tests.export.test_batches import Case, features, hart, infinity, var

FAMILIES = {"infinity": (infinity, 6, 1), "var": (var, 4, 1), "hart": (hart, 4, 0)}  # case, last scale, pruned from
CACHED = 2  # the scale that pruned tokens are restored from
GUIDANCE_ENDS = "guidance-ends"
POLICIES = ("dense", "pruned", GUIDANCE_ENDS)
EDITED = ("infinity", "var")  # HART's bundles hold no image encoder
BATCHES = (2, 4)
SEED = 3

Logits = list[NDArray[np.float32]]  # of every scale [L, logits of a token]


def case_of(family: str, policy: str) -> Case:
    """A tiny model that draws three scales: the first, one that is cached, and the last."""
    make, last, first = FAMILIES[family]
    rules = {i: ScaleRule(skip=True) for i in range(1, last) if i != CACHED}
    depth = make(PruningPolicy("few", rules)).plan.depth
    if policy == "dense":
        return make(PruningPolicy("dense", rules))
    rules[last] = ScaleRule(0.25, guidance=policy != GUIDANCE_ENDS)
    return make(PruningPolicy(policy, rules, first, depth, CACHED))


def built(
    case: Case, out: Path, backend: str, precision: str, cache: Path | bool, target: str | None = None, **options: Any
) -> Path:
    """The case's bundle, with the image encoder where its family has one."""
    checkpoint = case.checkpoint()
    options = {"batch": BATCHES, "with_encoder": checkpoint.family.name in EDITED, **options}
    toolchain = make_toolchain(backend, target, precision)
    build_bundle(checkpoint, case.plan, out, BuildOptions(**options), toolchain=toolchain, cache=cache)
    return out


@dataclass(frozen=True)
class Difference:
    """Of passes with the images alone.

    `largest` is the largest absolute difference of a logit at each scale; `changed` the share of tokens at each scale
    of which any logit differs by more than a tenth of the logits' own spread: those whose attention saw other keys.
    """

    guided: bool
    edited: bool
    images: int
    largest: tuple[float, ...]
    changed: tuple[float, ...]
    spread: float  # standard deviation of all logits

    @property
    def bit_equal(self) -> bool:
        return not any(self.largest)


def differences(
    session: Session, case: Case, batches: Sequence[int] = BATCHES, guidance: Sequence[bool] = (True, False)
) -> Iterator[Difference]:
    """Passes of each size with and without guidance, of drawn and, where the bundle can, of edited images."""
    for guided in guidance:
        for edited in (False, True) if session.manifest.encoder else (False,):
            alone = [logits_of(session, case, [image], guided, edited)[0] for image in range(max(batches))]
            assert_images_differ(alone)
            for count in batches:
                images = list(range(count))[::-1]  # in an order of its own
                found = logits_of(session, case, images, guided, edited)
                pairs = [(own, alone[image]) for image, own in zip(images, found, strict=True)]
                yield _difference(pairs, guided, edited, count)


def assert_images_differ(images: Sequence[Logits]) -> None:
    assert not np.allclose(images[0][-1], images[1][-1], atol=0.1), "what is compared differs from image to image"


def _difference(pairs: Sequence[tuple[Logits, Logits]], guided: bool, edited: bool, images: int) -> Difference:
    spread = float(np.std(np.concatenate([scale.ravel() for _, alone in pairs for scale in alone])))
    by_scale = [
        np.stack([np.abs(found[i] - alone[i]).max(axis=1) for found, alone in pairs]) for i in range(len(pairs[0][0]))
    ]
    largest = tuple(float(scale.max()) for scale in by_scale)
    changed = tuple(float((scale > spread / 10).mean()) for scale in by_scale)
    return Difference(guided, edited, images, largest, changed, spread)


def logits_of(session: Session, case: Case, images: Sequence[int], guided: bool, edited: bool) -> list[Logits]:
    """Of images by number, in one pass."""
    workspace, manifest = session.workspace(2 if guided else 1, len(images)), session.manifest
    noises = [
        edited_choices(session, workspace, image, place) if edited else forced_choices(manifest, image)
        for place, image in enumerate(images)
    ]
    if manifest.text_length:
        workspace.give_features([features(manifest, image) for image in images])
    else:
        workspace.give([LabelInput(image) for image in images])
    found: list[Logits] = [[] for _ in images]
    for calls, _ in workspace.run_scales(noises, [case.settings(image, guided) for image in images]):
        logits = workspace.read(calls.sampling_head, "logits")
        for place, own in enumerate(found):
            own.append(logits.reshape(-1, len(images), logits.shape[-1])[:, place].astype(np.float32))
    return found


def forced_choices(manifest: Manifest, image: int) -> Noise:
    """Bits or codes of an image's own, drawn by nobody; what else is random is of its seed."""
    codes = getattr(manifest.transformer, "codes", 0)

    def noise(scale: int, shape: tuple[int, ...], stream: str = CHOICE) -> NDArray[Any]:
        drawn = uniform_noise(SEED + image, scale, shape, stream)
        if stream.split(".")[0] != CHOICE:
            return drawn
        forced = -1 - np.floor(drawn * codes) if codes else np.where(drawn < 0.5, FORCE_ONE, FORCE_ZERO)
        return forced.astype(np.float32)

    return noise


def edited_choices(session: Session, workspace: Any, image: int, place: int) -> Noise:
    """Half of every scale's tokens are those of a given picture; the others are forced as above."""
    manifest = session.manifest
    size = manifest.plan.schedule.pixels
    if manifest.encoder:
        size = manifest.engines[manifest.encoder].tensor("image").shape[2:]
    picture = np.random.default_rng(image).uniform(-1, 1, (3, *size)).astype(np.float32)
    kept = {step.index: np.arange(step.tokens) % 2 == image % 2 for step in manifest.plan.steps}
    tokens = given_tokens(workspace.encode_image(picture), kept, manifest, session.weights)
    given = tokens.noise(SEED + image, partial(workspace.summed_before, image=place))
    forced = forced_choices(manifest, image)

    def noise(scale: int, shape: tuple[int, ...], stream: str = CHOICE) -> NDArray[Any]:
        if stream != CHOICE:
            return forced(scale, shape, stream)
        return np.where(kept[scale][:, None], given(scale, shape), forced(scale, shape))

    return noise


def main(
    backend: Annotated[str, typer.Option(help="Who compiles and runs the engines.")] = "onnxruntime",
    precision: str = "fp32",
    families: str = ",".join(FAMILIES),
    policies: str = ",".join(POLICIES),
    batch: str = ",".join(map(str, BATCHES)),
    guidance: Annotated[str, typer.Option(help="on, off or both.")] = "both",
    cache: Annotated[Path | None, typer.Option(help="Engine cache folder.")] = None,
) -> None:
    """Build every case, and print the largest differences of its passes with the images alone."""
    trace_fast()
    sizes = batch_sizes(batch)
    options, ways = {"batch": sizes, "guidance": guidance}, {"both": (True, False), "on": (True,), "off": (False,)}
    with tempfile.TemporaryDirectory() as folder:
        for family in families.split(","):
            for policy in policies.split(","):
                case = case_of(family, policy)
                out = built(case, Path(folder) / f"{family}-{policy}", backend, precision, cache or True, **options)
                session = Session(Bundle.open(out))
                for found in differences(session, case, sizes, ways[guidance]):
                    print(_line(f"{backend} {precision} {family} {policy}", found), flush=True)


def _line(title: str, found: Difference) -> str:
    what = f"guidance {'on' if found.guided else 'off'}, {'edited' if found.edited else 'drawn'}, {found.images} images"
    if found.bit_equal:
        return f"{title}: {what}: bit-equal (logits {found.spread:.2g})"
    worst = f"{max(found.largest):.1e} of logits {found.spread:.2g}"
    return f"{title}: {what}: {worst}, {max(found.changed):.1%} of a scale's tokens changed"


if __name__ == "__main__":
    typer.run(main)
