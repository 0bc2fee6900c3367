"""The names that a family's models are published and saved under: each family has a table of them, in its adapter.

Names alone: nothing here is opened.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedModel:
    """One published model, or a line of them, by the names of its parts.

    A part is a file of weights or a folder of them, and goes by its name without the suffix: `infinity_2b_reg` is
    infinity_2b_reg.pth, infinity_2b_reg.safetensors, or a folder infinity_2b_reg/.

    Args:
        transformer: regular expression of that name.
        name: what the model is called; None where that is the name of its transformer.
        image_tokenizers: names of the one that it was trained with, the preferred spelling first.
        text_encoder: folder that the text encoder is published as; empty where the model reads no prompts.
        text_encoder_repository: where that folder is published by itself.
        weight_files: files of weights in the transformer's folder that come before the usual ones.
    """

    transformer: str
    name: str | None = None
    image_tokenizers: tuple[str, ...] = ()
    text_encoder: str = ""
    text_encoder_repository: str = ""
    weight_files: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainingKeys:
    """The keys that a family's training program saves parts of a model under.

    Args:
        averaged: the transformer's weights averaged over training (EMA), which come first.
        trained: the transformer's weights themselves.
        image_tokenizer: those of the image tokenizer.
    """

    averaged: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    image_tokenizer: tuple[str, ...] = ("vae_local", "vae")
