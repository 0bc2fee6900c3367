"""All models of a server, and whether it takes requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from ..errors import InputError
from ..profiling.formatting import pixels
from ..runtime.requests.inputs import draws_labels
from .log import Log
from .metrics import Metrics
from .model import ServedModel
from .options import ServeOptions
from .wire import answers

ANSWERS_LEAVE = 5.0  # seconds for answers to be sent when all is drawn


class Fleet:
    """The models of a server by name, with its options, metrics and log.

    Raises:
        InputError: two models of one name, or an alias that stands for none or is a model's name.
    """

    def __init__(self, models: Sequence[ServedModel], options: ServeOptions, metrics: Metrics, log: Log) -> None:
        self.options, self.metrics, self.log = options, metrics, log
        self.models = {model.name: model for model in models}
        self.started = int(time.time())
        self.answering = 0  # requests under way
        self._is_closed = False
        if len(self.models) < len(models):
            names = [model.name for model in models]
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(
                f"two bundles are named {twice}", expected="names that differ", fix="name one: NAME=FOLDER"
            )
        for alias, name in options.aliases.items():
            if name not in self.models or alias in self.models:
                problem = f"no model {name}" if name not in self.models else "there is a model of that name"
                known = f"an alias of {', '.join(self.models)}"
                raise InputError(f"--alias {alias}={name}: {problem}", expected=known)

    def model_named(self, name: str | None) -> ServedModel:
        """A model by name or alias; the only one where none is named.

        Raises:
            ApiError: there is none, or there are several to choose from.
        """
        known = (*self.models, *self.options.aliases)
        if name is None:
            if len(self.models) > 1:
                raise answers.missing("model", f"one of {', '.join(known)}")
            return next(iter(self.models.values()))
        found = self.models.get(self.options.aliases.get(name, name))
        if found is None:
            raise answers.no_model(name[:200], known, "serve it under that name by --alias")
        return found

    def described(self) -> list[dict[str, Any]]:
        """Models and aliases, as /v1/models lists them; what is not loaded yet has its name only."""
        names = {name: name for name in self.models} | dict(self.options.aliases)
        return [self.describe(shown, self.models[name]) for shown, name in names.items()]

    def describe(self, shown: str, model: ServedModel) -> dict[str, Any]:
        found: dict[str, Any] = {"id": shown, "object": "model", "created": self.started, "owned_by": "fastvar"}
        if shown != model.name:
            found["alias_of"] = model.name
        if model.pipe is None:
            return found
        manifest, pipe = model.pipe.manifest, model.pipe
        defaults = manifest.sampling
        return found | {
            "family": manifest.family,
            "architecture": manifest.model,
            "size": pixels(pipe.size),
            "policy": manifest.plan.policy.name,
            "scales": len(manifest.plan.schedule),
            "draws": "class_label" if draws_labels(manifest) else "prompt",
            "edits": bool(manifest.encoder),
            "batch": pipe.batch_sizes,
            "guidance_scale": defaults.guidance_scale,
            "tau": defaults.tau,
            "top_p": defaults.top_p,
            "top_k": defaults.top_k,
            "bundle": pipe.bundle.digest,
        }

    def check_open(self) -> None:
        """Raises ApiError where the server is about to end."""
        if self._is_closed:
            raise answers.shutting_down()

    async def drain(self) -> None:
        """Begin nothing new, finish what is being drawn while `drain` lasts, and let the answers leave."""
        self._is_closed = True
        models = self.models.values()
        for model in models:
            model.refuse_waiting()
        end = time.monotonic() + self.options.drain
        for model in models:
            if not await model.idle(end - time.monotonic()):
                model.abandon()
        end = time.monotonic() + ANSWERS_LEAVE
        while self.answering and time.monotonic() < end:
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """Give all pipelines back."""
        self._is_closed = True
        await asyncio.gather(*(model.stop() for model in self.models.values()))
