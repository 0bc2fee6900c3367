"""Checkpoints from the Hugging Face hub: which files of which repositories make a model, and their download.

Everything is looked up before anything is downloaded: what is missing, what it takes, and whether the disk has room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ...core.dtypes import human_bytes
from ...engines.bundle.manifest import HubSource
from ...errors import CheckpointError
from ...hub.reference import HubReference, is_reference, parse_reference
from ...hub.repository import HubAccess, Repository, check_space
from ..models.registry import ADAPTERS
from .checkpoint import Checkpoint, load_checkpoint
from .published import CONFIG, IMAGE_TOKENIZER, TEXT_ENCODER, TRANSFORMER, PublishedFiles, published_files
from .published import text_encoder_files as files_of_text_encoder
from .text_encoders import KINDS, PREFIX_FILE, SETTINGS_FILE, TOKENIZER_FILE

Tell = Callable[[str], None]
_OF_TEXT_ENCODER = f"{CONFIG}, {TOKENIZER_FILE} and the weights"


@dataclass(frozen=True)
class _Part:
    """A part of a model: a path on the disk, or one in a repository with the files that it takes."""

    path: str
    repository: Repository | None = None
    files: tuple[str, ...] = ()

    def fetched(self) -> Path:
        """Where it lies."""
        return Path(self.path) if self.repository is None else self.repository.snapshot / self.path


@dataclass(frozen=True)
class HubCheckpoint:
    """A model whose parts are downloaded, and ready to be read."""

    name: str
    transformer: Path
    image_tokenizer: Path
    text_encoder: Path | None  # None where the model reads no prompts
    hub_sources: tuple[HubSource, ...]

    def load(self) -> Checkpoint:
        """Read the files, as `load_checkpoint`."""
        found = load_checkpoint(
            self.transformer, image_tokenizer=self.image_tokenizer, text_encoder=self.text_encoder, name=self.name
        )
        return replace(found, hub_sources=self.hub_sources)


def names_hub(*paths: str | Path | None) -> bool:
    """Whether any of these is to be had from the hub."""
    return any(is_reference(path) for path in paths)


def fetch_checkpoint(
    transformer: HubReference,
    *,
    model: str | None = None,
    image_tokenizer: str | Path | None = None,
    text_encoder: str | Path | None = None,
    access: HubAccess = HubAccess(),  # noqa: B008  it is frozen
    told: Tell = lambda _: None,
) -> HubCheckpoint:
    """Download what a model of a repository is made of.

    Args:
        transformer: the repository that it is published in.
        model: which of several models there.
        image_tokenizer, text_encoder: in place of those that the model is published with: a file and a folder, or
            hub:ORG/NAME/FILE and hub:ORG/NAME.
        told: called with a line for each repository, before anything is downloaded.

    Raises:
        CheckpointError: no such model there, or none that its parts can be told of.
        HubError: a repository cannot be read or downloaded, or the disk has no room.
    """
    repository = Repository.open(transformer.whole(), access)
    try:
        found = published_files(repository.listing.files, model)
    except CheckpointError as error:
        problem = f"{repository.reference}: {error.problem}"
        raise CheckpointError(problem, expected=error.expected, fix=error.fix) from error
    parts = {
        TRANSFORMER: _Part(found.transformer.path, repository, found.transformer.files),
        IMAGE_TOKENIZER: _image_tokenizer(found, repository, image_tokenizer, access),
    }
    text = _text_encoder(found, repository, text_encoder, access)
    if text is not None:
        _check_text_encoder(text, found)
        parts[TEXT_ENCODER] = text
    _fetch(parts.values(), {repository: found.model}, access, told)
    return HubCheckpoint(
        found.model,
        parts[TRANSFORMER].fetched(),
        parts[IMAGE_TOKENIZER].fetched(),
        None if text is None else text.fetched(),
        _sources(parts),
    )


def fetch_parts(
    image_tokenizer: str | Path | None,
    text_encoder: str | Path | None,
    access: HubAccess = HubAccess(),  # noqa: B008  it is frozen
    told: Tell = lambda _: None,
) -> tuple[Path | None, Path | None, tuple[HubSource, ...]]:
    """Image tokenizer and text encoder of a checkpoint on the disk, where they are to be had from the hub.

    Raises:
        HubError, CheckpointError: as `fetch_checkpoint`.
    """
    parts = {}
    if image_tokenizer is not None:
        parts[IMAGE_TOKENIZER] = _given_file(image_tokenizer, access)
    if text_encoder is not None:
        parts[TEXT_ENCODER] = _given_folder(text_encoder, access)
        _check_text_encoder(parts[TEXT_ENCODER])
    _fetch(parts.values(), {}, access, told)
    paths = {name: part.fetched() for name, part in parts.items()}
    return paths.get(IMAGE_TOKENIZER), paths.get(TEXT_ENCODER), _sources(parts)


def _image_tokenizer(
    found: PublishedFiles, repository: Repository, given: str | Path | None, access: HubAccess
) -> _Part:
    if given is not None:
        return _given_file(given, access)
    if found.image_tokenizer is None:
        raise CheckpointError(
            f"{repository.reference} has no image tokenizer of {found.model}, or more than one",
            expected=f"one of {', '.join(found.image_tokenizers)}",
            fix="name it with --image-tokenizer hub:ORG/NAME/FILE, or a file",
        )
    return _Part(found.image_tokenizer.path, repository, found.image_tokenizer.files)


def _text_encoder(
    found: PublishedFiles, repository: Repository, given: str | Path | None, access: HubAccess
) -> _Part | None:
    """The one that was given, or in the same repository, or published by itself; None where prompts are not read."""
    if given is not None:
        return _given_folder(given, access)
    if found.text_encoder is not None:
        return _Part(found.text_encoder.path, repository, found.text_encoder.files)
    if found.text_encoder_repository:
        return _given_folder(f"hub:{found.text_encoder_repository}", access)
    if found.family is not None and ADAPTERS[found.family].family.draws != "prompt":
        return None
    if found.family is None and not found.text_encoders:
        return None
    raise CheckpointError(
        f"{repository.reference} has no text encoder for {found.model}",
        expected="a folder text_encoder/ beside the model, or its repository",
        fix="name it with --text-encoder hub:ORG/NAME, or a folder",
    )


def _given_file(given: str | Path, access: HubAccess) -> _Part:
    if not is_reference(given):
        return _Part(str(given))
    reference = parse_reference(given)
    if not reference.file:
        raise CheckpointError(
            f"{reference} is a whole repository", expected="a file in it: hub:ORG/NAME/FILE", fix="name the file"
        )
    whole = replace(reference, file="")
    return _Part(reference.file, Repository.open(whole, access), (reference.file,))


def _given_folder(given: str | Path, access: HubAccess) -> _Part:
    """A text encoder by itself; the file of a reference is a folder in its repository."""
    if not is_reference(given):
        return _Part(str(given))
    reference = parse_reference(given)
    repository = Repository.open(replace(reference, file=""), access)
    folder = reference.file.rstrip("/") or "."
    return _Part(folder, repository, files_of_text_encoder(repository.listing.files, folder))


def _check_text_encoder(part: _Part, found: PublishedFiles | None = None) -> None:
    """Before gigabytes of it are downloaded: whether it could be read.

    Raises:
        CheckpointError: a file that it is read with is not there.
    """
    if part.repository is None:
        return
    held = {Path(name).name for name in part.files}
    needed = [CONFIG, TOKENIZER_FILE]
    kinds = ADAPTERS[found.family].text_encoders if found is not None and found.family is not None else ()
    has_prefix = bool(kinds) and all(KINDS[kind].has_prefix for kind in kinds)
    needed += [SETTINGS_FILE, PREFIX_FILE] if has_prefix else []
    missing = [name for name in needed if name not in held]
    others = held - {CONFIG, TOKENIZER_FILE, SETTINGS_FILE, PREFIX_FILE}
    if not others:
        missing.append("weights (model.safetensors, pytorch_model.bin, or shards with an index)")
    if missing:
        raise CheckpointError(
            f"the text encoder in {part.repository.reference} has no {', no '.join(missing)}",
            expected=_OF_TEXT_ENCODER
            + (f"; {PREFIX_FILE}, the instruction that the published program puts before prompts" * has_prefix),
            fix="copy its files into a folder, add what is missing, and name the folder with --text-encoder",
        )


def _fetch(parts: Iterable[_Part], names: dict[Repository, str], access: HubAccess, told: Tell) -> None:
    """Tell what is downloaded, see that the disk has room for it, and bring it."""
    wanted: dict[Repository, list[str]] = {}
    for part in parts:
        if part.repository is not None:
            own = next((one for one in wanted if one.reference == part.repository.reference), part.repository)
            wanted.setdefault(own, []).extend(part.files)
    for repository, files in wanted.items():
        told(_announcement(repository, files, names.get(repository, repository.reference.name)))
    missing = {repository: repository.missing(files) for repository, files in wanted.items()}
    check_space(access, sum(repository.listing.bytes_of(files) for repository, files in missing.items()))
    for repository, files in wanted.items():
        repository.fetch(files)


def _announcement(repository: Repository, files: list[str], name: str) -> str:
    files = list(dict.fromkeys(files))
    missing, listing = repository.missing(files), repository.listing
    here = "all here" if not missing else f"{len(missing)} to download, {human_bytes(listing.bytes_of(missing))}"
    count = f"{len(files)} file{'s' * (len(files) != 1)}"
    source = f"{repository.reference.repository}@{repository.commit}"
    return f"{name}: {count}, {human_bytes(listing.bytes_of(files))}, of {source}; {here}"


def _sources(parts: dict[str, _Part]) -> tuple[HubSource, ...]:
    return tuple(
        HubSource(name, part.repository.reference.repository, part.repository.commit, part.path)
        for name, part in parts.items()
        if part.repository is not None
    )
