"""Passes over exported programs for CPUs: operators for which a better one than torch's default is at hand.

* attention in bfloat16: our kernel, where the CPU and the head size allow it; by int8 products in programs whose linear
  layers compute in int8;
* linear layers: oneDNN's; those of int8 activations call our kernel as they are traced, and take their GELU with them.

A pass returns how many calls it replaced. The operators are those of operators.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .graph import Insert, only_user, replacing, side_by_side, value_of
from .operators import ATTENTION, LINEAR, LINEAR_INT8, register, supports_heads


def _suits_kernel(torch: Any, node: Any) -> bool:
    q = value_of(node.args[0])
    plain = len(node.args) <= 4 and node.kwargs.get("scale") == 1.0
    return plain and q.shape[0] == 1 and supports_heads(int(q.shape[-1]), str(q.dtype).removeprefix("torch."))


@replacing(lambda torch: torch.ops.aten.scaled_dot_product_attention.default, _suits_kernel)
def use_attention_kernel(torch: Any, node: Any, add: Insert) -> Any:
    """Every scaled_dot_product_attention by our kernel.

    Requires scale 1, no dropout, and attention that is not causal.
    """
    aten, (*operands, bias) = torch.ops.aten, (*node.args, node.kwargs.get("attn_mask"))[:4]
    if bias is not None:
        bias = add(aten.to.dtype, add(aten.squeeze.dim, bias, 0), torch.float32)
    tokens = (_tokens_first(torch, tensor, add) for tensor in operands)
    int8 = bool(node.graph.find_nodes(op="call_function", target=register(LINEAR_INT8)))
    out = add(register(ATTENTION), *(side_by_side(torch, tensor, add) for tensor in tokens), bias, int8)
    squeezed = only_user(node, aten.squeeze.dim)
    turned = squeezed and only_user(squeezed, aten.transpose.int)
    if turned:  # [1, heads, L, hd] is turned to tokens first, as `out` [L, heads, hd] is
        turned.replace_all_uses_with(out)
    return add(aten.unsqueeze.default, add(aten.transpose.int, out, 0, 1), 0)


def _tokens_first(torch: Any, node: Any, add: Insert) -> Any:
    """[1, heads, L, hd] as [L, heads, hd]: the tensor that was turned to become it, where the graph shows that."""
    aten = torch.ops.aten
    if node.target is aten.unsqueeze.default and node.args[1] == 0:
        turned = node.args[0]
        if turned.target is aten.transpose.int and set(turned.args[1:]) == {0, 1}:
            return turned.args[0]
    return add(aten.transpose.int, add(aten.squeeze.dim, node, 0), 0, 1)


def _suits_onednn(torch: Any, node: Any, types: Sequence[str] = ("float32", "bfloat16")) -> bool:
    given = value_of(node.args[0])
    return len(node.args) == 3 and given.dim() == 2 and str(given.dtype).removeprefix("torch.") in types


@replacing(lambda torch: torch.ops.aten.linear.default, _suits_onednn)
def use_onednn_linear(torch: Any, node: Any, add: Insert) -> Any:
    """Every linear layer of two-dimensional input with a bias by oneDNN's, with the tanh GELU that alone reads it.

    Option: element types, of which oneDNN refuses none on any CPU of the target.
    """
    return _with_gelu(torch, node, lambda gelu: add(register(LINEAR), *node.args, gelu))


def linear_weights(program: Any) -> tuple[int, ...]:
    """Inputs that only oneDNN's linear layers read, and as their weights: their places, 1 is the last input."""
    given = [node for node in program.graph.nodes if node.op == "placeholder"]
    linear = register(LINEAR)

    def is_weight(node: Any) -> bool:
        return bool(node.users) and all(
            user.target is linear and user.args[1] is node and user.args.count(node) == 1 for user in node.users
        )

    return tuple(len(given) - place for place, node in enumerate(given) if is_weight(node))


@replacing(lambda torch: register(LINEAR_INT8), lambda torch, node: True)
def use_int8_gelu(torch: Any, node: Any, add: Insert) -> Any:
    """Let linear layers of int8 activations compute the tanh GELU that alone reads one."""
    return _with_gelu(torch, node, lambda gelu: add(node.target, *node.args[:-1], gelu))


def _with_gelu(torch: Any, node: Any, layer: Callable[[bool], Any]) -> Any:
    """`layer` of whether a tanh GELU alone reads the node; such a GELU is replaced along with it."""
    gelu = only_user(node, torch.ops.aten.gelu.default)
    fused = gelu is not None and gelu.kwargs.get("approximate") == "tanh"
    replacement = layer(fused)
    if fused:
        gelu.replace_all_uses_with(replacement)
    return replacement
