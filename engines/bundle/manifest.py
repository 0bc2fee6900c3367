"""The bundle's manifest as frozen nouns: what every engine takes, gives, and which weights it is bound to.

Knows names, shapes and digests; never opens an engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, get_type_hints

import msgspec

from ...core.plan import Batch, GenerationPlan, SamplingMode, make_plan
from ...core.policy import PruningPolicy, ScaleRule, policy_to_json
from ...core.precision import Precision, PrecisionChoice
from ...core.schedule import ScaleSchedule
from ...errors import BundleError
from ...families import family_named
from ...families.base import ImageTokenizerShape, PromptFormat, SamplingDefaults, TransformerShape, to_json
from ..spec import EngineSpec
from .renamed import OLD_FORMAT, with_new_names

FORMAT_VERSION = 5
MOST_LAYERS, MOST_SCALES, MOST_SIDE = 1024, 64, 4096  # of a plan; a side in tokens
# Weights [1] that tell a stripe of a tiled decoder whether the image goes on beyond its end.
EDGE_INSIDE, EDGE_OUTSIDE = "decoder_edge.inside", "decoder_edge.outside"


@dataclass(frozen=True)
class StepEngines:
    """Engine names of one executed scale; a name is empty where no engine of its kind is.

    In order: `pick` chooses the tokens of a part of the scale, the layers run, the sampling head draws codes, and
    `residual` adds to them what codes cannot say.
    """

    sampling_head: str
    qkv: str = ""  # layers that never prune
    attn_mlp: str = ""
    qkv_pruned: str = ""  # layers that may
    attn_mlp_pruned: str = ""
    pick: str = ""
    residual: str = ""


@dataclass(frozen=True)
class EngineSet:
    """All engines of a pass: so many images, each with so many guidance rows (2 with guidance, 1 without).

    `conditioning` runs once a pass, `layer_conditioning` after it once for each layer; empty where layers need none.
    """

    rows: int
    conditioning: str
    layer_conditioning: str
    steps: tuple[StepEngines, ...]
    images: int = 1

    @property
    def batch(self) -> Batch:
        return Batch(self.rows, self.images)


@dataclass(frozen=True)
class DecoderStage:
    """What a tiled decoder does to every stripe of rows before it goes on: engine names."""

    layer: str  # what "{layer}" stands for in the names of the engine's weights
    engine: str
    last: str  # for the last stripe; the same engine where that is no shorter


@dataclass(frozen=True)
class DecoderTiles:
    """An image decoder that holds stripes of rows instead of whole activations; its image is [H, 3, W]."""

    rows: int  # of the latent, in one stripe
    stripes: int
    stages: tuple[DecoderStage, ...]


@dataclass(frozen=True)
class FileRecord:
    """A file of the bundle with its digest."""

    file: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Manifest:
    """Everything the runtime needs to know; written as manifest.json."""

    family: str
    model: str
    transformer: TransformerShape  # the family's own configuration
    image_tokenizer: ImageTokenizerShape
    plan: GenerationPlan
    text_length: int  # static length of the text, in tokens; 0 where images are not drawn from text
    engines: dict[str, EngineSpec]
    sets: tuple[EngineSet, ...]
    text_encoder: str  # engine names
    decoder: str  # empty where the decoder is tiled
    weights: FileRecord
    text_tokenizer: FileRecord | None
    checkpoint_digest: str
    fastvar_version: str
    precision: Precision = field(default_factory=Precision)
    precision_choice: PrecisionChoice | None = None  # None in bundles of versions that did not note it
    address_alignment: int = 1  # bytes that the engines' library wants every address to be a multiple of
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    tiles: DecoderTiles | None = None
    encoder: str = ""  # engine name; empty in a bundle without an image encoder
    class_names: FileRecord | None = None  # JSON list: the names of every class, commas between them
    prompt_format: PromptFormat = field(default_factory=PromptFormat)
    origin: tuple[str, ...] = ()  # which files the weights were read from, in plain words
    format_version: int = FORMAT_VERSION

    @property
    def side_files(self) -> tuple[FileRecord, ...]:
        """Files beside engines and weights."""
        return tuple(record for record in (self.text_tokenizer, self.class_names) if record is not None)

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Every file that the manifest names, once each."""
        engines = (FileRecord(spec.file, spec.sha256, spec.size_bytes) for spec in self.engines.values())
        return tuple(dict.fromkeys((*engines, *self.side_files, self.weights)))

    @property
    def any_engine(self) -> EngineSpec:
        """One of them: backend, target and library version are those of all."""
        return next(iter(self.engines.values()))

    @property
    def backend(self) -> str:
        """The backend of all engines."""
        return self.any_engine.backend

    @property
    def target(self) -> str:
        """The devices that all engines are for."""
        return self.any_engine.target

    def engine_set(self, rows: int, images: int = 1) -> EngineSet:
        """The engines of a pass.

        Raises:
            BundleError: the bundle holds none for it.
        """
        for found in self.sets:
            if found.batch == (rows, images):
                return found
        if rows not in {found.rows for found in self.sets}:
            raise BundleError(
                f"the bundle holds no engines for {rows} guidance row(s)",
                expected=f"one of {sorted({found.rows for found in self.sets})}",
                fix="rebuild with --guidance both",
            )
        built = self.batch_sizes(rows)
        raise BundleError(
            f"the bundle holds no engines for {images} images in one pass",
            expected=f"one of {built}",
            fix=f"rebuild with --batch {','.join(map(str, sorted({*built, images})))}",
        )

    def batch_sizes(self, rows: int) -> list[int]:
        """How many images a pass with so many guidance rows may draw, in rising order."""
        return sorted(found.images for found in self.sets if found.rows == rows)


