"""The command line from outside: what it prints, what it writes, and how it ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings

import pytest

from fastvar import cli
from fastvar.core.dtypes import human_bytes
from fastvar.core.version import __version__
from fastvar.errors import InternalError
from fastvar.runtime.images.png import read_metadata
from tests.fakes.tensorrt import fake_gpu_bundle

PROMPT = "a red circle above a blue square"


def test_version(run):
    assert run("--version") == (0, f"fastvar {__version__}\n", "")


@pytest.mark.parametrize(
    "command", ["build", "generate", "upscale", "inpaint", "profile", "tune", "inspect", "plan", "sizes", "doctor"]
)
def test_every_option_has_help(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "--help" in out
    for parameter in cli.typer.main.get_command(cli.app).commands[command].params:
        assert getattr(parameter, "help", None), f"{command} {parameter.name} has no help text"


def test_starting_the_command_imports_nothing_heavy():
    heavy = ("torch", "numpy", "onnxruntime", "onnx", "transformers", "tokenizers", "PIL")
    code = f"import fastvar.cli, sys; print(*(m for m in {heavy} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_generate_writes_images_that_say_how_they_were_made(run, tiny_bundle, tmp_path):
    code, out, err = run(
        "generate", tiny_bundle, PROMPT, "a green circle", "--seed", 7, "-n", 2, "--tau", 0.5, "-o", "new/images"
    )
    assert (code, err) == (0, "")
    names = [f"{prompt}-{seed}.png" for prompt in ("a-green-circle", PROMPT.replace(" ", "-")) for seed in (7, 8)]
    assert sorted(os.listdir(tmp_path / "new" / "images")) == names
    assert all(name in out for name in names)
    told = read_metadata(tmp_path / "new" / "images" / "a-green-circle-8.png")
    digest = json.loads(run("inspect", tiny_bundle, "--json")[1])["digest"]
    settings = json.loads(told.pop("settings"))
    assert told == {"prompt": "a green circle", "seed": "8", "bundle": digest, "fastvar": __version__}
    assert (settings["tau"], settings["guidance_scale"], settings["size"]) == (0.5, 3.0, "256x256")


def test_generate_never_overwrites_and_draws_the_same_again(run, tiny_bundle, tmp_path):
    for _ in range(2):
        assert run("generate", tiny_bundle, PROMPT, "--seed", 3, "-o", "a.png")[0] == 0
    assert sorted(os.listdir(tmp_path)) == ["a-2.png", "a.png"]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "a-2.png").read_bytes()


def test_generate_without_a_seed_tells_the_one_it_drew(run, tiny_bundle, tmp_path):
    code, out, _ = run("generate", tiny_bundle, PROMPT, "--cfg", 1, "--timings")
    (path,) = tmp_path.iterdir()
    seed = read_metadata(path)["seed"]
    assert code == 0
    assert f"(seed {seed}," in out
    assert path.name.endswith(f"-{seed}.png")
    assert "16x16" in out  # the last scale, in the table of timings


def test_inspect_shows_the_plan(run, tiny_bundle):
    code, out, _ = run("inspect", tiny_bundle, "--engines")
    assert code == 0
    assert "layers 1 to 1 of 2, restored from scale 2" in out
    assert "the whole image at once" in out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert rows[0][:5] == ["0", "1x1", "1", "1", "0"]
    assert rows[1][:2] == ["1", "skipped"]
    assert rows[6][:6] == ["6", "16x16", "256", "128", "17", "attn_mlp-16x16-k128-s145"]
    assert rows[7][:4] == ["total", "", "273", "145"]


def test_inspect_json_adds_up(run, tiny_bundle):
    facts = json.loads(run("inspect", tiny_bundle, "--json")[1])
    files = {engine["file"] for engine in facts["engines"].values()}
    assert facts["totals"]["engine_bytes"] == sum((tiny_bundle / file).stat().st_size for file in files)
    assert facts["skipped_scales"] == [1, 3, 4, 5]
    assert [scale["kept"] for scale in facts["scales"]] == [1, 16, 128]
    # two layers: one always runs all 273 tokens, one only those kept
    assert facts["totals"]["forwarded_tokens"] == 273 + 145


def test_inspect_shows_the_passes(run, tiny_bundle, batched_bundle):
    assert "one image" in run("inspect", tiny_bundle)[1]
    out = " ".join(run("inspect", batched_bundle)[1].split())
    facts = json.loads(run("inspect", batched_bundle, "--json")[1])
    assert facts["guidance_rows"] == [2, 1]
    assert [own["images"] for own in facts["batches"]] == [1, 2, 4]
    for smaller, own in zip(facts["batches"], facts["batches"][1:], strict=False):
        assert smaller["allocated_bytes"] < own["allocated_bytes"]
        assert smaller["activation_bytes"]["1"] < own["activation_bytes"]["1"]
        assert f"{own['images']} ({human_bytes(own['activation_bytes']['2'])})" in out
    assert facts["activation_bytes"] == facts["batches"][0]["activation_bytes"]


@pytest.fixture
def timed(monkeypatch):
    """Products are timed in no time; how often they were asked for, and with which words."""
    from fastvar.core.precision import PrecisionChoice
    from fastvar.engines.aotinductor.backend import AotInductorBackend

    pytest.importorskip("torch")
    calls = []

    def choice(self, kept, *, anew=False):
        calls.append((kept, anew))
        gflops = {"float32": 99.2, "bfloat16": 190.2, "float16": 21.4, "int8": 323.5}
        return "bfloat16", PrecisionChoice(False, "measured to be clearly the fastest", "a CPU", "torch 2.13.0", gflops)

    monkeypatch.setattr(AotInductorBackend, "auto_precision", choice)
    return calls


@pytest.mark.usefixtures("timed")
def test_doctor_of_a_bundle(run, batched_bundle):
    """Which passes fit into a budget, and into this machine."""
    facts = json.loads(run("doctor", batched_bundle, "--json")[1])["bundle"]
    assert (facts["backend"], facts["ready"], facts["largest_batch"]) == ("onnxruntime", True, 4)
    needs = {own["images"]: own["allocated_bytes"] for own in facts["batches"]}
    assert list(needs) == [1, 2, 4]
    facts = json.loads(run("doctor", batched_bundle, "--memory", needs[4] - 1, "--json")[1])["bundle"]
    assert (facts["budget_bytes"], facts["largest_batch"]) == (needs[4] - 1, 2)
    assert [own["fits"] for own in facts["batches"]] == [True, True, False]
    out = " ".join(run("doctor", batched_bundle, "--memory", needs[4] - 1)[1].split())
    assert f"of 2: {human_bytes(needs[2])}, fits" in out
    assert f"of 4: {human_bytes(needs[4])}, does not fit" in out


@pytest.mark.usefixtures("timed")
def test_doctor_of_a_gpu_bundle_knows_no_budget_of_its_own(run, tiny_bundle, tmp_path):
    path = fake_gpu_bundle(tiny_bundle, tmp_path / "gpu")
    facts = json.loads(run("doctor", path, "--json")[1])["bundle"]
    assert (facts["budget_bytes"], facts["largest_batch"]) == (None, None)
    assert "not known here: give --memory" in run("doctor", path)[1]
    facts = json.loads(run("doctor", path, "--memory", "1GiB", "--json")[1])["bundle"]
    assert facts["largest_batch"] == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("missing",), "is not a bundle"),
        (("--memory", "1GiB"), "go with a bundle"),
        (("missing", "--memory", "much"), "not understood"),
    ],
)
def test_doctor_of_what_is_no_bundle(run, arguments, told):
    code, out, err = run("doctor", *arguments)
    assert (code, out) == (2, "")
    assert told in err
    assert "Traceback" not in err


@pytest.mark.usefixtures("timed")
def test_doctor(run, monkeypatch):
    monkeypatch.setenv("FASTVAR_CACHE", "somewhere")
    code, out, _ = run("doctor")
    assert code == 0
    assert "backend onnxruntime" in out
    facts = json.loads(run("doctor", "--json")[1])
    assert facts["cache"] == {"folder": "somewhere", "files": 0, "bytes": 0}
    assert facts["packages"]["numpy"]


def test_doctor_tells_what_a_build_chooses(run, timed, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTVAR_CACHE", str(tmp_path / "kept"))
    line = (
        "bf16, auto: measured to be clearly the fastest; fp32 99, bf16 190, fp16 21, int8 324 GFLOP/s a thread "
        "on a CPU with torch 2.13.0"
    )
    assert line in " ".join(run("doctor")[1].split())
    facts = json.loads(run("doctor", "--measure", "--json")[1])["products"]
    assert (facts["precision"], facts["gflops_per_thread"]["int8"], facts["told"]) == ("bf16", 323.5, line)
    assert timed == [(tmp_path / "kept", False), (tmp_path / "kept", True)]


def test_doctor_without_torch_times_nothing(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    code, out, _ = run("doctor")
    assert code == 0
    assert "not timed: torch cannot be imported" in " ".join(out.split())


@pytest.mark.usefixtures("timed")
def test_doctor_names_the_extra_that_is_missing(run, monkeypatch):
    from fastvar import doctor

    monkeypatch.setattr(doctor, "_version", lambda name: None if name.startswith("onnxruntime") else "1.0")
    (use,) = [use for use in json.loads(run("doctor", "--json")[1])["uses"] if not use["ready"]]
    assert use["missing"] == ["onnxruntime or onnxruntime-gpu"]
    assert "fastvar-runtime[onnxruntime]" in use["fix"]


def test_doctor_knows_every_backend():
    from fastvar.doctor import REQUIREMENTS
    from fastvar.engines.registry import BACKEND_NAMES

    assert {r.use for r in REQUIREMENTS} >= {f"backend {name}" for name in BACKEND_NAMES}


def test_build_from_files_gives_the_bundle_built_in_memory(
    run, tiny_bundle, tiny_checkpoint_folder, tiny_policy, engine_cache, tmp_path
):
    options = ("--size", "256x256", "--policy", tiny_policy, "--cache", engine_cache)
    code, out, err = run("build", tiny_checkpoint_folder, *options, "--out", "bundle")
    assert (code, err) == (0, "")
    assert "built bundle in" in out
    assert " from the cache" in out
    assert os.listdir(tmp_path) == ["bundle"]
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (tmp_path / "bundle", tiny_bundle)]
    for name in ("engines", "weights", "plan", "sets", "transformer", "image_tokenizer"):
        assert manifests[0][name] == manifests[1][name], name


BAD_BUILDS = {
    "no scale schedule for 1000x1000": ("--random-weights", "infinity_layer12", "--size", "1000x1000"),
    "1024x1024, 896x1120": ("--random-weights", "infinity_layer12", "--size", "1000x1000"),
    "no scale schedule for 512x512": ("--random-weights", "var_d16", "--size", "512x512"),
    "var models do not know residual": ("--random-weights", "var_d16", "--no-residual"),
    "cannot run in stripes": ("--random-weights", "var_d16", "--decoder-tile", "8"),
    "bundles hold no image encoder": ("--random-weights", "hart_0.7b", "--with-encoder"),
    "size 'big' not understood": ("missing.pth", "--size", "big"),
    "no backend 'vulkan'": ("missing.pth", "--backend", "vulkan"),
    "no checkpoint missing.pth": ("missing.pth",),
    "nothing to build from": (),
    "exclude each other": ("missing.pth", "--random-weights", "infinity_layer12"),
    "no model size 'infinity_9b'": ("--random-weights", "infinity_9b"),
    "no policy 'sparse'": ("--random-weights", "infinity_layer12", "--policy", "sparse"),
    "guidance 'maybe' not understood": ("--random-weights", "infinity_layer12", "--guidance", "maybe"),
    "Invalid value for '--decoder-tile'": (
        "--random-weights",
        "infinity_layer12",
        "--decoder-tile",
        "0",
    ),
    "'--decoder-tile'": (
        "--random-weights",
        "infinity_layer12",
        "--decoder-tile",
        "few",
    ),
}


@pytest.mark.parametrize("message", BAD_BUILDS)
def test_bad_build_is_told_plainly_and_leaves_nothing(run, tmp_path, message):
    code, out, err = run("build", *BAD_BUILDS[message], "--out", "bundle")
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


BAD_INPUTS = {
    "the prompt is empty": ("  ",),
    "seed -1 is out of range": (PROMPT, "--seed", -1),
    "seed 9223372036854775808 is out of range": (PROMPT, "--seed", 2**63),
    "tau 0.0 is out of range": (PROMPT, "--tau", 0),
    "guidance_scale nan": (PROMPT, "--cfg", "nan"),
    "num_images 0": (PROMPT, "-n", 0),
    "expected: at most 16": ("red " * 40,),
    "100000 bytes": ("r" * 100_000,),
    "one file for 2 images": (PROMPT, "-n", 2, "--out", "a.png"),
    "a .png, .jpg, .jpeg or .webp file": (PROMPT, "--out", "a.gif"),
}


@pytest.mark.parametrize("message", BAD_INPUTS)
def test_bad_input_is_told_plainly_and_leaves_nothing(run, tiny_bundle, tmp_path, message):
    code, out, err = run("generate", tiny_bundle, *BAD_INPUTS[message])
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_emoji_in_a_prompt_are_drawn(run, tiny_bundle, tmp_path):
    assert run("generate", tiny_bundle, "🙂 🟥", "--seed", 1)[0] == 0
    assert read_metadata(tmp_path / "image-1.png")["prompt"] == "🙂 🟥"


def test_words_that_the_tokenizer_does_not_know_are_told_in_a_line(run, tiny_bundle, tmp_path):
    for options in ((), ("--negative-prompt", "blurry")):
        code, _, err = run("generate", tiny_bundle, "a zorped circle", "--seed", 1, *options)
        assert code == 0
        lines = err.splitlines()
        assert lines[0] == "warning: the tokenizer does not know: 'zorped' (prompt); the image cannot follow them"
        assert len(lines) == 1 + len(options) // 2
        assert all(line.startswith("warning: ") for line in lines)
    assert len(os.listdir(tmp_path)) == 2


def test_other_warnings_keep_their_place(capsys):
    with warnings.catch_warnings(record=True) as told:
        cli._tell_warnings_plainly()
        warnings.warn("look", stacklevel=1)
    assert [(str(warning.message), warning.filename) for warning in told] == [("look", __file__)]
    assert capsys.readouterr().err == ""


def test_unwritable_output_is_told_before_anything_is_drawn(run, tiny_bundle, tmp_path, monkeypatch):
    from fastvar.runtime.pipeline import Pipeline

    def draws(*_args, **_kwargs):
        raise AssertionError("drew an image that cannot be saved")

    monkeypatch.setattr(Pipeline, "__call__", draws)
    (tmp_path / "file").touch()
    code, _, err = run("generate", tiny_bundle, PROMPT, "--out", "file/a.png")
    assert code == 2
    assert "cannot write file" in err


@pytest.mark.parametrize("command", [("inspect",), ("generate", PROMPT)])
def test_what_is_no_bundle(run, tmp_path, command):
    verb, *rest = command
    (tmp_path / "empty").mkdir()
    for path in ("missing", "empty"):
        code, _, err = run(verb, path, *rest)
        assert code == 2
        assert "is not a bundle" in err


def test_a_budget_that_is_too_small_is_told_before_anything_is_drawn(run, tiny_bundle):
    code, out, err = run("generate", tiny_bundle, PROMPT, "--memory", "1MiB")
    assert (code, out) == (2, "")
    assert "1.0 MiB are its budget" in err
    assert run("generate", tiny_bundle, PROMPT, "--memory", "lots")[0] == 2
    assert run("generate", tiny_bundle, PROMPT, "--memory", "1GiB")[0] == 0


def test_a_flipped_byte_is_found(run, tiny_bundle, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_bundle, damaged)
    engine = next((damaged / "engines").glob("decoder-*"))
    data = bytearray(engine.read_bytes())
    data[len(data) // 2] ^= 1
    engine.write_bytes(data)
    code, _, err = run("generate", damaged, PROMPT)
    assert code == 2
    assert f"{engine.name} is damaged" in err


def test_wrong_option_is_the_users_error(run):
    assert run("generate", "bundle", PROMPT, "--seed", "seven")[0] == 2
    assert run("paint")[0] == 2


def test_a_bug_keeps_its_traceback(monkeypatch):
    from fastvar import doctor

    def broken():
        raise InternalError("a broken invariant")

    monkeypatch.setattr(doctor, "examine", broken)
    with pytest.raises(InternalError):
        cli.main(["doctor"])


def test_interrupt_ends_with_130(run, monkeypatch):
    from fastvar import doctor

    monkeypatch.setattr(doctor, "examine", lambda: signal.raise_signal(signal.SIGINT))
    code, out, err = run("doctor")
    assert code == 130
    assert "Traceback" not in out + err


def test_the_installed_command_ends_with_2():
    command = [sys.executable, "-m", "fastvar.cli", "inspect", "missing"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: missing is not a bundle")
    assert "Traceback" not in done.stderr
