from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastvar.core.plan import make_plan
from fastvar.core.policy import DENSE, PruningPolicy, ScaleRule
from fastvar.export.models.codebook.reference import draw, filter_logits, guide, mix, teacher_inputs
from fastvar.export.models.codebook.tokenizer import Quantizer, area_pool
from fastvar.export.models.transformer.pruning import select
from fastvar.export.models.var.model import VarTransformer
from fastvar.export.models.var.reference import Noise, VarSampling, generate_scales, teacher_logits
from fastvar.families.codebook import VqTokenizerConfig
from fastvar.families.var import VarConfig
from tests.parity.var import compare_var_folder

RECORDED = Path(__file__).parents[3] / "golden" / "var_tiny"
CONFIG = VarConfig(
    depth=3, width=32, heads=2, mlp_width=64, classes=5, codes=24, code_channels=4, scales=(1, 2, 3, 4, 6)
)
LABELS = torch.tensor([1, 4])
PRUNED = PruningPolicy("pruned", {3: ScaleRule(0.5), 4: ScaleRule(0.25)}, 1, 3, 2)
HARD = VarSampling(guidance_scale=1.5, top_k=10, top_p=0.9)
INF = float("inf")


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    model = VarTransformer(CONFIG).eval().requires_grad_(False)
    for tensor in model.parameters():
        tensor.copy_(torch.randn_like(tensor) * 0.35)
    quantizer = Quantizer(VqTokenizerConfig(24, 4, base_channels=32)).eval().requires_grad_(False)
    return model, quantizer


def uniform(scale, shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(scale))


def gumbel(scale, shape):
    return -torch.empty(shape).exponential_(generator=torch.Generator().manual_seed(scale)).log()


def run(models, policy=DENSE, sampling=HARD, noise=None):
    plan = make_plan(CONFIG.schedule, policy, CONFIG.depth)
    return list(generate_scales(*models, LABELS, plan, noise or Noise(uniform, gumbel), sampling))


def forced(traces):
    """Noise that forces the codes of another run."""
    maps = {trace.step.index: trace.token_map.flatten(1) for trace in traces}
    return Noise(lambda scale, shape: -1.0 - maps.get(scale, torch.zeros(shape)))


# The published program's recorded runs


@pytest.fixture(scope="module")
def comparisons():
    return {c.title.split(":")[0]: c for c in compare_var_folder(RECORDED)}


@pytest.mark.parametrize(
    ("name", "tensors", "sets", "limit"),
    [
        ("VAR run_hard", 12, 14, 2e-5),
        ("VAR run_smooth", 10, 10, 5e-4),
        ("VAR quantiser", 3, 10, 2e-6),
        ("VAR training forward", 2, 0, 4e-5),
    ],
)
def test_recorded_run_is_reproduced(comparisons, name, tensors, sets, limit):
    comparison = comparisons[name]
    assert len(comparison.errors) >= tensors
    assert comparison.checked_sets == sets
    assert comparison.failures == []
    assert max(comparison.errors.values()) < limit


# Generation


def test_cached_scales_equal_the_training_forward(models):
    """Scale after scale over a cache, and all at once under a mask."""
    traces = run(models, sampling=replace(HARD, guidance_scale=0.0))
    inputs = teacher_inputs(models[1], [trace.token_map for trace in traces])
    at_once = teacher_logits(models[0], LABELS, inputs)
    torch.testing.assert_close(torch.cat([trace.logits for trace in traces], dim=1), at_once, atol=2e-4, rtol=1e-4)
    first = CONFIG.first_token(3)
    alone = teacher_logits(models[0], LABELS, inputs[:, : first - 1])
    torch.testing.assert_close(alone, at_once[:, :first], atol=2e-4, rtol=1e-4)


def test_the_first_scale_is_not_guided_and_the_last_one_fully(models):
    traces = run(models)
    plain = run(models, sampling=replace(HARD, guidance_scale=0.0), noise=forced(traces))
    torch.testing.assert_close(traces[0].logits, plain[0].logits)
    both = models[0].logits(traces[-1].layer_out[-1], models[0].conditioning(torch.cat((LABELS, torch.tensor([5, 5])))))
    torch.testing.assert_close(traces[-1].logits, 2.5 * both[:2] - 1.5 * both[2:])
    torch.testing.assert_close(both[:2], plain[-1].logits)


def test_a_forced_run_repeats_the_one_it_is_forced_to(models):
    traces = run(models)
    again = run(models, noise=forced(traces))
    assert all(torch.equal(a.token_map, b.token_map) for a, b in zip(traces, again, strict=True))
    assert torch.equal(traces[-1].summed, again[-1].summed)


def test_smooth_sampling_mixes_what_the_filter_has_left(models):
    for trace in run(models, sampling=replace(HARD, smooth=True)):
        assert trace.mixture is not None
        torch.testing.assert_close(trace.mixture.sum(-1), torch.ones(trace.mixture.shape[:2]))
        assert not trace.mixture[~trace.kept_codes].any()
    single = run(models, sampling=VarSampling(1.5, top_k=1, top_p=0.0, smooth=True))
    for trace in single:  # of one code there is nothing to mix
        torch.testing.assert_close(trace.codes, models[1].lookup(trace.token_map))


# Pruning


def test_keeping_every_token_is_the_dense_run(models):
    dense = run(models)
    kept = run(models, replace(PRUNED, rules={3: ScaleRule(1.0), 4: ScaleRule(1.0)}))
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(dense, kept, strict=True))


