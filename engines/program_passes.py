"""Passes over exported programs for CPUs: operators for which a better one than torch's default is at hand.

* attention in bfloat16: our kernel (operators.py), where the CPU and the head size allow it;
* linear layers: oneDNN's; those of int8 activations are our kernel's already
  as they are traced, and take their GELU with them.

A pass returns how many it replaced. Programs are those of export/programs.py: not yet decomposed.
"""

from __future__ import annotations

from typing import Any

from .operators import ATTENTION, LINEAR, LINEAR_INT8, register, supports_heads
from .program_graph import Insert, erase_unread, only_user, value_of


def use_attention_kernel(torch: Any, program: Any) -> int:
    """Requires every scaled_dot_product_attention to have scale 1, no dropout, and not to be causal."""
    operator, aten, graph = register(ATTENTION), torch.ops.aten, program.graph_module.graph
    attention = aten.scaled_dot_product_attention.default
    found = [node for node in graph.find_nodes(op="call_function", target=attention) if _suits(node)]
    for node in found:
        add = Insert(torch, graph, node)
        operands = [_tokens_first(torch, tensor, add) for tensor in node.args[:3]]
        bias = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        if bias is not None:
            bias = add(aten.to.dtype, add(aten.squeeze.dim, bias, 0), torch.float32)
        out, turned = add(operator, *operands, bias), node.args[:3]
        _replace_heads_first(torch, node, out, add)
        for unread in turned:
            erase_unread(torch, unread)
    program.graph_module.recompile()
    return len(found)


def use_onednn_linear(torch: Any, program: Any) -> int:
    """Linear layers of two-dimensional input with a bias; a tanh GELU that alone reads one goes with it."""
    operator, aten, graph = register(LINEAR), torch.ops.aten, program.graph_module.graph
    found = [
        node
        for node in graph.find_nodes(op="call_function", target=aten.linear.default)
        if len(node.args) == 3 and value_of(node.args[0]).dim() == 2
    ]
    for node in found:
        gelu = _gelu_behind(torch, node)
        fused = gelu is not None
        last = gelu if fused else node
        last.replace_all_uses_with(Insert(torch, graph, last)(operator, *node.args, fused))
        graph.erase_node(last)
        if fused:
            graph.erase_node(node)
    program.graph_module.recompile()
    return len(found)


def use_int8_gelu(torch: Any, program: Any) -> int:
    """Linear layers of int8 activations: a tanh GELU that alone reads one goes with it. Returns how many layers."""
    graph = program.graph_module.graph
    found = graph.find_nodes(op="call_function", target=register(LINEAR_INT8))
    for node in found:
        if gelu := _gelu_behind(torch, node):
            node.args = (*node.args[:-1], True)
            gelu.replace_all_uses_with(node)
            graph.erase_node(gelu)
    program.graph_module.recompile()
    return len(found)


def _suits(node: Any) -> bool:
    q = value_of(node.args[0])
    plain = len(node.args) <= 4 and node.kwargs.get("scale") == 1.0
    return plain and q.shape[0] == 1 and supports_heads(int(q.shape[-1]), str(q.dtype).removeprefix("torch."))


def _tokens_first(torch: Any, node: Any, add: Insert) -> Any:
    """[1, heads, L, hd] as [L, heads, hd]: what it was before it was turned, where that can be seen."""
    aten = torch.ops.aten
    if node.target is aten.unsqueeze.default and node.args[1] == 0:
        turned = node.args[0]
        if turned.target is aten.transpose.int and set(turned.args[1:]) == {0, 1}:
            return turned.args[0]
    return add(aten.transpose.int, add(aten.squeeze.dim, node, 0), 0, 1)


def _replace_heads_first(torch: Any, node: Any, out: Any, add: Insert) -> None:
    """Whoever turns [1, heads, L, hd] into tokens first reads `out` [L, heads, hd] as it is."""
    aten = torch.ops.aten
    squeezed = only_user(node, aten.squeeze.dim)
    turned = squeezed and only_user(squeezed, aten.transpose.int)
    if turned:
        turned.replace_all_uses_with(out)
        for dead in (turned, squeezed, node):
            dead.graph.erase_node(dead)
        return
    node.replace_all_uses_with(add(aten.unsqueeze.default, add(aten.transpose.int, out, 0, 1), 0))
    node.graph.erase_node(node)


def _gelu_behind(torch: Any, node: Any) -> Any:
    gelu = only_user(node, torch.ops.aten.gelu.default)
    return gelu if gelu is not None and gelu.kwargs.get("approximate") == "tanh" else None
