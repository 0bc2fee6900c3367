import pytest

from fastvar.config import TRANSFORMERS
from fastvar.plan import load_policy, make_plan
from fastvar.profiling.flop import cache_bytes, transformer_flop
from fastvar.schedule import schedule_for

MODEL = TRANSFORMERS["infinity_2b"]


def plan(policy: str, size: int = 1024):
    schedule = schedule_for((size, size))
    return make_plan(schedule, load_policy(policy, schedule, MODEL.depth), MODEL.depth)


@pytest.mark.parametrize(("policy", "tera", "gib"), [("dense", 115, 5.1), ("fastvar", 27, 1.6)])
def test_the_published_model_at_its_own_size(policy: str, tera: float, gib: float):
    """What the design of this project was reckoned with: guidance on, the text's share apart."""
    found = transformer_flop(MODEL, plan(policy), rows=2, text_length=512)
    assert (found.matrices + found.self_attention) / 1e12 == pytest.approx(tera, abs=0.5)
    assert 0 < found.text < 0.06 * found.total
    assert cache_bytes(MODEL, plan(policy), 2, 2) / 2**30 == pytest.approx(gib, abs=0.06)


def test_a_layer_counted_by_hand():
    """Two tokens that see each other and nothing before: one scale of 1x1, then what 2x2 adds."""
    schedule = schedule_for((256, 256))
    dense = make_plan(schedule, load_policy("dense", schedule, 1), 1)
    found = transformer_flop(MODEL, dense, rows=1, text_length=2)
    C, M, L = MODEL.width, MODEL.mlp_width, 521
    seen = sum(n * s for n, s in zip((1, 4, 16, 36, 64, 144, 256), (1, 5, 21, 57, 121, 265, 521), strict=True))
    assert found.matrices == 2 * L * (6 * C * C + 2 * C * M) + 2 * L * C * 3 * 32
    assert found.self_attention == 2 * 2 * C * seen
    assert found.text == 2 * 2 * C * L * 2 + 2 * (2 * C) * C * 2


def test_guidance_doubles_everything():
    one, two = (transformer_flop(MODEL, plan("fastvar"), rows, 512) for rows in (1, 2))
    assert two.total == 2 * one.total
