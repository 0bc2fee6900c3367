"""One plain file of any checkpoint: equal tensors, official names, whole or not at all."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fastvar
from fastvar.errors import BundleError, CheckpointError, NumericsError
from fastvar.export.checkpoints.checkpoint import load_checkpoint, read_transformer
from tests.export.checkpoints.test_checkpoint import _equal
from tests.models import tiny_layouts as tiny

STATE = tiny.transformer(tiny.INFINITY_2B)


def test_a_training_checkpoint(tmp_path):
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in STATE.items()}
    other = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}
    torch.save({"trainer": {"gpt_ema_fsdp": wrapped, "gpt_fsdp": other}, "epoch": 3}, tmp_path / "last.pth")
    report = fastvar.convert(tmp_path / "last.pth", tmp_path / "plain.safetensors")
    _equal(load_file(tmp_path / "plain.safetensors"), STATE)
    assert (report.part, report.family, report.tensors) == ("transformer", "infinity", len(STATE))
    assert report.origin == "last.pth (trainer > gpt_ema_fsdp, the averaged weights; not gpt_fsdp)"
    assert report.size_bytes == (tmp_path / "plain.safetensors").stat().st_size
    _equal(read_transformer(tmp_path / "plain.safetensors").weights, STATE)


@pytest.mark.parametrize("pickled", [True, False])
def test_shards_become_one_file(tmp_path, pickled):
    folder = tiny.infinity_8b(tmp_path / "Infinity", pickled)
    index = next((folder / "infinity_8b_weights").glob("*.index.json"))
    for source, out in ((folder, "a"), (folder / "infinity_8b_weights", "b"), (index, "c")):
        report = fastvar.convert(source, tmp_path / f"{out}.safetensors")
        _equal(load_file(tmp_path / f"{out}.safetensors"), tiny.transformer(tiny.INFINITY_8B))
        assert report.settings == folder / "infinity_8b_weights" / "config.json"


def test_no_more_than_a_tensor_is_held_while_it_is_written(tmp_path, monkeypatch):
    """Tensors that are made when they are asked for are made one by one, for the file as for the checks."""
    from fastvar.export.checkpoints.stored_numbers import Scaled

    alive, most = set(), 0
    make = Scaled.tensor

    def counted(self):
        nonlocal most
        tensor = make(self)
        alive.add(id(tensor))
        most = max(most, len(alive))
        torch_finalize(tensor, alive.discard, id(tensor))
        return tensor

    from weakref import finalize as torch_finalize

    monkeypatch.setattr(Scaled, "tensor", counted)
    scaled = {}
    for name, tensor in STATE.items():
        if tensor.dim() > 1 and name.endswith("weight"):
            scaled |= {name: (tensor.float() * 64).to(torch.float8_e4m3fn), f"{name}_scale": torch.tensor(1 / 64)}
        else:
            scaled[name] = tensor
    save_file(scaled, tmp_path / "fp8.safetensors")
    fastvar.convert(tmp_path / "fp8.safetensors", tmp_path / "plain.safetensors")
    written = load_file(tmp_path / "plain.safetensors")
    assert 0 < most <= 2
    assert all(written[n].dtype == torch.float32 for n in scaled if f"{n}_scale" in scaled)


def test_an_image_tokenizer(tmp_path):
    folder = tiny.var(tmp_path / "var")
    report = fastvar.convert(folder / "vae_ch160v4096z32.pth", tmp_path / "vae.safetensors")
    assert (report.part, report.family) == ("image tokenizer", "var")
    _equal(load_file(tmp_path / "vae.safetensors"), tiny.images(tiny.VQ, "var"))


def test_the_converted_file_takes_the_place_of_the_original(tmp_path):
    folder = tiny.infinity_2b(tmp_path / "Infinity")
    old = load_checkpoint(folder)
    fastvar.convert(folder, folder / "infinity_2b_reg.safetensors")
    (folder / "infinity_2b_reg.pth").unlink()
    new = load_checkpoint(folder)
    assert new.name == old.name == "infinity_2b"
    _equal(new.transformer_weights, dict(old.transformer_weights))


def lora(folder: Path, name: str) -> torch.Tensor:
    """A LoRA as PEFT writes it; gives what it adds at scale 1."""
    folder.mkdir()
    outputs, inputs = STATE[f"{name}.weight"].shape
    down, up = torch.randn(2, inputs), torch.randn(outputs, 2)
    halves = {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
    save_file(halves, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    return 2 * up @ down


def test_a_lora_is_merged(tmp_path):
    name = "block_chunks.0.module.0.sa.mat_qkv"
    added = lora(tmp_path / "lora", name)
    torch.save(STATE, tmp_path / "w.pth")
    report = fastvar.convert(tmp_path / "w.pth", tmp_path / "o.safetensors", lora=tmp_path / "lora", scale=0.25)
    found, weight = load_file(tmp_path / "o.safetensors"), STATE[f"{name}.weight"]
    _equal(found, STATE | {f"{name}.weight": (weight.float() + 0.25 * added).to(weight.dtype)})
    assert report.changed == 1


BAD = {
    "is not named as what is written": ("w.pth", "o.bin", {}),
    "is there already": ("w.pth", "w.safetensors", {}),
    "is no folder": ("w.pth", "nowhere/o.safetensors", {}),
    "not a transformer of a family": ("other.pth", "o.safetensors", {}),
    "scale nan": ("w.pth", "o.safetensors", {"scale": float("nan")}),
}


@pytest.mark.parametrize("message", BAD)
def test_nothing_is_written_where_something_is_wrong(tmp_path, message):
    source, out, options = BAD[message]
    torch.save(STATE, tmp_path / "w.pth")
    torch.save({"a": torch.ones(2)}, tmp_path / "other.pth")
    save_file({"a": torch.ones(2)}, tmp_path / "w.safetensors")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=message):
        fastvar.convert(tmp_path / source, tmp_path / out, **options)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_merge_that_overflows_leaves_no_file(tmp_path):
    lora(tmp_path / "lora", "head")
    torch.save(STATE, tmp_path / "w.pth")
    with pytest.raises(NumericsError, match=r"head\.weight"):
        fastvar.convert(tmp_path / "w.pth", tmp_path / "o.safetensors", lora=tmp_path / "lora", scale=1e9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "w.pth"]


def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    from fastvar.engines.bundle import weight_file

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    torch.save(STATE, tmp_path / "w.pth")
    monkeypatch.setattr(weight_file._Writer, "write", full)
    with pytest.raises(BundleError, match="No space left"):
        fastvar.convert(tmp_path / "w.pth", tmp_path / "o.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


def test_on_the_command_line(run, tmp_path):
    folder = tiny.var(tmp_path / "var", depths=(16, 30))
    code, out, err = run("convert", folder, "--model", "var_d30", "--out", "o.safetensors")
    assert (code, err) == (0, "")
    assert "wrote o.safetensors: transformer of var, from var_d30.pth" in out
    assert f"copy {folder / 'config.json'} beside it" in out
    with safe_open(tmp_path / "o.safetensors", "pt") as file:
        assert set(file.keys()) == set(tiny.transformer(tiny.VAR))
    for given, message in {
        (folder,): "could be the transformer",
        ("missing.pth",): "no checkpoint missing.pth",
        (folder, "--model", "var_d30", "--scale", 2): "--scale goes with --lora",
    }.items():
        code, _, err = run("convert", *given, "--out", "p.safetensors")
        assert code == 2
        assert message in err
