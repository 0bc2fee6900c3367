"""What a benchmark draws with: the models it knows with their texts, and how each contender is built and opened.

All of it can be sent to another process: engines are built in one, and memory is measured in one. Torch is imported
where it is needed, not here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.contenders import EAGER, Contender, EngineContender, Entry
from benchmarks.records import Record, memory_record
from benchmarks.timing import noise_of
from fastvar.core.plan import GenerationPlan, make_plan
from fastvar.core.schedule import parse_size
from fastvar.engines.aotinductor.gpus import CUDA, GPUS, GpuTarget, capability_here
from fastvar.engines.bundle.bundle import Bundle
from fastvar.engines.registry import BACKEND_NAMES, backend_class
from fastvar.errors import BuildError, InputError
from fastvar.export.options import BuildOptions
from fastvar.families.infinity import INFINITY, TRANSFORMERS, ImageTokenizerConfig, TransformerConfig
from fastvar.families.infinity_presets import schedule_for
from fastvar.profiling.estimates.costs import EngineCosts, engine_costs
from fastvar.profiling.memory_run import device_kind, run_apart
from fastvar.profiling.sampler import sampler_for
from fastvar.runtime.requests.settings import SamplingSettings

if TYPE_CHECKING:
    from benchmarks.eager import EagerModel
    from fastvar.engines.bundle.manifest import Manifest
    from fastvar.export.checkpoints.checkpoint import Checkpoint

ROOT = Path(__file__).parents[1]
DEMO, TINY = "demo", "tiny"
SMALL = "256x256"  # the size of both
MODELS = (DEMO, TINY, *TRANSFORMERS)
DEMO_PROMPT = "a green circle left of a checked purple square left of a striped cyan triangle on a gray background"
GUIDANCE_ROWS = 2
# Demo: as its bundles are sampled. Random weights have no sampling of their own: upstream's defaults.
SAMPLING = {DEMO: SamplingSettings(3.0, 0.5, 0.97)}
UPSTREAM = SamplingSettings(3.0, 1.0, 0.97)
# Few and narrow layers, the last one pruned by the published policy: an image in milliseconds.
TINY_TRANSFORMER = TransformerConfig(
    depth=4, width=64, heads=2, mlp_width=128, text_width=128, text_length=16, code_channels=8, chunks=1
)
TINY_IMAGES = ImageTokenizerConfig(bits=8, base_channels=24, channel_multipliers=(1, 1, 1, 1, 1), residual_blocks=1)
# How the backends that build for a GPU and for a CPU name this machine's own.
TARGETS = {
    device: {
        name: targets[device] for name in BACKEND_NAMES if device in (targets := backend_class(name).device_targets)
    }
    for device in ("cpu", "cuda")
}


@dataclass(frozen=True)
class Model:
    """A model by name, its weights a function of the seed where they are random, and the length of its prompt.

    `batch`: how many images the passes of its bundles draw.
    """

    name: str
    prompt_tokens: int
    seed: int = 0
    batch: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if self.name not in MODELS:
            raise InputError(f"no model {self.name!r}", expected=f"one of {', '.join(MODELS)}")

    @property
    def settings(self) -> SamplingSettings:
        return SAMPLING.get(self.name, UPSTREAM)

    def checkpoint(self) -> Checkpoint:
        return _checkpoint(self.name, self.seed)

    def text(self) -> NDArray[Any]:
        """Ids [1, T] of a prompt where the model reads one, else random features [2, T, Ct]."""
        checkpoint = self.checkpoint()
        if checkpoint.tokenizer_file is not None:
            from tokenizers import Tokenizer

            return np.array([Tokenizer.from_file(str(checkpoint.tokenizer_file)).encode(DEMO_PROMPT).ids], np.int64)
        length = min(self.prompt_tokens, checkpoint.transformer.text_length)
        shape = (2, length, checkpoint.transformer.text_width)
        return np.random.default_rng(self.seed).standard_normal(shape, dtype=np.float32)

    @property
    def text_length(self) -> int:
        """Tokens of the text: engines are built for no more, as the published programs run no more."""
        return int(self.text().shape[1])

    @property
    def options(self) -> BuildOptions:
        """Engines with guidance, for this prompt's length."""
        return BuildOptions(guidance="on", text_length=self.text_length, batch=self.batch)

    def plan(self, size: str, policy: str) -> GenerationPlan:
        schedule, depth = schedule_for(parse_size(size)), self.checkpoint().transformer.depth
        return make_plan(schedule, INFINITY.policy(policy, schedule, depth), depth)

    def costs(self, plan: GenerationPlan) -> tuple[Manifest, EngineCosts]:
        """Counted from shapes alone, the same for whoever draws after the plan."""
        from fastvar.core.precision import Precision
        from fastvar.engines.registry import backend_class
        from fastvar.export.describe import describe

        backend = backend_class("onnxruntime")
        manifest = describe(self.checkpoint(), plan, backend, Precision(), self.options)
        return manifest, engine_costs(manifest, GUIDANCE_ROWS)


@lru_cache(maxsize=1)
def _checkpoint(name: str, seed: int) -> Checkpoint:
    from fastvar.export.checkpoints.checkpoint import load_checkpoint
    from fastvar.export.checkpoints.random_weights import random_checkpoint, random_checkpoint_for

    if name == DEMO:
        return load_checkpoint(ROOT / "demo" / "checkpoint", name=DEMO)
    if name == TINY:
        return random_checkpoint_for(TINY_TRANSFORMER, TINY_IMAGES, name=TINY, seed=seed)
    return random_checkpoint(name, seed)


