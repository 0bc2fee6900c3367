"""Contenders against each other: whether they compute the same, then their times in turn, and paired ratios.

All share one process, and run strictly one after the other. A pool of threads that waits for work burns a core for a
while (onnxruntime's 40 ms after its last launch, torch's 5 ms; measured on two cores), so each turn begins only once
the process has come to rest.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.contenders import Contender
from fastvar.core.noise import CHOICE, Noise, seeded_noise, uniform_noise
from fastvar.errors import NumericsError
from fastvar.runtime.requests.settings import SamplingSettings

_log = logging.getLogger(__name__)

Logits = NDArray[np.float32]  # [L, 2 * bits a token]
OnFailure = Callable[[str, Exception], None]

REST_S, AT_REST, LONGEST_REST_S = 0.02, 0.25, 2.0  # seconds of one look; share of a core; seconds to wait at most

# Relative error of the guided logits of one token, the median over a scale's tokens. A scale's largest or mean error
# would not do: where two scores nearly tie, rounding alone keeps another token, and that token's logits differ.
# fp32 rounding gives 1e-6 to 1e-5, bf16 about 1e-2, int8 products several times that; another computation 0.5 or more.
TOLERANCES = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.1, "w8a8": 0.3}
EQUAL_BITS = {"fp32": 0.99, "fp16": 0.97, "bf16": 0.9, "w8a8": 0.8}
FORCED_SEED, DRAWN_SEED = 1, 2
# What takes longer than this needs no warm-up: what a first run does besides is over in a fraction of a second.
LONG_S = 10.0
LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Pace:
    """How many rounds are timed, and how they begin.

    `cold`: contenders that have not run yet, and warm up first; a warm-up of more than `long_s` seconds is their first
    timed run. None for all. `most_s`: after so many seconds no further round begins, once there were LEAST_ROUNDS.
    """

    cold: Collection[str] | None = None
    long_s: float = float("inf")
    most_s: float = float("inf")


@dataclass(frozen=True)
class Run:
    """One image. `decode_ms` is None where the decoder was not run. `cpu_ms` is the time of all threads of this process
    while the scales were drawn.
    """

    text_ms: float
    scale_ms: tuple[float, ...]
    decode_ms: float | None
    cpu_ms: float | None = None

    @property
    def scales_ms(self) -> float:
        return sum(self.scale_ms)


@dataclass(frozen=True)
class Ratio:
    """How many times faster, round by round, over the rounds that both took part in."""

    median: float
    min: float
    max: float
    rounds: int


@dataclass(frozen=True)
class Agreement:
    """A contender against eager fp32 of the same plan, on equal text and equal forced bits.

    `error` is the median over the tokens of the last scale, `worst_error` that of the worst scale; `equal_bits` the
    share of all bits that come out alike when both draw from their logits with equal noise.
    """

    error: float
    worst_error: float
    equal_bits: float


def timed_in_turn(
    contenders: Mapping[str, Contender],
    runs: int | Mapping[str, int],
    *,
    decode_runs: int = 0,
    on_failure: OnFailure | None = None,
    pace: Pace = Pace(),
) -> dict[str, list[Run]]:
    """One image a round with every contender in turn; equal noise in a round. Round -1 warms up.

    Args:
        runs: rounds of all contenders, or of each.
        decode_runs: so many rounds run the decoder too.
        on_failure: is told what stopped a contender, which then leaves; else it is raised.
        pace: who warms up, and how long all of it may take; by default everybody, and as long as it takes.
    """
    wanted = {name: runs if isinstance(runs, int) else runs[name] for name in contenders}
    found: dict[str, list[Run]] = {name: [] for name in contenders}
    left, begun = dict(contenders), time.perf_counter()
    for number in range(-1, max(wanted.values(), default=0)):
        if number >= LEAST_ROUNDS and time.perf_counter() - begun > pace.most_s:
            break
        for name, contender in list(left.items()):
            warm = pace.cold is not None and name not in pace.cold
            if len(found[name]) >= wanted[name] or number >= wanted[name] or (number < 0 and warm):
                continue
            try:
                run = one_image(contender, abs(number), decode=number < decode_runs)
            except Exception as error:
                if on_failure is None:
                    raise
                on_failure(name, error)
                del left[name], found[name]
                continue
            if number >= 0 or run.scales_ms > pace.long_s * 1e3:
                found[name].append(run)
    return found


def one_image(contender: Contender, seed: int, *, decode: bool) -> Run:
    """Text, scales and, where asked for, the decoder, in a process at rest."""
    come_to_rest()
    text_ms = contender.text()
    begun = time.process_time()
    scale_ms = contender.scales(noise_of(seed))
    cpu_ms = (time.process_time() - begun) * 1e3
    return Run(text_ms, tuple(scale_ms), contender.decode() if decode else None, cpu_ms)


def decoder_ms(contender: Contender, runs: int) -> list[float]:
    """Milliseconds of the decoder, of the codes last drawn: after a warm-up, and so many times unless that takes long.

    At least once; a warm-up of more than LONG_S seconds is the only run.
    """
    come_to_rest()
    found: list[float] = []
    spent = contender.decode()
    while spent < LONG_S * 1e3 and len(found) < runs:
        come_to_rest()
        found.append(contender.decode())
        spent += found[-1]
    return found or [spent]


def come_to_rest() -> None:
    """Wait until no thread of this process spins; says so where they do not stop."""
    begun = time.perf_counter()
    while time.perf_counter() - begun < LONGEST_REST_S:
        start, spent = time.perf_counter(), time.process_time()
        time.sleep(REST_S)
        if time.process_time() - spent < AT_REST * (time.perf_counter() - start):
            return
    _log.warning(
        "threads of this process still spin after %.0f s: they take time from what is measured", LONGEST_REST_S
    )


def noise_of(seed: int) -> Noise:
    """The runtime's own."""
    return seeded_noise(seed)


