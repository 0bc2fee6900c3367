"""HART's reference against recorded runs, and against itself where options must not matter."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastvar.core.plan import make_plan
from fastvar.core.policy import DENSE, PruningPolicy, ScaleRule
from fastvar.errors import PlanError
from fastvar.export.models.hart.diffusion import DiffusionNet, diffusion_steps, sample
from fastvar.export.models.hart.model import image_rotary
from fastvar.export.models.hart.reference import Prompt, Sampling, generate_scales
from fastvar.export.models.transformer.pruning import select
from tests.models.tiny_hart import CONFIG, DRAWS, PRUNED, model, prompt, tokenizer
from tests.parity.comparison import Comparison
from tests.parity.hart import compare_hart_folder

FOLDER = Path(__file__).parents[3] / "golden" / "hart_tiny"
HARD = Sampling(smooth=False, guidance_scale=2.0)


def scales(policy=DENSE, sampling=HARD, draws=DRAWS, made=None, text=None, guided=True):
    made = made or model()
    plan = make_plan(made.config.schedule, policy, made.config.depth)
    return generate_scales(made, tokenizer(), text or prompt(), plan, draws, sampling, guided)


def generate(*args, **options):
    return list(scales(*args, **options))


@pytest.fixture(scope="module")
def comparisons() -> dict[str, Comparison]:
    return {c.title.split(":")[0]: c for c in compare_hart_folder(FOLDER)}


@pytest.mark.parametrize("case", ["short_smooth", "short_maskgit3", "short_aln_discrete"])
def test_recorded_run_is_reproduced(comparisons: dict[str, Comparison], case: str):
    comparison = comparisons[case]
    assert len(comparison.errors) > 20
    assert comparison.failures == []
    assert max(comparison.errors.values()) < 2e-4


def test_a_keep_ratio_of_one_is_dense():
    kept_all = replace(PRUNED, rules={3: ScaleRule(1.0), 4: ScaleRule(1.0)})
    for pruned, dense in zip(generate(kept_all), generate(), strict=True):
        assert torch.equal(pruned.layer_out[-1], dense.layer_out[-1])


def test_pruned_tokens_alone_are_cached_and_the_others_restored():
    """The first layer, whose input is known: kept tokens keep their positions, dropped ones add what is cached."""
    made = model()
    trace = next(trace for trace in scales(PRUNED, made=made) if trace.index == 3)
    x, out, state = trace.block_in, trace.layer_out[0], trace.states[0]
    kept = select(x, 8)
    assert torch.equal(state.kept["sa"], kept)
    rotary = image_rotary((4, 4), (6, 6), torch.tensor([2, 4, 0, 0]), made.config.head_dim)
    for row in range(4):
        _, k, _ = made.layers[0].project_qkv(x[row : row + 1, kept[row]], None, rotary[:, row : row + 1, kept[row]])
        assert torch.allclose(state.keys[row, :, 5 + 4 + 9 :], k[0], atol=1e-5)
        cached = state.outputs["sa"][row] + state.outputs["ffn"][row]  # of 3x3
        enlarged = F.interpolate(cached.t().view(1, -1, 3, 3), (4, 4), mode="area").view(-1, 16).t()
        dropped = list(set(range(16)) - set(kept[row].tolist()) - set(state.kept["ffn"][row].tolist()))
        assert len(dropped) > 2
        assert torch.allclose(out[row, dropped], (x[row] + enlarged)[dropped], atol=1e-5)


def test_a_pruned_last_scale_in_several_iterations_is_not_pruned():
    order = torch.stack([torch.randperm(36, generator=torch.manual_seed(i)) for i in range(2)])
    sampling, draws = replace(HARD, final_iterations=2), replace(DRAWS, order=order)
    traces = generate(PRUNED, sampling, draws)
    assert [trace.block_in.shape[1] for trace in traces[4:]] == [11, 25]
    assert [trace.index for trace in traces[4:]] == [4, 5]
    run = torch.cat([trace.tokens for trace in traces[4:]], dim=1).sort(dim=1).values
    assert torch.equal(run, torch.arange(36).expand(2, -1))
    assert traces[4].summed is None
    assert traces[5].summed is not None


def test_images_of_a_batch_do_not_see_each_other():
    both = generate()
    forced = replace(DRAWS, codes=lambda i, _: -1.0 - both[i].codes[1:], diffusion=_last_rows(DRAWS.diffusion))
    alone = generate(draws=forced, text=_second(prompt()))
    assert torch.allclose(alone[-1].summed, both[-1].summed[1:], atol=1e-4)


def _second(text):
    return Prompt(text.features[1:], text.mask[1:], text.positions[1:])


def _last_rows(diffusion):
    return lambda index, shape: diffusion(index, (shape[0], 2 * shape[1], shape[2]))[:, shape[1] :]


def test_without_guidance_the_conditional_rows_decide():
    unguided = generate(guided=False)
    nothing = generate(sampling=replace(HARD, guidance_scale=0.0))
    assert unguided[-1].block_in.shape[0] == 2
    assert torch.allclose(unguided[-1].summed, nothing[-1].summed, atol=1e-5)


def test_guidance_that_is_switched_off_leaves_conditional_rows():
    off = PruningPolicy("off", {3: ScaleRule(guidance=False), 4: ScaleRule(guidance=False)})
    traces = generate(off)
    assert [trace.block_in.shape[0] for trace in traces] == [4, 4, 4, 2, 2]
    assert traces[-1].diffusion_rows.shape[0] == 2 * 36


def test_options_of_the_final_scale_change_it_alone():
    """The residual adds at most its gain an element, for the last diffusion step ends in a mean of clamped numbers."""
    traces, plain = generate(), generate(sampling=replace(HARD, residual=False))
    assert torch.equal(traces[-1].codes, plain[-1].codes)
    difference = (traces[-1].summed - plain[-1].summed).abs()
    assert 0 < difference.max() <= 0.6 + 1e-3
    assert plain[-1].diffusion == []
    expected = plain[-2].summed + tokenizer().quantize.embedding(plain[-1].codes).transpose(1, 2).unflatten(2, (6, 6))
    assert torch.allclose(plain[-1].summed, expected)


def test_a_skipped_scale_is_left_out_and_the_last_cannot_be():
    traces = generate(PruningPolicy("skip", {2: ScaleRule(skip=True)}))
    assert [trace.index for trace in traces] == [0, 1, 3, 4]
    with pytest.raises(PlanError, match="final scale"):
        generate(PruningPolicy("skip", {4: ScaleRule(skip=True)}))


def test_diffusion_guided_at_exactly_one_is_unguided():
    torch.manual_seed(0)
    net, z, noise = DiffusionNet(CONFIG), torch.randn(4, 32), torch.randn(3, 2, 4)
    with torch.no_grad():
        final = {g: [*sample(net, z, g, noise, diffusion_steps(3))][-1].x_out for g in (None, 0.0, 1.0, 1.001)}
    assert torch.equal(final[None], final[1.0])
    assert torch.equal(final[None], final[0.0])
    assert not torch.allclose(final[None], final[1.001], atol=1e-3)
