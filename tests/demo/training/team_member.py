"""What test_team.py runs: the gradient of a model over four parts of a step, by a number of processes."""

import argparse

import torch

from demo.training.team import team

PARTS = 4

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
        if own.leads:
            print(weight.grad.tolist(), total.item(), list(own.parts(PARTS)))
