"""What engines hold between their kernels, by the shapes at their border."""

from fastvar.core.policy import LONGEST_TOPK
from fastvar.core.precision import Precision
from fastvar.engines.scratch_estimates import Computation, working_bytes
from fastvar.engines.spec import EngineSpec, TensorSpec

TOKENS, WIDTH, HIDDEN, FLOAT = 8000, 64, 128, 4


def attn_mlp(kept: int) -> int:
    """The estimate for the second half of a block in fp32, which keeps so many of its tokens."""
    shapes = {"x": (TOKENS, WIDTH), "q": (kept, 2, WIDTH // 2), "ffn.fc1.weight": (HIDDEN, WIDTH)}
    inputs = tuple(TensorSpec(name, "float32", shape) for name, shape in shapes.items())
    outputs = (TensorSpec("x_out", "float32", (TOKENS, WIDTH)),)
    return working_bytes(
        EngineSpec("", "", "", 0, inputs, outputs, {}, "", "", ""), Computation(Precision(), (8,), layers=2)
    )


def test_one_restored_map_and_another_where_tokens_are_selected_in_turns():
    assert LONGEST_TOPK == 3840, "TensorRT's limit"
    token = attn_mlp(101) - attn_mlp(100)
    one_map = TOKENS * WIDTH * FLOAT
    assert attn_mlp(100) == 100 * token + one_map
    assert attn_mlp(LONGEST_TOPK) == LONGEST_TOPK * token + one_map
    assert attn_mlp(LONGEST_TOPK + 1) == (LONGEST_TOPK + 1) * token + 2 * one_map
