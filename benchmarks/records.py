"""What a benchmark writes down of its contenders: medians, paired ratios, FLOP/s and shares of the machine's peak.

Knows results only. `python -m benchmarks` (`make bench`) brings the contenders and calls this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from benchmarks.contenders import Contender, EngineContender, Entry
from benchmarks.timing import Agreement, Run, noise_of, paired
from fastvar.core.plan import GenerationPlan, StepPlan
from fastvar.engines.bundle.manifest import Manifest
from fastvar.profiling.estimates.costs import Cost, EngineCosts, Kind, add
from fastvar.profiling.sampler import Sampler
from fastvar.profiling.samples import memory_of

LARGEST = 2  # executed scales that are broken down launch by launch
LAUNCH_RUNS, SHORT_MS = 3, 1000.0  # of what takes less than this; else once
COPY = "copy"
Record = dict[str, Any]
Peaks = Mapping[str, float]  # precision -> FLOP/s of a matrix product, COPY -> bytes/s


@dataclass(frozen=True)
class Part:
    """Launches that belong together: the median of their milliseconds, and what they cost."""

    launches: int
    ms: float
    cost: Cost


@dataclass(frozen=True)
class Breakdown:
    """One executed scale launch by launch: all layers together, and by kind of engine."""

    step: StepPlan
    whole: Part
    kinds: Mapping[Kind, Part]


@dataclass(frozen=True)
class Result:
    """Everything about one contender at one size."""

    entry: Entry
    plan: GenerationPlan
    costs: EngineCosts  # counted for the plan: the same for whoever draws after it
    agreement: Agreement | None  # None where it was not compared: eager torch of a plan that no engine has
    runs: Sequence[Run]
    decodes_ms: Sequence[float] = ()  # of the decoder, which equal ones share
    launches: Sequence[Breakdown] = ()  # of the largest scales, engines only
    memory: Record | None = None

    @property
    def scales_ms(self) -> float:
        return median(run.scales_ms for run in self.runs)

    @property
    def text_ms(self) -> float:
        return median(run.text_ms for run in self.runs)

    @property
    def decode_ms(self) -> float | None:
        return median(self.decodes_ms) if self.decodes_ms else None

    @property
    def image_ms(self) -> float | None:
        """Text, scales and decoder, each at its median."""
        return None if self.decode_ms is None else self.text_ms + self.scales_ms + self.decode_ms

    @property
    def flop(self) -> int:
        """Of all scales."""
        return add(self.costs.by_scale().values()).flop

    @property
    def flop_per_s(self) -> float:
        return self.flop / self.scales_ms * 1e3


def result_record(result: Result, peaks: Peaks) -> Record:
    """Ready for json.dumps."""
    entry, plan, peak = result.entry, result.plan, peaks[result.entry.compute]
    tokens = sum(step.tokens for step in plan.steps)
    return {
        "engine": entry.engine,
        "precision": entry.precision,
        "policy": entry.policy,
        "runs": len(result.runs),
        "scales_ms": result.scales_ms,
        "scales_ms_spread": [min(r.scales_ms for r in result.runs), max(r.scales_ms for r in result.runs)],
        "scales_cpu_ms": median(r.cpu_ms for r in result.runs if r.cpu_ms is not None),
        "text_ms": result.text_ms,
        "decode_ms": result.decode_ms,
        "decode_runs": len(result.decodes_ms),
        "image_ms": result.image_ms,
        "tokens": tokens,
        "forwarded_tokens": plan.forwarded_tokens,
        "tokens_per_s": tokens / result.scales_ms * 1e3,
        "flop": result.flop,
        "flop_per_s": result.flop_per_s,
        "share_of_gemm_peak": result.flop_per_s / peak,
        "agreement_with_eager_fp32": None if result.agreement is None else asdict(result.agreement),
        "memory": result.memory,
        "scales": list(_scale_records(result, peak)),
        "largest_scales_by_launch": [_breakdown_record(b, peak, peaks[COPY]) for b in result.launches],
        "runs_ms": [asdict(run) for run in result.runs],
    }


def _scale_records(result: Result, peak: float) -> Iterator[Record]:
    costs = result.costs.by_scale()
    for position, step in enumerate(result.plan.steps):
        ms, flop = median(run.scale_ms[position] for run in result.runs), costs[step.index].flop
        yield {
            "index": step.index,
            "size": list(step.size),
            "tokens": step.tokens,
            "kept": step.kept,
            "ms": ms,
            "flop": flop,
            "flop_per_s": flop / ms * 1e3,
            "share_of_gemm_peak": flop / ms * 1e3 / peak,
        }


def best_of_programs(results: Mapping[str, Result]) -> list[str]:
    """Of every eager program, dense or pruned, the contender in the precision that it is fastest in."""
    programs: dict[tuple[str, str], list[str]] = {}
    for name, result in results.items():
        if result.entry.eager:
            programs.setdefault(result.entry.program, []).append(name)
    return [min(names, key=lambda name: results[name].scales_ms) for names in programs.values()]


def ratio_records(results: Mapping[str, Result]) -> list[Record]:
    """How many times faster each contender is than eager torch in its best precision; without eager torch, than each
    contender before it in the list.
    """
    names, found = list(results), []
    best = best_of_programs(results)
    for position, name in enumerate(names):
        for other in best or names[:position]:
            if other == name or (best and _comes_first(results[name].entry, results[other].entry, best, results)):
                continue
            a, b = results[other], results[name]
            ratio = paired([run.scales_ms for run in a.runs], [run.scales_ms for run in b.runs])
            if ratio is None:
                continue
            image = a.image_ms / b.image_ms if a.image_ms and b.image_ms else None
            found.append({"contender": name, "against": other, "scales": asdict(ratio), "image": image})
    return found


def _comes_first(entry: Entry, rival: Entry, best: Sequence[str], results: Mapping[str, Result]) -> bool:
    """Whether a contender's own eager program stands before the rival's: that one is told against it, not it against
    that.
    """
    programs = [results[name].entry.program for name in best]
    return entry.eager and programs.index(entry.program) < programs.index(rival.program)


def launch_breakdown(contender: EngineContender, costs: EngineCosts) -> list[Breakdown]:
    """The largest executed scales; launches are waited for one by one, which a whole image is not."""
    calls = [call for call in costs.calls if call.kind is not Kind.TEXT_ENCODER]
    runs = [_scale_launches(contender)]
    while len(runs) < LAUNCH_RUNS and sum(runs[0]) < SHORT_MS:
        runs.append(_scale_launches(contender))

    def part(indices: Sequence[int]) -> Part:
        ms = median(sum(run[i] for i in indices) for run in runs)
        return Part(len(indices), ms, add(calls[i].cost for i in indices))

    found = []
    for step in sorted(contender.plan.steps, key=lambda step: step.tokens)[-LARGEST:]:
        own = [i for i, call in enumerate(calls) if call.scale == step.index]
        kinds = {
            kind: [i for i in own if calls[i].kind is kind] for kind in (Kind.QKV, Kind.ATTN_MLP, Kind.SAMPLING_HEAD)
        }
        found.append(Breakdown(step, part(own), {kind: part(indices) for kind, indices in kinds.items()}))
    return found


def _breakdown_record(found: Breakdown, peak: float, copy: float) -> Record:
    step, whole = found.step, _part_record(found.whole, peak, copy)
    kinds = {kind.value: _part_record(part, peak, copy) for kind, part in found.kinds.items()}
    return {"index": step.index, "size": list(step.size), "kept": step.kept, **whole, "kinds": kinds}


def _part_record(part: Part, peak: float, copy: float) -> Record:
    cost, per_s = part.cost, 1e3 / part.ms
    return {
        "launches": part.launches,
        "ms": part.ms,
        "gemm_flop": cost.gemm_flop,
        "attention_flop": cost.attention_flop,
        "bytes_moved": cost.bytes_moved,
        "flop_per_s": cost.flop * per_s,
        "share_of_gemm_peak": cost.flop * per_s / peak,
        "bytes_per_s": cost.bytes_moved * per_s,
        "share_of_copy_peak": cost.bytes_moved * per_s / copy,
    }


def memory_record(open_contender: Callable[[], Contender], sampler: Sampler) -> Record:
    """What a contender takes, from before it is opened to behind its first image: weights and all.

    Meant for a process of its own, into which libraries were imported before. On the CPU mapped weights count, on a
    GPU the driver's own share does.
    """
    with sampler:
        contender = open_contender()
        opened = sampler.sample()
        contender.text()
        contender.scales(noise_of(0))
        contender.decode()
    recording = sampler.recording
    return {
        "before_bytes": recording.before_bytes,
        "opened_bytes": memory_of(recording.samples)[recording.samples.index(opened)],
        "peak_bytes": recording.peak_bytes,
        "growth_bytes": recording.peak_bytes - recording.before_bytes,
        "source": recording.peak.source,
    }


def plan_record(manifest: Manifest, costs: EngineCosts) -> Record:
    """A plan by what it costs, whoever runs it."""
    plan = manifest.plan
    return {
        "policy": plan.policy.name,
        "steps": [
            {
                "index": s.index,
                "size": list(s.size),
                "tokens": s.tokens,
                "kept": s.kept,
                "guided": s.guided,
                "text": s.text,
            }
            for s in plan.steps
        ],
        "forwarded_tokens": plan.forwarded_tokens,
        "kv_cache_bytes": costs.kv_cache_bytes,
        "flop": {kind.value: cost.flop for kind, cost in costs.by_kind().items()},
    }


def _scale_launches(contender: EngineContender) -> list[float]:
    """Milliseconds of every launch up to the last scale's: the decoder is not run."""
    found, inside = [], False
    for step, _, ms in contender.launches(noise_of(0)):
        if inside and step is None:
            break
        inside = inside or step is not None
        found.append(ms)
    return found
