"""`make bench` and `make gpu-bench` from end to end, with the tiny model on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from benchmarks import __main__ as bench_module
from benchmarks import contest as contest_module
from benchmarks import machine_peak
from benchmarks import models as bench_subject
from benchmarks import timing as contest
from benchmarks.contenders import EngineContender, Entry
from benchmarks.models import TARGETS, Engines, Model, Place
from benchmarks.peers import disturbed
from fastvar.errors import BuildError, InputError


@pytest.fixture
def here(engine_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small peaks, no rest between turns, and what has processes of its own runs in this one."""
    monkeypatch.setenv("FASTVAR_CACHE", str(engine_cache))
    monkeypatch.setattr(bench_subject, "run_apart", lambda _, function, *arguments: function(*arguments))
    monkeypatch.setattr(contest, "come_to_rest", lambda: None)
    monkeypatch.setattr(contest_module, "disturbed", lambda share: "")  # whatever else this machine does
    monkeypatch.setitem(machine_peak.GEMM_SIDE, "cpu", 64)
    monkeypatch.setitem(machine_peak.COPY_BYTES, "cpu", 1 << 16)


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(bench_module.main)
    options = ("--models", "tiny", "--prompt-tokens", 16, "--runs", 2, "--decode-runs", 1)
    return CliRunner().invoke(app, [str(argument) for argument in (*options, *arguments)])


def test_the_tiny_model_from_end_to_end(here: None, tiny_policy: Path, tmp_path: Path):
    """What `make gpu-bench` calls, but for its device."""
    ours, eager = "onnxruntime:fp32", f"eager-pruned:bf16:{tiny_policy}"
    options = ("--device", "cpu", "--keep-going", "--policy", tiny_policy, "--dense-runs", 1, "--memory")
    files = ("--out", tmp_path, "--markdown", tmp_path / "tables.md")
    done = run(*options, *files, "--contenders", f"eager-dense:fp32,{eager},{ours}")
    assert done.exit_code == 0, done.output
    data = json.loads((tmp_path / "bench-tiny-cpu.json").read_text())
    assert data["machine"]["cpu_cores"] >= 1
    assert data["machine"]["torch"]
    assert data["settings"]["text_length"] == 16
    assert data["settings"]["dense_runs"] == 1
    (size,) = data["sizes"]
    assert size["failed"] == {}
    assert set(size["peaks"]) == {"fp32", "bf16", "copy"}
    found = size["contenders"]
    assert list(found) == ["eager-dense:fp32", eager, ours]
    assert [c["runs"] for c in found.values()] == [1, 2, 2]
    assert found[ours]["flop"] == found[eager]["flop"] < found["eager-dense:fp32"]["flop"]
    assert found[ours]["agreement_with_eager_fp32"]["equal_bits"] == 1
    assert found[ours]["flop_per_s"] == pytest.approx(found[ours]["flop"] / found[ours]["scales_ms"] * 1e3)
    assert found[ours]["share_of_gemm_peak"] == pytest.approx(found[ours]["flop_per_s"] / size["peaks"]["fp32"])
    for contender in found.values():
        assert contender["image_ms"] > contender["scales_ms"] > 0
        assert len(contender["runs_ms"]) == contender["runs"]
        assert contender["memory"]["peak_bytes"] >= contender["memory"]["before_bytes"] > 0
        assert [s["index"] for s in contender["scales"]][-1] == 6
    largest = found[ours]["largest_scales_by_launch"]
    assert [s["kept"] for s in largest] == [16, 128]
    for scale in largest:
        assert list(scale["kinds"]) == ["qkv", "attn_mlp", "sampling_head"]
        assert sum(kind["launches"] for kind in scale["kinds"].values()) == scale["launches"] == 9
        flop = sum(k["gemm_flop"] + k["attention_flop"] for k in scale["kinds"].values())
        assert flop == next(s["flop"] for s in found[ours]["scales"] if s["index"] == scale["index"])
    assert not found[eager]["largest_scales_by_launch"]
    ratios = {(r["contender"], r["against"]): r["scales"] for r in size["ratios"]}
    assert set(ratios) == {(eager, "eager-dense:fp32"), (ours, "eager-dense:fp32"), (ours, eager)}
    assert [r["rounds"] for r in ratios.values()] == [1, 1, 2]
    pairs = zip(found[eager]["runs_ms"], found[ours]["runs_ms"], strict=True)
    by_round = [sum(a["scale_ms"]) / sum(b["scale_ms"]) for a, b in pairs]
    assert ratios[ours, eager] == {
        "median": pytest.approx(np.median(by_round)),
        "min": min(by_round),
        "max": max(by_round),
        "rounds": 2,
    }
    tables = (tmp_path / "tables.md").read_text()
    assert tables.strip() in done.output
    assert "| contender | policy | scales, s (range) | times eager-dense:fp32 |" in tables
    assert "| 256x256 | onnxruntime:fp32 | 16x16 | 128 | attn_mlp |" in tables


