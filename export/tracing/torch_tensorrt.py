"""An optional way to TensorRT engines: the exported program straight through Torch-TensorRT, without ONNX.

For machines with a GPU and the package. It compiles for the GPU in the machine, and reports no kernels.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from ...core.platform import import_extra
from ...core.precision import Precision
from ...engines.cache.engine_cache import CachedEngine
from ...engines.spec import TensorSpec
from ...engines.tensorrt.backend import TORCH_TENSORRT, packed
from ...errors import BuildError
from ..models.common.rows import topk_operator
from ..models.common.step_graph import StepModule, WeightShapes
from .onnx import example_inputs, example_weights


def compile_exported(module: nn.Module, weights: WeightShapes, precision: Precision) -> CachedEngine:
    """A step module -> TensorRT engine whose bindings have the names of the module's tensors and weights.

    Raises:
        BackendError: Torch-TensorRT is not installed, or finds no GPU.
        BuildError: it cannot convert the module whole.
    """
    step = cast(StepModule, module)
    library = import_extra("torch_tensorrt", TORCH_TENSORRT, expected="a machine with a GPU, and a CUDA build of torch")
    inputs, matrices = example_inputs(step, precision), example_weights(weights, precision)
    with torch.no_grad(), topk_operator():
        program = torch.export.export(module.eval(), tuple(inputs.values()), kwargs={"weights": matrices})
    outputs = tuple(step.outputs)
    try:
        plan = library.dynamo.convert_exported_program_to_serialized_trt_engine(
            program,
            arg_inputs=tuple(inputs.values()),
            kwarg_inputs={"weights": matrices},
            arg_input_binding_names=tuple(inputs),
            kwarg_input_binding_names={"weights": {name: name for name in matrices}},
            output_binding_names=outputs if len(outputs) > 1 else outputs[0],
            use_explicit_typing=True,  # the module says what is 16 bits and what is not
            disable_tf32=True,  # selection scores and sampling are fp32, and mean it
            max_aux_streams=0,  # one stream orders everything
            cache_built_engines=False,
            reuse_cached_engines=False,
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise BuildError(
            f"Torch-TensorRT {library.__version__} cannot convert {type(module).__name__}: {error}",
            fix="build through ONNX: leave --via away",
        ) from error
    given = [_spec(name, tensor) for name, tensor in {**inputs, **matrices}.items()]
    taken = [_spec(name, tensor) for name, tensor in zip(outputs, _results(program), strict=True)]
    return CachedEngine(packed(plan), tuple(given), tuple(taken))


def _results(program: Any) -> list[Any]:
    """The program's outputs as it knows them: element type and shape."""
    (node,) = program.graph.find_nodes(op="output")
    return [value.meta["val"] for value in node.args[0]]


def _spec(name: str, tensor: Any) -> TensorSpec:
    return TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
