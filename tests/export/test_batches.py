"""Several images in one pass: each is what it is alone, in all families and with settings of its own. In torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fastvar.core.noise import seeded_noise
from fastvar.core.plan import GenerationPlan, SamplingMode
from fastvar.core.policy import DENSE, PruningPolicy, ScaleRule
from fastvar.export.checkpoints.checkpoint import Checkpoint
from fastvar.export.checkpoints.random_weights import random_checkpoint_for
from fastvar.export.options import BuildOptions
from fastvar.families.hart import HART
from fastvar.families.infinity import ImageTokenizerConfig
from fastvar.families.var import VAR
from fastvar.runtime.conditioning import TextFeatures
from fastvar.runtime.requests.inputs import LabelInput
from fastvar.runtime.requests.settings import SamplingSettings
from fastvar.runtime.session import Session
from tests.export.models.var import test_steps as tiny_var
from tests.models import tiny_hart, tiny_models
from tests.models.module_bundle import ModuleBundle

BATCHES = BuildOptions(batch=(2, 4))


@dataclass(frozen=True)
class Case:
    """A tiny model of a family under a plan. `settings` are those of image i, without guidance where it is off."""

    checkpoint: Callable[[], Checkpoint]
    plan: GenerationPlan
    settings: Callable[[int, bool], SamplingSettings]


def infinity(policy: PruningPolicy, patchify: bool = False) -> Case:
    config = tiny_models.PATCHIFIED if patchify else tiny_models.CONFIG
    images = ImageTokenizerConfig(
        bits=config.bits, base_channels=24, channel_multipliers=(1,) * (4 if patchify else 5), residual_blocks=0
    )

    def checkpoint() -> Checkpoint:
        made = random_checkpoint_for(config, images, dtype=torch.float32, name="tiny")
        return replace(made, transformer_weights=dict(tiny_models.model(config).state_dict()))

    def settings(image: int, guided: bool) -> SamplingSettings:
        return SamplingSettings(2.0 + image if guided else 1.0, 0.6 + 0.1 * image, 0.9 + 0.02 * image)

    return Case(checkpoint, tiny_models.plan(policy), settings)


def var(policy: PruningPolicy, mode: SamplingMode = SamplingMode(), shared: bool = False) -> Case:  # noqa: B008  frozen
    config = replace(tiny_var.CONFIG, shared_modulation=shared, heads=2 if shared else 4)

    def settings(image: int, guided: bool) -> SamplingSettings:
        guidance = 2.0 + image if guided else 0.0
        return SamplingSettings(guidance, None, 0.9 + 0.02 * image, 20 + image, VAR.guidance_off)

    return Case(lambda: tiny_var.checkpoint(config), VAR.plan(config.schedule, policy, config, mode), settings)


def hart(policy: PruningPolicy = DENSE, modulated: bool = False, **mode: Any) -> Case:
    config = replace(tiny_hart.CONFIG, modulated=modulated, pooling="avg" if modulated else tiny_hart.CONFIG.pooling)

    def checkpoint() -> Checkpoint:
        made = random_checkpoint_for(config, tiny_hart.TOKENIZER, name="tiny")
        weights = tiny_hart.model(config).state_dict()
        return replace(made, transformer_weights=weights, image_tokenizer_weights=tiny_hart.tokenizer().state_dict())

    def settings(image: int, guided: bool) -> SamplingSettings:
        return SamplingSettings(2.0 + image if guided else 0.0, None, 0.9 + 0.02 * image, guidance_off=0.0)

    return Case(checkpoint, HART.plan(config.schedule, policy, config, SamplingMode(**mode)), settings)


INFINITY_PRUNED, LATE = tiny_models.POLICY, tiny_models.without_guidance(tiny_models.POLICY, 5)
CASES = {
    "infinity-dense": infinity(DENSE),
    "infinity-pruned": infinity(INFINITY_PRUNED),
    "infinity-guidance-ends": infinity(LATE),
    "infinity-shared-selection": infinity(replace(INFINITY_PRUNED, shared_selection=True)),
    "infinity-text-ends": infinity(tiny_models.without_text(LATE, 5)),
    "infinity-patchified": infinity(INFINITY_PRUNED, patchify=True),
    "var-dense": var(DENSE),
    "var-pruned": var(tiny_var.PRUNED),
    "var-guidance-ends": var(replace(tiny_var.PRUNED, rules={4: ScaleRule(0.25, guidance=False)})),
    "var-smooth": var(tiny_var.PRUNED, SamplingMode(smooth=True)),
    "var-one-modulation": var(tiny_var.PRUNED, shared=True),
    "hart-dense": hart(),
    "hart-pruned": hart(tiny_hart.PRUNED),
    "hart-guidance-ends": hart(replace(tiny_hart.PRUNED, rules={4: ScaleRule(0.25, guidance=False)})),
    "hart-modulated": hart(tiny_hart.PRUNED, modulated=True),
    "hart-parts": hart(final_iterations=3),
    "hart-parts-modulated-smooth": hart(modulated=True, final_iterations=2, smooth=True),
    "hart-parts-guidance-ends": hart(PruningPolicy("off", {4: ScaleRule(guidance=False)}), final_iterations=2),
    "hart-no-residual": hart(residual=False),
}


@dataclass
class Drawn:
    """One image: logits and running sums of every scale, and pixels."""

    logits: list[NDArray[Any]] = field(default_factory=list)
    sums: list[NDArray[Any]] = field(default_factory=list)
    pixels: NDArray[Any] | None = None


def draw(session: Session, case: Case, images: Sequence[int], guided: bool) -> list[Drawn]:
    """Images by number, in one pass."""
    workspace = session.workspace(2 if guided else 1, len(images))
    manifest = session.manifest
    if manifest.text_length:
        workspace.give_features([features(manifest, image) for image in images])
    else:
        given = [LabelInput(image) for image in images]
        workspace.give(given)
    noises = [seeded_noise(7 + image) for image in images]
    found = [Drawn() for _ in images]
    for calls, _ in workspace.run_scales(noises, [case.settings(image, guided) for image in images]):
        logits = workspace.read(calls.sampling_head, "logits")
        by_image = logits.reshape(-1, len(images), logits.shape[-1])
        for place, own in enumerate(found):
            own.logits.append(by_image[:, place].copy())
            own.sums.append(workspace.summed_codes(calls, place).copy())
    for place, own in enumerate(found):
        own.pixels = workspace.decode(place).copy()
    return found


def features(manifest: Any, image: int) -> TextFeatures:
    """A text of an image's own, and of its own length."""
    rng, length = np.random.default_rng(image), 2 + image % (manifest.text_length - 2)
    width = manifest.engines[manifest.sets[0].conditioning].tensor("cond").shape[-1]
    cond, uncond = (rng.standard_normal((length, width), dtype=np.float32) for _ in range(2))
    padded = np.zeros((manifest.text_length, width), np.float32)
    padded[:length] = cond
    return TextFeatures(padded, uncond, (length, length))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@torch.no_grad()
def test_images_of_a_pass_are_what_they_are_alone(case: Case, tmp_path: Path):
    session = ModuleBundle(case.checkpoint(), case.plan, tmp_path, BATCHES).session()
    for guided in (True, False):
        alone = [draw(session, case, [image], guided)[0] for image in range(4)]
        assert not np.allclose(alone[0].sums[-1], alone[1].sums[-1]), "images differ"
        for images in ([0, 1, 2, 3], [2, 1]):
            for image, found in zip(images, draw(session, case, images, guided), strict=True):
                for one, other in zip(found.logits, alone[image].logits, strict=True):
                    np.testing.assert_allclose(one, other, atol=3e-4, rtol=1e-3)
                for one, other in zip(found.sums, alone[image].sums, strict=True):
                    np.testing.assert_allclose(one, other, atol=1e-3, rtol=1e-3)
                np.testing.assert_allclose(found.pixels, alone[image].pixels, atol=1e-3)
