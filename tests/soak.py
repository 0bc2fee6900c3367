"""Many threads, one pipeline: calls, streams that are read, shared, left alone and dropped, previews early and late.

Whatever comes out must be, bit for bit, what each drawing gives alone. `soak` draws any number of images, so that a
long run can look for what a short one does not meet; it says how much memory the process took on the way.
"""

from __future__ import annotations

import mmap
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from fastvar import Pipeline

PROMPTS = ("a red circle", "a blue square above a green triangle")
SEEDS = (1, 2)
GUIDANCE = (3.0, 1.0)
Subject = tuple[str, int, float]  # prompt, seed, guidance scale


@dataclass
class Alone:
    """What a subject gives when nothing else is drawn: the image, and the preview of every scale."""

    image: bytes
    previews: list[bytes]


@dataclass
class Soak:
    """A run in progress."""

    pipe: Pipeline
    alone: dict[Subject, Alone]
    jobs: SimpleQueue[int]
    seed: int
    kinds: Counter[str] = field(default_factory=Counter)
    differing: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)  # after every job

    def work(self) -> None:
        """What each thread does: jobs, until there are none."""
        while True:
            try:
                job = self.jobs.get_nowait()
            except Empty:
                return
            rng = random.Random(f"{self.seed} {job}")
            kind = rng.choice(list(KINDS))
            try:
                KINDS[kind](self, rng)
            except Exception as error:  # noqa: BLE001  the run goes on, and the result tells
                self.errors.append(f"job {job}, {kind}: {type(error).__name__}: {error}")
            self.kinds[kind] += 1
            self.rss_mib.append(rss_mib())

    def subject(self, rng: random.Random) -> Subject:
        return rng.choice(list(self.alone))

    def compare(self, kind: str, subject: Subject, found: object, expected: object) -> None:
        if found != expected:
            self.differing.append(f"{kind} {subject}")


def _settings(subject: Subject) -> dict[str, Any]:
    return {"prompt": subject[0], "seed": subject[1], "guidance_scale": subject[2]}


def _call(run: Soak, rng: random.Random) -> None:
    subject = run.subject(rng)
    image = run.pipe(**_settings(subject)).images[0].tobytes()
    run.compare("a call", subject, image, run.alone[subject].image)


def _call_with_previews(run: Soak, rng: random.Random) -> None:
    """A listener that keeps some events for later."""
    subject, kept = run.subject(rng), []
    listening = rng.random() < 0.5

    def listen(event: Any) -> None:
        kept.append(event.preview().tobytes() if listening else event)

    image = run.pipe(**_settings(subject), callback_on_scale_end=listen).images[0].tobytes()
    previews = [seen if listening else seen.preview().tobytes() for seen in kept]
    run.compare("a call with previews", subject, (image, previews), (run.alone[subject].image, _previews(run, subject)))


def _whole_stream(run: Soak, rng: random.Random) -> None:
    subject = run.subject(rng)
    if rng.random() < 0.5:
        found = [event.preview().tobytes() for event in run.pipe.stream(**_settings(subject))]
    else:
        found = [event.preview().tobytes() for event in list(run.pipe.stream(**_settings(subject)))]
    run.compare("a stream", subject, found, _previews(run, subject))


def _dropped_stream(run: Soak, rng: random.Random) -> None:
    """Left in the middle: dropped without a word, or closed."""
    subject = run.subject(rng)
    stream = run.pipe.stream(**_settings(subject))
    events = [next(stream) for _ in range(rng.randint(0, len(_previews(run, subject)) - 1))]
    if rng.random() < 0.5:
        stream.close()
    del stream
    time.sleep(rng.random() * 0.01)
    found = [event.preview().tobytes() for event in events]
    run.compare("a dropped stream", subject, found, _previews(run, subject)[: len(found)])


def _call_between_events(run: Soak, rng: random.Random) -> None:
    subject = run.subject(rng)
    stream = run.pipe.stream(**_settings(subject))
    count = rng.randint(0, len(_previews(run, subject)))
    events = [next(stream) for _ in range(count)]
    _call(run, rng)
    events += stream
    found = [event.preview().tobytes() for event in events]
    run.compare("a stream with a call between", subject, found, _previews(run, subject))


def _shared_stream(run: Soak, rng: random.Random) -> None:
    """Two threads read one stream: every event comes once."""
    subject, found = run.subject(rng), []
    stream = run.pipe.stream(**_settings(subject))

    def read() -> None:
        found.extend((event.index, event.preview().tobytes()) for event in stream)

    other = threading.Thread(target=read)
    other.start()
    read()
    other.join()
    previews = [preview for _, preview in sorted(found)]
    run.compare("a shared stream", subject, previews, _previews(run, subject))


KINDS: dict[str, Callable[[Soak, random.Random], None]] = {
    "a call": _call,
    "a call with previews": _call_with_previews,
    "a stream": _whole_stream,
    "a dropped stream": _dropped_stream,
    "a stream with a call between": _call_between_events,
    "a shared stream": _shared_stream,
}


def _previews(run: Soak, subject: Subject) -> list[bytes]:
    return run.alone[subject].previews


def soak(pipe_or_bundle: Pipeline | str | Path, images: int = 60, threads: int = 8, seed: int = 0) -> dict[str, Any]:
    """Draw so many images from so many threads.

    Returns:
        "images", "seconds", "kinds" (how many of each), "differing" and "errors" (what was wrong, in words), "alive"
        (threads that did not come to an end), "rss_mib" (resident memory after every image, where the system tells).
    """
    own = not isinstance(pipe_or_bundle, Pipeline)
    pipe = Pipeline.load(pipe_or_bundle) if own else pipe_or_bundle
    run = Soak(pipe, _all_alone(pipe), SimpleQueue(), seed)
    for job in range(images):
        run.jobs.put(job)
    start = time.monotonic()
    workers = [threading.Thread(target=run.work, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(max(60.0, 10.0 * images) - (time.monotonic() - start))
    alive = sum(worker.is_alive() for worker in workers)
    if own and not alive:
        pipe.close()
    return {
        "images": sum(run.kinds.values()),
        "seconds": time.monotonic() - start,
        "kinds": dict(run.kinds),
        "differing": run.differing,
        "errors": run.errors,
        "alive": alive,
        "rss_mib": run.rss_mib,
    }


def _all_alone(pipe: Pipeline) -> dict[Subject, Alone]:
    alone = {}
    for subject in [(prompt, seed, scale) for prompt in PROMPTS for seed in SEEDS for scale in GUIDANCE]:
        previews = [event.preview().tobytes() for event in pipe.stream(**_settings(subject))]
        alone[subject] = Alone(pipe(**_settings(subject)).images[0].tobytes(), previews)
    return alone


def rss_mib() -> float:
    """Resident memory of this process; 0 where /proc does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE / 2**20
    except (OSError, IndexError):
        return 0.0


if __name__ == "__main__":
    bundle, *numbers = sys.argv[1:]
    result = soak(Pipeline.load(bundle, threads=1), *map(int, numbers))
    memory = result.pop("rss_mib")
    print(result, f"RSS {memory[len(memory) // 3]:.0f} MiB after a third, {memory[-1]:.0f} MiB at the end", sep="\n")
    sys.exit(bool(result["differing"] or result["errors"] or result["alive"]))
