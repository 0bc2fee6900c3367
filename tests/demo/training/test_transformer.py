"""The recipe: what is drawn for a step, what a lesson trains, and a shortened run of all stages."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastvar
from demo.training.config import CONFIG
from demo.training.environment import VARIABLES
from demo.training.latent_codec import BITS, SCHEDULES
from demo.training.teacher_forcing import run_block
from demo.training.transformer import (
    CURRICULUM,
    LARGE,
    SMALL,
    Batch,
    build,
    context_losses,
    lesson_losses,
    lesson_of,
    padded,
)
from fastvar.families.infinity import TransformerConfig

TINY = TransformerConfig(
    depth=2, width=64, heads=2, mlp_width=64, text_width=128, text_length=12, code_channels=BITS, chunks=2
)


def _batch(side: int) -> Batch:
    torch.manual_seed(0)
    latent = 0.5 * torch.randn(2, BITS, *SCHEDULES[side].final)
    return Batch(latent, torch.randn(2, 6, 128), torch.ones(2, 6, dtype=torch.bool))


def test_lessons_come_in_their_shares_and_the_same_for_a_step():
    for start, lessons in CURRICULUM:
        assert sum(share for _, share in lessons) == pytest.approx(1)
        drawn = [lesson_of(start, step) for step in range(2000)]
        assert drawn == [lesson_of(start, step) for step in range(2000)]
        for lesson, share in lessons:
            assert np.mean([one == lesson for one in drawn]) == pytest.approx(share, abs=0.05)


def test_the_last_lessons_see_the_whole_context():
    assert all(not lesson.kept for lesson, _ in CURRICULUM[-1][1])
    assert {lesson.side for lesson, _ in CURRICULUM[-1][1]} == set(SCHEDULES)


@pytest.mark.parametrize("lesson", [SMALL, LARGE], ids=["small", "large"])
def test_a_fresh_model_guesses_and_learns(lesson):
    torch.manual_seed(0)
    model, batch = build(TINY), _batch(lesson.side)
    losses = lesson_losses(model, batch, lesson)
    assert losses.shape == (lesson.scales,)
    torch.testing.assert_close(losses, torch.full_like(losses, np.log(2)), atol=0.05, rtol=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = context_losses(model, batch, lesson)
    for _ in range(5):
        optimizer.zero_grad()
        lesson_losses(model, batch, lesson).sum().backward()
        optimizer.step()
    assert context_losses(model, batch, lesson)[0] < before[0] - 0.1  # the rest of these latents is noise


@pytest.mark.slow
@pytest.mark.parametrize("lesson", [SMALL, LARGE], ids=["small", "large"])
def test_compiled_blocks_learn_what_eager_ones_do(lesson):
    model, batch, found = build(TINY), _batch(lesson.side), []
    for block in (run_block, torch.compile(run_block, dynamic=False)):
        torch.manual_seed(1)
        model.zero_grad()
        losses = lesson_losses(model, batch, lesson, block)
        losses.sum().backward()
        found.append((losses.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (eager, gradient), (compiled, compiled_gradient) = found
    torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=0)
    assert (compiled_gradient - gradient).norm() < 0.02 * gradient.norm()  # products in bf16


def test_text_is_padded_to_one_length_and_that_changes_no_loss():
    model, batch = build(TINY), _batch(256)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    features, mask = padded(batch.features, batch.mask)
    assert features.shape == (2, CONFIG.text_length, 128)
    assert mask.sum() == batch.mask.sum()
    short, long = (context_losses(model, b, SMALL) for b in (batch, Batch(batch.latent, features, mask)))
    torch.testing.assert_close(short, long, atol=2e-3, rtol=0)


@pytest.mark.slow
def test_a_shortened_run_of_the_recipe_makes_a_checkpoint_that_draws_both_sizes(tmp_path: Path, engine_cache: Path):
    environment = {**os.environ, **VARIABLES, "FASTVAR_DEMO_STATE": str(tmp_path)}
    command = [sys.executable, "-m", "demo.training", "--shortened"]
    subprocess.run(command, env=environment, check=True)
    again = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert again.stdout.count("finished before") == 5
    for size, scales in (("256x256", 7), ("512x512", 10)):
        out = tmp_path / size
        fastvar.build(tmp_path / "checkpoint", size=size, policy="fastvar", guidance="on", out=out, cache=engine_cache)
        image = fastvar.Pipeline.load(out)("a large red star on a dotted gray background", seed=0).images[0]
        assert f"{image.width}x{image.height}" == size
        assert len(fastvar.Pipeline.load(out).manifest.plan.schedule.sizes) == scales
    weights = sum(file.stat().st_size for file in (tmp_path / "checkpoint").rglob("*") if file.is_file())
    assert weights < 20e6
