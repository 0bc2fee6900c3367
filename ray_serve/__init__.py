"""`serve run fastvar.ray_serve:app bundles=NAME=FOLDER`: the server of `fastvar serve` on Ray Serve.

An ingress guards the sockets as `fastvar serve` does, reads `model`, and hands the request to a replica that has that
bundle loaded; there the very application of `fastvar serve` answers it. So fields, errors, streams and cancelling are
those of one machine, and a replica's own queue says 429 before Ray would drop a request with text that no client reads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would tell its makers of every cluster

from ..core.platform import needs_extra
from ..errors import InputError

with needs_extra("ray"):
    import ray.serve  # noqa: F401  which package is missing is told apart
with needs_extra("serve"):
    from ..serving.options import ServeOptions, read_aliases
    from .ingress import Ingress
    from .replica import MOST_BUNDLES, Replica

NUMBERS: dict[str, Any] = {"queue": int, "drain": float, "batch_wait_ms": float, "instances": int}
TEXTS: dict[str, Any] = {"max_body": str, "api_key_file": str}
SCALING: dict[str, Any] = {
    "replicas": int,
    "least": int,
    "ongoing": float,
    "upscale_delay_s": float,
    "downscale_delay_s": float,
    "ingresses": int,
    "cpus": float,
    "gpus": float,
}
LOADING: dict[str, Any] = {"threads": int, "memory": str}


def app(arguments: dict[str, Any]) -> Any:
    """The application that `serve run` and a serve.yaml name.

    Args:
        arguments: bundles, "NAME=FOLDER" joined by commas; aliases, "ALIAS=NAME" joined by commas; queue, drain,
            batch_wait_ms, instances, max_body, api_key_file, threads, memory as of `fastvar serve`; replicas and least,
            the most and the fewest of them; ongoing, how many requests a replica is meant to have; upscale_delay_s and
            downscale_delay_s, how long that has to last, as Ray has them; ingresses; cpus and gpus of a replica.

    Raises:
        InputError: one is not known, or not understood.
    """
    known = ("bundles", "aliases", *NUMBERS, *TEXTS, *SCALING, *LOADING)
    if unknown := [name for name in arguments if name not in known]:
        raise InputError(f"argument {unknown[0]!r} is not known", expected=f"some of {', '.join(known)}")
    bundles = read_aliases([part for part in str(arguments.get("bundles", "")).split(",") if part])
    if not bundles:
        raise InputError("no bundles given", expected="bundles=NAME=FOLDER", fix="name one")
    aliases = read_aliases([part for part in str(arguments.get("aliases", "")).split(",") if part])
    if stray := [alias for alias, name in aliases.items() if name not in bundles or alias in bundles]:
        raise InputError(f"alias {stray[0]} does not name a bundle", expected=f"ALIAS=NAME of {', '.join(bundles)}")
    options: dict[str, Any] = {**_read(arguments, NUMBERS), **_read(arguments, TEXTS)}
    checked = ServeOptions(**{name: value for name, value in options.items() if name != "api_key_file"})
    scaling = _read(arguments, SCALING)
    load_options: dict[str, Any] = {
        "memory_budget" if name == "memory" else name: v for name, v in _read(arguments, LOADING).items()
    }
    autoscaling: dict[str, Any] = {
        "min_replicas": scaling.get("least", 1),
        "max_replicas": max(scaling.get("replicas", 1), scaling.get("least", 1)),
        "target_ongoing_requests": scaling.get("ongoing", 2.0),
    }
    autoscaling |= {name: scaling[name] for name in ("upscale_delay_s", "downscale_delay_s") if name in scaling}
    replica = Replica.options(  # type: ignore[attr-defined]  # ray's decorator gives a deployment
        # Ours is full first, and says so in a form that clients read; Ray's own refusal is plain text.
        max_ongoing_requests=(checked.queue + 16) * MOST_BUNDLES,
        ray_actor_options={"num_cpus": scaling.get("cpus", 1.0), "num_gpus": scaling.get("gpus", 0.0)},
        autoscaling_config=autoscaling,
        health_check_period_s=5,
    )
    options["aliases"] = aliases
    ingress = Ingress.options(num_replicas=scaling.get("ingresses", 1))  # type: ignore[attr-defined]  # the same
    return ingress.bind(replica.bind(bundles, options, load_options), list(bundles), aliases, options)


def _read(arguments: Mapping[str, Any], readers: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by their readers: `serve run` gives text, a serve.yaml numbers too.

    Raises:
        InputError: one is not understood.
    """
    found = {}
    for name, read in readers.items():
        if name in arguments:
            try:
                found[name] = read(arguments[name])
            except (TypeError, ValueError):
                expected = {int: "a whole number", float: "a number"}.get(read, "text")
                raise InputError(f"{name}={arguments[name]!r} not understood", expected=expected) from None
    return found
