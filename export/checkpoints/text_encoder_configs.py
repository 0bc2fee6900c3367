"""A text encoder's config.json, read by hand: the fields that its numbers depend on, checked against its tensors.

Nothing else of the file reaches transformers, which trusts whatever it is given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError
from ..models.common.tensor_shapes import Shapes, count, dims

if TYPE_CHECKING:
    from transformers import Qwen2Config, T5Config

ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu")
FEED_FORWARDS = (*ACTIVATIONS, *(f"gated-{name}" for name in ACTIVATIONS))
MOST = 1 << 24  # of a number that no tensor bounds
T5, QWEN2 = "a T5 encoder", "a Qwen2 model"
_T5_ATTENTION = "encoder.block.0.layer.0.SelfAttention"
# Tensors that sizes are read from.
T5_SIZES = ("shared.weight", f"{_T5_ATTENTION}.relative_attention_bias.weight", f"{_T5_ATTENTION}.q.weight")
QWEN2_SIZES = ("embed_tokens.weight", "layers.0.self_attn.k_proj.weight", "layers.0.mlp.gate_proj.weight")


@dataclass(frozen=True)
class Entries:
    """The entries of a config.json; `where` names it in errors."""

    data: Mapping[str, Any]
    where: str

    def integer(self, name: str, otherwise: int | None = None) -> int:
        """A positive whole number.

        Raises:
            CheckpointError: another value, or none where nothing stands in for it.
        """
        value = self.data.get(name, otherwise)
        if type(value) is not int or not 0 < value <= MOST:
            raise self._refused(name, value, "a positive whole number")
        return value

    def number(self, name: str, otherwise: float | None = None) -> float:
        """A positive number."""
        value = self.data.get(name, otherwise)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf or value > 1e18:
            raise self._refused(name, value, "a positive number")
        return float(value)

    def choice(self, name: str, choices: Sequence[Any], otherwise: Any) -> Any:
        """One of some values, of the same type."""
        value = self.data.get(name, otherwise)
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise self._refused(name, value, " or ".join(repr(choice) for choice in choices))
        return value

    def agree(self, **read: int) -> None:
        """What is given of sizes is what the tensors have.

        Raises:
            CheckpointError: it is not.
        """
        for name, value in read.items():
            if self.integer(name, value) != value:
                raise self._refused(name, self.data[name], f"{value}, as its tensors have")

    def plain(self) -> None:
        """Raises:
        CheckpointError: the numbers are said to be quantised.
        """
        found = self.data.get("quantization_config")
        if found is not None:
            method = found.get("quant_method") if isinstance(found, Mapping) else found
            raise CheckpointError(
                f"{self.where}: the text encoder is quantised ({method!r})",
                expected="weights in float16, bfloat16 or float32, and no quantization_config",
                fix="take the text encoder as it was published, or save it dequantised",
            )

    def _refused(self, name: str, value: Any, expected: str) -> CheckpointError:
        what = f"says {name} {_shown(value)}" if name in self.data else f"has no {name}"
        return CheckpointError(
            f"{self.where} {what}", expected=expected, fix="fetch the folder of the text encoder again"
        )


def t5_config(entries: Entries, shapes: Shapes) -> T5Config:
    """The encoder half's configuration.

    Raises:
        CheckpointError: the tensors are not those of a T5 encoder, or an entry contradicts them or is not understood.
    """
    from transformers import T5Config  # seconds to import

    (vocabulary, width), (buckets, heads), (rows, _) = (dims(shapes, name, 2, T5) for name in T5_SIZES)
    feed_forward = "encoder.block.0.layer.1.DenseReluDense.wi"
    gated = f"{feed_forward}_0.weight" in shapes
    hidden = dims(shapes, f"{feed_forward}{'_0' if gated else ''}.weight", 2, T5)[0]
    sizes = {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": _divided(rows, heads, T5),
        "d_ff": hidden,
        "num_layers": count(shapes, r"encoder\.block\.(\d+)\.", T5),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }
    entries.agree(**sizes)
    kinds = [kind for kind in FEED_FORWARDS if kind.startswith("gated-") == gated]
    config = T5Config(
        **sizes,
        relative_attention_max_distance=entries.integer("relative_attention_max_distance", 128),
        layer_norm_epsilon=entries.number("layer_norm_epsilon", 1e-6),
        feed_forward_proj=entries.choice("feed_forward_proj", kinds, "relu"),
    )
    for name in ("dense_act_fn", "is_gated_act"):
        entries.choice(name, (getattr(config, name),), getattr(config, name))
    if config.relative_attention_max_distance <= buckets // 4:  # its logarithm spaces the further half of the buckets
        raise CheckpointError(f"{entries.where} says relative_attention_max_distance {buckets // 4} or less")
    return config


def qwen2_config(entries: Entries, shapes: Shapes) -> Qwen2Config:
    """The configuration of a Qwen2 model, or of the language half of a Qwen2-VL model.

    Text alone has one position on all of Qwen2-VL's axes, so its rotary is the ordinary one.

    Raises:
        CheckpointError: the tensors are not those of a Qwen2 model, or an entry contradicts them or is not understood.
    """
    from transformers import Qwen2Config  # seconds to import

    text = entries.data.get("text_config")
    if isinstance(text, Mapping):  # how newer versions of transformers write Qwen2-VL
        entries = Entries({**entries.data, **text}, entries.where)
    (vocabulary, width), (keys, _), (hidden, _) = (dims(shapes, name, 2, QWEN2) for name in QWEN2_SIZES)
    heads = entries.integer("num_attention_heads")
    head_dim = _divided(width, heads, QWEN2)
    shared = _divided(keys, head_dim, QWEN2)
    _divided(heads, shared, QWEN2)
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": count(shapes, r"layers\.(\d+)\.", QWEN2),
        "num_key_value_heads": shared,
    }
    entries.agree(**sizes, head_dim=head_dim)
    return Qwen2Config(
        **sizes,
        num_attention_heads=heads,
        hidden_act=entries.choice("hidden_act", ACTIVATIONS, "silu"),
        rms_norm_eps=entries.number("rms_norm_eps", 1e-6),
        max_position_embeddings=entries.integer("max_position_embeddings", 32768),
        use_sliding_window=entries.choice("use_sliding_window", (False,), False),
        rope_parameters={"rope_type": "default", "rope_theta": _rotary_base(entries)},
    )


def _rotary_base(entries: Entries) -> float:
    """Under rope_parameters, or by itself with rope_scaling beside it, as older versions of transformers wrote it."""
    scaling = entries.data.get("rope_parameters", entries.data.get("rope_scaling")) or {}
    if not isinstance(scaling, Mapping):
        raise CheckpointError(f"{entries.where} says rope_parameters {_shown(scaling)}", expected="an object")
    for name in ("rope_type", "type"):
        Entries(scaling, f"{entries.where}: rotary").choice(name, ("default", "mrope"), "default")
    bases = [Entries(found, entries.where) for found in (scaling, entries.data) if "rope_theta" in found]
    values = {found.number("rope_theta") for found in bases or [entries]}
    if len(values) > 1:
        raise CheckpointError(f"{entries.where} says rope_theta {' and '.join(map(str, sorted(values)))}")
    return values.pop()


def _divided(whole: int, parts: int, kind: str) -> int:
    if not parts or whole < parts or whole % parts:
        raise CheckpointError(
            f"not {kind}: {whole} does not divide into {parts} attention heads", fix="fetch the folder again"
        )
    return whole // parts


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
