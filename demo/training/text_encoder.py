"""Train a T5-style text encoder and its word tokenizer on scene captions.

The encoder learns from throw-away heads that ask its features what the scene looks like; only the encoder is
kept. It knows captions and scenes, never pixels.
"""

import argparse
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Encoding, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from demo.scenes import (
    BACKGROUNDS,
    COLORS,
    KINDS,
    PATTERNS,
    PLACEMENTS,
    RICH,
    SIZES,
    Scene,
    caption,
    held_out_scenes,
    training_scenes,
)
from demo.training.curve import Curve
from demo.training.loop import Steps, TrainingRun
from demo.training.places import CURVES, STATES, TEXT_ENCODER

PAD, END, UNKNOWN = 0, 1, 2  # T5's ids
SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
MAX_SHAPES = 3
STATE = STATES / "text_encoder.pt"
SAVE_EVERY = 50  # steps
UNKNOWN_RATE = 0.1  # share of training captions with one unknown word, which should change nothing

SHAPE_CLASSES = {  # field of `Shape` -> its values
    "color": tuple(COLORS),
    "kind": KINDS,
    "size": tuple(SIZES),
    "pattern": PATTERNS,
    "cell": tuple(PLACEMENTS),
}
SHAPE_WIDTHS = [len(values) for values in SHAPE_CLASSES.values()]
SLOT_WIDTHS = [width + 1 for width in SHAPE_WIDTHS]  # class 0: no shape in this slot
SCENE_WIDTHS = [len(BACKGROUNDS), MAX_SHAPES]  # background, number of shapes


def build_tokenizer(captions: list[str]) -> Tokenizer:
    """One token per word, lower-cased, `</s>` appended; words outside `captions` become `<unk>`."""
    words = sorted({word for text in captions for word in text.replace(",", " , ").split()})
    vocabulary = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace("grey", "gray"),
            normalizers.Replace("center", "centre"),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return tokenizer


@dataclass(frozen=True)
class Batch:
    """Tokenized captions and what the heads should say about them; every tensor is int64.

    Captions are padded to the longest: ids, mask [B, L]. nouns [N, 2] holds the (caption, position) of each
    shape noun, noun_labels [N, 5] its `SHAPE_CLASSES`; scene_labels [B, 2] background and count - 1;
    slot_labels [B, 3, 5] the classes + 1 of the shapes in reading order, 0 where there is none.
    """

    ids: Tensor
    mask: Tensor
    nouns: Tensor
    noun_labels: Tensor
    scene_labels: Tensor
    slot_labels: Tensor


def make_batch(scenes: list[Scene], tokenizer: Tokenizer, rng: np.random.Generator, noise: float) -> Batch:
    """Caption `scenes`; a share `noise` of the captions gets one unknown word at a random place."""
    rows, nouns, noun_labels = [], [], []
    slot_labels = torch.zeros(len(scenes), MAX_SHAPES, len(SHAPE_CLASSES), dtype=torch.int64)
    for row, (scene, encoding) in enumerate(_encode(scenes, tokenizer, rng)):
        ids, tokens = list(encoding.ids), encoding.tokens
        inserted = int(rng.integers(len(ids))) if rng.random() < noise else len(ids)
        if inserted < len(ids):
            ids.insert(inserted, UNKNOWN)
        rows.append(ids)
        for slot, shape in enumerate(scene.shapes):
            classes = [values.index(getattr(shape, field)) for field, values in SHAPE_CLASSES.items()]
            position = _noun_position(tokens, shape.color, shape.kind)
            nouns.append((row, position + (inserted <= position)))
            noun_labels.append(classes)
            slot_labels[row, slot] = torch.tensor(classes) + 1
    padded = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)
    scene_labels = [(BACKGROUNDS.index(s.background), len(s.shapes) - 1) for s in scenes]
    return Batch(
        padded,
        (padded != PAD).long(),
        torch.tensor(nouns),
        torch.tensor(noun_labels),
        torch.tensor(scene_labels),
        slot_labels,
    )


def _encode(scenes: list[Scene], tokenizer: Tokenizer, rng: np.random.Generator) -> Iterator[tuple[Scene, Encoding]]:
    return zip(scenes, tokenizer.encode_batch([caption(scene, rng) for scene in scenes]), strict=True)


def _noun_position(tokens: list[str], color: str, kind: str) -> int:
    """Index of the noun in "... color kind ..."; the pair is unique in a scene."""
    return next(i for i in range(1, len(tokens)) if (tokens[i - 1], tokens[i]) == (color, kind))


def build_encoder(vocabulary_size: int) -> T5EncoderModel:
    """Randomly initialized; about 0.5 M parameters."""
    config = T5Config(
        vocab_size=vocabulary_size,
        d_model=128,
        d_kv=32,
        num_heads=4,
        d_ff=256,
        num_layers=3,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=PAD,
        eos_token_id=END,
    )
    return T5EncoderModel(config)


