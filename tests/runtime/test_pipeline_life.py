"""From load to close: what `load` refuses, what closing gives back, and what becomes of a pipeline that is pickled."""

from __future__ import annotations

import copy
import gc
import inspect
import json
import multiprocessing
import pickle
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest

from fastvar import Pipeline
from fastvar.core.platform import usable_cores
from fastvar.engines.bundle.bundle import Bundle
from fastvar.errors import BundleError, FastvarError, InputError, PlanError
from tests.mutations import sealed

PROMPT = "a red circle above a blue square"


def drawn(pipe: Pipeline) -> bytes:
    return pipe(PROMPT, seed=7, guidance_scale=1).images[0].tobytes()


# Loading


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"threads": 0}, "threads 0 is out of range"),
        ({"threads": "2"}, "threads '2' is out of range"),
        ({"threads": True}, "threads True is out of range"),
        ({"threads": 1.5}, r"threads 1\.5 is out of range"),
        ({"memory_budget": 0}, "memory_budget 0 is no amount of memory"),
        ({"memory_budget": 1e10}, "memory_budget 10000000000.0 is no amount of memory"),
        ({"memory_budget": True}, "memory_budget True is no amount of memory"),
        ({"memory_budget": [1]}, r"memory_budget \[1\] is no amount of memory"),
        ({"memory_budget": "lots"}, "memory 'lots' not understood"),
        ({"busy_timeout": "5"}, "busy_timeout '5' is text"),
        ({"busy_timeout": -1}, "busy_timeout -1 is out of range"),
        ({"cuda_graphs": "no"}, "cuda_graphs 'no' is text"),
        ({"offload_text_encoder": 1}, "offload_text_encoder 1 is a int"),
        ({"path": None}, "the path None is a NoneType"),
        ({"path": 7}, "the path 7 is a int"),
        ({"verify": 1}, "verify 1 not understood"),
    ],
)
def test_what_load_refuses(tiny_bundle: Path, wrong: dict[str, object], named: str):
    with pytest.raises((InputError, PlanError, BundleError), match=named) as error:
        Pipeline.load(**{"path": tiny_bundle, **wrong})
    assert error.value.expected


def test_what_load_takes(tiny_bundle: Path):
    cores = np.int64(usable_cores())  # what other tests of the process have by default
    pipe = Pipeline.load(str(tiny_bundle), threads=cores, memory_budget=np.int64(1 << 30), busy_timeout=np.inf)
    assert len(drawn(pipe)) == 256 * 256 * 3


def test_the_process_may_go_elsewhere_after_loading(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tiny_bundle.parent)
    pipe = Pipeline.load(tiny_bundle.name)
    monkeypatch.chdir(tmp_path)
    assert len(drawn(pipe)) == 256 * 256 * 3


# Closing


def test_closing_gives_back_what_was_loaded(tiny_bundle: Path):
    pipe = Pipeline.load(tiny_bundle)
    events = []
    image = pipe(PROMPT, seed=7, guidance_scale=1, callback_on_scale_end=events.append).images[0]
    alone = [event.preview().tobytes() for event in pipe.stream(PROMPT, seed=7, guidance_scale=1)]
    held = [weakref.ref(part) for part in (pipe._session, pipe._session.weights, pipe._session.workspace(1))]
    gc.disable()  # not when the collector comes by, but now
    try:
        assert not pipe.closed
        pipe.close()
        assert pipe.closed
        assert [part() for part in held] == [None] * 3
    finally:
        gc.enable()
    assert [event.preview().tobytes() for event in events] == alone
    assert image.getpixel((0, 0))
    pipe.close()


def test_a_closed_pipeline_says_so(editing_bundle: Path):
    with Pipeline.load(editing_bundle) as pipe:
        stream = pipe.stream(PROMPT, seed=7)
        first = next(stream)
        alone = next(pipe.stream(PROMPT, seed=7)).preview().tobytes()
    small, mask = np.full((64, 64, 3), 90, np.uint8), np.eye(64, dtype=bool)
    uses = (
        lambda: pipe(PROMPT),
        lambda: pipe.stream(PROMPT),
        lambda: pipe.upscale(small, PROMPT),
        lambda: pipe.inpaint(small, mask, PROMPT),
        lambda: pickle.dumps(pipe),
    )
    for use in uses:
        with pytest.raises(InputError, match="the pipeline is closed") as error:
            use()
        assert "Pipeline.load" in error.value.fix
    list(stream)  # what was drawn of it before others drew
    assert first.preview().tobytes() == alone
    assert pipe.size == (256, 256)


def test_a_stream_that_the_end_overtakes(tiny_bundle: Path):
    pipe = Pipeline.load(tiny_bundle)
    stream, later = pipe.stream(PROMPT, seed=7), pipe.stream(PROMPT, seed=8)
    next(stream)
    pipe.close()
    for one in (stream, later):
        with pytest.raises(InputError, match="the pipeline is closed"):
            next(one)


def test_a_pipeline_that_was_never_made_is_dropped_in_silence(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(FastvarError):
        Pipeline.load(tiny_bundle, threads=0)
    Pipeline.__new__(Pipeline)
    pipe = Pipeline.load(tiny_bundle)
    next(pipe.stream(PROMPT))
    del pipe
    gc.collect()
    assert capsys.readouterr().err == ""


# Pickling


def test_a_pickled_pipeline_is_loaded_anew(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    monkeypatch.chdir(tmp_path)
    pipe = Pipeline.load("bundle", busy_timeout=3.5, memory_budget="1GiB")
    monkeypatch.chdir("/")
    data = pickle.dumps(pipe)
    assert len(data) < 2000
    for other in (pickle.loads(data), copy.copy(pipe), copy.deepcopy([pipe])[0]):
        assert other is not pipe
        assert drawn(other) == drawn(pipe)
        assert other._turns._timeout == 3.5
    path, arguments = pipe._origin
    assert path == folder
    assert ["path", *arguments] == list(inspect.signature(Pipeline.load).parameters), "whatever load takes"


def test_a_bundle_that_changed_since_is_refused(tiny_bundle: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    data = pickle.dumps(Pipeline.load(folder))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model"] = "another"
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))
    with pytest.raises(BundleError, match="is another bundle than the one whose Pipeline was pickled"):
        pickle.loads(data)
    shutil.rmtree(folder)
    with pytest.raises(BundleError, match="is not a bundle"):
        pickle.loads(data)


def test_a_pipeline_that_was_not_loaded_cannot_be_pickled(tiny_bundle: Path):
    pipe = Pipeline(Bundle.open(tiny_bundle))
    for send in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(InputError, match="this Pipeline was not made by"):
            send(pipe)


@pytest.mark.slow
def test_a_process_that_is_spawned_draws_the_same(tiny_bundle: Path):
    pipe = Pipeline.load(tiny_bundle)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(drawn, [pipe]) == drawn(pipe)
