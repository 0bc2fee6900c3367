"""The bundles of a GPU's day: what each is made of. Imports torch when a recipe is followed, not before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.builder import DEMO
from benchmarks.models import Model
from fastvar.core.policy import PruningPolicy, ScaleRule
from fastvar.engines.aotinductor.gpus import CUDNN, GpuTarget
from fastvar.engines.bundle.bundle import Bundle
from fastvar.families.codebook import VqTokenizerConfig
from fastvar.families.hart import HartConfig
from fastvar.families.var import VarConfig

if TYPE_CHECKING:
    from fastvar.core.plan import GenerationPlan
    from fastvar.engines.cache.engine_cache import EngineCache
    from fastvar.export.checkpoints.checkpoint import Checkpoint
    from fastvar.export.options import BuildOptions
    from fastvar.export.toolchain import Toolchain

PROMPT_TOKENS = 64
FIRST = "1024x1024-fastvar"  # its weights are made once, and all other bundles of the model take them over
BATCHED = "1024x1024-fastvar-batch"
BATCHES = (1, 4, 8)  # images of a pass
DENSE, WIDE, LARGE, WITH_CUDNN = "1024x1024-dense", "960x1920-fastvar", "2048x2048-fastvar", f"{FIRST}-{CUDNN}"
DEMO_PRECISIONS = ("bf16", "fp16")
# What a build reports, for the record.
TOLD = (
    "graphs_traced",
    "graphs_cached",
    "trace_seconds",
    "compile_seconds",
    "weight_bytes",
    "engine_bytes",
    "weights_linked",
)

# Small models of the other families: every kind of step, in heads of 64 channels, an image in milliseconds.
SMALL_VAR = VarConfig(
    depth=4, width=256, heads=4, mlp_width=1024, classes=10, codes=256, code_channels=32, scales=(1, 2, 3, 4, 6, 8, 12)
)
SMALL_HART = HartConfig(
    depth=4,
    width=256,
    heads=4,
    mlp_width=1024,
    context_length=32,
    context_width=64,
    codes=256,
    code_channels=32,
    scales=(1, 2, 3, 4, 6, 8, 12),
    diffusion_width=128,
    diffusion_depth=2,
    diffusion_steps=4,
)
SMALL_IMAGES = VqTokenizerConfig(codes=256, code_channels=32, base_channels=32, residual_blocks=1)
SMALL_POLICY = PruningPolicy("small", {5: ScaleRule(0.5), 6: ScaleRule(0.25)}, 2, 4, 4)
FAMILIES = {"var": SMALL_VAR, "hart": SMALL_HART}


@dataclass(frozen=True)
class Recipe:
    """One bundle.

    Args:
        name: of its folder.
        source: "demo", a key of FAMILIES, or a model of `benchmarks.models`.
        backend: who compiles it.
        target: for which device.
        precision: as `fastvar build` takes it.
        size: of models of any size.
        policy: of these too.
        like: the bundle whose weights it takes over.
        batch: how many images its passes draw, of models of any size.
    """

    name: str
    source: str
    backend: str
    target: str | None
    precision: str
    size: str = ""
    policy: str = ""
    like: str = ""
    batch: tuple[int, ...] = (1,)

    def make(self, folder: Path, jobs: int | None = None) -> dict[str, Any]:
        """Build it there, by so many processes at most; what it took, for the record."""
        if self.like:
            report = self._make_like(Bundle.open(folder / self.like), folder / self.name, jobs)
        else:
            from fastvar.export.build import build_bundle

            checkpoint, plan, options, toolchain = self.parts()
            report = build_bundle(checkpoint, plan, folder / self.name, options, toolchain=toolchain, jobs=jobs)
        return {name: getattr(report, name) for name in TOLD}

    def compile(self, cache: EngineCache) -> tuple[int, int]:
        """Make its engines alone, for the cache: how many were compiled, and how many were there."""
        from fastvar.export.checkpoints.weight_sources import engine_weights, preview_weights
        from fastvar.export.describe import assemble_checkpoint
        from fastvar.export.factory import EngineFactory

        checkpoint, plan, options, toolchain = self.parts()
        sources = engine_weights(checkpoint, options.with_encoder, toolchain.precision) | preview_weights(checkpoint)
        factory = EngineFactory(toolchain, cache, sources)
        factory.make(assemble_checkpoint(checkpoint, plan, options).graphs, lambda name: None)
        return factory.compiled, factory.cached

    def parts(self) -> tuple[Checkpoint, GenerationPlan, BuildOptions, Toolchain]:
        from fastvar.export.options import BuildOptions
        from fastvar.export.toolchain import make_toolchain

        toolchain, options = make_toolchain(self.backend, self.target, self.precision), BuildOptions(guidance="on")
        if self.size:
            model = Model(self.source, PROMPT_TOKENS, batch=self.batch)
            return model.checkpoint(), model.plan(self.size, self.policy), model.options, toolchain
        checkpoint, policy = self._checkpoint(), SMALL_POLICY if self.source in FAMILIES else "fastvar"
        family, transformer = checkpoint.family, checkpoint.transformer
        size = family.size(DEMO[2] if self.source == "demo" else None, transformer)
        schedule = family.schedule_for(size, transformer)
        if isinstance(policy, str):
            policy = family.policy(policy, schedule, transformer.depth)
        return checkpoint, family.plan(schedule, policy, transformer, None), options, toolchain

    def _checkpoint(self) -> Checkpoint:
        from fastvar.export.checkpoints.checkpoint import load_checkpoint
        from fastvar.export.checkpoints.random_weights import random_checkpoint_for

        if self.source in FAMILIES:
            return random_checkpoint_for(FAMILIES[self.source], SMALL_IMAGES, name=self.source)
        return load_checkpoint(Path(DEMO[0]), name=self.source)

    def _make_like(self, source: Bundle, out: Path, jobs: int | None) -> Any:
        """Engines for another policy, size, batch or attention kernel of the same GPU."""
        from fastvar.export.rebuild import rebuild

        if self.target is not None:
            source = retargeted(source, self.target)
        plan = Model(self.source, PROMPT_TOKENS).plan(self.size, self.policy)
        return rebuild(source, out, policy=plan.policy, size=self.size, batch=self.batch, jobs=jobs)


def retargeted(bundle: Bundle, target: str) -> Bundle:
    """A bundle as if its engines had been asked for with another attention kernel. What `rebuild` takes over of it, the
    image decoder, has the same kernels either way: for heads as wide as its own there is one."""
    manifest = bundle.manifest
    engines = {name: replace(spec, target=target) for name, spec in manifest.engines.items()}
    return replace(bundle, manifest=replace(manifest, engines=engines))


def recipes(model: str, capability: str) -> Iterator[Recipe]:
    """All bundles, those that others take their weights from before them.

    Args:
        model: of `benchmarks.models`, for all that is timed.
        capability: of the GPU, "sm90".
    """
    program, gpu = "aotinductor", str(GpuTarget(capability))
    yield Recipe(FIRST, model, program, gpu, "bf16", "1024x1024", "fastvar")
    for source in ("demo", *FAMILIES):
        yield Recipe(f"{source}-cpu", source, "onnxruntime", None, "fp32")
    for precision in DEMO_PRECISIONS:
        yield Recipe(f"demo-{precision}", "demo", program, gpu, precision)
    for source in FAMILIES:
        yield Recipe(f"{source}-gpu", source, program, gpu, "bf16")
    for name in (DENSE, LARGE, WIDE):
        size, policy = name.split("-")
        yield Recipe(name, model, program, gpu, "bf16", size, policy, like=FIRST)
    yield Recipe(BATCHED, model, program, gpu, "bf16", "1024x1024", "fastvar", like=FIRST, batch=BATCHES)
    with_cudnn = str(GpuTarget(capability, CUDNN))
    yield Recipe(WITH_CUDNN, model, program, with_cudnn, "bf16", "1024x1024", "fastvar", like=FIRST)
