"""Which files of a folder, or of a repository, belong to a model: told from their names alone.

The names that models are published under are in the table of each family's adapter. Beside them stands the layout that
names its parts: transformer.*, image_tokenizer.*, text_encoder/. Opens nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath as Path

from ...errors import CheckpointError
from ..models.registry import ADAPTERS
from ..models.transformer.published_models import PublishedModel
from .tensor_files import TORCH_SUFFIXES

SUFFIXES = (".safetensors", *TORCH_SUFFIXES)  # of files of weights, the preferred first
INDEX = ".index.json"
# Files of weights in a folder as transformers writes it, the preferred first.
FOLDER_WEIGHTS = tuple(
    f"{stem}{suffix}{index}"
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin"))
    for index in ("", INDEX)
)
CONFIG, CLASS_NAMES = "config.json", "class_names.json"
TOKENIZER_FILE, SETTINGS_FILE, PREFIX_FILE = "tokenizer.json", "tokenizer_config.json", "prefix.txt"
TRANSFORMER, IMAGE_TOKENIZER, TEXT_ENCODER = "transformer", "image_tokenizer", "text_encoder"
BESIDE_TRANSFORMER = (CONFIG, CLASS_NAMES)
BESIDE_TEXT_WEIGHTS = (CONFIG, TOKENIZER_FILE, SETTINGS_FILE, PREFIX_FILE)
NAMED = 8  # models in an error before "and N more"


@dataclass(frozen=True)
class Part:
    """A part of a model.

    path: what is read: a file of weights, the index of several, or the folder of a text encoder.
    files: all that it takes, `path` among them if it is a file.
    """

    path: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class PublishedFiles:
    """The files of one model, by their names as they were given.

    image_tokenizer, text_encoder: None where no name, or more than one, could be it.
    image_tokenizers, text_encoders: what they go by, for who has to say what is missing.
    text_encoder_repository: where the text encoder is published by itself; empty where none is known.
    rivals: several names that could be the image tokenizer.
    """

    model: str
    family: str | None  # None where the names do not tell
    transformer: Part
    image_tokenizer: Part | None
    text_encoder: Part | None
    image_tokenizers: tuple[str, ...]
    text_encoders: tuple[str, ...]
    text_encoder_repository: str = ""
    rivals: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """Everything that the model takes, each name once."""
        parts = (self.transformer, self.image_tokenizer, self.text_encoder)
        return tuple(dict.fromkeys(name for part in parts if part is not None for name in part.files))


@dataclass(frozen=True)
class _Candidate:
    """What may be the transformer that is looked for."""

    model: str
    path: str  # of the file or folder
    weights: str
    published: PublishedModel | None
    family: str | None

    def goes_by(self, name: str) -> bool:
        path = Path(self.path)
        names = {self.model, self.path, path.name, _stem(path.name)}
        return _folded(name.rstrip("/")) in {_folded(own) for own in names}


def published_files(names: Iterable[str], model: str | None = None) -> PublishedFiles:
    """The files of one model among the names of a folder or a repository.

    Args:
        names: all files, relative, with `/` between folders.
        model: which of several: its published name ("infinity_2b"), or that of its transformer, with suffix or without.

    Raises:
        CheckpointError: no model, none of that name, or several and no name to choose by.
    """
    listing = _Listing(names)
    chosen = _chosen(_candidates(listing), model)
    published = chosen.published
    image_names = (IMAGE_TOKENIZER, *(published.image_tokenizers if published else _image_tokenizer_names()))
    text_names = (TEXT_ENCODER, *dict.fromkeys(row.text_encoder for row in _rows(published) if row.text_encoder))
    root = str(Path(chosen.path).parent)
    choices = _best(listing.parts_by_name(image_names), root, ordered=published is not None)
    images = choices[0] if len(choices) == 1 else None
    weights = _shards(listing, chosen.weights)
    beside = listing.beside(chosen.weights, BESIDE_TRANSFORMER)
    return PublishedFiles(
        chosen.model,
        chosen.family,
        Part(chosen.weights, (*weights, *beside)),
        None if images is None else Part(images, (*_shards(listing, images), *_own_config(listing, images))),
        _text_encoder(listing, text_names, root),
        image_names,
        text_names if published is None or published.text_encoder else (),
        published.text_encoder_repository if published else "",
        tuple(choices) if len(choices) > 1 else (),
    )


def text_encoder_files(names: Iterable[str], folder: str = ".") -> tuple[str, ...]:
    """What a text encoder takes of a folder as transformers writes it: one format of weights, and what lies beside."""
    return _Listing(names).text_encoder(folder)


def weight_files(names: Iterable[str], file: str) -> tuple[str, ...]:
    """What reading one of the files takes: itself, the shards that an index names, and settings beside it."""
    listing = _Listing(names)
    return (*_shards(listing, file), *listing.beside(file, BESIDE_TRANSFORMER))


def is_transformer_folder(name: str, held: Iterable[str]) -> bool:
    """Whether a folder is the transformer itself, as some model is published: by its name, and the files in it."""
    rows = [row for row in _rows(None) if re.fullmatch(row.transformer, name)]
    listing = _Listing(held)
    return any(listing.weights(".", row.weight_files) for row in rows)


class _Listing:
    """Names of files, by folder."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = sorted(set(names))
        self.folders: dict[str, set[str]] = {}
        for name in self.names:
            path = Path(name)
            self.folders.setdefault(str(path.parent), set()).add(path.name)

    def weights(self, folder: str, first: tuple[str, ...] = ()) -> str | None:
        """What holds the weights of a folder as transformers writes it."""
        held = self.folders.get(folder, set())
        found = next((name for name in (*first, *FOLDER_WEIGHTS) if name in held), None)
        return None if found is None else str(Path(folder) / found)

    def parts(self, pattern: str, first: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
        """Files and folders whose name, without its suffix, a regular expression matches; and their weights.

        Of files in one folder under one name, the one with the preferred suffix.
        """
        matches = re.compile(pattern).fullmatch
        for folder, held in self.folders.items():
            files = [name for name in held if Path(name).suffix in SUFFIXES and matches(_stem(name))]
            for stem in sorted({_stem(name) for name in files}):
                best = next(stem + suffix for suffix in SUFFIXES if stem + suffix in held)
                path = str(Path(folder) / best)
                yield path, path
            if matches(Path(folder).name) and (weights := self.weights(folder, first)):
                yield folder, weights

    def parts_by_name(self, names: tuple[str, ...]) -> list[list[tuple[str, str]]]:
        """For each name, what goes by it: where it lies, and its weights."""
        return [list(self.parts(re.escape(name))) for name in names]

    def folders_by_name(self, names: tuple[str, ...]) -> list[list[tuple[str, str]]]:
        """For each name, the folders of that name, twice each."""
        return [[(folder, folder) for folder in self.folders if Path(folder).name == name] for name in names]

    def beside(self, file: str, names: tuple[str, ...]) -> Iterator[str]:
        """Those of the names that lie in a file's folder."""
        folder = str(Path(file).parent)
        yield from (str(Path(folder) / name) for name in names if name in self.folders.get(folder, set()))

    def text_encoder(self, folder: str) -> tuple[str, ...]:
        """The files of a text encoder."""
        weights = self.weights(folder)
        beside = self.beside(f"{folder}/{CONFIG}", BESIDE_TEXT_WEIGHTS)
        return (*beside, *(_shards(self, weights) if weights else ()))


def _candidates(listing: _Listing) -> list[list[_Candidate]]:
    """Everything that could be the transformer, in groups: a group counts only where those before it are empty."""
    own = [
        _Candidate(TRANSFORMER, path, weights, None, None)
        for path, weights in listing.parts(TRANSFORMER)
        if str(Path(path).parent) == "."
    ]
    known = [
        _Candidate(row.name or _stem(Path(path).name), path, weights, row, family)
        for family, adapter in ADAPTERS.items()
        for row in adapter.published
        for path, weights in listing.parts(row.transformer, row.weight_files)
    ]
    top = sorted(listing.folders.get(".", set()))
    indices = [_unnamed(name) for name in top if name.endswith(INDEX)]
    others = {*_image_tokenizer_names(), IMAGE_TOKENIZER, TRANSFORMER}
    files = [_unnamed(name) for name in top if Path(name).suffix in SUFFIXES and _stem(name) not in others]
    taken = {candidate.path for candidate in known}
    depths = sorted({len(Path(candidate.path).parts) for candidate in (*own, *known)})
    by_depth = [[c for c in (*own, *known) if len(Path(c.path).parts) == depth] for depth in depths]
    return [*by_depth, indices, [candidate for candidate in files if candidate.path not in taken]]


def _chosen(groups: list[list[_Candidate]], model: str | None) -> _Candidate:
    if model is None:
        found = next((group for group in groups if group), [])
    else:
        found = [candidate for group in groups for candidate in group if candidate.goes_by(model)]
    if len(found) == 1:
        return found[0]
    there = found or [candidate for group in groups for candidate in group]
    shown = ", ".join(_shown(candidate) for candidate in there[:NAMED])
    shown += f" and {len(there) - NAMED} more" if len(there) > NAMED else ""
    if model is not None and not found:
        raise CheckpointError(
            f"no model {model!r} among the files", expected=f"one of {shown}" if there else "a published layout"
        )
    raise CheckpointError(
        f"{len(found)} files that could be the transformer" + (f": {shown}" if found else ""),
        expected="one model: transformer.safetensors, transformer.pth, one *.index.json, one *.pth, or the names that "
        "it is published under",
        fix="choose one with --model NAME (model=NAME), or name the file itself" if found else "check the path",
    )


def _shown(candidate: _Candidate) -> str:
    name = Path(candidate.path).name
    named = candidate.published is not None and candidate.model != name
    return f"{candidate.model} ({candidate.path})" if named else candidate.path


def _unnamed(path: str) -> _Candidate:
    return _Candidate(_stem(path), path, path, None, None)


def _rows(published: PublishedModel | None) -> Iterator[PublishedModel]:
    """The line of a model; all lines where it is of none."""
    yield from (published,) if published else (row for adapter in ADAPTERS.values() for row in adapter.published)


def _image_tokenizer_names() -> tuple[str, ...]:
    """What image tokenizers of all families are published as, but for names that say nothing by themselves."""
    named = [name for row in _rows(None) for name in row.image_tokenizers]
    named += [name for adapter in ADAPTERS.values() for name in adapter.image_tokenizers]
    return tuple(dict.fromkeys(named))


def _text_encoder(listing: _Listing, names: tuple[str, ...], root: str) -> Part | None:
    choices = _best(listing.folders_by_name(names), root, ordered=False)
    return Part(choices[0], listing.text_encoder(choices[0])) if len(choices) == 1 else None


def _best(found: list[list[tuple[str, str]]], root: str, *, ordered: bool) -> list[str]:
    """Of what goes by each of some names, the one that is meant, or several that may be: beside the transformer, or
    else anywhere.

    The first name, which is ours, comes before all others. Of those the first that is there counts if they are
    `ordered`; else there must be but one.
    """
    for near in (True, False):
        own, *others = [[what for path, what in some if not near or str(Path(path).parent) == root] for some in found]
        other = next((some for some in others if some), []) if ordered else [what for some in others for what in some]
        if choices := own or other:
            return choices
    return []


def _own_config(listing: _Listing, weights: str) -> Iterator[str]:
    """The configuration of a part that is a folder by itself."""
    if Path(weights).name in FOLDER_WEIGHTS:
        yield from listing.beside(weights, (CONFIG,))


def _shards(listing: _Listing, weights: str) -> Iterator[str]:
    """A file of weights; or an index, and the files beside it that it can name."""
    yield weights
    if not weights.endswith(INDEX):
        return
    folder, stem = Path(weights).parent, Path(weights).name.removesuffix(INDEX)
    held = sorted(name for name in listing.folders[str(folder)] if Path(name).suffix in SUFFIXES)
    suffix = Path(stem).suffix
    numbered = re.compile(rf"{re.escape(stem.removesuffix(suffix))}-\d+-of-\d+{re.escape(suffix)}")
    named = [name for name in held if numbered.fullmatch(name)]
    yield from (str(folder / name) for name in named or held)


def _stem(name: str) -> str:
    """A name without the suffix of a file of weights, or of an index."""
    name = name.removesuffix(INDEX)
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)


def _folded(name: str) -> str:
    return name.lower().replace("-", "_")
