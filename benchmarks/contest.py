"""A benchmark's contenders at one size: built, compared, timed in turn, broken down, and their memory measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import typer

from benchmarks.contenders import Contender, EngineContender, Entry
from benchmarks.models import EagerModels, Engines, Model, Opener, Place, memory_apart
from benchmarks.records import Record, Result, launch_breakdown, plan_record, ratio_records, result_record
from benchmarks.timing import Agreement, Logits, compare, forced_logits, require_agreement, timed_in_turn
from fastvar.core.plan import GenerationPlan
from fastvar.engines.bundle.manifest import Manifest
from fastvar.profiling.estimates.costs import EngineCosts

Found = TypeVar("Found")
REFERENCE = "fp32"


@dataclass(frozen=True)
class Settings:
    """What is measured, and how often."""

    device: str
    entries: Mapping[str, Entry]
    runs: int
    dense_runs: int
    decode_runs: int
    memory: bool
    keep_going: bool

    def runs_of(self, name: str) -> int:
        return self.dense_runs if self.entries[name].dense_eager else self.runs


@dataclass
class Contest:
    """Where contenders may fail (`keep_going`), `failed` says what stopped each."""

    model: Model
    size: str
    settings: Settings
    place: Place
    engines: Engines
    failed: dict[str, str] = field(default_factory=dict)
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
        policies = dict.fromkeys(result.entry.policy for result in results.values())
        return {
            "size": self.size,
            "peaks": peaks,
            "plans": {policy: plan_record(*self._costs(policy)) for policy in policies},
            "contenders": {name: result_record(result, peaks) for name, result in results.items()},
            "ratios": ratio_records(results),
            "failed": self.failed,
        }

    def _opener(self, name: str) -> Opener:
        entry = self.settings.entries[name]
        if not entry.eager:
            typer.echo(f"{self.size}: engines of {name}", err=True)
        bundle = None if entry.eager else self.engines.bundle(entry, self.size)
        return Opener(self.model, entry, self.size, self.place, self.model.text(), bundle)

    def _peaks(self) -> dict[str, float]:
        """Of the machine; measured before and behind the contenders, for others may slow down either."""
        from benchmarks.machine_peak import measured_peaks

        return measured_peaks({entry.compute for entry in self.settings.entries.values()}, self.place.device)

    def _timed(self, openers: Mapping[str, Opener]) -> dict[str, Result]:
        models = EagerModels(self.model, self.place)
        contenders = self._for_all(openers, lambda name: openers[name].open(models))
        agreements = self._agreements(contenders, models)
        models.keep_only({openers[name].entry.precision for name in agreements if openers[name].entry.eager})
        typer.echo(f"{self.size}: timing {', '.join(agreements)}", err=True)
        runs = timed_in_turn(
            {name: contenders[name] for name in agreements},
            {name: self.settings.runs_of(name) for name in agreements},
            decode_runs=self.settings.decode_runs,
            on_failure=self._note if self.settings.keep_going else None,
        )

        def result(name: str) -> Result:
            entry, contender = openers[name].entry, contenders[name]
            costs = self._costs(entry.policy)[1]
            launches = launch_breakdown(contender, costs) if isinstance(contender, EngineContender) else ()
            return Result(entry, contender.plan, costs, agreements[name], runs[name], launches)

        return self._for_all(runs, result)

    def _costs(self, policy: str) -> tuple[Manifest, EngineCosts]:
        if policy not in self._counted:
            self._counted[policy] = self.model.costs(self.model.plan(self.size, policy))
        return self._counted[policy]

    def _agreements(self, contenders: Mapping[str, Contender], models: EagerModels) -> dict[str, Agreement]:
        """Of every contender with eager fp32 of its plan; those that disagree are refused."""
        expected: dict[str, list[Logits]] = {}

        def reference(entry: Entry, plan: GenerationPlan) -> list[Logits]:
            if entry.policy not in expected:
                expected[entry.policy] = forced_logits(models.contender(REFERENCE, plan))
            return expected[entry.policy]

        def agreement(name: str) -> Agreement:
            typer.echo(f"{self.size}: comparing {name} with eager fp32", err=True)
            contender, entry, settings = contenders[name], self.settings.entries[name], self.model.settings
            scales = [step.index for step in contender.plan.steps]
            pair = forced_logits(contender), reference(entry, contender.plan)
            found = compare(*pair, scales, settings.top_p)
            require_agreement(name, entry.precision, found, settings)
            return found

        return self._for_all(contenders, agreement)

    def _for_all(self, names: Mapping[str, object], function: Callable[[str], Found]) -> dict[str, Found]:
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
