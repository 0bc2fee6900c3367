"""Nodes for ComfyUI: load a fastvar bundle, generate, upscale, in-paint. This folder goes into custom_nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

try:
    import fastvar  # noqa: F401  what the nodes draw with
except ModuleNotFoundError as error:
    if error.name != "fastvar":
        raise
    raise ModuleNotFoundError(
        'these nodes need fastvar in ComfyUI\'s environment: python -m pip install "fastvar-runtime[onnxruntime]"',
        name="fastvar",
    ) from None

from .nodes import Generate, InPaint, LoadBundle, Upscale


class FastvarExtension(ComfyExtension):
    """The pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadBundle, Generate, Upscale, InPaint]


async def comfy_entrypoint() -> ComfyExtension:
    return FastvarExtension()