def manifest_to_json(manifest: Manifest) -> dict[str, Any]:
    """A dictionary for json.dump."""
    plan = manifest.plan
    data = asdict(manifest)
    data["transformer"] = to_json(manifest.transformer)
    data["image_tokenizer"] = to_json(manifest.image_tokenizer)
    data["plan"] = {
        "schedule": {
            "sizes": [list(size) for size in plan.schedule.sizes],
            "rope_grid": list(plan.schedule.rope_grid),
            "bucket": plan.schedule.bucket,
            "pixels_per_token": plan.schedule.pixels_per_token,
        },
        "policy": policy_to_json(plan.policy),
        "depth": plan.depth,
        "sampling_mode": asdict(plan.sampling_mode),
        "first_tokens": plan.first_tokens,
    }
    return data


def manifest_from_json(data: dict[str, Any]) -> Manifest:
    """Read what `manifest_to_json` wrote. The plan is laid out anew from schedule and policy.

    Raises:
        BundleError: another format version, or fields missing.
    """
    found = data.get("format_version")
    if found == OLD_FORMAT:
        data, found = with_new_names(data, FORMAT_VERSION), FORMAT_VERSION
    if found != FORMAT_VERSION:
        age = "newer" if isinstance(found, int) and found > FORMAT_VERSION else "older"
        raise BundleError(
            f"the bundle has format version {found!r}, {age} than this fastvar reads",
            expected=f"format version {FORMAT_VERSION}",
            fix="update fastvar" if age == "newer" else "rebuild the bundle with `fastvar build`",
        )
    try:
        return _manifest(data)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise BundleError(f"manifest.json is not understood: {error}", fix="rebuild the bundle") from error


@dataclass(frozen=True)
class _PolicyFile:
    """A policy as the manifest holds it."""

    name: str
    layers: tuple[int, int]
    restore_scale: int | None
    scale: dict[str, ScaleRule]  # by index
    shared_selection: bool = False

    def policy(self) -> PruningPolicy:
        rules = {int(index): rule for index, rule in self.scale.items() if index.isascii() and index.isdecimal()}
        if [str(index) for index in rules] != list(self.scale):
            raise ValueError(f"scales {list(self.scale)}, expected whole numbers")
        return PruningPolicy(self.name, rules, *self.layers, self.restore_scale, self.shared_selection)


@dataclass(frozen=True)
class _PlanFile:
    """A plan as the manifest holds it: what the steps follow from."""

    schedule: ScaleSchedule
    policy: _PolicyFile
    depth: int
    sampling_mode: SamplingMode
    first_tokens: int

    def plan(self) -> GenerationPlan:
        """Laid out, if it is no larger than any that is built: laying out takes time and memory."""
        sizes = self.schedule.sizes
        sides = [side for size in (*sizes, self.schedule.rope_grid) for side in size]
        if self.depth > MOST_LAYERS or len(sizes) > MOST_SCALES or not all(1 <= side <= MOST_SIDE for side in sides):
            raise ValueError(f"a plan of {self.depth} layers and {len(sizes)} scales, up to {max(sides)} tokens wide")
        return make_plan(self.schedule, self.policy.policy(), self.depth, self.sampling_mode, self.first_tokens)


def _manifest(data: dict[str, Any]) -> Manifest:
    family = family_named(str(data["family"]))
    kinds: dict[str, Any] = get_type_hints(Manifest)
    kinds |= {"transformer": family.transformer, "image_tokenizer": family.image_tokenizer, "plan": _PlanFile}
    if unknown := sorted(data.keys() - kinds.keys()):
        raise ValueError(f"unknown entries {unknown}")
    nouns = {name: _noun(name, value, kinds[name]) for name, value in data.items()}
    return Manifest(**{**nouns, "plan": nouns["plan"].plan()})


def _noun(name: str, data: Any, kind: Any) -> Any:
    """JSON as the type that it stands for, strictly: no number for a text, no entry that the type does not have.

    Raises:
        ValueError: it is none; says where.
    """
    try:
        found = msgspec.convert(data, kind, strict=True)
    except msgspec.ValidationError as error:
        raise ValueError(f"{name}: {error}") from error
    if unknown := list(_unknown(data, msgspec.to_builtins(found))):
        raise ValueError(f"{name}: unknown entries {unknown}")
    return found


def _unknown(data: Any, understood: Any) -> Iterator[str]:
    """Entries that were read over."""
    if isinstance(data, dict):
        yield from sorted(data.keys() - understood.keys())
        for name in data.keys() & understood.keys():
            yield from _unknown(data[name], understood[name])
    elif isinstance(data, list):
        for one, other in zip(data, understood, strict=True):
            yield from _unknown(one, other)
