"""HART's step modules, chained by the runtime, against the reference; recorded runs besides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvar.core.plan import Batch, SamplingMode
from fastvar.core.policy import DENSE, PruningPolicy, ScaleRule
from fastvar.errors import PlanError
from fastvar.export.assembly import assemble
from fastvar.export.checkpoints.checkpoint import Checkpoint
from fastvar.export.checkpoints.random_weights import random_checkpoint_for
from fastvar.export.models.hart.reference import PassTrace, Prompt, Sampling, generate_scales
from fastvar.families.base import PromptFormat
from fastvar.families.hart import HART, HartConfig
from fastvar.runtime.memory.layout import StepCalls
from fastvar.runtime.requests.settings import SamplingSettings
from fastvar.runtime.workspace import Workspace
from tests.models import tiny_hart as tiny
from tests.models.module_bundle import ModuleBundle

MODULATED = replace(tiny.CONFIG, modulated=True, pooling="avg", context_norm=False)
PLAIN = replace(tiny.CONFIG, modulated=True, unit_queries=False, timestep_levels=False)
UNGUIDED = ScaleRule(guidance=False)
LATE = replace(tiny.PRUNED, rules={3: ScaleRule(0.5, guidance=False), 4: ScaleRule(0.25, guidance=False)})
ORDER = torch.randperm(36, generator=torch.manual_seed(3))


@dataclass(frozen=True)
class Case:
    config: HartConfig = tiny.CONFIG
    policy: PruningPolicy = DENSE
    sampling_mode: SamplingMode = field(default_factory=SamplingMode)
    rows: int = 2
    guidance: float = 3.0
    top_p: float = 1.0


CASES = {
    "dense": Case(),
    "one-row": Case(rows=1),
    "top-p": Case(top_p=0.8),
    "top-p-of-zero": Case(top_p=0.0),
    "pruned": Case(policy=tiny.PRUNED),
    "pruned-one-row": Case(policy=tiny.PRUNED, rows=1),
    "shared-selection": Case(policy=replace(tiny.PRUNED, shared_selection=True)),
    "skipped": Case(policy=PruningPolicy("skip", {2: ScaleRule(skip=True)})),
    "guidance-off-late": Case(policy=LATE),
    "modulated": Case(MODULATED, tiny.PRUNED),
    "modulated-quarter-scale-level-table": Case(PLAIN),
    "smooth": Case(sampling_mode=SamplingMode(smooth=True)),
    "no-residual": Case(sampling_mode=SamplingMode(residual=False)),
    "three-parts": Case(sampling_mode=SamplingMode(final_iterations=3)),
    "three-parts-one-row": Case(MODULATED, sampling_mode=SamplingMode(final_iterations=3), rows=1),
    "parts-without-guidance": Case(PLAIN, PruningPolicy("off", {4: UNGUIDED}), SamplingMode(final_iterations=2)),
    "residual-guided-at-exactly-one": Case(guidance=4 / 3),
}


def checkpoint(config: HartConfig) -> Checkpoint:
    made = random_checkpoint_for(config, tiny.TOKENIZER, name="tiny")
    images = tiny.tokenizer().state_dict()
    return replace(made, transformer_weights=tiny.model(config).state_dict(), image_tokenizer_weights=images)


def workspace_for(case: Case, folder: Path, text: Prompt, **changes: Any) -> Workspace:
    plan = HART.plan(case.config.schedule, case.policy, case.config, case.sampling_mode)
    made = replace(checkpoint(case.config), **changes)
    workspace = ModuleBundle(made, plan, folder).session().workspace(case.rows)
    workspace.set_features(text.features[0].numpy(), None, (int(text.mask.sum()),))
    return workspace


def noise(index: int, shape: tuple[int, ...], name: str = "noise"):
    """What the reference draws, by pass."""
    kind, _, part = name.partition(".")
    draws = {"noise": tiny.uniform, "gumbel": tiny.normal, "residual_noise": tiny.normal, "order": lambda *_: ORDER}
    return draws[kind](index + int(part or 0), shape).numpy()


def reference(case: Case, text: Prompt) -> Iterator[PassTrace]:
    d = case.sampling_mode
    sampling = Sampling(case.guidance, case.top_p % 1, d.smooth, d.residual, d.final_iterations)
    plan = HART.plan(case.config.schedule, case.policy, case.config)
    draws, models = replace(tiny.DRAWS, order=ORDER[None]), (tiny.model(case.config), tiny.tokenizer())
    return generate_scales(*models, text, plan, draws, sampling, guided=case.rows == 2)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_chained_steps_equal_the_reference(case: Case, tmp_path: Path):
    text = tiny.prompt((3,))
    workspace = workspace_for(case, tmp_path, text)
    settings = SamplingSettings(case.guidance, None, case.top_p, guidance_off=0.0)
    for (calls, _), trace in zip(workspace.run_scales(noise, settings), reference(case, text), strict=True):
        out = read(workspace, calls.layers[-1], "x_out").unflatten(0, (-1, calls.rows)).transpose(0, 1)
        torch.testing.assert_close(out, trace.layer_out[-1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            read(workspace, calls.sampling_head, "logits"), trace.logits[0], atol=2e-4, rtol=1e-4
        )
        if "codes" in calls.sampling_head.tensors:
            assert read(workspace, calls.sampling_head, "codes").tolist() == trace.codes[0].tolist()
        if calls.kept:
            assert_same_tokens_kept(workspace, calls, trace)
        if trace.summed is not None:
            summed = torch.from_numpy(workspace.summed_codes(calls).copy())
            torch.testing.assert_close(summed, trace.summed[0], atol=1e-3, rtol=1e-4)
    image = torch.from_numpy(workspace.decode().copy())
    assert trace.summed is not None
    torch.testing.assert_close(image, tiny.tokenizer().decode(trace.summed)[0], atol=5e-3, rtol=1e-3)


def read(workspace: Workspace, call, name: str) -> torch.Tensor:
    return torch.from_numpy(workspace.read(call, name).copy())


def assert_same_tokens_kept(workspace: Workspace, calls: StepCalls, trace: PassTrace) -> None:
    for layer, views in calls.kept.items():
        for name, view in views.items():
            found = torch.from_numpy(workspace.read_view(view) // calls.rows).view(-1, calls.rows).t()
            assert torch.equal(found.sort(-1).values, trace.states[layer].kept[name].sort(-1).values)


def test_padding_is_read(tmp_path: Path):
    text = tiny.prompt((3,))
    workspace = workspace_for(Case(), tmp_path, text)
    x = read(workspace, workspace.layout.conditioning, "x")
    padded = text.features[0].clone()
    padded[-1] += 1
    workspace.set_features(padded.numpy(), None, (3,))
    changed = (read(workspace, workspace.layout.conditioning, "x") != x).any(-1).view(-1, 2)
    assert changed.tolist() == [[False, False]] * 4 + [[True, False]]


def test_context_positions_stay_at_the_last_token_that_counts(tmp_path: Path):
    workspace = workspace_for(Case(), tmp_path, tiny.prompt((3,)))
    positions = read(workspace, workspace.layout.conditioning, "context_positions").view(-1, 2)
    assert positions.t().tolist() == [[0, 1, 2, 2, 2], [0] * 5]
    assert read(workspace, workspace.layout.conditioning, "offset").tolist() == [2, 0]


def test_padding_in_front_has_positions_before_the_first(tmp_path: Path):
    left = PromptFormat(pad_left=True, keeps_padding=True)
    workspace = workspace_for(Case(rows=1), tmp_path, tiny.prompt((3,)), prompt_format=left)
    assert read(workspace, workspace.layout.conditioning, "context_positions").tolist() == [-1, -1, 0, 1, 2]
    assert read(workspace, workspace.layout.conditioning, "offset").tolist() == [2]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (PruningPolicy("skip", {4: ScaleRule(skip=True)}), "skips HART's last scale"),
        (replace(tiny.PRUNED, restore_scale=0), "restores tokens from scale 0"),
    ],
)
def test_policies_that_hart_cannot_follow(policy: PruningPolicy, message: str):
    plan = HART.plan(tiny.CONFIG.schedule, policy, tiny.CONFIG)
    with pytest.raises(PlanError, match=message):
        assemble(plan, tiny.CONFIG, tiny.TOKENIZER, None, 5, [Batch(2)])


def test_parts_have_graphs_of_their_own():
    plan = HART.plan(tiny.CONFIG.schedule, DENSE, tiny.CONFIG, SamplingMode(final_iterations=3))
    (engines,) = assemble(plan, tiny.CONFIG, tiny.TOKENIZER, None, 5, [Batch(2)]).sets
    last = engines.steps[-3:]
    assert [step.part for step in plan.steps[-3:]] == [0, 1, 2]
    for kind in ("pick", "qkv", "attn_mlp", "sampling_head", "residual"):
        assert len({getattr(step, kind) for step in last}) == 3
    assert engines.steps[0].pick == engines.steps[0].residual == ""
