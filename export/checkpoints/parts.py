"""The parts of a model on this disk: where transformer, image tokenizer and text encoder lie, by their names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import CheckpointError
from .published import PublishedFiles, is_transformer_folder, published_files

DEEPEST = 3  # folders within each other that are looked through


@dataclass(frozen=True)
class Parts:
    """Where the parts of one model lie.

    model: what it is published as; empty for a model of the user's own name.
    image_tokenizer, text_encoder: None where they are not there, or more than one file could be it.
    image_tokenizers, text_encoders: the names that they were looked for under.
    """

    folder: Path
    model: str
    transformer: Path
    image_tokenizer: Path | None = None
    text_encoder: Path | None = None
    image_tokenizers: tuple[str, ...] = ()
    text_encoders: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()  # of the image tokenizer

    def shown(self, path: Path) -> str:
        """A path as an origin names it: within the folder, or else its name alone."""
        inside = path.is_relative_to(self.folder) and path != self.folder
        return (path.relative_to(self.folder) if inside else Path(path.name)).as_posix()


def find_parts(source: Path, model: str | None = None) -> Parts:
    """The parts of a model from its folder, or from its transformer alone: then from what lies beside it.

    Args:
        source: a folder; or the transformer: its file, its index, or the folder that it is published as.
        model: which of several models in a folder.

    Raises:
        CheckpointError: no model, several and no name, or a name that chooses nothing.
    """
    if not source.is_dir():
        if model is not None:
            raise CheckpointError(
                f"{source} is no folder of which a model {model!r} could be chosen", fix="leave the name away"
            )
        return _beside(source)
    folder, names = source, list(_names(source, DEEPEST))
    if model is None and is_transformer_folder(source.resolve().name, names):
        folder, model = source.resolve().parent, source.resolve().name
        names = [f"{model}/{name}" for name in names] + [
            name for name in _names(folder, DEEPEST - 1) if not name.startswith(f"{model}/")
        ]
    try:
        return _parts(folder, published_files(names, model))
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error.problem}", expected=error.expected, fix=error.fix) from None


def _beside(file: Path) -> Parts:
    """A transformer that is named, and whatever published names beside it belong to it."""
    folder = file.parent
    if is_transformer_folder(folder.resolve().name, _names(folder, 1)):
        return replace(find_parts(folder), transformer=file)
    try:
        found = _parts(folder, published_files(_names(folder, 2), file.name))
    except CheckpointError:
        return Parts(folder, "", file)  # reading it says what is the matter, if anything is
    return found if found.transformer == file else Parts(folder, "", file)


def _parts(folder: Path, found: PublishedFiles) -> Parts:
    images, text = found.image_tokenizer, found.text_encoder
    return Parts(
        folder,
        found.model if found.family is not None else "",
        folder / found.transformer.path,
        None if images is None else folder / images.path,
        None if text is None else folder / text.path,
        found.image_tokenizers,
        found.text_encoders,
        found.rivals,
    )


def _names(folder: Path, depth: int) -> Iterator[str]:
    """Files of a folder and of those within it, so many levels deep, as published names are written."""
    for where, folders, files in os.walk(folder, followlinks=True):
        inside = Path(where).relative_to(folder)
        if len(inside.parts) + 1 >= depth:
            folders.clear()
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from ((inside / name).as_posix() for name in files)
