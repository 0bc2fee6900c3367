"""A Qwen2 decoder as text encoder, as a step graph: its last hidden states are the features. Weights are inputs.

The prompt's tokens stand behind those of a system prompt, whose features are cut off again. What a tokenizer does, and
which system prompt that is, is not known here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ....errors import CheckpointError
from .rows import Shapes, Weights
from .steps import Step
from .weights import Role

if TYPE_CHECKING:
    from transformers import Qwen2Config

ATTENTION = "fastvar_causal_fp32_softmax"  # our attention's name with transformers
HIDDEN = -1e30  # added to the score of a key that a query does not see


def qwen2_vl_text() -> Qwen2Config:
    """The published text encoder's sizes: the language half of Qwen2-VL-2B, 1.5 billion parameters."""
    from transformers import Qwen2Config  # seconds to import

    return Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    )


def qwen2_role(name: str) -> Role:
    """Norms work on the fp32 stream; matrices, their biases and the embedding are of the compute precision."""
    return Role.FP32 if name.endswith("norm.weight") else Role.COMPUTE


def qwen2_shapes(config: Qwen2Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the encoder, as transformers' Qwen2Model names them."""
    return {name: tuple(tensor.shape) for name, tensor in _on_meta(config).state_dict().items()}


class Qwen2Encoder(Step):
    """ids [1, P + T], attention_mask [1, P + T] (both int64) -> features [T, Ct], of all but the first P tokens.

    Positions count all tokens, padding too. Padding is seen by no token, but has features of its own, and HART reads
    them: a padding token sees what comes before it. Where it sees nothing its features are finite, and mean nothing.

    The residual stream is fp32, as where the published program runs it under autocast.
    """

    inputs = ("ids", "attention_mask")
    outputs = ("features",)

    def __init__(self, config: Qwen2Config, text_length: int, prefix_length: int = 0) -> None:
        super().__init__()
        if config.use_sliding_window:
            raise CheckpointError(
                "the text encoder attends through a sliding window", expected="a Qwen2 model with full attention"
            )
        self.model = _on_meta(config)
        # Its frequencies are no weight that comes from outside: they are made here, as constants of the graph.
        self.model.rotary_emb = type(self.model.rotary_emb)(self.model.config)
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(_to_weight_type)
        self.text_length, self.prefix_length = text_length, prefix_length
        self.weights = tuple(self.model.state_dict())

    def border(self) -> Shapes:
        tokens = (1, self.prefix_length + self.text_length)
        return {"ids": tokens, "attention_mask": tokens, "features": (self.text_length, self.model.config.hidden_size)}

    def forward(self, ids: Tensor, attention_mask: Tensor, weights: Weights) -> Tensor:
        embedded = F.embedding(ids, weights["embed_tokens.weight"]).float()
        tokens = self.prefix_length + self.text_length
        causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        seen = causal & attention_mask[:, None, None, :].bool()  # [1, 1, T, T]: of rank 4, used as it is
        inputs = {
            "inputs_embeds": embedded,
            "attention_mask": torch.where(seen, 0.0, HIDDEN),
            "position_ids": torch.arange(tokens)[None],
            "use_cache": False,
        }
        features: Tensor = functional_call(self.model, weights, (), inputs).last_hidden_state[0]
        return features[self.prefix_length :]


def _on_meta(config: Qwen2Config) -> Any:
    from transformers import AttentionInterface, Qwen2Model

    AttentionInterface.register(ATTENTION, _attention)
    config = type(config).from_dict({**config.to_dict(), "_attn_implementation": ATTENTION})
    with torch.device("meta"):
        return Qwen2Model(config).eval()


def _to_weight_type(module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Operands of a product take its weight's type; the stream they come from is fp32."""
    return (arguments[0].to(module.weight.dtype),)


def _attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float = 1.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [B, H, T, hd], key, value [B, Hk, T, hd], mask [B, 1, T, T] -> [B, T, H, hd]; the softmax in fp32.

    Query heads go in groups that share a key head. transformers' rotary is fp32, so query and key are: they are rounded
    to the value's type.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (t.to(value.dtype).repeat_interleave(groups, dim=1) for t in (key, value))
    scores = (query.to(value.dtype) @ key.transpose(2, 3)).float() * scaling + attention_mask
    return (torch.softmax(scores, dim=-1).to(value.dtype) @ value).transpose(1, 2), None
