"""Recorded runs of Infinity's published image tokenizer: torch, the decoder in stripes, and engines of both halves."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastvar.core.precision import Precision
from fastvar.core.tensors import TensorRef
from fastvar.engines.base import PROGRAM
from fastvar.engines.registry import get_backend
from fastvar.engines.spec import EngineSpec
from fastvar.export.models.common.step_graph import WeightShape
from fastvar.export.models.common.weights import Role
from fastvar.export.models.infinity.steps import InfinityImageDecoder, InfinityImageEncoder
from fastvar.export.models.infinity.tokenizer import ImageTokenizer
from fastvar.export.tracing.onnx import trace
from fastvar.export.tracing.torch_export import trace_program
from fastvar.families.infinity import ImageTokenizerConfig
from tests.models.stage_chain import tiled
from tests.parity.comparison import Comparison, Tensors, compare_crops

VAE_TOLERANCE = {"h": 5e-5, "z": 1e-5, "recon": 1e-4, "recon2": 1e-4}
STRIPE = 5


def compare_image_tokenizer(folder: Path) -> Comparison:
    """Encoder, quantiser and decoder against the recording."""
    meta = json.loads((folder / "vae.json").read_text())
    recorded = load_file(folder / "vae.safetensors")
    model = ImageTokenizer(image_tokenizer_config(meta)).eval()
    model.load_state_dict({k: v.float() for k, v in load_file(folder / "weights_vae.safetensors").items()})
    result = Comparison("image tokenizer: torch reference", VAE_TOLERANCE)
    latent = model.encoder(recorded["image"].float())
    result.tensor("encode", "h", latent, recorded["h"])
    bits, total = model.quantize(latent, [(h, w) for h, w in meta["schedule"]])
    for i, found in enumerate(bits):
        expected = recorded[f"s{i:02d}.bits"].bool()
        result.same(f"scale {i} bits", torch.equal(found.reshape(expected.shape), expected))
    result.tensor("encode", "z", total, recorded["z"])
    compare_decoded(model.decode, recorded, result)
    return result


def compare_decoder_stages(folder: Path) -> Comparison:
    """The decoder in stripes of rows against the recording."""
    meta = json.loads((folder / "vae.json").read_text())
    config = image_tokenizer_config(meta)
    model = ImageTokenizer(config).eval()
    model.load_state_dict({k: v.float() for k, v in load_file(folder / "weights_vae.safetensors").items()})
    result = Comparison(f"image tokenizer: decoder in stripes of {STRIPE} latent rows", VAE_TOLERANCE)
    decode = partial(tiled, model.decoder, config, tile=STRIPE)
    compare_decoded(decode, load_file(folder / "vae.safetensors"), result)
    return result


def compare_decoded(decode: Any, recorded: Tensors, result: Comparison) -> None:
    for name in sorted(recorded):
        number = name.removeprefix("z")
        if name.startswith("z") and (not number or number.isdecimal()):
            compare_crops(result, "decode", f"recon{number}", decode(recorded[name]), recorded, f"recon{number}")


def image_tokenizer_config(meta: dict[str, Any]) -> ImageTokenizerConfig:
    return ImageTokenizerConfig(
        bits=meta["codebook_dim"],
        base_channels=meta["base_ch"],
        channel_multipliers=tuple(meta["ch_mult"]),
        residual_blocks=meta["num_res_blocks"],
    )


def compare_coder_engines(folder: Path, backend: str) -> Comparison:
    """Encoder and decoder engines against the recording."""
    meta = json.loads((folder / "vae.json").read_text())
    recorded = load_file(folder / "vae.safetensors")
    state = {k: v.float() for k, v in load_file(folder / "weights_vae.safetensors").items()}
    config, grid = image_tokenizer_config(meta), tuple(meta["schedule"][-1])
    result = Comparison(f"image tokenizer: {backend} engines", VAE_TOLERANCE)
    encode = CoderEngine(backend, InfinityImageEncoder(config, grid), "encoder.", state)
    decode = CoderEngine(backend, InfinityImageDecoder(config, grid), "decoder.", state)
    result.tensor("encode", "h", encode(recorded["image"].float()), recorded["h"])
    compare_decoded(decode, recorded, result)
    return result


class CoderEngine:
    """One engine outside a bundle, called with a tensor."""

    def __init__(self, backend: str, module: Any, prefix: str, state: Tensors) -> None:
        weights = {name: state[prefix + name].contiguous() for name in module.weights}
        shapes = {name: WeightShape(tuple(w.shape), Role.FP32) for name, w in weights.items()}
        compiler = get_backend(backend)
        traced = (trace_program if compiler.graph_form == PROGRAM else trace)(module, shapes)
        target, version = compiler.resolve_target(None, Precision()), compiler.version()
        engine = compiler.build(traced.graph, target).engine
        spec = EngineSpec("coder", "", "", len(engine), traced.inputs, traced.outputs, {}, backend, target, version)
        self._input = torch.empty(next(iter(module.input_shapes().values())))
        self._output = torch.empty(traced.outputs[0].shape)
        tensors = {**weights, module.inputs[0]: self._input, module.outputs[0]: self._output}
        refs = {n: TensorRef(t.data_ptr(), "float32", tuple(t.shape)) for n, t in tensors.items()}
        self._alive = tensors
        self._launch = compiler.load(engine, spec).prepare(refs)

    def __call__(self, value: Tensor) -> Tensor:
        self._input.copy_(value)
        self._launch()
        return self._output.clone()
