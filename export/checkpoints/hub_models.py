"""Checkpoints from the Hugging Face hub: which files of which repositories make a model, and their download.

Everything is looked up before anything is downloaded: what is missing, what it takes, and whether the disk has room.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...core.dtypes import human_bytes
from ...errors import CheckpointError
from ...hub.listing import Listing
from ...hub.reference import HubReference, is_reference, parse_reference
from ...hub.repository import HubAccess, Repository, check_space
from ..models.registry import ADAPTERS
from .checkpoint import Checkpoint, load_checkpoint
from .published import (
    CONFIG,
    IMAGE_TOKENIZER,
    PREFIX_FILE,
    SETTINGS_FILE,
    TEXT_ENCODER,
    TOKENIZER_FILE,
    TRANSFORMER,
    PublishedFiles,
    published_files,
    weight_files,
)
from .published import text_encoder_files as files_of_text_encoder
from .text_encoders import KINDS

Tell = Callable[[str], None]
_OF_TEXT_ENCODER = f"{CONFIG}, {TOKENIZER_FILE} and the weights"


@dataclass(frozen=True)
class _Part:
    """A part of a model: a path on the disk, or one in a repository with the files that it takes."""

    path: str
    repository: Repository | None = None
    files: tuple[str, ...] = ()

    @property
    def place(self) -> Path:
        """Where it lies, when it is downloaded."""
        return Path(self.path) if self.repository is None else self.repository.snapshot / self.path


@dataclass(frozen=True)
class FoundCheckpoint:
    """A model all of whose parts lie on this disk.

    source: the transformer, or the folder of the model.
    model: which of several in the folder.
    name: what it is called; as it is published, or as `source`, for None.
    image_tokenizer, text_encoder: where they do not lie where the model's own would.
    origins: of each part that came from a hub, its name there, with the commit.
    """

    source: Path
    model: str | None = None
    name: str | None = None
    image_tokenizer: Path | None = None
    text_encoder: Path | None = None
    origins: Mapping[str, str] = field(default_factory=dict)

    def load(self) -> Checkpoint:
        """Read the files, as `load_checkpoint`."""
        found = load_checkpoint(
            self.source,
            model=self.model,
            image_tokenizer=self.image_tokenizer,
            text_encoder=self.text_encoder,
            name=self.name,
        )
        return replace(found, origin=tuple(self._with_repository(line) for line in found.origin))

    def _with_repository(self, line: str) -> str:
        """A line of the origin, with the name on the hub in place of that on this disk."""
        part, _, file = line.partition(": ")
        found, keys = self.origins.get(part.replace(" ", "_")), file.partition(" (")[2]
        return line if found is None else f"{part}: {found}" + (f" ({keys}" if keys else "")


def find_checkpoint(
    source: str | Path,
    *,
    model: str | None = None,
    image_tokenizer: str | Path | None = None,
    text_encoder: str | Path | None = None,
    access: HubAccess = HubAccess(),  # noqa: B008  it is frozen
    told: Tell = lambda _: None,
) -> FoundCheckpoint:
    """Where a model lies; what of it is named as hub:ORG/NAME is downloaded.

    Args:
        source: a folder or a transformer as `load_checkpoint` takes it, or the repository that a model is published in.
        model: which of several models there.
        image_tokenizer, text_encoder: in place of those that the model is published with: a file and a folder, or
            hub:ORG/NAME/FILE and hub:ORG/NAME.
        told: called with a line for each repository, before anything is downloaded.

    Raises:
        CheckpointError: no such model there, or a part of it that cannot be told.
        HubError: a repository cannot be read or downloaded, or the disk has no room.
    """
    if is_reference(source):
        return _from_hub(parse_reference(source).whole(), model, (image_tokenizer, text_encoder), access, told)
    parts = {}
    if image_tokenizer is not None:
        parts[IMAGE_TOKENIZER] = _given_file(image_tokenizer, access)
    if text_encoder is not None:
        parts[TEXT_ENCODER] = _given_folder(text_encoder, access)
        _check_text_encoder(parts[TEXT_ENCODER])
    _fetch(parts.values(), {}, access, told)
    paths = {name: part.place for name, part in parts.items()}
    return FoundCheckpoint(
        Path(source), model, None, paths.get(IMAGE_TOKENIZER), paths.get(TEXT_ENCODER), _origins(parts)
    )


def find_weights(
    source: str | Path,
    *,
    model: str | None = None,
    access: HubAccess = HubAccess(),  # noqa: B008  it is frozen
    told: Tell = lambda _: None,
) -> Path:
    """Where the weights of one part of a model lie; what is named as hub:ORG/NAME is downloaded.

    Args:
        source: a path, given back as it is; a repository, of which the transformer is meant; or hub:ORG/NAME/FILE.
        model: which of several models in a repository.
        told: called with a line for the repository, before anything is downloaded.

    Raises:
        CheckpointError: no such model there, or a file is named and a model too.
        HubError: the repository cannot be read or downloaded, or the disk has no room.
    """
    if not is_reference(source):
        return Path(source)
    reference = parse_reference(source)
    if not reference.file:
        repository, found = _published(reference, model, access)
        part, names = _Part(found.transformer.path, repository, found.transformer.files), {reference: found.model}
    elif model is not None:
        raise CheckpointError(f"{reference} names a file, and the model {model!r} another", fix="give one of them")
    else:
        repository = Repository.open(replace(reference, file=""), access)
        held = repository.listing.files
        files = weight_files(held, reference.file) if reference.file in held else (reference.file,)
        part, names = _Part(reference.file, repository, files), {}
    _fetch([part], names, access, told)
    return part.place


def _published(reference: HubReference, model: str | None, access: HubAccess) -> tuple[Repository, PublishedFiles]:
    """A repository that a model is published in, and its files there."""
    repository = Repository.open(reference, access)
    try:
        return repository, published_files(repository.listing.files, model)
    except CheckpointError as error:
        problem = f"{repository.reference}: {error.problem}"
        raise CheckpointError(problem, expected=error.expected, fix=error.fix) from error


def _from_hub(
    reference: HubReference,
    model: str | None,
    given: tuple[str | Path | None, str | Path | None],
    access: HubAccess,
    told: Tell,
) -> FoundCheckpoint:
    """A published model; `given` are an image tokenizer and a text encoder in place of its own."""
    repository, found = _published(reference, model, access)
    parts = {
        TRANSFORMER: _Part(found.transformer.path, repository, found.transformer.files),
        IMAGE_TOKENIZER: _image_tokenizer(found, repository, given[0], access),
    }
    text = _text_encoder(found, repository, given[1], access)
    if text is not None:
        _check_text_encoder(text, found)
        parts[TEXT_ENCODER] = text
    _fetch(parts.values(), {repository.reference: found.model}, access, told)
    paths = {name: part.place for name, part in parts.items()}
    return FoundCheckpoint(
        paths[TRANSFORMER], None, found.model, paths[IMAGE_TOKENIZER], paths.get(TEXT_ENCODER), _origins(parts)
    )


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
    if found.family is None or ADAPTERS[found.family].family.draws != "prompt":
        return None  # or it cannot be told from names: reading the transformer will tell
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


def _fetch(parts: Iterable[_Part], names: Mapping[HubReference, str], access: HubAccess, told: Tell) -> None:
    """Tell what is downloaded, see that the disk has room for it, and bring it."""
    wanted: dict[HubReference, tuple[Repository, dict[str, None]]] = {}
    for part in parts:
        if part.repository is not None:
            _, files = wanted.setdefault(part.repository.reference, (part.repository, {}))
            files |= dict.fromkeys(part.files)
    needed = 0
    for reference, (repository, files) in wanted.items():
        missing, listing = repository.missing(files), repository.listing
        needed += listing.bytes_of(missing)
        told(f"{names.get(reference, reference.name)}: {_counted(files, listing)}, of {_pinned(repository)}")
        if missing:
            told(f"  to download: {_counted(missing, listing)}, into {access.root}")
    check_space(access, needed)
    for repository, files in wanted.values():
        repository.fetch(files)


def _counted(files: Collection[str], listing: Listing) -> str:
    return f"{len(files)} file{'s' * (len(files) != 1)}, {human_bytes(listing.bytes_of(files))}"


def _pinned(repository: Repository) -> str:
    return str(HubReference(repository.reference.repository, repository.commit))


def _origins(parts: Mapping[str, _Part]) -> dict[str, str]:
    return {
        name: _pinned(part.repository) + (f"/{part.path}" if part.path != "." else "")
        for name, part in parts.items()
        if part.repository is not None
    }
