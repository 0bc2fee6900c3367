"""From Infinity's checkpoint tensors to the tensors that its engines are bound to.

What depends on weights alone is done here, once, instead of in every graph: biases joined, scales
exponentiated, rotary pairs laid out in halves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..families.infinity import TransformerConfig
from .transformer_blocks import MAX_LOG_SCALE
from .weights import Role, WeightSource, getter


def transformer_weights(config: TransformerConfig, state: Mapping[str, Tensor]) -> dict[str, WeightSource]:
    """Official state -> "transformer.*" tensors; layers are "transformer.blocks.<layer>.*" whatever their chunk."""
    sources = {f"transformer.{name}": s for name, s in _shared(config, state).items()}
    for layer in range(config.depth):
        for name, source in _layer(config, state, layer_prefix(config, layer)).items():
            sources[f"transformer.blocks.{layer}.{name}"] = source
    return sources


def layer_prefix(config: TransformerConfig, layer: int) -> str:
    """Official key prefix of a layer: chunked, or flat for a single chunk."""
    if config.chunks == 1:
        return f"blocks.{layer}."
    chunk, position = divmod(layer, config.layers_per_chunk)
    return f"block_chunks.{chunk}.module.{position}."


def halves_order(config: TransformerConfig) -> Tensor:
    """Row order that turns rotary pairs (2j, 2j + 1) of every head into (j, j + hd / 2): [C].

    Applied to queries and keys alike, so no dot product changes, and the rotation needs no strided access.
    """
    head = torch.cat((torch.arange(0, config.head_dim, 2), torch.arange(1, config.head_dim, 2)))
    return (torch.arange(config.heads)[:, None] * config.head_dim + head).flatten()


def _shared(config: TransformerConfig, state: Mapping[str, Tensor]) -> dict[str, WeightSource]:
    c, pool = config, "text_proj_for_sos.ca."
    exact = {
        "cfg_uncond": (c.text_length, c.text_width),
        "text_norm.weight": (c.text_width,),
        pool + "mat_q": (1, c.pool_heads, c.width // c.pool_heads),
        pool + "proj.weight": (c.width, c.width),
        pool + "proj.bias": (c.width,),
        "pos_start": (1, 1, c.width),
        "lvl_embed.weight": (c.levels, c.width),
        "word_embed.weight": (c.width, c.code_channels),
        "word_embed.bias": (c.width,),
        "shared_ada_lin.1.weight": (6 * c.width, c.width),
        "shared_ada_lin.1.bias": (6 * c.width,),
        "head_nm.ada_lin.1.weight": (2 * c.width, c.width),
        "head_nm.ada_lin.1.bias": (2 * c.width,),
    }
    operands = {
        pool + "mat_kv.weight": (2 * c.width, c.text_width),
        "text_proj_for_ca.0.weight": (c.width, c.text_width),
        "text_proj_for_ca.0.bias": (c.width,),
        "text_proj_for_ca.2.weight": (c.width, c.width),
        "text_proj_for_ca.2.bias": (c.width,),
        "head.weight": (2 * c.code_channels, c.width),
        "head.bias": (2 * c.code_channels,),
    }
    sources = {name: WeightSource(shape, getter(state, name)) for name, shape in exact.items()}
    sources |= {name: WeightSource(s, getter(state, name), Role.OPERAND) for name, s in operands.items()}
    sources[pool + "kv_bias"] = WeightSource((2 * c.width,), _key_value_bias(state, pool + "v_bias"), Role.OPERAND)
    return sources


def _layer(config: TransformerConfig, state: Mapping[str, Tensor], prefix: str) -> dict[str, WeightSource]:
    c = config
    matrices = {
        "sa.proj.weight": (c.width, c.width),
        "ca.mat_q.weight": (c.width, c.width),
        "ca.mat_kv.weight": (2 * c.width, c.width),
        "ca.proj.weight": (c.width, c.width),
        "ffn.fc1.weight": (c.mlp_width, c.width),
        "ffn.fc2.weight": (c.width, c.mlp_width),
    }
    biases = {
        "sa.proj.bias": (c.width,),
        "ca.mat_q.bias": (c.width,),
        "ca.proj.bias": (c.width,),
        "ffn.fc1.bias": (c.mlp_width,),
        "ffn.fc2.bias": (c.width,),
    }
    exact = {"ca_norm.weight": (c.width,), "ca_norm.bias": (c.width,)}
    sources: dict[str, WeightSource] = {}
    for role, shapes in ((Role.MATRIX, matrices), (Role.OPERAND, biases), (Role.EXACT, exact)):
        sources |= {name: WeightSource(shape, getter(state, prefix + name), role) for name, shape in shapes.items()}
    order = halves_order(c)

    def qkv_weight() -> Tensor:
        q, k, v = state[prefix + "sa.mat_qkv.weight"].chunk(3)
        return torch.cat((q[order], k[order], v))

    def qkv_bias() -> Tensor:
        q, v = state[prefix + "sa.q_bias"], state[prefix + "sa.v_bias"]
        return torch.cat((q[order], torch.zeros_like(q), v))

    def q_scale() -> Tensor:
        return state[prefix + "sa.scale_mul_1H11"].float().flatten().clamp(max=MAX_LOG_SCALE).exp()

    sources["ada_gss"] = WeightSource((6, c.width), lambda: state[prefix + "ada_gss"].view(6, c.width))
    sources["sa.qkv.weight"] = WeightSource((3 * c.width, c.width), qkv_weight, Role.MATRIX)
    sources["sa.qkv.bias"] = WeightSource((3 * c.width,), qkv_bias, Role.OPERAND)
    sources["sa.q_scale"] = WeightSource((c.heads,), q_scale)
    sources["ca.kv_bias"] = WeightSource((2 * c.width,), _key_value_bias(state, prefix + "ca.v_bias"), Role.OPERAND)
    return sources


def _key_value_bias(state: Mapping[str, Tensor], name: str) -> Callable[[], Tensor]:
    def fetch() -> Tensor:
        v = state[name]
        return torch.cat((torch.zeros_like(v), v))

    return fetch
