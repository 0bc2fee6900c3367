"""Section "eager": engines against eager torch as the published programs work, in one process and in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks.contenders import Contender, EngineContender, Entry
from benchmarks.gpu.recipes import DENSE, FIRST, PROMPT_TOKENS
from benchmarks.gpu.rounds import Round, image_rounds, medians, ratio_of
from benchmarks.gpu.sections import Context
from benchmarks.models import EagerModels, Model, Opener, Place
from benchmarks.timing import Logits, compare, forced_logits, require_agreement
from fastvar.errors import NumericsError

SIZE, RUNS = "1024x1024", 5
PLACE = Place("cuda")
# Name -> entry, and the bundle of those that are engines.
ENTRIES = {
    "eager-pruned": (Entry("eager-pruned", "bf16", "fastvar"), None),
    "eager-dense": (Entry("eager-dense", "bf16", "dense"), None),
    "engines": (Entry("aotinductor", "bf16", "fastvar"), FIRST),
    "engines-dense": (Entry("aotinductor", "bf16", "dense"), DENSE),
}
RATIOS = (
    ("eager-pruned", "eager-dense"),
    ("engines", "eager-dense"),
    ("engines", "eager-pruned"),
    ("engines-dense", "eager-dense"),
    ("engines", "engines-dense"),
)


def measure(context: Context) -> None:
    """Lines of the machine's peaks, of each contender's agreement with eager fp32, of rounds, medians and ratios."""
    context.log.measure("peaks", peaks)
    if context.identity.stand_in:  # for cuDNN there is none
        torch.backends.cudnn.enabled = False
        torch.backends.cuda.enable_cudnn_sdp(False)
    contest = Contest(context)
    found = {name: context.log.measure(f"agreement of {name}", partial(contest.agreement, name)) for name in ENTRIES}
    contest.let_go()
    timed = [name for name in ENTRIES if is_timed(found[name], context.identity.stand_in)]
    rounds = image_rounds(context, RUNS, {name: partial(contest.contender, name) for name in timed})
    context.log.conclude("medians", lambda: medians(rounds))
    for faster, slower in RATIOS:
        name = f"{faster} against {slower}"
        context.log.conclude(name, partial(ratio_record, rounds, slower, faster))


def is_timed(agreement: dict[str, Any] | None, stand_in: bool) -> bool:
    """The time of who computes something else is worth nothing; a rehearsal has nothing else."""
    return stand_in or (agreement is not None and agreement["ok"])


def ratio_record(rounds: Sequence[Round], slower: str, faster: str) -> dict[str, Any]:
    return asdict(ratio_of(rounds, slower, faster))


def peaks() -> dict[str, float]:
    from benchmarks.machine_peak import measured_peaks

    return measured_peaks(["bf16"], PLACE.device)


class Contest:
    """Contenders opened once, and only when something of them is not in the journal yet."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._model = Model(context.identity.model, PROMPT_TOKENS)
        self._models = EagerModels(self._model, PLACE)
        self._opened: dict[str, Contender] = {}
        self._expected: dict[str, list[Logits]] = {}

    def agreement(self, name: str) -> dict[str, Any]:
        """With eager fp32 of the same plan, on equal text and forced bits."""
        entry, contender = ENTRIES[name][0], self.contender(name)
        if entry.policy not in self._expected:
            self._expected[entry.policy] = forced_logits(self._models.contender("fp32", contender.plan))
        scales = [step.index for step in contender.plan.steps]
        settings = self._model.settings
        found = compare(forced_logits(contender), self._expected[entry.policy], scales, settings.top_p)
        try:
            require_agreement(name, entry.precision, found, settings)
        except NumericsError as error:
            return {"ok": False, **asdict(found), "why": str(error)}
        return {"ok": True, **asdict(found)}

    def let_go(self) -> None:
        """What is there for comparisons alone."""
        self._expected.clear()
        self._models.keep_only({"bf16"})

    def contender(self, name: str) -> Contender:
        if name not in self._opened:
            entry, bundle = ENTRIES[name]
            if bundle is None:
                opener = Opener(self._model, entry, SIZE, PLACE, self._model.text())
                self._opened[name] = opener.open(self._models)
            else:
                opened = self._context.bundle(bundle)
                self._opened[name] = EngineContender(opened, self._model.text(), self._model.settings)
        return self._opened[name]
