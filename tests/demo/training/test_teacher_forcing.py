"""The training forward computes what the scale-by-scale reference computes."""

import torch

from demo.training.latent_codec import SCHEDULES
from demo.training.teacher_forcing import all_logits, make_example, random_subset
from fastvar.core.plan import make_plan
from fastvar.core.policy import DENSE
from fastvar.export.models.infinity.model import InfinityTransformer
from fastvar.export.models.infinity.reference import Sampling, generate_scales
from fastvar.families.infinity import TransformerConfig

SCHEDULE = SCHEDULES[256]
CONFIG = TransformerConfig(
    depth=2, width=64, heads=2, mlp_width=256, text_width=128, text_length=12, code_channels=8, chunks=2
)


def random_model() -> InfinityTransformer:
    torch.manual_seed(0)
    model = InfinityTransformer(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.requires_grad_(False)


def test_all_scales_at_once_equal_the_reference():
    model = random_model()
    latent = torch.randn(2, 8, *SCHEDULE.final)
    features, mask = torch.randn(2, 7, 128), torch.ones(2, 7, dtype=torch.bool)
    mask[0, 5:] = False
    example = make_example(latent, torch.zeros(2, 1, 1, 1), SCHEDULE, len(SCHEDULE))
    logits, scales = all_logits(model, features, mask, example, SCHEDULE)

    plan = make_plan(SCHEDULE, DENSE, CONFIG.depth)
    for row, length in enumerate((5, 7)):
        targets = [t[row] for t in example.targets]
        forced = generate_scales(
            model,
            features[row : row + 1, :length],
            torch.ones(1, length, dtype=torch.bool),
            plan,
            lambda index, shape, targets=targets: torch.where(targets[index] > 0, -1.0, 2.0),
            Sampling(guidance_scale=1.0),
        )
        for trace, start, end in zip(forced, scales.starts, scales.ends, strict=True):
            torch.testing.assert_close(logits[row, start:end], trace.logits, atol=1e-4, rtol=1e-4)


def test_subset_of_the_last_scale_leaves_earlier_scales_alone():
    model = random_model()
    latent, features = torch.randn(2, 8, *SCHEDULE.final), torch.randn(2, 7, 128)
    mask = torch.ones(2, 7, dtype=torch.bool)
    example = make_example(latent, torch.zeros(2, 1, 1, 1), SCHEDULE, len(SCHEDULE))
    whole, scales = all_logits(model, features, mask, example, SCHEDULE)
    subset, indices = random_subset(example, {6: 40})
    logits, _ = all_logits(model, features, mask, subset, SCHEDULE, indices)
    assert logits.shape[1] == scales.starts[6] + 40
    torch.testing.assert_close(logits[:, : scales.starts[6]], whole[:, : scales.starts[6]], atol=1e-4, rtol=1e-4)


def test_keeping_every_token_in_another_order_changes_nothing():
    model = random_model()
    latent, features = torch.randn(2, 8, *SCHEDULE.final), torch.randn(2, 7, 128)
    mask = torch.ones(2, 7, dtype=torch.bool)
    example = make_example(latent, torch.zeros(2, 1, 1, 1), SCHEDULE, len(SCHEDULE))
    whole, scales = all_logits(model, features, mask, example, SCHEDULE)
    subset, indices = random_subset(example, {5: 144, 6: 256})
    logits, _ = all_logits(model, features, mask, subset, SCHEDULE, indices)
    for i in (5, 6):
        expected = whole[:, scales.starts[i] : scales.ends[i]]
        expected = expected.gather(1, indices[i].unsqueeze(-1).expand(-1, -1, expected.shape[-1]))
        torch.testing.assert_close(logits[:, scales.starts[i] : scales.ends[i]], expected, atol=1e-4, rtol=1e-4)


def test_wrong_bits_are_mended_by_later_targets():
    latent = torch.randn(1, 8, *SCHEDULE.final) * 0.2
    torch.manual_seed(1)
    example = make_example(latent, torch.full((1, 1, 1, 1), 0.5), SCHEDULE, len(SCHEDULE))
    residual = latent - example.inputs[-1]  # the last input is the running sum on the full grid
    assert torch.equal(example.targets[-1], (residual > 0).flatten(2).transpose(1, 2).float())
