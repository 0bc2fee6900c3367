"""A tiled decoder's launches: in which order stripes run, and where in one slot of memory they lie. Pure arithmetic.

An activation lies there as rows between two spare ones, which the stripes at its ends read beyond it. A stage may write
where rows lie that are not read again. So most of a decoder runs in place: towards lower addresses with the stripes in
order, or towards higher ones with the last stripe first. No launch writes what it reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from ...core.dtypes import size_bytes
from ...engines.bundle.manifest import EDGE_INSIDE, EDGE_OUTSIDE, DecoderStage, DecoderTiles
from ...engines.spec import EngineSpec, TensorSpec

BUFFER, IMAGE = "decoder", "image"
HALO = 1  # rows that a stripe reads beyond itself on either side, and spare rows beside an activation
WITH_HALO = ("stripe", "inner_stripe")

Spans = Sequence[tuple[int, int]]  # first row of every stripe, and the one behind its last


@dataclass(frozen=True)
class Rows:
    """An activation in the slot: its first spare row begins at byte `start`."""

    start: int
    row_bytes: int
    height: int

    @property
    def end(self) -> int:
        return self.at(self.height + HALO)

    def at(self, row: int) -> int:
        """The byte where a row begins."""
        return self.start + (HALO + row) * self.row_bytes


@dataclass(frozen=True)
class Placed:
    """Rows that take the place of others: stripe by stripe from the first, or `upwards` from the last."""

    rows: Rows
    upwards: bool


@dataclass(frozen=True)
class StripeLaunch:
    """One stage on one stripe: slot and start byte by tensor, and the weights that stand for its constants."""

    engine: str
    layer: str
    buffers: Mapping[str, tuple[str, int]]
    constants: Mapping[str, str]


@dataclass(frozen=True)
class Stage:
    """A stage with its engines, that of all stripes but the last, and that of the last."""

    layer: str
    engine: EngineSpec
    last: EngineSpec
    stripes: int

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        return {tensor.name: tensor for tensor in (*self.engine.inputs, *self.engine.outputs)}

    def spans(self, tensor: str) -> Spans:
        """Rows of every stripe, without its halo."""
        halo = HALO if tensor in WITH_HALO else 0
        whole, last = (spec.tensor(tensor).shape[0] - 2 * halo for spec in (self.engine, self.last))
        return list(pairwise(accumulate([whole] * (self.stripes - 1) + [last], initial=0)))

    def rows(self, tensor: str) -> Rows:
        """The whole activation, at the beginning of the slot."""
        return Rows(0, self.row_bytes(tensor), self.spans(tensor)[-1][1])

    def row_bytes(self, tensor: str) -> int:
        spec = self.tensors[tensor]
        return size_bytes(spec.dtype, spec.shape[1:])


class TiledDecoder:
    """Plans every stage; `summed` is the slot of the codes, all other slots are its own.

    Two activations are stored: the residual stream, and inside a residual block what is between its convolutions.
    """

    def __init__(self, tiles: DecoderTiles, engines: Mapping[str, EngineSpec], summed: str) -> None:
        self._stages = [_stage(stage, tiles, engines) for stage in tiles.stages]
        self._summed = summed
        self._stream = self._inner = Rows(0, 0, 0)
        self._following = Placed(self._stream, upwards=False)
        self._statistics = ("statistics0", "statistics1")  # those that a stage reads, and those that it writes

    @property
    def image(self) -> TensorSpec:
        """All rows of the image together: [H, 3, W]."""
        last = self._stages[-1]
        spec = last.tensors["image"]
        return replace(spec, shape=(last.rows("image").height, *spec.shape[1:]))

    def launches(self) -> Iterator[StripeLaunch]:
        """In the order in which they run."""
        yield self._first(self._stages[0])
        for stage in self._stages[1:]:
            if "inner_stripe_out" in stage.tensors:
                yield from self._into_block(stage)
            elif "inner_stripe" in stage.tensors:
                yield from self._out_of_block(stage)
            elif "image" in stage.tensors:
                yield from self._stripes(stage, {"stripe": self._stream}, {})
            else:
                yield from self._in_place(stage)
            self._statistics = self._statistics[::-1]

    def _first(self, stage: Stage) -> StripeLaunch:
        """All rows at once."""
        written = stage.engine.tensor("stripe_out")
        self._stream = Rows(0, stage.row_bytes("stripe_out"), written.shape[0])
        buffers = {"summed": (self._summed, 0), "stripe_out": (BUFFER, self._stream.at(0))}
        buffers["statistics_out"] = (self._statistics[0], 0)
        return StripeLaunch(stage.engine.name, stage.layer, buffers, {})

    def _into_block(self, stage: Stage) -> Iterator[StripeLaunch]:
        """The stream stays until the block ends, and what follows it must not lie where the inner activation does."""
        x, inner, spans = self._stream, stage.rows("inner_stripe_out"), stage.spans("stripe")
        self._following = over(x, spans, replace(x, start=0), spans, halo=0)
        following = self._following.rows
        if inner.end > min(x.start, following.start):
            inner = replace(inner, start=max(x.end, following.end))
        self._inner = inner
        yield from self._stripes(stage, {"stripe": x}, {"inner_stripe_out": inner})

    def _out_of_block(self, stage: Stage) -> Iterator[StripeLaunch]:
        given = {"inner_stripe": self._inner, "residual": self._stream}
        yield from self._stripes(stage, given, {"stripe_out": self._following.rows}, self._following.upwards)
        self._stream = self._following.rows

    def _in_place(self, stage: Stage) -> Iterator[StripeLaunch]:
        made, written = stage.rows("stripe_out"), stage.spans("stripe_out")
        target = over(self._stream, stage.spans("stripe"), made, written, HALO)
        yield from self._stripes(stage, {"stripe": self._stream}, {"stripe_out": target.rows}, target.upwards)
        self._stream = target.rows

    def _stripes(
        self, stage: Stage, given: Mapping[str, Rows], made: Mapping[str, Rows], upwards: bool = False
    ) -> Iterator[StripeLaunch]:
        """The launches of a stage."""
        last = stage.stripes - 1
        for number in range(last, -1, -1) if upwards else range(stage.stripes):
            buffers = {name: self._place(stage, name, number, rows) for name, rows in (*given.items(), *made.items())}
            buffers |= self._results(stage, number)
            ends = {"above": number == 0, "below": number == last}
            constants = {name: EDGE_OUTSIDE if outside else EDGE_INSIDE for name, outside in ends.items()}
            engine = stage.last if number == last else stage.engine
            yield StripeLaunch(engine.name, stage.layer, buffers, constants)

    def _place(self, stage: Stage, tensor: str, number: int, rows: Rows) -> tuple[str, int]:
        first, _ = stage.spans(tensor)[number]
        return BUFFER, rows.at(first - HALO if tensor in WITH_HALO else first)

    def _results(self, stage: Stage, number: int) -> dict[str, tuple[str, int]]:
        """Where statistics are read and written, or rows of the image."""
        read, written = self._statistics
        buffers = {"statistics": (read, 0)}
        if "image" in stage.tensors:
            buffers["image"] = (IMAGE, stage.spans("image")[number][0] * stage.row_bytes("image"))
        else:
            spec = stage.tensors["statistics_out"]
            buffers["statistics_out"] = (written, number * size_bytes(spec.dtype, spec.shape))
        return buffers


def over(source: Rows, read: Spans, target: Rows, written: Spans, halo: int) -> Placed:
    """A place for the target over a source that is not read again: below its beginning if there is room, else above.

    Every stripe reads its rows, and `halo` more on either side, before any of them is overwritten.
    """
    old, new = replace(source, start=0), replace(target, start=0)
    stripes = list(zip(read, written, strict=True))
    below = max(new.at(stop) - old.at(first - halo) for (first, _), (_, stop) in stripes)
    if below <= source.start:
        return Placed(replace(target, start=source.start - below), upwards=False)
    above = max(old.at(stop + halo) - new.at(first) for (_, stop), (first, _) in stripes)
    return Placed(replace(target, start=max(source.start + above, 0)), upwards=True)


def _stage(stage: DecoderStage, tiles: DecoderTiles, engines: Mapping[str, EngineSpec]) -> Stage:
    return Stage(stage.layer, engines[stage.engine], engines[stage.last], tiles.stripes)
