"""What the command line shows: facts as plain dictionaries, and the Rich tables drawn from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from ..engines.bundle_folder import SIGNATURE
from ..engines.dtypes import human_bytes
from ..engines.manifest import EngineSet, Manifest, StepEngines
from ..plan import StepPlan
from ..runtime.soundness import sound_layout

if TYPE_CHECKING:
    from ..engines.bundle import Bundle
    from ..export.bundling import BuildReport
    from ..runtime.events import ImageTimings

Facts = dict[str, Any]


def bundle_facts(bundle: Bundle) -> Facts:
    """Everything `fastvar inspect` tells, ready for json.dumps. Bytes count a file once."""
    manifest = bundle.manifest
    plan, policy = manifest.plan, manifest.plan.policy
    height, width = plan.schedule.pixels
    engine = manifest.any_engine
    return {
        "path": str(bundle.path),
        "digest": bundle.digest,
        "family": manifest.family,
        "model": manifest.model,
        "size": f"{width}x{height}",
        "budget": plan.schedule.budget,
        "policy": {
            "name": policy.name,
            "pruned_layers": [policy.first_layer, policy.stop_layer],
            "cached_scale": policy.cached_scale,
        },
        "layers": plan.depth,
        "backend": engine.backend,
        "library_version": engine.library_version,
        "target": engine.target,
        "native_code": bundle.holds_native_code,
        "signature": _signature(bundle),
        "precision": manifest.precision.label,
        "text_length": manifest.text_length,
        "decoder_tile": manifest.tiles.rows if manifest.tiles else None,
        "guidance_rows": [s.rows for s in manifest.sets],
        "sampling": vars(manifest.sampling),
        "classes": getattr(manifest.transformer, "classes", None),
        "drawing": vars(manifest.plan.drawing),
        "checkpoint_digest": manifest.checkpoint_digest,
        "fastvar_version": manifest.fastvar_version,
        "format_version": manifest.format_version,
        "weight_bytes": manifest.weights.size_bytes,
        "activation_bytes": {str(s.rows): sound_layout(manifest, s.rows).arena_bytes for s in manifest.sets},
        "scales": _scale_facts(manifest),
        "skipped_scales": [i for i in range(len(plan.schedule)) if policy.rule(i).skip],
        "totals": {
            "tokens": sum(step.tokens for step in plan.steps),
            "kept": sum(step.kept for step in plan.steps),
            "forwarded_tokens": plan.forwarded_tokens,
            "engines": len(manifest.engines),
            "engine_bytes": _bytes_of(manifest, set(manifest.engines)),
            "kernels": sum(spec.report.kernels for spec in manifest.engines.values()),
        },
        "engines": {
            name: {
                "file": spec.file,
                "bytes": spec.size_bytes,
                "inputs": len(spec.inputs),
                "outputs": len(spec.outputs),
                "weights": len(spec.weights),
                "attentions": spec.attentions,
                **vars(spec.report),
            }
            for name, spec in manifest.engines.items()
        },
    }


def _signature(bundle: Bundle) -> str:
    if bundle.opening.public_key is not None:
        return "of the given key"
    return "there, not checked" if (bundle.path / SIGNATURE).is_file() else "none"


def _scale_facts(manifest: Manifest) -> list[Facts]:
    return [_one_scale(manifest, position, step) for position, step in enumerate(manifest.plan.steps)]


def _one_scale(manifest: Manifest, position: int, step: StepPlan) -> Facts:
    engines = _step_engines(manifest.sets, position)
    return {
        "index": step.index,
        "size": list(step.size),
        "tokens": step.tokens,
        "kept": step.kept,
        "past_dense": step.past_dense,
        "past_pruned": step.past_pruned,
        "fills_cache": step.fills_cache,
        "engines": engines,
        "engine_bytes": _bytes_of(manifest, set(engines)),
        "attentions": sum(manifest.engines[name].attentions for name in engines),
        "fused_attentions": sum(manifest.engines[name].report.fused_attentions for name in engines),
        "scratch_bytes": max(manifest.engines[name].report.scratch_bytes for name in engines),
    }


def _step_engines(sets: Sequence[EngineSet], position: int) -> list[str]:
    """Engine names of one scale, each once, those of the pruned layers first."""
    names: list[str] = []
    for engine_set in sets:
        step: StepEngines = engine_set.steps[position]
        names += (step.attend_pruned, step.project_pruned, step.attend, step.project, step.bridge)
        names += (step.pick, step.residual)
    return list(dict.fromkeys(filter(None, names)))


def _bytes_of(manifest: Manifest, names: set[str]) -> int:
    files = {manifest.engines[name].file: manifest.engines[name].size_bytes for name in names}
    return sum(files.values())


def header_table(facts: Facts) -> Table:
    """The bundle as a whole."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    policy, sampling = facts["policy"], facts["sampling"]
    first, stop = policy["pruned_layers"]
    pruned = f"layers {first} to {stop - 1} of {facts['layers']}" if stop > first else "no layer pruned"
    restored = f", restored from scale {policy['cached_scale']}" if stop > first else ""
    guidance = {2: "on", 1: "off"}
    memory = ", ".join(
        f"{human_bytes(b)} with guidance {guidance[int(r)]}" for r, b in facts["activation_bytes"].items()
    )
    rows = {
        "bundle": facts["path"],
        "model": f"{facts['model']} ({facts['family']})",
        "size": f"{facts['size']}, schedule {facts['budget']}",
        "policy": f"{policy['name']}: {pruned}{restored}",
        "backend": f"{facts['backend']} {facts['library_version']}, target {facts['target']}, {facts['precision']}",
        "code": "native: loading it runs what its maker compiled" if facts["native_code"] else "none of its own",
        "signature": facts["signature"],
        "decoder": _decoder(facts["decoder_tile"]),
        "prompt": f"at most {facts['text_length']} tokens"
        if facts["text_length"]
        else f"one of {facts['classes']} classes",
        "sampling": ", ".join(f"{name} {value:g}" for name, value in sampling.items() if value is not None),
        "weights": human_bytes(facts["weight_bytes"]),
        "memory": f"{memory}, beside the weights",
        "digest": facts["digest"],
        "made by": f"fastvar {facts['fastvar_version']}, bundle format {facts['format_version']}",
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def _prompt(facts: Facts) -> str:
    length = facts["text_length"]
    return f"at most {length} tokens" if length else f"none: one of {facts['classes']} classes"


def _decoder(tile: int | None) -> str:
    return "the whole image at once" if tile is None else f"stripes of {tile} latent rows"


def plan_table(facts: Facts) -> Table:
    """One row per scale, with totals."""
    totals = facts["totals"]
    notes = (
        "past: keys cached before, in dense / pruned layers; engine: attention of the layers that prune; "
        "bytes: all engines of the scale, see --engines"
    )
    compiled = bool(totals["kernels"])  # by a compiler that says what it did
    if compiled:
        notes += "; fused: attentions that are one kernel, of all; scratch: memory of the engine that needs most"
    table = Table(show_footer=True, caption=notes, caption_justify="left")
    table.add_column("scale", "total", justify="right")
    table.add_column("size", justify="right")
    table.add_column("tokens", str(totals["tokens"]), justify="right")
    table.add_column("kept", str(totals["kept"]), justify="right")
    table.add_column("past", justify="right")
    table.add_column("engine", f"{totals['engines']} engines", overflow="fold")
    table.add_column("bytes", human_bytes(totals["engine_bytes"]), justify="right")
    if compiled:
        table.add_column("fused", justify="right")
        table.add_column("scratch", justify="right")
    rows = {scale["index"]: _plan_row(scale, compiled) for scale in facts["scales"]}
    rows |= {index: (str(index), "skipped") for index in facts["skipped_scales"]}
    for index, row in sorted(rows.items()):
        table.add_row(*row, style="dim" if index in facts["skipped_scales"] else None)
    return table


def _plan_row(scale: Facts, compiled: bool) -> tuple[str, ...]:
    height, width = scale["size"]
    dense, pruned = scale["past_dense"], scale["past_pruned"]
    past = str(dense) if dense == pruned else f"{dense} / {pruned}"
    return (
        str(scale["index"]),
        f"{width}x{height}",
        str(scale["tokens"]),
        str(scale["kept"]),
        past,
        scale["engines"][0].rpartition("-r")[0],
        human_bytes(scale["engine_bytes"]),
        *(
            (f"{scale['fused_attentions']}/{scale['attentions']}", human_bytes(scale["scratch_bytes"]))
            if compiled
            else ()
        ),
    )


def engine_table(facts: Facts) -> Table:
    """Every engine of the bundle; kernels, fused attentions and scratch memory where its compiler told them."""
    compiled = bool(facts["totals"]["kernels"])
    table = Table("engine", "file")
    for name in ("bytes", "inputs", "outputs", "weights", *(("kernels", "fused", "scratch") if compiled else ())):
        table.add_column(name, justify="right")
    for name, engine in facts["engines"].items():
        cells = [human_bytes(engine["bytes"]), *(str(engine[key]) for key in ("inputs", "outputs", "weights"))]
        if compiled:
            fused = f"{engine['fused_attentions']}/{engine['attentions']}" if engine["attentions"] else ""
            cells += [str(engine["kernels"]), fused, human_bytes(engine["scratch_bytes"])]
        table.add_row(name, engine["file"], *cells)
    return table


def timing_table(timings: Sequence[ImageTimings]) -> Table:
    """Milliseconds per scale, one column per image."""
    table = Table("scale", "size", "tokens", "kept")
    for column in table.columns:
        column.justify = "right"
    for number in range(len(timings)):
        table.add_column(f"image {number + 1}, ms" if len(timings) > 1 else "ms", justify="right")
    for scales in zip(*(timing.scales for timing in timings), strict=True):
        first, (height, width) = scales[0], scales[0].size
        spent = (f"{scale.ms:.1f}" for scale in scales)
        table.add_row(str(first.index), f"{width}x{height}", str(first.tokens), str(first.kept), *spent)
    table.add_section()
    for label, attribute in (("text", "text_ms"), ("decoder", "decode_ms"), ("total", "total_ms")):
        table.add_row(label, "", "", "", *(f"{getattr(timing, attribute):.1f}" for timing in timings))
    return table


def build_lines(report: BuildReport) -> list[str]:
    """What a build did, in plain lines."""
    origin = ", the file of the other bundle" if report.weights_linked else ""
    taken = f"{report.graphs_cached} engines from the cache"
    taken += f", {report.engines_copied} copied" if report.engines_copied else ""
    return [
        f"built {report.out} in {report.seconds:.1f} s",
        f"graphs   {report.graphs_traced} exported in {report.trace_seconds:.1f} s, added up over all workers",
        f"         {taken}, others compiled in {report.compile_seconds:.1f} s",
        f"engines  {human_bytes(report.engine_bytes)}, of it transformer steps {human_bytes(report.step_engine_bytes)}",
        f"weights  {human_bytes(report.weight_bytes)}{origin}",
    ]


def doctor_tables(facts: Facts) -> list[Table]:
    """Machine, uses and packages."""
    return [_machine_table(facts), _use_table(facts), _package_table(facts)]


def _machine_table(facts: Facts) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    memory, cache = facts["memory_bytes"], facts["cache"]
    quota = "" if facts["cpu_quota"] is None else f", a container's quota of {facts['cpu_quota']:g}"
    limited = (
        ""
        if facts["memory_limit_bytes"] is None
        else f", a container's limit of {human_bytes(facts['memory_limit_bytes'])}"
    )
    rows = {
        "fastvar": facts["fastvar"],
        "python": f"{facts['python']} on {facts['platform']}",
        "cpu": f"{facts['cpu']}, {facts['cpu_cores']} cores usable{quota}",
        "features": " ".join(facts["cpu_features"]) or "unknown",
        "memory": (human_bytes(memory) if memory else "unknown") + limited,
        "C++ compiler": facts["cxx"] or "none: the backend aotinductor builds with one",
        "nvidia driver": facts["nvidia_driver"] or "none",
        "engine cache": f"{cache['folder']} ({cache['files']} files, {human_bytes(cache['bytes'])})",
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def _use_table(facts: Facts) -> Table:
    table = Table("for", "state", "what to do")
    for use in facts["uses"]:
        state = Text("ready", "green") if use["ready"] else Text(f"lacks {', '.join(use['missing'])}", "yellow")
        table.add_row(use["use"], state, Text(use["fix"] or use["note"]))
    return table


def _package_table(facts: Facts) -> Table:
    table = Table("package", "version")
    for name, version in facts["packages"].items():
        table.add_row(name, version or Text("not installed", "dim"))
    return table
