"""Which graphs a plan needs, and which of them each step uses. Graphs that are equal are one graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..config import ImageTokenizerConfig, TransformerConfig
from ..engines.manifest import EngineSet, StepEngines
from ..plan import GenerationPlan, StepPlan
from ..schedule import Size
from .block_steps import Attend, Project
from .coders import ImageDecoder, ImageEncoder, TextEncoder
from .graphs import StepGraph
from .steps import Bridge, Condition, TextKV

if TYPE_CHECKING:
    from transformers import T5Config

LAYER_PREFIX = "transformer.blocks.{layer}."
SHARED_PREFIX = "transformer."


@dataclass
class Assembly:
    """The graphs of a bundle by name, and who uses them."""

    graphs: dict[str, StepGraph] = field(default_factory=dict)
    sets: list[EngineSet] = field(default_factory=list)
    text_encoder: str = ""  # graph names; no text encoder for a model built without one
    decoder: str = ""
    encoder: str = ""  # empty unless asked for

    @property
    def step_graphs(self) -> list[str]:
        """Names of the transformer's graphs: all but the coders."""
        coders = (ImageDecoder, ImageEncoder, TextEncoder)
        return [name for name, graph in self.graphs.items() if graph.factory not in coders]

    def add(self, graph: StepGraph) -> str:
        self.graphs[graph.name] = graph
        return graph.name


def assemble(
    plan: GenerationPlan,
    transformer: TransformerConfig,
    image_tokenizer: ImageTokenizerConfig,
    text_encoder: T5Config | None,
    text_length: int,
    rows: tuple[int, ...],
    with_encoder: bool = False,
) -> Assembly:
    """All graphs of a bundle: one set of transformer steps for each number of guidance rows, and the coders."""
    assembly = Assembly()
    for count in rows:
        assembly.sets.append(_engine_set(assembly, plan, transformer, text_length, count))
    patch = transformer.patch
    grid = (plan.schedule.final[0] * patch, plan.schedule.final[1] * patch)
    label = _label(grid)
    coder = {"config": image_tokenizer, "grid": grid}
    assembly.decoder = assembly.add(StepGraph(f"decoder-{label}", ImageDecoder, coder, "image_tokenizer.decoder."))
    if with_encoder:
        assembly.encoder = assembly.add(StepGraph(f"encoder-{label}", ImageEncoder, coder, "image_tokenizer.encoder."))
    if text_encoder is not None:
        arguments: dict[str, object] = {"config": text_encoder, "text_length": text_length}
        graph = StepGraph(f"text-encoder-t{text_length}", TextEncoder, arguments, "text_encoder.")
        assembly.text_encoder = assembly.add(graph)
    return assembly


def _engine_set(
    assembly: Assembly, plan: GenerationPlan, config: TransformerConfig, text_length: int, rows: int
) -> EngineSet:
    text = {"config": config, "rows": rows, "text_length": text_length}
    suffix = f"t{text_length}-r{rows}"
    return EngineSet(
        rows=rows,
        condition=assembly.add(StepGraph(f"condition-{suffix}", Condition, text, SHARED_PREFIX)),
        text_kv=assembly.add(StepGraph(f"text-kv-{suffix}", TextKV, text, LAYER_PREFIX)),
        steps=tuple(_step(assembly, plan, step, config, text_length, rows) for step in plan.steps),
    )


def _step(
    assembly: Assembly, plan: GenerationPlan, step: StepPlan, config: TransformerConfig, text_length: int, rows: int
) -> StepEngines:
    def project(kept: int) -> str:
        arguments = {"rows": rows, "size": step.size, "kept": kept, "position_grid": plan.schedule.position_grid}
        name = f"project-{_label(step.size)}-k{kept}-r{rows}"
        return assembly.add(StepGraph(name, Project, {"config": config, **arguments}, LAYER_PREFIX))

    def attend(kept: int, past: int, cached_size: Size | None, fills: bool) -> str:
        arguments: dict[str, object] = {
            "rows": rows,
            "size": step.size,
            "kept": kept,
            "past": past,
            "text_length": text_length,
        }
        arguments |= {"cached_size": cached_size, "fills": fills}
        name = f"attend-{_label(step.size)}-k{kept}-s{past + kept}-r{rows}" + ("-fill" if fills else "")
        return assembly.add(StepGraph(name, Attend, {"config": config, **arguments}, LAYER_PREFIX))

    cached = plan.cached_size if step.prunes else None
    pruned = [plan.policy.prunes(layer) for layer in range(plan.depth)]
    halves: dict[str, str] = {}
    if not all(pruned):
        halves["project"] = project(step.tokens)
        halves["attend"] = attend(step.tokens, step.past_dense, None, False)
    if any(pruned):
        halves["project_pruned"] = project(step.kept)
        halves["attend_pruned"] = attend(step.kept, step.past_pruned, cached, step.fills_cache)
    return StepEngines(bridge=_bridge(assembly, plan, step, config, rows), **halves)


def _bridge(assembly: Assembly, plan: GenerationPlan, step: StepPlan, config: TransformerConfig, rows: int) -> str:
    following = None if step.next_index is None else plan.schedule.sizes[step.next_index]
    arguments = {"rows": rows, "size": step.size, "final": plan.schedule.final}
    arguments |= {"next_size": following, "next_index": step.next_index}
    onward = "end" if following is None else f"{_label(following)}@{step.next_index}"
    name = f"bridge-{_label(step.size)}-{onward}-of-{_label(plan.schedule.final)}-r{rows}"
    return assembly.add(StepGraph(name, Bridge, {"config": config, **arguments}, SHARED_PREFIX))


def _label(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
