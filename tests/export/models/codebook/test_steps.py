"""Choosing codes by ranks, in graphs, against the sorts of the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvar.export.models.codebook.reference import draw, filter_logits, mix
from fastvar.export.models.codebook.steps import HIDDEN, Ranking, running_sums
from fastvar.export.models.common.rows import LONGEST_TOPK, largest, topk_operator


@given(
    seed=st.integers(0, 10**6),
    codes=st.integers(2, 150),
    top_k=st.integers(0, 160),
    top_p=st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.01]),
)
@settings(max_examples=60, deadline=None)
def test_ranks_leave_and_draw_what_sorting_does(seed, codes, top_k, top_p):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(5, codes, generator=generator)
    uniform = torch.rand(5, generator=generator)
    ranking = Ranking(logits, codes, torch.tensor([1 - top_p]), torch.tensor([top_k]))
    filtered = filter_logits(logits, top_k, top_p)
    assert torch.equal((ranking.mass > 0).sum(1), (filtered > -float("inf")).sum(1))
    assert torch.equal(ranking.draw(uniform), draw(filtered[None], uniform[None])[0])
    gumbel = -torch.log(torch.empty_like(logits).exponential_(generator=generator))
    torch.testing.assert_close(ranking.mix(gumbel, torch.tensor([0.3])), mix(filtered, gumbel, 0.3))


def test_a_code_can_be_forced_though_it_is_not_left():
    ranking = Ranking(torch.tensor([[0.0, 9.0, 1.0]]), 1, torch.zeros(1), None)
    assert ranking.draw(torch.tensor([0.999])).tolist() == [1]
    assert ranking.draw(torch.tensor([-3.0])).tolist() == [2]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 300, 4096])
def test_running_sums(length):
    x = torch.rand(3, length)
    torch.testing.assert_close(running_sums(x), x.cumsum(1))
    torch.testing.assert_close(running_sums(x, falling=True), x.flip(1).cumsum(1).flip(1))


def test_more_than_a_compiler_ranks_is_ranked_in_turns():
    x = torch.stack([torch.randperm(LONGEST_TOPK + 200).float() for _ in range(4)])  # no two are equal
    with topk_operator():
        values, index = largest(x, x.shape[1], 1, 2 * HIDDEN)
    ordered, places = x.sort(dim=1, descending=True)
    assert torch.equal(values, ordered)
    assert torch.equal(index, places)
