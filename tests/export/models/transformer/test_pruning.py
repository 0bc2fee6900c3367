import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvar.core.policy import PruningPolicy, ScaleRule
from fastvar.core.resize import area_ends, bilinear_matrix
from fastvar.export.models.infinity.reference import Sampling, generate_scales
from fastvar.export.models.transformer.pruning import gather, restore, select
from tests.models import tiny_models as tiny


def test_selection_takes_the_tokens_farthest_from_the_mean():
    x = torch.zeros(1, 6, 2)
    x[0, 4], x[0, 1] = torch.tensor([9.0, 0]), torch.tensor([0.0, 5])
    assert select(x, 2).tolist() == [[4, 1]]


def test_equal_scores_go_to_the_lowest_index():
    x = torch.tensor([1.0, -1, 1, -1, 1, -1]).view(1, 6, 1).repeat(2, 1, 1)
    assert select(x, 3).tolist() == [[0, 1, 2]] * 2


def test_each_row_selects_for_itself():
    x = torch.zeros(2, 5, 1)
    x[0, 3], x[1, 0] = 1, 1
    assert select(x, 1).tolist() == [[3], [0]]


def test_restoration_keeps_fresh_tokens_and_enlarges_the_rest_by_area():
    cached = torch.randn(1, 2 * 3, 4, generator=torch.manual_seed(0))
    fresh = torch.full((1, 2, 4), 7.0)
    kept = torch.tensor([[1, 19]])
    out = restore(fresh, kept, cached, (2, 3), (4, 5))
    expected = F.adaptive_avg_pool2d(cached.transpose(1, 2).view(1, 4, 2, 3), (4, 5)).flatten(2).transpose(1, 2)
    expected[0, [1, 19]] = 7.0
    torch.testing.assert_close(out, expected)


def test_gather_then_restore_of_everything_is_the_identity():
    x = torch.randn(2, 6, 3, generator=torch.manual_seed(0))
    kept = torch.stack([torch.randperm(6, generator=torch.manual_seed(i)) for i in range(2)])
    assert torch.equal(restore(gather(x, kept), kept, torch.zeros(2, 1, 3), (1, 1), (2, 3)), x)


def test_keep_ratio_one_is_dense_exactly():
    everything = PruningPolicy("all", {i: ScaleRule(1.0) for i in range(7)}, 0, tiny.CONFIG.depth, 2)
    runs = []
    for plan in (tiny.dense_plan(), tiny.plan(everything)):
        runs.append(list(generate_scales(tiny.model(), *tiny.text(), plan, tiny.noise, Sampling())))
    for dense, kept in zip(*runs, strict=True):
        assert torch.equal(dense.logits, kept.logits)
        assert torch.equal(dense.summed_codes, kept.summed_codes)


def test_pruning_changes_only_what_comes_after_the_first_pruned_scale():
    dense, pruned = (
        {t.step.index: t for t in generate_scales(tiny.model(), *tiny.text(), plan, tiny.noise, Sampling())}
        for plan in (tiny.dense_plan(), tiny.plan())
    )
    assert torch.equal(dense[2].logits, pruned[2].logits)
    assert not torch.allclose(dense[3].logits, pruned[3].logits, atol=1e-3)
    assert 4 not in pruned
    assert pruned[6].states[1].keys.shape[2] == tiny.plan().capacity(1) < dense[6].states[1].keys.shape[2]


@given(st.integers(1, 24), st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_area_ends_are_torchs_adaptive_pooling(source: int, extra: int):
    target = source + extra
    values = torch.arange(source, dtype=torch.float64).square().view(1, 1, source)
    first, last = area_ends(source, target)
    assert (last - first).max() <= 1
    mine = (values[0, 0, first] + values[0, 0, last]) / 2
    torch.testing.assert_close(mine, F.adaptive_avg_pool1d(values, target)[0, 0])


@given(st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_bilinear_matrix_is_torchs_interpolation(source: int, target: int):
    values = torch.randn(1, 1, source, 1, generator=torch.manual_seed(0))
    expected = F.interpolate(values, size=(target, 1), mode="bilinear", align_corners=False)[0, 0, :, 0]
    mine = torch.from_numpy(bilinear_matrix(source, target)) @ values[0, 0, :, 0]
    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(bilinear_matrix(source, target).sum(1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "keep", "expected"), [(1024, 0.6, 615), (1600, 0.5, 800), (7, 1.0, 7), (10, 0.7, 7)]
)
def test_kept_counts_are_the_published_ones(tokens: int, keep: float, expected: int):
    assert ScaleRule(keep).kept(tokens) == expected
