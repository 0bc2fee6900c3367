from pathlib import Path

import pytest
import torch
from torch import nn

from demo.training.curve import Curve, read
from demo.training.loop import Minutes, Steps, TrainingRun, learning_rate_factor, optimizers, orthogonalize


def _run(file: Path) -> TrainingRun:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    return TrainingRun(model, optimizers(matrices, others, 1e-2, 0.02), file, Steps(6), average=0.9)


def _step(run: TrainingRun) -> None:
    batch = torch.randn(4, 6)  # of the generator that the run saves
    run.model(batch).square().mean().backward()
    run.update()


def test_an_interrupted_run_ends_with_the_weights_of_a_whole_one(tmp_path: Path):
    whole = _run(tmp_path / "whole.pt")
    for _ in range(6):
        _step(whole)
    first = _run(tmp_path / "parts.pt")
    for _ in range(3):
        _step(first)
    first.save()
    for _ in range(2):
        _step(first)  # lost: nothing is saved of it
    second = _run(tmp_path / "parts.pt")
    assert second.step == 3
    for _ in range(3):
        _step(second)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name]), name
        assert torch.equal(whole.averaged[name], second.averaged[name]), name


def test_a_checkpoint_of_another_model_is_refused_in_words(tmp_path: Path):
    file = tmp_path / "state.pt"
    for inputs in (3, 4):
        model = torch.nn.Linear(inputs, 2)
        if inputs == 3:
            TrainingRun(model, [], file, Steps(2), average=0.0).save()
    with pytest.raises(SystemExit, match=r"state.pt cannot be resumed.*expected.*FASTVAR_DEMO_STATE"):
        TrainingRun(model, [], file, Steps(2), average=0.0)


def test_budgets_of_steps_and_of_minutes():
    assert Steps(8).progress(2, 1e9) == 0.25
    assert Minutes(2).progress(10**9, 30.0) == 0.25
    assert learning_rate_factor(0.03) == 1.0
    assert learning_rate_factor(1.0) < 1e-6 < learning_rate_factor(0.0)


def test_a_rate_that_falls_late_is_constant_until_then():
    assert learning_rate_factor(0.03, 0.7) == learning_rate_factor(0.5, 0.7) == learning_rate_factor(0.7, 0.7) == 1.0
    assert learning_rate_factor(0.85, 0.7) == 0.5
    assert learning_rate_factor(1.0, 0.7) < 1e-6


def test_orthogonalized_updates_have_singular_values_near_one():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(40, 16)))
    assert 0.6 < values.min() <= values.max() < 1.3


def test_a_curve_goes_on_at_the_step_that_is_resumed(tmp_path: Path):
    file = tmp_path / "curves" / "stage.csv"
    curve = Curve(file, ("loss", "psnr"), 0)
    for step in (2, 4, 6):
        curve.add({"loss": step})
        curve.add({"loss": step + 1})
        line = curve.write(step, 1.0)
    assert line == "step 6 1 s loss 6.5000"
    resumed = Curve(file, ("loss", "psnr"), 4)
    resumed.add({"loss": 9, "psnr": 30})
    resumed.write(6, 2.0)
    rows = read(file)
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    assert [row["loss"] for row in rows] == ["2.5000", "4.5000", "9.0000"]
    assert [row["psnr"] for row in rows] == ["", "", "30.0000"]