def paired(slower: Sequence[float], faster: Sequence[float]) -> Ratio | None:
    """slower / faster of every round that both have; None for no such round."""
    ratios = [a / b for a, b in zip(slower, faster, strict=False)]
    return Ratio(median(ratios), min(ratios), max(ratios), len(ratios)) if ratios else None


def forced_logits(contender: Contender, codes: int = 0) -> list[Logits]:
    """Logits of every scale under choices drawn beforehand: -1 forces a bit to one, 2 to zero.

    Args:
        codes: of families that choose codes in place of bits, how many there are: -1 - i forces code i.
    """

    def forced(scale: int, shape: tuple[int, ...], stream: str = CHOICE) -> NDArray[Any]:
        drawn = uniform_noise(FORCED_SEED, scale, shape, stream)
        if stream.split(".")[0] != CHOICE:
            return drawn
        return -1 - np.floor(drawn * codes) if codes else np.where(drawn < 0.5, np.float32(-1), np.float32(2))

    contender.text()
    return contender.logits(forced)


def compare(found: Sequence[Logits], expected: Sequence[Logits], scales: Sequence[int], top_p: float) -> Agreement:
    """`scales`: the index of each in the full schedule."""
    errors = [token_error(*pair) for pair in zip(found, expected, strict=True)]
    equal = [
        drawn_bits(a, scale, top_p) == drawn_bits(b, scale, top_p)
        for a, b, scale in zip(found, expected, scales, strict=True)
    ]
    return Agreement(errors[-1], max(errors), float(np.concatenate([e.ravel() for e in equal]).mean()))


def token_error(found: Logits, expected: Logits) -> float:
    """L2 norm of the difference over that of what is expected, token by token: their median."""
    difference, size = np.linalg.norm(found - expected, axis=1), np.linalg.norm(expected, axis=1)
    return float(np.median(difference / size))


def drawn_bits(logits: Logits, scale: int, top_p: float) -> NDArray[np.bool_]:
    """[L, 2 * bits] -> [L, bits]: one where u < P(one); the rarer value goes at a probability of 1 - top_p or less."""
    pair = logits.reshape(len(logits), -1, 2).astype(np.float64)
    one = 1 / (1 + np.exp(pair[..., 0] - pair[..., 1]))
    kept = top_p or 1.0  # 0: off
    one = np.where(one <= 1 - kept, 0.0, np.where(one >= kept, 1.0, one))
    return np.asarray(uniform_noise(DRAWN_SEED, scale, one.shape) < one)


def require_agreement(name: str, precision: str, found: Agreement, settings: SamplingSettings) -> None:
    """Refuse to time a contender that draws something else.

    Raises:
        NumericsError: it disagrees by more than rounding in its precision can explain.
    """
    error, bits = TOLERANCES[precision], EQUAL_BITS[precision]
    if not (found.error <= error and found.worst_error <= error and found.equal_bits >= bits):
        raise NumericsError(
            f"{name} computes something else than eager fp32 of the same plan: logits of the median token off by "
            f"{found.error:.2g}, at the worst scale by {found.worst_error:.2g}, {found.equal_bits:.1%} of the bits "
            f"equal (guidance {settings.guidance_scale}, tau {settings.tau}, top-p {settings.top_p})",
            expected=f"an error of at most {error:g}, and {bits:.0%} of the bits",
            fix="rebuild its engines; if it stays, the backend is wrong and its time is worth nothing",
        )
