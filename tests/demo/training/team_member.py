"""What test_team.py runs: a gradient over four parts of a step, and steps of Muon, by a number of processes."""

import argparse

import torch

from demo.training.loop import Muon
from demo.training.team import Team, team

PARTS = 4


def matrices_after_two_steps(own: Team) -> list[torch.Tensor]:
    """Three matrices that each process has the gradients of."""
    torch.manual_seed(0)
    matrices = [torch.randn(8, 6, requires_grad=True), torch.randn(4, 12, requires_grad=True), torch.ones(5, 5)]
    optimizer = Muon([m.requires_grad_() for m in matrices], 0.01, 0.1, own)
    for _ in range(2):
        for m in matrices:
            m.grad = torch.randn_like(m)
        optimizer.step()
    return [m.detach() for m in matrices]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--meeting", default="")
    args = parser.parse_args()
    weight, unused = (torch.ones(3, requires_grad=True) for _ in range(2))
    total = torch.zeros(1)
    with team("tests.demo.training.team_member", [], args.processes, args.meeting) as own:
        for part in own.parts(PARTS):
            loss = (weight * part**2).sum()
            loss.backward()
            total += loss.detach()
        own.add_up([weight, unused], total)
        alone, together = matrices_after_two_steps(Team()), matrices_after_two_steps(own)
        assert all(map(torch.equal, alone, together)), (alone, together)
        if own.leads:
            print(weight.grad.tolist(), total.item(), list(own.parts(PARTS)))
