"""`python -m benchmarks.serving.front BUNDLE`: what goes through Ray where nothing is drawn, on this machine alone.

Requests that the ingress answers, requests that a replica answers, and bytes of an image that was drawn once, as its
answer carries them; and shares of a batch that actors give back at once. Clients, proxy, ingress, replica and driver
share the cores.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.serving.recorded import PROMPT, RESULTS, record
from fastvar.bulk.items import Item
from fastvar.bulk.on_ray import LOCAL, Actor, draw_on_ray, started
from fastvar.bulk.processes import DrawerArguments
from fastvar.core.platform import import_extra


def asked(port: int, path: str, clients: int, seconds: float) -> dict[str, float]:
    """Requests of so many clients that ask again at once."""
    took: list[float] = []
    end = time.monotonic() + seconds

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while (begun := time.monotonic()) < end:
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                raise AssertionError(f"{path}: {answer.status}")
            took.append(time.monotonic() - begun)

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"requests_per_s": len(took) / seconds, "median_ms": median(took) * 1e3}


def answer_bytes(port: int) -> int:
    """Of an answer with one image."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({"prompt": PROMPT, "seed": 1})
    connection.request("POST", "/v1/images/generations", body, {"content-type": "application/json"})
    return len(connection.getresponse().read())


class Idle(Actor):
    """Draws nothing, and says that it has."""

    def __init__(self, arguments: str) -> None:
        self._error = None
        self._drawer = self

    def draw(self, items: Any, report: Any) -> None:
        for item in items:
            report(item.key, "drawn")


def shares(folder: Path, count: int, most: int = 4) -> dict[str, float]:
    """Shares of a batch a second that the driver hands to two actors, and bytes of an image's entry in them."""
    arguments = DrawerArguments("none", "none", most, str(folder), "png", None, {})
    together = arguments.share(1_000_000, 1)
    items = [Item(f"{number:032x}", number, 0, "", "prompt", PROMPT, number, {}) for number in range(count * together)]
    told: list[float] = []
    draw = draw_on_ray(LOCAL, actor=f"{__name__.replace('__main__', 'benchmarks.serving.front')}:Idle")
    draw(items, arguments, 2, lambda key, state: told.append(time.monotonic()))
    behind = told[len(told) // 4 :]  # actors have been started
    rate = len(behind) / (behind[-1] - behind[0])
    return {
        "shares_per_s": rate / together,
        "images_a_share": together,
        "entry_bytes": len(json.dumps(items[0].to_json())),
    }


def measure(bundle: Path, clients: int, seconds: float) -> dict[str, Any]:
    started(LOCAL)
    serve = import_extra("ray.serve", "ray")
    from fastvar.ray_serve import app

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(app({"bundles": f"bundle={bundle.absolute()}"}), name="fastvar", route_prefix="/")
    try:
        paths = {"ingress": "/health", "replica": "/v1/models/bundle"}
        asked(port, "/health", clients, 2.0)  # warms up
        found: dict[str, Any] = {name: asked(port, path, clients, seconds) for name, path in paths.items()}
        found |= {"clients": clients, "answer_bytes": answer_bytes(port)}
    finally:
        serve.shutdown()
    found |= {"bundle_bytes": sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())}
    with tempfile.TemporaryDirectory() as folder:
        return found | shares(Path(folder), 400)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--out", type=Path, default=RESULTS / "front.json")
    given = parser.parse_args()
    measured = record(given.bundle, given.out, lambda: measure(given.bundle, given.clients, given.seconds))
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