def test_pruned_layers_forward_and_remember_only_what_they_keep(models):
    traces = run(models, PRUNED)
    plan = make_plan(CONFIG.schedule, PRUNED, CONFIG.depth)
    keys = [state.keys.shape[2] for state in traces[-1].states]
    assert keys == [plan.capacity(layer) for layer in range(3)] == [66, 31, 31]
    kept = traces[-1].states[1].kept
    assert {name: index.shape for name, index in kept.items()} == {"sa": (4, 9), "ffn": (4, 9)}
    assert not torch.equal(kept["sa"].sort().values, kept["ffn"].sort().values)
    assert torch.equal(kept["sa"], select(traces[-1].layer_out[0], 9))


def test_a_token_kept_by_neither_sub_layer_gets_what_both_gave_at_the_cached_scale(models):
    traces = run(models, PRUNED)
    state, layer_out = traces[-1].states[1], traces[-1].layer_out
    for row in range(4):
        rest = sorted(set(range(36)) - set(torch.cat([kept[row] for kept in state.kept.values()]).tolist()))
        cached = state.outputs["sa"][row] + state.outputs["ffn"][row]  # of the 3x3 scale, each for 2x2 tokens of 6x6
        expected = cached.view(3, 1, 3, 1, -1).expand(3, 2, 3, 2, -1).reshape(36, -1)
        torch.testing.assert_close((layer_out[1] - layer_out[0])[row, rest], expected[rest], atol=1e-5, rtol=1e-5)


def test_sub_layers_may_share_the_selection(models):
    traces = run(models, replace(PRUNED, shared_selection=True))
    state = traces[-1].states[2]
    assert torch.equal(state.kept["sa"], state.kept["ffn"])


def test_a_skipped_scale_leaves_its_embedding_and_phi_unused(models):
    skipping = PruningPolicy("skipping", {3: ScaleRule(skip=True)})
    traces = run(models, skipping)
    assert [trace.step.index for trace in traces] == [0, 1, 2, 4]
    model = models[0]
    expected = model.embed(area_pool(traces[2].summed, (6, 6))) + model.place(4)
    torch.testing.assert_close(traces[3].block_in, expected.repeat(2, 1, 1))


def test_without_guidance_the_last_scale_is_the_conditional_row(models):
    dense = run(models)
    off = run(models, PruningPolicy("off", {4: ScaleRule(guidance=False)}), noise=forced(dense))
    assert len(off[-1].block_in) == 2
    torch.testing.assert_close(off[-1].layer_out[-1], dense[-1].layer_out[-1][:2])


# Sampling


def test_top_k_keeps_ties_and_top_p_the_likeliest():
    logits = torch.tensor([2.0, 1.0, 1.0, 0.0]).view(1, 1, 4)
    assert filter_logits(logits, 2, 0.0).flatten().tolist() == [2.0, 1.0, 1.0, -INF]
    assert filter_logits(logits, 0, 1e-6).flatten().tolist() == [2.0, -INF, -INF, -INF]
    assert torch.equal(filter_logits(logits, 0, 0.0), logits)
    assert torch.equal(filter_logits(logits, 900, 0.0), logits)


def test_top_p_goes_by_what_top_k_has_left():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert (filter_logits(logits, 0, 0.65) > -INF).tolist() == [True, True, False, False]  # 0.3 may go in all
    # of the first three: 4/9, 3/9, 2/9, so that 2/9 may go
    assert (filter_logits(logits, 3, 0.65) > -INF).tolist() == [True, True, False, False]
    assert (filter_logits(logits, 3, 0.8) > -INF).tolist() == [True, True, True, False]


def test_of_equal_logits_top_p_keeps_the_lowest_index():
    assert (filter_logits(torch.zeros(4), 0, 0.4) > -INF).tolist() == [True, True, False, False]


def test_a_number_picks_by_cumulative_probability_from_the_likeliest_down():
    filtered = torch.tensor([0.2, 0.0, 0.5, 0.3]).log().expand(1, 6, 4)  # code 1 was filtered out
    numbers = torch.tensor([[0.0, 0.49, 0.51, 0.79, 0.81, 1 - 2**-24]])
    assert draw(filtered, numbers).tolist() == [[2, 2, 3, 3, 0, 0]]


def test_of_equal_logits_the_lowest_index_comes_first():
    assert draw(torch.zeros(1, 4, 4), torch.tensor([[0.1, 0.3, 0.6, 0.9]])).tolist() == [[0, 1, 2, 3]]


def test_a_negative_number_forces_its_code_even_one_that_was_filtered():
    filtered = torch.tensor([0.0, -INF, -INF]).expand(1, 3, 3)
    assert draw(filtered, torch.tensor([[-1.0, -2.0, -3.0]])).tolist() == [[0, 1, 2]]


def test_guidance_pushes_away_from_the_unconditional_row():
    logits = torch.tensor([[[3.0, 1.0]], [[1.0, 1.0]]])
    assert guide(logits, 1, 0.5).tolist() == [[[4.0, 1.0]]]
    assert guide(logits[:1], 1, 0.5).tolist() == [[[3.0, 1.0]]]


def test_mixtures_sharpen_towards_the_last_scale():
    logits = torch.tensor([[[0.2, 0.1, -INF]]])
    early, late = (mix(logits, torch.zeros(1, 1, 3), progress)[0, 0] for progress in (0.0, 1.0))
    torch.testing.assert_close(early[0] / early[1], torch.tensor(0.1 / 0.27).exp())
    torch.testing.assert_close(late[0] / late[1], torch.tensor(0.2 / 0.0135).exp(), rtol=1e-4, atol=0)
    assert early[2] == late[2] == 0
