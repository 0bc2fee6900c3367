"""A benchmark's contenders at one size: built, compared, timed in turn, broken down, and their memory measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import typer

from benchmarks.contenders import QUANTISED, Contender, EngineContender, Entry
from benchmarks.models import EagerModels, Engines, Model, Opener, Place, memory_apart
from benchmarks.peers import Watch, disturbed
from benchmarks.records import (
    Record,
    Result,
    best_of_programs,
    launch_breakdown,
    plan_record,
    ratio_records,
    result_record,
)
from benchmarks.timing import (
    LONG_S,
    Agreement,
    Logits,
    Pace,
    compare,
    decoder_ms,
    forced_logits,
    require_agreement,
    timed_in_turn,
)
from fastvar.core.plan import GenerationPlan
from fastvar.engines.bundle.manifest import Manifest
from fastvar.profiling.estimates.costs import EngineCosts, add

Found = TypeVar("Found")
REFERENCE = "fp32"
SHORT_S = 1.0
ROUNDS_S = 120.0  # of all rounds together; three are timed whatever they take


@dataclass(frozen=True)
class Settings:
    """What is measured, and how often."""

    device: str
    entries: Mapping[str, Entry]
    runs: int
    dense_runs: int | None  # None: as many, but once where an image takes seconds
    decode_runs: int
    memory: bool
    keep_going: bool

    def runs_of(self, name: str, seconds: float) -> int:
        """Rounds of a contender of which an image takes about so long."""
        if not self.entries[name].dense_eager:
            return self.runs
        return self.dense_runs or (1 if seconds > SHORT_S else self.runs)


@dataclass
class Contest:
    """Where contenders may fail (`keep_going`), `failed` says what stopped each."""

    model: Model
    size: str
    settings: Settings
    place: Place
    engines: Engines
    failed: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # who was not timed, and why not
    _others: float | None = None  # share of all cores that other processes had
    _seconds: dict[str, float] = field(default_factory=dict)  # of the image that was compared
    _counted: dict[str, tuple[Manifest, EngineCosts]] = field(default_factory=dict)  # by policy

    def measure(self) -> Record:
        """Everything about this size, ready for json.dumps."""
        entries = self.settings.entries
        openers = self._for_all(entries, self._opener)
        before = self._peaks()
        results = self._timed(openers)
        peaks = {name: max(value, before[name]) for name, value in self._peaks().items()}
        if self.settings.memory:  # the contenders of this process are gone by now
            taken = self._for_all(results, lambda name: memory_apart(openers[name]))
            results = {name: replace(result, memory=taken.get(name)) for name, result in results.items()}
        told = disturbed(self._others) if self.place.device == "cpu" else ""
        policies = dict.fromkeys(result.entry.policy for result in results.values())
        return {
            "size": self.size,
            "peaks": peaks,
            "plans": {policy: plan_record(*self._costs(policy)) for policy in policies},
            "contenders": {name: result_record(result, peaks) for name, result in results.items()},
            "others": self._others,
            "disturbed": told,
            "ratios": [] if told else ratio_records(results),
            "best_of_eager": best_of_programs(results),
            "failed": self.failed,
            "left_out": self.left_out,
        }

    def _opener(self, name: str) -> Opener:
        entry = self.settings.entries[name]
        if not entry.eager:
            typer.echo(f"{self.size}: engines of {name}", err=True)
        bundle = None if entry.eager else self.engines.bundle(entry, self.size)
        return Opener(self.model, entry, self.size, self.place, self.model.text(), bundle)

    def _peaks(self) -> dict[str, float]:
        """Of the machine; measured before and behind the contenders, for others may slow down either."""
        from benchmarks.machine_peak import INT8, measured_peaks

        entries = self.settings.entries.values()
        whole = (
            {INT8} if self.place.device == "cpu" and any(entry.precision == QUANTISED for entry in entries) else set()
        )
        return measured_peaks({entry.compute for entry in entries} | whole, self.place.device)

    def _timed(self, openers: Mapping[str, Opener]) -> dict[str, Result]:
        models = EagerModels(self.model, self.place)
        contenders = self._for_all(openers, lambda name: openers[name].open(models))
        agreements = self._agreements(contenders, models)
        timed = [name for name in contenders if name in agreements or self._is_timed_unseen(name)]
        models.keep_only({openers[name].entry.precision for name in timed if openers[name].entry.eager})
        typer.echo(f"{self.size}: timing {', '.join(timed)}", err=True)
        with Watch() as watch:
            runs = timed_in_turn(
                {name: contenders[name] for name in timed},
                {name: self.settings.runs_of(name, self._predicted_s(name)) for name in timed},
                on_failure=self._note if self.settings.keep_going else None,
                pace=Pace({name for name in timed if self._seconds.get(name, 0.0) < SHORT_S}, LONG_S, ROUNDS_S),
            )

        def result(name: str) -> Result:
            entry, contender = openers[name].entry, contenders[name]
            return Result(entry, contender.plan, self._costs(entry.policy)[1], agreements.get(name), runs[name])

        results = self._for_all(runs, result)
        with Watch() as later:
            decoded = self._decoded({name: contenders[name] for name in results}, best_of_programs(results))
        shares = [own.found.share for own in (watch, later) if own.found.share is not None]
        self._others = max(shares, default=None)

        def whole(name: str) -> Result:
            contender, found = contenders[name], results[name]
            launches = launch_breakdown(contender, found.costs) if isinstance(contender, EngineContender) else ()
            return replace(found, decodes_ms=decoded.get(name, ()), launches=launches)

        return self._for_all([name for name in results if name not in self.failed], whole)

    def _decoded(self, contenders: Mapping[str, Contender], best: Sequence[str]) -> dict[str, Sequence[float]]:
        """Milliseconds of the decoders, equal ones timed once; of eager torch, that of the best precision."""
        found: dict[object, Sequence[float]] = {}

        def spent(name: str) -> Sequence[float]:
            key = self._decoder(name, contenders[name])
            if key not in found:
                typer.echo(f"{self.size}: the decoder of {name}", err=True)
                found[key] = decoder_ms(contenders[name], self.settings.decode_runs)
            return found[key]

        drawn = [name for name in contenders if name in best or not self.settings.entries[name].eager]
        return self._for_all(drawn, spent)

    def _decoder(self, name: str, contender: Contender) -> object:
        """What tells decoders apart: the files of its engines, or eager torch's precision."""
        if not isinstance(contender, EngineContender):
            return self.settings.entries[name].precision
        manifest = contender.manifest
        stages = manifest.tiles.stages if manifest.tiles else ()
        names = [manifest.decoder] if manifest.decoder else [engine for s in stages for engine in (s.engine, s.last)]
        return tuple(manifest.engines[engine].sha256 for engine in names)

    def _is_timed_unseen(self, name: str) -> bool:
        """Whether a contender that was not compared is timed: dense eager torch, but in one precision alone where an
        image takes long: that in which pruned eager torch took less."""
        entry = self.settings.entries[name]
        if name in self.failed or not entry.dense_eager or self._is_compared(entry):
            return False
        rivals = [own for own, other in self.settings.entries.items() if other.program == entry.program]
        best = min(rivals, key=self._predicted_s)
        if name == best or self._predicted_s(best) < LONG_S:
            return True
        self.left_out[name] = (
            f"an image takes about {self._predicted_s(best):.0f} s in {self.settings.entries[best].precision}, "
            "in which pruned eager torch is the faster"
        )
        return False

    def _predicted_s(self, name: str) -> float:
        """Seconds of an image: as it was compared, or of eager torch under another policy by the operations."""
        entry = self.settings.entries[name]
        if name in self._seconds:
            return self._seconds[name]
        for own, seconds in self._seconds.items():
            other = self.settings.entries[own]
            if other.eager and other.precision == entry.precision:
                return seconds * self._flop(entry.policy) / self._flop(other.policy)
        return 0.0

    def _flop(self, policy: str) -> float:
        return add(self._costs(policy)[1].by_scale().values()).flop

    def _is_compared(self, entry: Entry) -> bool:
        """Whether a contender is compared with eager fp32: all but dense eager torch where no engine is dense."""
        own = {other.policy for other in self.settings.entries.values() if not other.eager}
        return not entry.dense_eager or entry.policy in own

    def _costs(self, policy: str) -> tuple[Manifest, EngineCosts]:
        if policy not in self._counted:
            self._counted[policy] = self.model.costs(self.model.plan(self.size, policy))
        return self._counted[policy]

    def _agreements(self, contenders: Mapping[str, Contender], models: EagerModels) -> dict[str, Agreement]:
        """Of contenders with eager fp32 of their plan; those that disagree are refused. It warms them up."""
        expected: dict[str, list[Logits]] = {}
        compared = [name for name in contenders if self._is_compared(self.settings.entries[name])]
        compared.sort(key=lambda name: not self._is_reference(name))  # eager fp32 itself first: it is drawn once

        def drawn(name: str) -> list[Logits]:
            begun = time.perf_counter()
            logits = forced_logits(contenders[name])
            self._seconds[name] = time.perf_counter() - begun
            return logits

        def reference(policy: str, plan: GenerationPlan) -> list[Logits]:
            if policy not in expected:
                expected[policy] = forced_logits(models.contender(REFERENCE, plan))
            return expected[policy]

        def agreement(name: str) -> Agreement:
            typer.echo(f"{self.size}: comparing {name} with eager fp32", err=True)
            contender, entry, settings = contenders[name], self.settings.entries[name], self.model.settings
            scales = [step.index for step in contender.plan.steps]
            logits = drawn(name)
            if self._is_reference(name):
                expected[entry.policy] = logits
            found = compare(logits, reference(entry.policy, contender.plan), scales, settings.top_p)
            require_agreement(name, entry.precision, found, settings)
            return found

        return self._for_all(compared, agreement)

    def _is_reference(self, name: str) -> bool:
        entry = self.settings.entries[name]
        return entry.eager and entry.precision == REFERENCE

    def _for_all(self, names: Iterable[str], function: Callable[[str], Found]) -> dict[str, Found]:
        """Name by name; one that fails is noted and left out, where that is asked for."""
        found = {}
        for name in names:
            try:
                found[name] = function(name)
            except Exception as error:
                if not self.settings.keep_going:
                    raise
                self._note(name, error)
        return found

    def _note(self, name: str, error: Exception) -> None:
        self.failed[name] = f"{type(error).__name__}: {error}"
        typer.echo(f"{self.size}: {name} is left out: {self.failed[name]}", err=True)
