"""HART's official tensors -> the tensors that its step graphs are bound to. Nothing is read before it is asked for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..families.hart import HartConfig
from ..families.vq import VqTokenizerConfig
from .hart_diffusion import NumberEmbedding, diffusion_steps
from .hart_residual import NET, residual_weight_names
from .vq_steps import attention_weights, codebook_weights
from .weights import Role, WeightSource, getter

OFFICIAL = "diffloss.net."
EXACT_LAYERS = ("input_proj.", "final_layer.linear.", ".in_ln.")  # of the diffusion head


def hart_weights(
    c: HartConfig, state: Mapping[str, Tensor], images: VqTokenizerConfig, images_state: Mapping[str, Tensor]
) -> dict[str, WeightSource]:
    """All of them, by names without "transformer."."""
    sources = _shared_weights(c, state) | codebook_weights(images, images_state) | _diffusion_weights(c, state)
    for layer in range(c.depth):
        found = _layer_weights(c, state, f"blocks.{layer}.")
        sources |= {f"blocks.{layer}.{name}": source for name, source in found.items()}
    return sources


def _shared_weights(c: HartConfig, state: Mapping[str, Tensor]) -> dict[str, WeightSource]:
    exact: dict[str, tuple[int, ...]] = {
        "context_embed.bias": (c.width,),
        "word_embed.weight": (c.width, c.code_channels),
        "word_embed.bias": (c.width,),
        "head_nm.ada_lin.1.weight": (2 * c.width, c.width),
        "head_nm.ada_lin.1.bias": (2 * c.width,),
        "decoder_norm.weight": (c.width,),
    }
    if c.context_norm:
        exact["context_norm.weight"] = (c.context_width,)
    operands: dict[str, tuple[int, ...]] = {
        "context_embed.weight": (c.width, c.context_width),
        "head.weight": (c.codes, c.width),
        "head.bias": (c.codes,),
    }
    sources = {name: WeightSource(shape, getter(state, name)) for name, shape in exact.items()}
    sources |= {name: WeightSource(shape, getter(state, name), Role.OPERAND) for name, shape in operands.items()}
    sources["head_norm.weight"] = WeightSource((c.width,), getter(state, "head_nm.ln_wo_grad.weight"))

    def levels() -> Tensor:
        """One row a scale, looked up or computed."""
        if not c.timestep_levels:
            return state["lvl_embed.weight"]
        return number_table(state, "lvl_embed.", c.width, range(c.levels))

    return sources | {"lvl_embed.weight": WeightSource((c.levels, c.width), levels)}


def _layer_weights(c: HartConfig, state: Mapping[str, Tensor], prefix: str) -> dict[str, WeightSource]:
    sources = attention_weights(c, state, f"{prefix}attn.", "qkv_proj.weight", c.unit_queries)

    def gate_up() -> Tensor:
        return torch.cat([state[f"{prefix}ffn.{name}_proj.weight"] for name in ("gate", "up")])

    down = getter(state, f"{prefix}ffn.down_proj.weight")
    sources["ffn.gate_up.weight"] = WeightSource((2 * c.mlp_width, c.width), gate_up, Role.MATRIX)
    sources["ffn.down.weight"] = WeightSource((c.width, c.mlp_width), down, Role.MATRIX)
    sources["norm.weight"] = WeightSource((c.width,), getter(state, f"{prefix}ln_wo_grad.weight"))
    if c.modulated:
        shapes: dict[str, tuple[int, ...]] = {"weight": (6 * c.width, c.width), "bias": (6 * c.width,)}
        for kind, shape in shapes.items():
            name = f"ada_lin.1.{kind}"
            sources[name] = WeightSource(shape, getter(state, prefix + name), Role.OPERAND)
    return sources


def _diffusion_weights(c: HartConfig, state: Mapping[str, Tensor]) -> dict[str, WeightSource]:
    """The head's network; its time embedding is needed at the sampled steps alone, and becomes a table of them."""
    width, channels = c.diffusion_width, c.code_channels
    outputs = {"final_layer.linear": 2 * channels, "final_layer.adaLN_modulation.1": 2 * width}
    inputs = {"cond_embed": c.width, "input_proj": channels}

    def times() -> Tensor:
        steps = [step.timestep for step in diffusion_steps(c.diffusion_steps)]
        return number_table(state, f"{OFFICIAL}time_embed.", width, steps)

    sources = {f"{NET}times": WeightSource((c.diffusion_steps, width), times)}
    for name in residual_weight_names(c):
        layer, _, kind = name.removeprefix(NET).rpartition(".")
        if name in sources or not name.startswith(NET):
            continue
        rows = 3 * width if layer.endswith("adaLN_modulation.1") and layer not in outputs else outputs.get(layer, width)
        matrix = kind == "weight" and not layer.endswith("in_ln")
        shape = (rows, inputs.get(layer, width)) if matrix else (rows,)
        exact = any(part in f".{layer}." for part in EXACT_LAYERS)
        role = Role.EXACT if exact else Role.OPERAND
        sources[name] = WeightSource(shape, getter(state, f"{OFFICIAL}{layer}.{kind}"), role)
    return sources


def number_table(state: Mapping[str, Tensor], prefix: str, width: int, numbers: range | list[int]) -> Tensor:
    """What a number embedding gives for each number [n, width], fp32."""
    embedding = NumberEmbedding(width)
    embedding.load_state_dict({name: state[prefix + name].float() for name in embedding.state_dict()})
    with torch.no_grad():
        found: Tensor = embedding(torch.tensor(list(numbers)))
    return found
