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
        assembly.add(StepGraph(f"encoder-{label}", ImageEncoder, coder, "image_tokenizer.encoder."))
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
    own = step.rows(rows)
    suffix = _rows_label(own, rows)
    shared: dict[str, object] = {"config": config, "rows": own, "text_rows": rows, "size": step.size}

    def project(kept: int) -> str:
        arguments = {**shared, "kept": kept, "position_grid": plan.schedule.position_grid}
        name = f"project-{_label(step.size)}-k{kept}-{suffix}"
        return assembly.add(StepGraph(name, Project, arguments, LAYER_PREFIX))

    def attend(kept: int, pruned: bool) -> str:
        past, fills = step.past(pruned), pruned and step.fills_cache
        guided_past = step.guided_past(pruned) if own < rows else 0
        arguments = {**shared, "kept": kept, "past": past, "text_length": text_length, "fills": fills}
        arguments |= _restoration(plan, step, rows) if kept < step.tokens else {"cached_size": None}
        older = f"of{guided_past}" if guided_past else ""
        name = f"attend-{_label(step.size)}-k{kept}-s{past + kept}{older}-{suffix}" + ("-fill" if fills else "")
        return assembly.add(StepGraph(name, Attend, {**arguments, "guided_past": guided_past}, LAYER_PREFIX))

    pruned = [plan.policy.prunes(layer) for layer in range(plan.depth)]
    halves: dict[str, str] = {}
    if not all(pruned):
        halves["project"], halves["attend"] = project(step.tokens), attend(step.tokens, False)
    if any(pruned):
        halves["project_pruned"], halves["attend_pruned"] = project(step.kept), attend(step.kept, True)
    return StepEngines(bridge=_bridge(assembly, plan, step, config, rows), **halves)


def _restoration(plan: GenerationPlan, step: StepPlan, rows: int) -> dict[str, object]:
    """What pruned tokens of a step are restored from: the grid of the cached scale, and its guidance rows."""
    filled = next(earlier for earlier in plan.steps if earlier.fills_cache)
    return {"cached_size": filled.size, "cached_rows": filled.rows(rows)}


def _bridge(assembly: Assembly, plan: GenerationPlan, step: StepPlan, config: TransformerConfig, rows: int) -> str:
    following = next((later for later in plan.steps if later.index == step.next_index), None)
    own, further = step.rows(rows), following.rows(rows) if following else 0
    arguments = {"rows": own, "text_rows": rows, "size": step.size, "final": plan.schedule.final}
    arguments |= {"next_size": following and following.size, "next_index": step.next_index, "next_rows": further}
    onward = "end" if following is None else f"{_label(following.size)}@{step.next_index}"
    label = _rows_label(own, rows) + (f"to{further}" if following and further < own else "")
    name = f"bridge-{_label(step.size)}-{onward}-of-{_label(plan.schedule.final)}-{label}"
    return assembly.add(StepGraph(name, Bridge, {"config": config, **arguments}, SHARED_PREFIX))


def _rows_label(own: int, rows: int) -> str:
    """r2, or r1of2 where guidance has been switched off."""
    return f"r{own}" if own == rows else f"r{own}of{rows}"


def _label(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
