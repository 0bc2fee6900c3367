"""Gradients added up over processes, and the optimizer's work shared among them."""

import subprocess
import sys

import pytest

from demo.training.team import Team

MEMBER = [sys.executable, "-m", "tests.demo.training.team_member", "--processes"]


@pytest.mark.parametrize(("processes", "own"), [(1, [0, 1, 2, 3]), (2, [0, 2])])
def test_any_number_of_processes_finds_the_same_gradient_and_takes_the_same_steps(processes: int, own: list[int]):
    done = subprocess.run([*MEMBER, str(processes)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"[14.0, 14.0, 14.0] 42.0 {own}"


def test_every_part_is_one_members():
    for size in (1, 2, 3):
        parts = [part for rank in range(size) for part in Team(rank, size).parts(8)]
        assert sorted(parts) == list(range(8))
