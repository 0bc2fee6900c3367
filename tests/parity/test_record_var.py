"""Recordings of a VAR model of which nothing is as published: engines agree with them, and changed numbers do not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvar.export.models.var.reference import VarSampling
from tests.parity.comparison import Comparison, crop
from tests.parity.var import compare_var_folder
from tests.parity.var_engines import compare_var_engines
from tests.record_var import IMAGES, ODD, RUNS, Run, record


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("recorded")
    record(made)
    return made


@pytest.fixture(scope="module")
def comparisons(folder: Path, engine_cache: Path) -> list[Comparison]:
    return [*compare_var_folder(folder), *compare_var_engines(folder, "onnxruntime", engine_cache)]


def changed(folder: Path, out: Path, file: str, **changes: torch.Tensor) -> Path:
    """A copy of a folder with other tensors in one file; names of theirs have two underscores for a full stop."""
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    tensors = load_file(out / file) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file(tensors, out / file)
    return out


@pytest.mark.slow
def test_engines_agree_with_the_recording(comparisons: list[Comparison]):
    assert [c.title for c in comparisons if "engines" in c.title] == [
        "VAR run_hard: onnxruntime engines",
        "VAR run_smooth: onnxruntime engines",
    ]
    assert len(comparisons) == 7
    for comparison in comparisons:
        assert comparison.failures == [], comparison.title
    compared = {name for comparison in comparisons for _, name in comparison.errors}
    assert {"block_out.first16", "logits", "f_hat", "img.center20", "img.stride3", "img.raw.tl20"} <= compared


@pytest.mark.slow
@pytest.mark.parametrize("what", ["s04__block_out_last16", "s03__logits_cfg", "s01__f_hat", "img_center20"])
@pytest.mark.parametrize("image", [0, 1])
def test_a_number_that_is_changed_is_found(folder: Path, tmp_path: Path, engine_cache: Path, what: str, image: int):
    found = load_file(folder / "run_hard.safetensors")[what.replace("__", ".")].clone()
    own = found[image].view(-1)
    own[len(own) // 3] += 0.02
    broken = changed(folder, tmp_path / "broken", "run_hard.safetensors", **{what: found})
    (broken / "run_smooth.safetensors").unlink()
    (engines,) = compare_var_engines(broken, "onnxruntime", engine_cache)
    for comparison in (next(compare_var_folder(broken)), engines):
        assert len(comparison.failures) == 1, comparison.title


@pytest.mark.parametrize("field", ["num_heads", "patch_nums", "top_p", "cfg", "num_classes"])
def test_what_the_manifest_says_counts(folder: Path, tmp_path: Path, field: str):
    other = changed(folder, tmp_path / "other", "run_hard.safetensors")
    data = json.loads((other / "manifest.json").read_text())
    values = {"num_heads": 6, "patch_nums": [1, 2, 3, 5, 7], "top_p": 0.5, "cfg": 2.0, "num_classes": 8}
    data["config"][field] = values[field]
    (other / "manifest.json").write_text(json.dumps(data))
    try:
        failures = [failure for comparison in compare_var_folder(other) for failure in comparison.failures]
    except Exception as error:  # noqa: BLE001 whatever it is, it is told
        failures = [str(error)]
    assert failures


def test_a_tensor_that_is_not_known_is_a_failure(folder: Path, tmp_path: Path):
    other = changed(
        folder, tmp_path / "other", "run_hard.safetensors", img_round9=torch.zeros(1), s01__atlas=torch.ones(1)
    )
    (run, *_) = compare_var_folder(other)
    assert run.mismatches == ["s01.atlas: not a tensor that is known", "img_round9: not a crop that is known"]


def test_runs_of_any_name_are_compared_and_read_their_own_settings(tmp_path: Path):
    config = replace(ODD, unit_queries=True, scales=(1, 2, 4), shared_modulation=True, classes=2)
    runs = {"run_other": Run((0, 1, 1), VarSampling(0.7, 0, 0.8)), "run_hard": RUNS["run_smooth"]}
    runs["run_hard"] = replace(runs["run_hard"], labels=(1,))
    record(tmp_path, config, replace(IMAGES, max_scales=3), runs, seed=5)
    comparisons = list(compare_var_folder(tmp_path))
    assert [c.title for c in comparisons][:2] == ["VAR run_hard: torch reference", "VAR run_other: torch reference"]
    for comparison in comparisons:
        assert comparison.failures == [], comparison.title


def test_of_several_images_the_largest_error_counts():
    seen = Comparison("", {"a": 0.1})
    for value in (0.0, 0.5, 0.2):
        seen.tensor("s00", "a", torch.full((1, 1), value), torch.zeros(1, 1))
    assert seen.errors == {("s00", "a"): 0.5}
    assert len(seen.failures) == 1
    for value in (float("nan"), 0.0):
        seen.tensor("s01", "a", torch.full((1, 1), value), torch.zeros(1, 1))
    assert len(seen.failures) == 2


@pytest.mark.parametrize(("height", "width"), [(128, 128), (33, 50)])
def test_crops_of_any_size(height: int, width: int):
    image = torch.arange(height * width).view(1, 1, height, width)
    for name in ("tl8", "br8", "center8"):
        part = crop(image, name)
        assert part is not None
        assert part.shape == (1, 1, 8, 8)
    assert int(crop(image, "tl8")[0, 0, 0, 0]) == 0
    assert int(crop(image, "br8")[0, 0, -1, -1]) == height * width - 1
    assert int(crop(image, "center8")[0, 0, 0, 0]) == (height - 8) // 2 * width + (width - 8) // 2
    assert torch.equal(crop(image, "stride4"), image[..., ::4, ::4])
    assert torch.equal(crop(image, "tl999"), image)
    assert torch.equal(crop(image, "full"), image)
    assert crop(image, "round8") is None
