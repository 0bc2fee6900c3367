"""Programs on their way to a GPU. They were traced and saved on the CPU, which leaves five things to mend."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from ...core.platform import import_extra
from .gpus import CUDNN
from .graph import Insert, side_by_side, tidy


def moved_to_gpu(torch: Any, program: Any, device: str) -> Any:
    """A program ready to be compiled for a GPU.

    Args:
        program: as torch.export loads it.
        device: with its number, "cuda:0". Without one, torch writes a device into the program's assertions that no
            tensor will ever have.
    """
    mend(torch, program)
    examples, parameters = _take_memory(torch, program)
    moved = import_extra("torch.export.passes", "aotinductor").move_to_device_pass(program, device)
    moved._example_inputs = torch.utils._pytree.tree_map(_widened, moved.example_inputs, examples)
    for name, parameter in parameters.items():
        moved._state_dict[name] = torch.nn.Parameter(_widened(moved.state_dict[name], parameter), requires_grad=False)
    return moved


def mend(torch: Any, program: Any) -> None:
    """All that tracing on the CPU and saving have left, but for the device."""
    tidy(torch, program)
    _hint_sizes(torch, program)
    _join_channels(torch, program)


def _take_memory(torch: Any, program: Any) -> tuple[Any, dict[str, Any]]:
    """Leave one number of every example input, and of every parameter that has no memory: a move makes what it moves
    whole, and the weights of a text encoder, whose shapes these have, are gigabytes.

    Returns:
        Those inputs and parameters as they were.
    """

    def number(tensor: Any) -> Any:
        return torch.zeros((), dtype=tensor.dtype)

    examples = program.example_inputs
    parameters = {name: value for name, value in program.state_dict.items() if value.is_meta}
    program._example_inputs = torch.utils._pytree.tree_map(number, examples)
    for name, value in parameters.items():
        program._state_dict[name] = torch.nn.Parameter(number(value), requires_grad=False)
    return examples, parameters


def _widened(number: Any, like: Any) -> Any:
    """One number in all places of a tensor: its shape, without its memory."""
    return number.expand(like.shape)


def _hint_sizes(torch: Any, program: Any) -> None:
    """Every open size gets the value that it has in the example inputs.

    Saving a program loses the values of sizes that never stand alone, as s in [2 * s, C]. CPUs do not ask; code for
    GPUs is laid out by them.
    """
    sympy = import_extra("sympy", "aotinductor")
    examples = torch.utils._pytree.tree_leaves(program.example_inputs)
    placeholders = program.graph.find_nodes(op="placeholder")[-len(examples) :]
    for node, example in zip(placeholders, examples, strict=True):
        for size, value in zip(node.meta["val"].shape, example.shape, strict=True):
            if not isinstance(size, torch.SymInt):
                continue
            hints, expression = size.node.shape_env.backed_var_to_val, size.node.expr
            unknown = [symbol for symbol in expression.free_symbols if symbol not in hints]
            if len(unknown) == 1:
                (solution,) = sympy.solve(expression - value, unknown[0])
                hints[unknown[0]] = sympy.Integer(solution)


def _join_channels(torch: Any, program: Any) -> None:
    """Attention takes channels that lie side by side: no kernel of a GPU reads others, as those of a convolution."""
    aten, graph = torch.ops.aten, program.graph_module.graph
    for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        add = Insert(torch, graph, node)
        joined = [side_by_side(torch, x, add) for x in node.args[:3]]
        node.args = (*joined, *node.args[3:])
    program.graph_module.recompile()


def gpu_options(torch: Any) -> dict[str, Any]:
    """What AOTInductor is told of a GPU: those options that the installed torch knows.

    Kernels lie in the library, as machine code of one generation. Nothing is tried out on the GPU at hand: matrices are
    not padded because of a measurement, so that a build makes the same library again.
    """
    wanted = {"aot_inductor.embed_kernel_binary": True, "shape_padding": False, "compile_threads": 1}
    return known_options(torch, wanted)


def forget_kernels() -> None:
    """Have the compiler forget the kernels of earlier programs: those would say in which order it links the next's."""
    import_extra("torch._inductor.utils", "aotinductor").clear_caches()


def known_options(torch: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    """Options of the compiler without those that the installed torch does not have."""
    known = import_extra("torch._inductor.config", "aotinductor").get_config_copy()
    return {name: value for name, value in wanted.items() if name in known}


def with_attention(torch: Any, kernel: str) -> AbstractContextManager[Any]:
    """A block in which attention is compiled to a kernel that was chosen, not to what torch takes on a GPU.

    Without a mask it is flash or cuDNN's; with one, or in fp32, the memory-efficient kernel. None writes the scores to
    memory: where none of them suits, the compiler says so.
    """
    kernels = torch.nn.attention.SDPBackend
    first = [kernels.CUDNN_ATTENTION] if kernel == CUDNN else []
    allowed = [*first, kernels.FLASH_ATTENTION, kernels.EFFICIENT_ATTENTION]
    chosen: AbstractContextManager[Any] = torch.nn.attention.sdpa_kernel(allowed, set_priority=True)
    return chosen


@contextmanager
def arrays_declared_alike(torch: Any) -> Iterator[None]:
    """A block in which the C++ around the kernels declares its arrays of sizes alike in every build.

    torch before 2.13 looks for an array that it may use again under the address of a method object. That is gone at
    once, so that it is chance whether the next one lies there.
    """
    if torch.__version__ >= (2, 13):
        yield
        return
    wrapper = import_extra("torch._inductor.codegen.cpp_wrapper_cpu", "aotinductor").CppWrapperCpu
    declare = wrapper.codegen_int_array_var
    wrapper.codegen_int_array_var = with_lasting_method(declare)
    try:
        yield
    finally:
        wrapper.codegen_int_array_var = declare


def with_lasting_method(declare: Callable[..., str]) -> Callable[..., str]:
    """`declare` of a code generator (generator, array, method, ...), which is given one object for each method."""

    @functools.wraps(declare)
    def declared(generator: Any, array: str, method: Any, *more: Any, **named: Any) -> str:
        lasting = generator.__dict__.setdefault("_lasting_methods", {})
        key = (id(getattr(method, "__self__", method)), getattr(method, "__name__", ""))
        return declare(generator, array, lasting.setdefault(key, method), *more, **named)

    return declared