class Heads(nn.Module):
    """Linear probes trained together with the encoder and then thrown away."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.noun = nn.Linear(width, sum(SHAPE_WIDTHS))
        self.scene = nn.Linear(width, sum(SCENE_WIDTHS))  # on every token and on the mean
        self.slots = nn.Linear(width, MAX_SHAPES * sum(SLOT_WIDTHS))

    def forward(self, features: Tensor, batch: Batch) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """features [B, L, C] -> question -> pairs of logits [M, classes] and labels [M]."""
        mask = batch.mask.bool()
        pooled = (features * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # [B, C]
        tokens = features[mask]  # [T, C], T tokens of all captions
        owner = mask.nonzero()[:, 0]  # [T], the caption of each token
        nouns = features[batch.nouns[:, 0], batch.nouns[:, 1]]  # [N, C]
        slots = self.slots(pooled).view(-1, sum(SLOT_WIDTHS))  # [B * 3, classes]
        return {
            "noun": _pair(self.noun(nouns), SHAPE_WIDTHS, batch.noun_labels),
            "token": _pair(self.scene(tokens), SCENE_WIDTHS, batch.scene_labels[owner]),
            "mean": _pair(self.scene(pooled), SCENE_WIDTHS, batch.scene_labels),
            "slot": _pair(slots, SLOT_WIDTHS, batch.slot_labels.flatten(0, 1)),
        }


def _pair(logits: Tensor, widths: list[int], labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(logits.split(widths, dim=-1), labels.unbind(-1), strict=True))


def train(steps: int, batch_size: int, peak_rate: float, seed: int) -> tuple[Tokenizer, T5EncoderModel, Heads]:
    """Train, resuming from the last checkpoint; the same arguments give the same weights on the same machine."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer = build_tokenizer([caption(scene, rng) for scene in islice(training_scenes(seed, RICH), 4000)])
    encoder = build_encoder(tokenizer.get_vocab_size())
    heads = Heads(encoder.config.d_model)
    both = nn.ModuleDict({"encoder": encoder, "heads": heads})
    optimizer = torch.optim.AdamW(both.parameters(), lr=peak_rate, weight_decay=0.01)
    optimizer.param_groups[0]["peak_lr"] = peak_rate
    run = TrainingRun(both, [optimizer], STATE, Steps(steps), average=0.0)
    curve = Curve(CURVES / "text_encoder.csv", ("loss",), run.step)
    while run.progress < 1:
        own = np.random.default_rng((seed, run.step, 1))  # another stream than the scenes come from
        batch = make_batch(
            list(islice(training_scenes((seed, run.step), RICH), batch_size)), tokenizer, own, UNKNOWN_RATE
        )
        loss = _loss(encoder, heads, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        run.update()
        curve.add({"loss": loss.item()})
        if run.step % SAVE_EVERY == 0:
            print(curve.write(run.step, run.used_s), flush=True)
            run.save()
    return tokenizer, encoder, heads


def _answers(encoder: T5EncoderModel, heads: Heads, batch: Batch) -> dict[str, list[tuple[Tensor, Tensor]]]:
    features = encoder(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state  # [B, L, C]
    answers: dict[str, list[tuple[Tensor, Tensor]]] = heads(features, batch)
    return answers


def _loss(encoder: T5EncoderModel, heads: Heads, batch: Batch) -> Tensor:
    """Sum over the questions of their mean cross-entropy."""
    answers = _answers(encoder, heads, batch).values()
    return torch.stack([F.cross_entropy(logits, labels) for pairs in answers for logits, labels in pairs]).sum()


@torch.no_grad()
def evaluate(tokenizer: Tokenizer, encoder: T5EncoderModel, heads: Heads, count: int, seed: int) -> dict[str, float]:
    """Accuracy on the captions of `count` held-out scenes, per question and attribute."""
    rng = np.random.default_rng(seed)
    batch = make_batch(held_out_scenes(count, seed, RICH), tokenizer, rng, noise=0.0)
    scene_names = ("background", "count")
    names = {"noun": SHAPE_CLASSES, "slot": SHAPE_CLASSES, "token": scene_names, "mean": scene_names}
    return {
        f"{question} {name}": (logits.argmax(-1) == labels).float().mean().item()
        for question, pairs in _answers(encoder, heads, batch).items()
        for name, (logits, labels) in zip(names[question], pairs, strict=True)
    }


def longest_caption(tokenizer: Tokenizer, count: int = 20_000, seed: int = 0) -> int:
    """Most tokens, `</s>` included, in the captions of `count` random training scenes."""
    rng = np.random.default_rng(seed)
    scenes = list(islice(training_scenes(seed, RICH), count))
    return max(len(encoding.ids) for _, encoding in _encode(scenes, tokenizer, rng))


def round_to_half(encoder: T5EncoderModel) -> None:
    """Make every weight exactly representable in fp16, in place; the dtype stays float32."""
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(parameter.half())


def save(folder: Path, tokenizer: Tokenizer, encoder: T5EncoderModel) -> None:
    """Write config.json, model.safetensors (fp16) and tokenizer.json, then move the folder into place.

    Converts `encoder` to fp16.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    encoder.half().save_pretrained(temporary)
    tokenizer.save(str(temporary / "tokenizer.json"))
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)


def main() -> None:
    """Train, report, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=TEXT_ENCODER)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--peak-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # faster than two on a shared machine at these sizes
    torch.use_deterministic_algorithms(True)
    tokenizer, encoder, heads = train(arguments.steps, arguments.batch_size, arguments.peak_rate, arguments.seed)
    round_to_half(encoder)
    for name, accuracy in evaluate(tokenizer, encoder, heads, count=1000, seed=1).items():
        print(f"held-out {name}: {accuracy:.4f}")
    print(f"vocabulary {tokenizer.get_vocab_size()}, longest caption {longest_caption(tokenizer)} tokens")
    save(arguments.out, tokenizer, encoder)


if __name__ == "__main__":
    main()
