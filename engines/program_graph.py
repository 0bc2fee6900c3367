"""Changing the graph of an exported program: the hand tools of all passes."""

from __future__ import annotations

from typing import Any


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


def erase_unread(torch: Any, node: Any) -> None:
    """A view that nobody reads any more, and the views that it is made of."""
    aten = torch.ops.aten
    while not node.users and node.target in (aten.squeeze.dim, aten.transpose.int, aten.unsqueeze.default):
        source = node.args[0]
        node.graph.erase_node(node)
        node = source


class Insert:
    """Adds calls before one node of a graph, each with what it stands for while graphs are traced."""

    def __init__(self, torch: Any, graph: Any, before: Any) -> None:
        self._torch, self._graph, self._before = torch, graph, before

    def __call__(self, function: Any, *arguments: Any) -> Any:
        with self._graph.inserting_before(self._before):
            node = self._graph.call_function(function, arguments)
        with self._torch.no_grad():
            node.meta["val"] = function(*(value_of(argument) for argument in arguments))
        return node


def value_of(argument: Any) -> Any:
    """What a node stands for; of a list what its members do; anything else is itself."""
    if isinstance(argument, (list, tuple)):
        return type(argument)(value_of(member) for member in argument)
    return argument.meta["val"] if hasattr(argument, "meta") else argument


def only_user(node: Any, target: Any) -> Any:
    """The one node that reads this one, where it calls `target`; else None."""
    (*others, user) = node.users
    return user if not others and user.target is target else None
