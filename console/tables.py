"""What the command line shows: facts as plain dictionaries, and the tables drawn from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from ..core.dtypes import human_bytes
from ..core.plan import StepPlan
from ..core.platform import memory_bytes
from ..core.policy import PruningPolicy
from ..core.precision import told_of
from ..engines.bundle.folder import SIGNATURE
from ..engines.bundle.manifest import EngineSet, Manifest, StepEngines
from ..engines.bundle.precision_note import precision_note
from ..engines.registry import runs_on_host
from ..profiling.estimates.passes import PassMemory, largest_that_fits, passes_of
from ..profiling.formatting import pixels
from ..profiling.report.columns import Column, fact_table, text_table

if TYPE_CHECKING:
    from ..engines.bundle.bundle import Bundle
    from ..export.construction import BuildReport
    from ..runtime.output import ImageTimings

Facts = dict[str, Any]


def bundle_facts(bundle: Bundle) -> Facts:
    """Everything that `fastvar inspect` shows, ready for json.dumps. A file shared by engines counts once."""
    manifest = bundle.manifest
    plan, policy = manifest.plan, manifest.plan.policy
    engine = manifest.any_engine
    batches = [pass_facts(found) for found in passes_of(manifest)]
    return {
        "path": str(bundle.path),
        "digest": bundle.digest,
        "family": manifest.family,
        "model": manifest.model,
        "size": pixels(plan.schedule.pixels),
        "bucket": plan.schedule.bucket,
        "policy": _policy_facts(policy),
        "layers": plan.depth,
        "backend": engine.backend,
        "library_version": engine.library_version,
        "target": engine.target,
        "native_code": bundle.holds_native_code,
        "signature": _signature(bundle),
        "precision": manifest.precision.label,
        "precision_choice": _choice_facts(manifest),
        "text_length": manifest.text_length,
        "decoder_tile": manifest.tiles.rows if manifest.tiles else None,
        "guidance_rows": sorted({s.rows for s in manifest.sets}, reverse=True),
        "batches": batches,
        "sampling": vars(manifest.sampling),
        "classes": getattr(manifest.transformer, "classes", None),
        "sampling_mode": vars(manifest.plan.sampling_mode),
        "checkpoint_digest": manifest.checkpoint_digest,
        "fastvar_version": manifest.fastvar_version,
        "format_version": manifest.format_version,
        "weight_bytes": manifest.weights.size_bytes,
        "activation_bytes": next(own["activation_bytes"] for own in batches if own["images"] == 1),
        "scales": [_scale_facts(manifest, position, step) for position, step in enumerate(plan.steps)],
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


def _choice_facts(manifest: Manifest) -> Facts | None:
    """How its maker came to the precision, and what to say of that here; None where it was not noted."""
    choice = manifest.precision_choice
    if choice is None:
        return None
    return {**vars(choice), "told": told_of(manifest.precision, choice), "note": precision_note(manifest)}


def _precision_rows(facts: Facts) -> Facts:
    """The precision of a bundle, and what to do where this CPU is faster in another."""
    choice = facts["precision_choice"]
    if choice is None:
        return {"precision": f"{facts['precision']}; why was not noted"}
    return {"precision": choice["told"]} | ({"on this CPU": choice["note"]} if choice["note"] else {})


def _policy_facts(policy: PruningPolicy) -> Facts:
    pruned = [policy.first_layer, policy.stop_layer]
    return {"name": policy.name, "pruned_layers": pruned, "restore_scale": policy.restore_scale}


def _signature(bundle: Bundle) -> str:
    if bundle.opening.public_key is not None:
        return "of the given key"
    return "there, not checked" if (bundle.path / SIGNATURE).is_file() else "none"


def _scale_facts(manifest: Manifest, position: int, step: StepPlan) -> Facts:
    engines = _step_engines(manifest.sets, position)
    return {
        "index": step.index,
        "size": list(step.size),
        "tokens": step.tokens,
        "kept": step.kept,
        "past_dense": step.past_dense,
        "past_pruned": step.past_pruned,
        "fills_cache": step.writes_restore_cache,
        "engines": engines,
        "engine_bytes": _bytes_of(manifest, set(engines)),
        "attentions": sum(manifest.engines[name].attentions for name in engines),
        "fused_attentions": sum(manifest.engines[name].report.fused_attentions for name in engines),
        "scratch_bytes": max(manifest.engines[name].report.scratch_bytes for name in engines),
    }


def _step_engines(sets: Sequence[EngineSet], position: int) -> list[str]:
    """Distinct engine names of one scale; those of the pruned layers come first."""
    names: list[str] = []
    for engine_set in sets:
        step: StepEngines = engine_set.steps[position]
        names += (step.attn_mlp_pruned, step.qkv_pruned, step.attn_mlp, step.qkv, step.sampling_head)
        names += (step.pick, step.residual)
    return list(dict.fromkeys(filter(None, names)))


def _bytes_of(manifest: Manifest, names: set[str]) -> int:
    files = {manifest.engines[name].file: manifest.engines[name].size_bytes for name in names}
    return sum(files.values())


def header_table(facts: Facts) -> Table:
    """The bundle as a whole."""
    policy, guidance, classes = facts["policy"], {"2": "on", "1": "off"}, facts["classes"]
    first, stop = policy["pruned_layers"]
    pruned = f"layers {first} to {stop - 1} of {facts['layers']}" if stop > first else "no layer pruned"
    restored = f", restored from scale {policy['restore_scale']}" if stop > first else ""
    length, tile = facts["text_length"], facts["decoder_tile"]
    memory = (f"{human_bytes(b)} with guidance {guidance[rows]}" for rows, b in facts["activation_bytes"].items())
    sampling = (f"{name} {value:g}" for name, value in facts["sampling"].items() if value is not None)
    return fact_table(
        {
            "bundle": facts["path"],
            "model": f"{facts['model']} ({facts['family']})",
            "size": f"{facts['size']}, schedule {facts['bucket']}",
            "policy": f"{policy['name']}: {pruned}{restored}",
            "backend": f"{facts['backend']} {facts['library_version']}, target {facts['target']}",
            **_precision_rows(facts),
            "code": "native: loading it runs what its maker compiled" if facts["native_code"] else "none of its own",
            "signature": facts["signature"],
            "decoder": "the whole image at once" if tile is None else f"stripes of {tile} latent rows",
            "prompt": f"at most {length} tokens" if length else f"one of {classes} classes",
            "sampling": ", ".join(sampling),
            "weights": human_bytes(facts["weight_bytes"]),
            "memory": f"{', '.join(memory)}, beside the weights",
            "passes": _passes_line(facts["batches"]),
            "digest": facts["digest"],
            "made by": f"fastvar {facts['fastvar_version']}, bundle format {facts['format_version']}",
        }
    )


def pass_facts(found: PassMemory) -> Facts:
    """What is told of the passes of so many images, ready for json.dumps."""
    rows = (str(count) for count in found.guidance_rows)
    return {
        "images": found.images,
        "activation_bytes": dict(zip(rows, found.activation_bytes, strict=True)),
        "allocated_bytes": found.need.total_bytes,
    }


def _passes_line(batches: Sequence[Facts]) -> str:
    """How many images a pass draws, and the memory of each number."""
    told = ", ".join(f"{own['images']} ({human_bytes(max(own['activation_bytes'].values()))})" for own in batches)
    return "one image" if len(batches) == 1 else f"images in one: {told}"


def plan_table(facts: Facts) -> Table:
    """One row per scale, with totals."""
    totals, skipped = facts["totals"], facts["skipped_scales"]
    notes = (
        "past: keys cached before, in dense / pruned layers; engine: attention of the layers that prune; "
        "bytes: all engines of the scale, see --engines"
    )
    columns = [
        Column("scale", "index", foot="total"),
        Column("size", format=pixels),
        Column("tokens", foot=str(totals["tokens"])),
        Column("kept", foot=str(totals["kept"])),
        Column("past", _past),
        Column("engine", _pruning_engine, justify="left", foot=f"{totals['engines']} engines", overflow="fold"),
        Column("bytes", "engine_bytes", human_bytes, foot=human_bytes(totals["engine_bytes"])),
    ]
    if totals["kernels"]:  # the compiler reported what it did
        notes += "; fused: attentions that are one kernel, of all; scratch: memory of the engine that needs most"
        columns += [Column("fused", _fused), Column("scratch", "scratch_bytes", human_bytes)]
    rows = {scale["index"]: scale for scale in facts["scales"]} | {i: (str(i), "skipped") for i in skipped}
    return text_table(
        columns,
        [row for _, row in sorted(rows.items())],
        lambda row: "dim" if isinstance(row, tuple) else None,
        caption=notes,
        caption_justify="left",
    )


def _past(scale: Facts) -> str:
    dense, pruned = scale["past_dense"], scale["past_pruned"]
    return str(dense) if dense == pruned else f"{dense} / {pruned}"


def _pruning_engine(scale: Facts) -> str:
    name: str = scale["engines"][0]
    return name.rpartition("-r")[0]


def _fused(facts: Facts) -> str:
    return f"{facts['fused_attentions']}/{facts['attentions']}" if facts["attentions"] else ""


def engine_table(facts: Facts) -> Table:
    """Every engine of the bundle, with kernels, fused attentions and scratch memory if its compiler reports them."""
    columns = [
        Column("engine", "name", justify="left"),
        Column("file", justify="left"),
        Column("bytes", format=human_bytes),
        *(Column(name) for name in ("inputs", "outputs", "weights")),
    ]
    if facts["totals"]["kernels"]:
        columns += [Column("kernels"), Column("fused", _fused), Column("scratch", "scratch_bytes", human_bytes)]
    return text_table(columns, [{"name": name, **engine} for name, engine in facts["engines"].items()])


def timing_table(timings: Sequence[ImageTimings]) -> Table:
    """Milliseconds per scale, one column per image."""
    images = [f"image {number}, ms" for number in range(1, len(timings) + 1)] if len(timings) > 1 else ["ms"]
    rows = []
    for scales in zip(*(timing.scales for timing in timings), strict=True):
        first = scales[0]
        known = (str(first.index), pixels(first.size), str(first.tokens), str(first.kept))
        rows.append((*known, *(f"{scale.ms:.1f}" for scale in scales)))
    table = text_table([Column(heading) for heading in ("scale", "size", "tokens", "kept", *images)], rows)
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
        f"computes in {report.precision}",
        f"graphs   {report.graphs_traced} exported in {report.trace_seconds:.1f} s, added up over all workers",
        f"         {taken}, others compiled in {report.compile_seconds:.1f} s",
        f"engines  {human_bytes(report.engine_bytes)}, of it transformer steps {human_bytes(report.step_engine_bytes)}",
        f"weights  {human_bytes(report.weight_bytes)}{origin}",
        *(f"         {line}" for line in report.origin),
    ]


def doctor_tables(facts: Facts) -> list[Table]:
    """Machine, uses and packages."""
    memory, limit, cache = facts["memory_bytes"], facts["memory_limit_bytes"], facts["cache"]
    products = facts["products"]
    quota = "" if facts["cpu_quota"] is None else f", a container's quota of {facts['cpu_quota']:g}"
    limited = "" if limit is None else f", a container's limit of {human_bytes(limit)}"
    machine = {
        "fastvar": facts["fastvar"],
        "python": f"{facts['python']} on {facts['platform']}",
        "cpu": f"{facts['cpu']}, {facts['cpu_cores']} cores usable{quota}",
        "features": " ".join(facts["cpu_features"]) or "unknown",
        "memory": (human_bytes(memory) if memory else "unknown") + limited,
        "products": f"not timed: {products['problem']}" if products["problem"] else f"aotinductor: {products['told']}",
        "C++ compiler": facts["cxx"] or "none: the backend aotinductor builds with one",
        "nvidia driver": facts["nvidia_driver"] or "none",
        "engine cache": f"{cache['folder']} ({cache['files']} files, {human_bytes(cache['bytes'])})",
    }
    uses = (
        Column("for", "use", justify="left"),
        Column("state", _use_state, justify="left"),
        Column("what to do", lambda use: Text(use["fix"] or use["note"]), justify="left"),
    )
    packages = (Column("package", justify="left"), Column("version", justify="left"))
    missing = Text("not installed", "dim")
    versions = [(name, version or missing) for name, version in facts["packages"].items()]
    tables = [fact_table(machine), text_table(uses, facts["uses"]), text_table(packages, versions)]
    return [*([doctor_bundle_table(facts["bundle"])] if "bundle" in facts else []), *tables]


def doctor_bundle_facts(bundle: Bundle, budget: int | None, uses: Sequence[Facts]) -> Facts:
    """Whether this machine can draw from a bundle, and in passes of how many images.

    `budget`: bytes; without one the machine's memory counts, where engines take that, and nothing else is known.
    """
    manifest, passes = bundle.manifest, passes_of(bundle.manifest)
    on_host = runs_on_host(manifest)
    limit = budget if budget is not None or not on_host else memory_bytes()
    return {
        "path": str(bundle.path),
        "backend": manifest.backend,
        "target": manifest.target,
        "precision": manifest.precision.label,
        "precision_choice": _choice_facts(manifest),
        "ready": next(use["ready"] for use in uses if use["use"] == f"backend {manifest.backend}"),
        "budget_bytes": limit,
        "batches": [
            {**pass_facts(own), "fits": None if limit is None else own.need.total_bytes <= limit} for own in passes
        ],
        "largest_batch": None if limit is None else largest_that_fits(passes, limit),
    }


def doctor_bundle_table(facts: Facts) -> Table:
    """A bundle on this machine."""
    limit, states = facts["budget_bytes"], {None: "", True: ", fits", False: ", does not fit"}
    passes = [
        f"of {own['images']}: {human_bytes(own['allocated_bytes'])}{states[own['fits']]}" for own in facts["batches"]
    ]
    told = "not known here: give --memory" if limit is None else human_bytes(limit)
    ready = "ready" if facts["ready"] else "not ready, see below"
    return fact_table(
        {
            "bundle": facts["path"],
            "backend": f"{facts['backend']}, target {facts['target']}: {ready}",
            **_precision_rows(facts),
            "budget": told,
            "passes": "; ".join(passes),
        }
    )


def _use_state(use: Facts) -> Text:
    return Text("ready", "green") if use["ready"] else Text(f"lacks {', '.join(use['missing'])}", "yellow")
