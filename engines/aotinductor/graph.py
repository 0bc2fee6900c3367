"""Tools of the passes over exported programs. A pass is a function that replaces one call, applied to every such call.

Programs are those of export/tracing/torch_export.py: not yet decomposed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

Pass = Callable[..., int]  # (torch, program, *options) -> how many calls it replaced


def replacing(target: Callable[[Any], Any], suits: Callable[..., bool]) -> Callable[[Callable[..., Any]], Pass]:
    """Make a pass of a function (torch, node, add) that returns what takes the place of a call.

    Args:
        target: (torch) -> the operator to replace calls of.
        suits: (torch, node, *options) -> whether to replace that call; options are those of the pass.
    """

    def decorate(replace: Callable[..., Any]) -> Pass:
        @functools.wraps(replace)
        def over(torch: Any, program: Any, *options: Any) -> int:
            graph = program.graph_module.graph
            calls = graph.find_nodes(op="call_function", target=target(torch))
            found = [node for node in calls if suits(torch, node, *options)]
            for node in found:
                node.replace_all_uses_with(replace(torch, node, Insert(torch, graph, node)))
                graph.erase_node(node)  # by hand: torch keeps calls that may draw random numbers
            graph.eliminate_dead_code()
            program.graph_module.recompile()
            return len(found)

        return over

    return decorate


def tidy(torch: Any, program: Any) -> None:
    """Drop what hides patterns and computes nothing: assertions on types, and casts to the type that a tensor has."""
    aten, graph = torch.ops.aten, program.graph_module.graph
    for node in graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=aten.to.dtype):
        if value_of(node.args[0]).dtype == node.args[1]:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    program.graph_module.recompile()


class Insert:
    """Adds calls before one node of a graph, each with the fake tensor that it stands for while graphs are traced."""

    def __init__(self, torch: Any, graph: Any, before: Any) -> None:
        self._torch, self._graph, self._before = torch, graph, before

    def __call__(self, function: Any, *arguments: Any) -> Any:
        """The node of a new call; `arguments` are nodes, numbers, or lists of them."""
        with self._graph.inserting_before(self._before):
            node = self._graph.call_function(function, arguments)
        with self._torch.no_grad():
            node.meta["val"] = function(*(value_of(argument) for argument in arguments))
        return node


def value_of(argument: Any) -> Any:
    """The fake tensor that a node stands for; of a list those of its members; any other argument itself."""
    if isinstance(argument, (list, tuple)):
        return type(argument)(value_of(member) for member in argument)
    return argument.meta["val"] if hasattr(argument, "meta") else argument


def side_by_side(torch: Any, node: Any, add: Insert) -> Any:
    """The node, or a copy whose last axis lies contiguous where its own does not, as with channels of a convolution."""
    return node if value_of(node).stride(-1) == 1 else add(torch.ops.aten.contiguous.default, node)


def only_user(node: Any, target: Any) -> Any:
    """The one node that reads this one, where it calls `target`; else None."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target is target else None