@dataclass(frozen=True)
class Place:
    """Where contenders run."""

    device: str  # "cpu" or "cuda"
    threads: int | None = None  # on the CPU; the libraries' choice by default

    def prepare(self, engine: str, model: Model) -> None:
        """Import what an engine needs, and set the threads of torch."""
        from benchmarks.eager import use_threads
        from fastvar.engines.registry import get_backend

        if engine not in EAGER:
            get_backend(engine, threads=self.threads).version()
        elif model.name == DEMO:
            from benchmarks.eager import import_text_encoder

            import_text_encoder()
        use_threads(self.threads)


@dataclass(frozen=True)
class Opener:
    """Opens a contender at one size, here or in another process.

    `bundle` holds a backend's engines, and with the text at hand they need no checkpoint.
    """

    model: Model
    entry: Entry
    size: str
    place: Place
    text: NDArray[Any]
    bundle: Path | None = None

    def open(self, models: EagerModels | None = None) -> Contender:
        """Eager contenders take their modules from `models`, which they share with others of their precision."""
        if self.bundle is not None:
            bundle, settings = Bundle.open(self.bundle), self.model.settings
            return EngineContender(bundle, self.text, settings, self.place.threads)
        models = models or EagerModels(self.model, self.place)
        return models.contender(self.entry.precision, self.model.plan(self.size, self.entry.policy))


@dataclass
class EagerModels:
    """Eager torch modules of one model, loaded once for each precision."""

    model: Model
    place: Place
    _loaded: dict[str, EagerModel] = field(default_factory=dict)

    def contender(self, precision: str, plan: GenerationPlan) -> Contender:
        from benchmarks.eager import EagerContender, EagerModel
        from fastvar.export.models.infinity.reference import Sampling

        if precision not in self._loaded:
            self._loaded[precision] = EagerModel(self.model.checkpoint(), precision, self.place.device)
        settings = self.model.settings
        assert settings.tau is not None  # eager runs of Infinity alone
        sampling = Sampling(settings.guidance_scale, settings.tau, settings.top_p)
        return EagerContender(self._loaded[precision], plan, self.model.text(), sampling)

    def keep_only(self, precisions: set[str]) -> None:
        """Let go of modules that were loaded for a comparison."""
        from benchmarks.eager import release_memory

        self._loaded = {name: found for name, found in self._loaded.items() if name in precisions}
        release_memory()


def memory_apart(opener: Opener) -> Record:
    """Memory of a contender in a process of its own."""
    return run_apart(f"measured {opener.entry.engine}", measure_memory, opener)


def measure_memory(opener: Opener) -> Record:
    """What `memory_apart` runs there."""
    opener.place.prepare(opener.entry.engine, opener.model)
    if opener.entry.eager:
        draw_tiny()
    return memory_record(opener.open, sampler_for(opener.place.device))


def draw_tiny() -> None:
    """An image on the CPU: much of torch is only imported when it is first used, and is no memory of a model's."""
    tiny = Model(TINY, 2)
    contender = EagerModels(tiny, Place("cpu")).contender("fp32", tiny.plan(SMALL, "dense"))
    contender.text()
    contender.scales(noise_of(0))
    contender.decode()


@dataclass
class Engines:
    """Bundles of a model's contenders. The first of a backend and precision is built, all others take its weights."""

    folder: Path
    model: Model
    place: Place
    _built: dict[tuple[Entry, str], Path] = field(default_factory=dict)

    def bundle(self, entry: Entry, size: str) -> Path:
        """Built in a process of its own, so that nothing of a build is left in the one that is timed.

        Raises:
            BuildError: the backend builds nothing for the device.
        """
        if (entry, size) in self._built:
            return self._built[entry, size]
        target = TARGETS[self.place.device].get(entry.engine)
        if target is None:
            raise BuildError(f"{entry.engine} builds nothing for device {self.place.device!r}")
        kind = (entry.engine, entry.precision)
        like = next((path for (e, _), path in self._built.items() if (e.engine, e.precision) == kind), None)
        out = self.folder / f"{len(self._built)}-{entry.engine}-{entry.precision}-{size}"
        run_apart(f"built {out.name}", build_engines, self.model, entry, size, target, out, like)
        found = device_kind(Bundle.open(out))
        if found != self.place.device:
            raise BuildError(f"{entry.engine} built engines for {found}", expected=self.place.device)
        self._built[entry, size] = out
        return out


def by_name(target: str) -> str:
    """The GPU in this machine under its own name, where AOTInductor knows it: engines for that may be in the cache,
    wherever they were compiled."""
    if target != CUDA:
        return target
    import torch

    here = capability_here(torch)
    return str(GpuTarget(here)) if here in GPUS else target


def build_engines(model: Model, entry: Entry, size: str, target: str, out: Path, like: Path | None) -> None:
    """What `Engines` runs in another process."""
    from fastvar.export.build import build_bundle
    from fastvar.export.rebuild import rebuild
    from fastvar.export.toolchain import make_toolchain

    plan = model.plan(size, entry.policy)
    if like is not None:
        rebuild(like, out, policy=plan.policy, size=size, batch=model.batch)
        return
    toolchain = make_toolchain(entry.engine, by_name(target), entry.compute, entry.weights)
    build_bundle(model.checkpoint(), plan, out, model.options, toolchain=toolchain)