def measured(folder: Path) -> list[dict]:
    return json.loads((folder / "bench-tiny-cpu.json").read_text())["sizes"]


def test_every_ratio_is_against_the_best_precision_of_eager_torch(here: None, tiny_policy: Path, tmp_path: Path):
    pruned = [f"eager-pruned:{precision}:{tiny_policy}" for precision in ("fp32", "bf16")]
    dense = [f"eager-dense:{precision}" for precision in ("fp32", "bf16")]
    ours = "onnxruntime:fp32"
    done = run("--policy", tiny_policy, "--out", tmp_path, "--contenders", ",".join((*dense, *pruned, ours)))
    assert done.exit_code == 0, done.output
    (size,) = measured(tmp_path)
    found = size["contenders"]
    best = [min(names, key=lambda name: found[name]["scales_ms"]) for names in (dense, pruned)]
    assert size["best_of_eager"] == best
    against = {(ratio["contender"], ratio["against"]) for ratio in size["ratios"]}
    slower = [next(name for name in names if name not in best) for names in (dense, pruned)]
    assert against == {
        (slower[0], best[0]),
        *((name, rival) for name in (ours, slower[1]) for rival in best),
        (best[1], best[0]),
    }
    assert f"times {best[1]}, its best |" in done.output
    decoded = {name for name, own in found.items() if own["decode_ms"] is not None}
    assert decoded == {*best, ours}
    compared = {name for name, own in found.items() if own["agreement_with_eager_fp32"]}
    assert compared == {*pruned, ours}, "dense eager torch alone needs no reference"
    assert all(own["memory"] is None for own in found.values())
    assert "copy" in size["peaks"]


def test_where_others_work_no_ratio_is_printed(here: None, tiny_policy: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(contest_module, "disturbed", lambda share: disturbed(0.42))
    contenders = f"eager-pruned:fp32:{tiny_policy},onnxruntime:fp32"
    done = run("--policy", tiny_policy, "--out", tmp_path, "--contenders", contenders)
    assert done.exit_code == 0, done.output
    assert "Other processes had 42% of the cores while this was timed, of which 10% are allowed" in done.output
    assert "| contender | policy | scales, CPU s | equal bits |" in done.output
    assert "times" not in done.output.partition("scales, CPU s")[2].partition("Measured")[0]
    assert "range" not in done.output
    (size,) = measured(tmp_path)
    assert size["ratios"] == []
    assert "no ratios" in size["disturbed"]
    for own in size["contenders"].values():
        assert 0 < own["scales_cpu_ms"] < 1e5


def test_a_long_dense_image_is_drawn_once_and_in_one_precision(here: None, tiny_policy: Path, tmp_path, monkeypatch):
    """That in which pruned eager torch took less; unwarmed."""
    monkeypatch.setattr(contest_module, "LONG_S", 1e-6)
    monkeypatch.setattr(contest_module, "SHORT_S", 1e-6)
    pruned = [f"eager-pruned:{precision}:{tiny_policy}" for precision in ("fp32", "bf16")]
    contenders = ",".join(("eager-dense:fp32", "eager-dense:bf16", *pruned))
    done = run("--policy", tiny_policy, "--out", tmp_path, "--contenders", contenders)
    assert done.exit_code == 0, done.output
    (size,) = measured(tmp_path)
    ((name, why),) = size["left_out"].items()
    assert name.startswith("eager-dense")
    assert "in which pruned eager torch is the faster" in why
    assert f"{name} was not timed" in done.output
    dense = [own for other, own in size["contenders"].items() if other.startswith("eager-dense")]
    assert [own["runs"] for own in dense] == [1]
    assert [own["runs"] for other, own in size["contenders"].items() if other in pruned] == [2, 2]


def test_two_sizes_in_one_call(here: None, tiny_policy: Path, tmp_path: Path):
    """Engines of the second are made from the bundle of the first."""
    sizes = ("--sizes", "256x256,240x320")
    done = run("--policy", tiny_policy, "--out", tmp_path, *sizes, "--contenders", "onnxruntime:fp32")
    assert done.exit_code == 0, done.output
    assert [size["size"] for size in measured(tmp_path)] == ["256x256", "240x320"]


@pytest.mark.slow
def test_two_sizes_of_engines_of_programs(here: None, tiny_policy: Path, tmp_path: Path):
    pytest.importorskip("torch")
    sizes = ("--sizes", "256x256,240x320")
    done = run("--policy", tiny_policy, "--out", tmp_path, *sizes, "--contenders", "aotinductor:fp32")
    assert done.exit_code == 0, done.output
    assert [list(size["contenders"]) for size in measured(tmp_path)] == [["aotinductor:fp32"]] * 2


def test_engines_can_be_made_beforehand(here: None, tiny_policy: Path, tmp_path: Path):
    contenders = f"eager-pruned:fp32:{tiny_policy},onnxruntime:fp32"
    done = run("--policy", tiny_policy, "--out", tmp_path / "out", "--contenders", contenders, "--prepare")
    assert done.exit_code == 0, done.output
    assert "engines of onnxruntime:fp32" in done.output
    assert not (tmp_path / "out").exists()


@pytest.fixture
def disagreeing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines whose logits are another model's."""
    logits = EngineContender.logits
    monkeypatch.setattr(EngineContender, "logits", lambda self, noise: [-scale for scale in logits(self, noise)])


def test_who_disagrees_is_not_timed(here: None, disagreeing: None, tiny_policy: Path, tmp_path: Path):
    options = ("--policy", tiny_policy, "--out", tmp_path, "--no-memory")
    done = run(*options, "--contenders", "onnxruntime:fp32")
    assert done.exit_code == 2
    assert "onnxruntime:fp32 computes something else" in done.output
    assert not list(tmp_path.iterdir())
    done = run(*options, "--contenders", f"eager-pruned:fp32:{tiny_policy},onnxruntime:fp32", "--keep-going")
    assert done.exit_code == 0, done.output
    (size,) = json.loads((tmp_path / "bench-tiny-cpu.json").read_text())["sizes"]
    assert "computes something else" in size["failed"]["onnxruntime:fp32"]
    assert list(size["contenders"]) == [f"eager-pruned:fp32:{tiny_policy}"]
    assert "onnxruntime:fp32 left: NumericsError" in done.output


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--models", "infinity_9b"), "no model 'infinity_9b'"),
        (("--models", ","), "names nothing"),
        (("--sizes", "300x300"), "no scale schedule for 300x300"),
        (("--contenders", "eager-dense:fp32,aot:fp32"), "contender 'aot:fp32' not understood"),
        (("--device", "tpu"), "no device 'tpu'"),
        (("--contenders", "onnxruntime:fp32", "--policy", "fast"), "no policy 'fast'"),
    ],
)
def test_what_the_user_got_wrong_ends_with_2(options: tuple[str, ...], problem: str, tmp_path: Path):
    done = run("--contenders", "eager-dense:fp32", "--out", tmp_path, *options)
    assert done.exit_code == 2
    assert problem in done.output


