"""Programs made ready for a GPU: what that changes is seen without one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastvar.engines.aotinductor.gpu_program import _join_channels
from fastvar.engines.aotinductor.graph import value_of

SDPA = torch.ops.aten.scaled_dot_product_attention.default


class OfAConvolution(nn.Module):
    """Attention over a grid, whose channels lie as a convolution leaves them; values side by side."""

    def forward(self, x: Tensor) -> Tensor:
        channels_last = x.flatten(2).transpose(1, 2)[:, None]  # [B, 1, h * w, C]
        return nn.functional.scaled_dot_product_attention(channels_last, channels_last, channels_last.contiguous())


def test_attention_is_given_channels_that_lie_side_by_side():
    x = torch.randn(2, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(OfAConvolution(), (x,))
    expected = program.module()(x)
    (call,) = program.graph.find_nodes(op="call_function", target=SDPA)
    assert [value_of(argument).stride(-1) == 1 for argument in call.args] == [False, False, True]
    _join_channels(torch, program)
    (call,) = program.graph.find_nodes(op="call_function", target=SDPA)
    assert all(value_of(argument).stride(-1) == 1 for argument in call.args)
    contiguous = program.graph.find_nodes(op="call_function", target=torch.ops.aten.contiguous.default)
    assert len(contiguous) == 3, "the one that was there, and those of queries and keys"
    torch.testing.assert_close(program.module()(x), expected)
