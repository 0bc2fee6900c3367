"""Section "truth": whether the GPU computes what onnxruntime computes in fp32 on the CPU, on equal forced choices."""

from __future__ import annotations

from benchmarks.gpu.drawing import WAYS, forced, parity
from benchmarks.gpu.recipes import DEMO_PRECISIONS
from benchmarks.gpu.sections import Context


def measure(context: Context) -> None:
    """The demo in every precision, without CUDA graphs and with them."""
    expected = forced(context.bundle("demo-cpu"))
    for precision in DEMO_PRECISIONS:
        for way, graphs in WAYS.items():

            def compared(precision: str = precision, graphs: bool = graphs) -> dict[str, object]:
                return parity(expected, forced(context.bundle(f"demo-{precision}"), graphs), precision)

            context.log.measure(f"{precision}, {way}", compared)