def test_a_backend_is_not_asked_for_what_it_cannot_target(tmp_path: Path):
    engines = Engines(tmp_path, Model("tiny", 16), Place("cuda"))
    with pytest.raises(BuildError, match="onnxruntime builds nothing for device 'cuda'"):
        engines.bundle(Entry("onnxruntime", "fp32", "dense"), "256x256")
    assert set(TARGETS) == {"cpu", "cuda"}


def test_the_same_weights_for_every_size(here: None, tiny_policy: Path, tmp_path: Path):
    """The second bundle takes over the weights of the first."""
    engines = Engines(tmp_path, Model("tiny", 16), Place("cpu"))
    first = engines.bundle(Entry("onnxruntime", "fp32", str(tiny_policy)), "256x256")
    same = engines.bundle(Entry("onnxruntime", "fp32", str(tiny_policy)), "256x256")
    assert same == first
    (tmp_path / "copy.toml").write_text(tiny_policy.read_text())
    second = engines.bundle(Entry("onnxruntime", "fp32", str(tmp_path / "copy.toml")), "256x256")
    assert second != first
    assert (second / "weights.safetensors").samefile(first / "weights.safetensors")


def test_texts():
    assert Model("infinity_layer12", 64).text().shape == (2, 64, 2048)
    assert Model("tiny", 64).text_length == 16, "no more than the model reads"
    demo = Model("demo", 64)
    assert demo.text().ndim == 2
    assert demo.text_length == demo.text().shape[1] < 64
    assert demo.settings.tau == 0.5
    with pytest.raises(InputError, match="no model"):
        Model("infinity_9b", 64)


@pytest.mark.parametrize(("capability", "target"), [("sm90", "cuda-sm90"), ("sm999", "cuda"), ("", "cuda")])
def test_the_gpu_at_hand_goes_by_its_name_where_that_is_known(monkeypatch, capability: str, target: str):
    """Engines made for it elsewhere are found in the cache."""
    monkeypatch.setattr(bench_subject, "capability_here", lambda torch: capability)
    assert bench_subject.by_name("cuda") == target
    assert bench_subject.by_name("cpu-avx2") == "cpu-avx2"
