"""From HART's official tensors to the tensors that its step graphs are bound to. Each is read when it is fetched."""

from __future__ import annotations

import torch
from torch import Tensor

from ....families.codebook import VqTokenizerConfig
from ....families.hart import HartConfig
from ..codebook.steps import codebook_weights
from ..common.weights import Role, Sources, State, WeightSource, affine
from ..transformer.weights import Official, all_layers, attention_weights
from .diffusion import NumberEmbedding, diffusion_steps
from .model import HartTransformer
from .residual import NET, residual_weight_names

OFFICIAL = "diffloss.net."
EXACT_LAYERS = ("input_proj.", "final_layer.linear.", ".in_ln.")  # of the diffusion head


def hart_weights(c: HartConfig, state: State, images: VqTokenizerConfig, images_state: State) -> Sources:
    """All tensors of the graphs by name, without "transformer."."""
    official = Official.of(HartTransformer, c, state)
    sources = _shared_weights(c, official) | codebook_weights(images, images_state) | _diffusion_weights(c, official)
    return sources | all_layers(c.depth, lambda i: _layer_weights(c, official.layer(f"blocks.{i}.")))


def _shared_weights(c: HartConfig, official: Official) -> Sources:
    exact = ("context_embed.bias", *affine("word_embed", "head_nm.ada_lin.1"), "decoder_norm.weight")
    exact += ("context_norm.weight",) if c.context_norm else ()
    sources = official.taken(exact) | official.taken(("context_embed.weight", *affine("head")), Role.COMPUTE)
    sources["head_norm.weight"] = official.renamed("head_nm.ln_wo_grad.weight")

    def levels() -> Tensor:
        """One row a scale, looked up or computed."""
        if not c.timestep_levels:
            return official["lvl_embed.weight"]
        return number_table(official.state, "lvl_embed.", c.width, range(c.max_scales))

    return sources | {"lvl_embed.weight": WeightSource((c.max_scales, c.width), levels)}


def _layer_weights(c: HartConfig, official: Official) -> Sources:
    sources = attention_weights(c, official, "attn", "qkv_proj", c.unit_queries)

    def gate_up() -> Tensor:
        return torch.cat([official[f"ffn.{name}_proj.weight"] for name in ("gate", "up")])

    sources["ffn.gate_up.weight"] = WeightSource((2 * c.mlp_width, c.width), gate_up, Role.QUANTIZABLE)
    sources["ffn.down.weight"] = official.renamed("ffn.down_proj.weight", Role.QUANTIZABLE)
    sources["norm.weight"] = official.renamed("ln_wo_grad.weight")
    return sources | (official.taken(affine("ada_lin.1"), Role.COMPUTE) if c.modulated else {})


def _diffusion_weights(c: HartConfig, official: Official) -> Sources:
    """The head's network; its time embedding is needed at the sampled steps alone, and becomes a table of them."""

    def times() -> Tensor:
        steps = [step.timestep for step in diffusion_steps(c.diffusion_steps)]
        return number_table(official.state, f"{OFFICIAL}time_embed.", c.diffusion_width, steps)

    sources = {f"{NET}times": WeightSource((c.diffusion_steps, c.diffusion_width), times)}
    for name in residual_weight_names(c):
        if name.startswith(NET) and name not in sources:
            exact = any(part in f".{name.removeprefix(NET)}" for part in EXACT_LAYERS)
            role = Role.FP32 if exact else Role.COMPUTE
            sources[name] = official.renamed(OFFICIAL + name.removeprefix(NET), role)
    return sources


def number_table(state: State, prefix: str, width: int, numbers: range | list[int]) -> Tensor:
    """The number embedding of each number [n, width], fp32."""
    embedding = NumberEmbedding(width)
    embedding.load_state_dict({name: state[prefix + name].float() for name in embedding.state_dict()})
    with torch.no_grad():
        found: Tensor = embedding(torch.tensor(list(numbers)))
    return found
