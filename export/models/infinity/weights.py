"""From Infinity's official tensors to the tensors that its step graphs are bound to.

Arithmetic on weights alone is done here once instead of in every graph: biases are joined, scales are exponentiated,
rotary pairs are laid out in halves.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ....families.infinity import TransformerConfig
from ..common.weights import Role, Sources, State, WeightSource, affine
from ..transformer.weights import Official, all_layers, attention_weights
from .model import InfinityTransformer


def transformer_weights(config: TransformerConfig, state: State) -> Sources:
    """Official state -> "transformer.*" tensors; layers are "transformer.blocks.<layer>.*" whatever their chunk."""
    official = Official.of(InfinityTransformer, replace(config, chunks=1), state)
    layers = all_layers(config.depth, lambda i: _layer(config, official.layer(layer_prefix(config, i))))
    return {f"transformer.{name}": source for name, source in (_shared(config, official) | layers).items()}


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


def _shared(c: TransformerConfig, official: Official) -> Sources:
    pool = "text_proj_for_sos.ca"
    exact: tuple[str, ...] = ("cfg_uncond", "text_norm.weight", f"{pool}.mat_q", "pos_start", "lvl_embed.weight")
    exact += affine(f"{pool}.proj", "word_embed", "shared_ada_lin.1", "head_nm.ada_lin.1")
    operands = (f"{pool}.mat_kv.weight", *affine("text_proj_for_ca.0", "text_proj_for_ca.2", "head"))
    sources = official.taken(exact) | official.taken(operands, Role.COMPUTE)
    return sources | {f"{pool}.kv_bias": _key_value_bias(c, official, f"{pool}.v_bias")}


def _layer(c: TransformerConfig, official: Official) -> Sources:
    matrices = ("ca.mat_q", "ca.mat_kv", "ca.proj", "ffn.fc1", "ffn.fc2")
    sources = official.taken([f"{name}.weight" for name in matrices], Role.QUANTIZABLE)
    sources |= official.taken([f"{name}.bias" for name in matrices if name != "ca.mat_kv"], Role.COMPUTE)
    sources |= official.taken(affine("ca_norm")) | attention_weights(
        c, official, "sa", "mat_qkv", order=halves_order(c)
    )
    sources["ada_gss"] = WeightSource((6, c.width), lambda: official["ada_gss"].view(6, c.width))
    return sources | {"ca.kv_bias": _key_value_bias(c, official, "ca.v_bias")}


def _key_value_bias(c: TransformerConfig, official: Official, name: str) -> WeightSource:
    """The bias of keys, which is zero, and that of values."""

    def fetch() -> Tensor:
        v = official[name]
        return torch.cat((torch.zeros_like(v), v))

    return WeightSource((2 * c.width,), fetch, Role.COMPUTE)
