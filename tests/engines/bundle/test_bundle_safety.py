"""What a bundle from somebody else must not do: lead outside its folder, or run code unasked."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from fastvar.engines.bundle.bundle import Bundle, BundleWriter, Opening
from fastvar.engines.bundle.files import hub_model
from fastvar.engines.cache import lock as lock_module
from fastvar.engines.cache.engine_cache import save_shared
from fastvar.engines.cache.lock import FolderLock
from fastvar.engines.onnxruntime.backend import OnnxRuntimeBackend
from fastvar.engines.registry import BACKEND_NAMES, backend_class
from fastvar.errors import BackendError, BundleError
from tests.models.small_bundle import graph, linear_spec, make_bundle, tensor, write_bundle

FILES = ("weights.safetensors", "tokenizer.json", "manifest.json", "engines")


# Links


@pytest.mark.parametrize("file", FILES)
def test_links_that_lead_outside(tmp_path, file):
    make_bundle(tmp_path / "b")
    (tmp_path / "b" / file).rename(tmp_path / "elsewhere")
    (tmp_path / "b" / file).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="is a link that leads outside its bundle") as caught:
        Bundle.open(tmp_path / "b")
    assert "copy the file itself" in caught.value.fix


def test_links_inside_the_bundle_and_to_the_bundle_are_followed(tmp_path):
    make_bundle(tmp_path / "b")
    (tmp_path / "b" / "tokenizer.json").rename(tmp_path / "b" / "engines" / "other")
    (tmp_path / "b" / "tokenizer.json").symlink_to("engines/other")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    assert Bundle.open(tmp_path / "link").manifest.model == "small"


def test_links_in_a_circle(tmp_path):
    make_bundle(tmp_path / "b")
    (tmp_path / "b" / "tokenizer.json").unlink()
    (tmp_path / "b" / "tokenizer.json").symlink_to("tokenizer.json")
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.open(tmp_path / "b")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes there")
def test_a_pipe_in_the_place_of_a_file_does_not_block(tmp_path):
    make_bundle(tmp_path / "b")
    (tmp_path / "b" / "tokenizer.json").unlink()
    os.mkfifo(tmp_path / "b" / "tokenizer.json")
    with pytest.raises(BundleError, match="is no file"):
        Bundle.open(tmp_path / "b")


# Hugging Face hub caches


def in_hub_cache(root: Path, source: Path, revision: str = "abc123", model: str = "models--org--tiny") -> Path:
    """The files of a bundle as the hub keeps them: blobs, and a snapshot of links to them."""
    blobs, snapshot = root / model / "blobs", root / model / "snapshots" / revision
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in source.rglob("*") if path.is_file())):
        shutil.copy(file, blobs / str(number))
        link = snapshot / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    return snapshot


def aot_bundle(out: Path) -> Path:
    """A bundle that says that its engines are compiled programs."""
    with BundleWriter(out) as writer:
        manifest = write_bundle(writer)
        (spec,) = manifest.engines.values()
        object.__setattr__(spec, "backend", "aotinductor")
        writer.commit(manifest)
    return out


def test_links_of_a_hub_cache_to_its_own_blobs_are_followed(tmp_path):
    make_bundle(tmp_path / "b")
    snapshot = in_hub_cache(tmp_path / "hub", tmp_path / "b")
    assert hub_model(snapshot) == tmp_path / "hub" / "models--org--tiny"
    assert hub_model(tmp_path / "b") is None
    assert Bundle.open(snapshot, verify="all").manifest.model == "small"


def test_links_of_a_hub_cache_to_another_model_are_not(tmp_path):
    make_bundle(tmp_path / "b")
    snapshot = in_hub_cache(tmp_path / "hub", tmp_path / "b")
    other = in_hub_cache(tmp_path / "hub", tmp_path / "b", model="models--org--other")
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to((other / "tokenizer.json").resolve())
    with pytest.raises(BundleError, match="leads outside its bundle"):
        Bundle.open(snapshot)


def test_native_code_from_a_hub_is_run_only_when_asked_for(tmp_path):
    local = aot_bundle(tmp_path / "b")
    snapshot = in_hub_cache(tmp_path / "hub", local)
    with pytest.raises(BundleError, match="came from a hub and holds native code") as caught:
        Bundle.open(snapshot)
    assert "trust_remote_code=True (--trust-remote-code)" in caught.value.expected
    assert Bundle.open(snapshot, trust_remote_code=True).holds_native_code
    assert Bundle.open(local).holds_native_code, "a local folder was put there by its user"


def test_who_asks_for_nothing_trusts_nothing(tmp_path):
    """As another process is told to open a bundle."""
    snapshot = in_hub_cache(tmp_path / "hub", aot_bundle(tmp_path / "b"))
    assert Opening() == Opening("auto", trust_remote_code=False, public_key=None)
    with pytest.raises(BundleError, match="came from a hub and holds native code"):
        Bundle.open_with(snapshot, Opening())


def test_a_hub_bundle_of_graphs_needs_no_trust(tmp_path):
    make_bundle(tmp_path / "b")
    assert not Bundle.open(in_hub_cache(tmp_path / "hub", tmp_path / "b")).holds_native_code


def test_kernels_are_not_written_into_a_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVAR_CACHE", str(tmp_path / "cache"))
    make_bundle(tmp_path / "b")
    snapshot = in_hub_cache(tmp_path / "hub", tmp_path / "b")
    assert Bundle.open(snapshot).kernel_folder == tmp_path / "cache" / "kernels"
    assert Bundle.open(tmp_path / "b").kernel_folder == tmp_path / "b" / "kernels"


def test_which_backends_run_code():
    native = {name for name in BACKEND_NAMES if backend_class(name).native_code}
    assert native == set(BACKEND_NAMES) - {"onnxruntime"}


@pytest.mark.parametrize(("command", "asks"), [("inspect", False), ("generate", True), ("profile", True)])
def test_commands_ask_for_trust_where_they_run_something(run, tmp_path, command, asks):
    snapshot = in_hub_cache(tmp_path / "hub", aot_bundle(tmp_path / "b"))
    prompt = ["a red circle"] if command == "generate" else []
    _, out, err = run(command, snapshot, *prompt)
    assert ("holds native code" in err) is asks
    if asks:
        _, out, err = run(command, snapshot, *prompt, "--trust-remote-code")
        assert "holds native code" not in out + err


def test_an_engine_reads_no_file_beside_it(tmp_path, monkeypatch):
    """ONNX can name files that hold its constants; a bundle's engines are bytes, and have none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="secret")
    model = graph([helper.make_node("Add", ["x", "w"], ["y"])], [tensor("x", [4])], [tensor("y", [4])])
    onnx_model = __import__("onnx").load_from_string(model)
    onnx_model.graph.initializer.append(weight)
    backend = OnnxRuntimeBackend()
    with pytest.raises(BackendError, match="cannot load engine"):
        backend.load(onnx_model.SerializeToString(), linear_spec(backend.version()))


# Locks


@pytest.mark.skipif(os.name == "nt", reason="no locks there")
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_systems_without_locks(tmp_path, monkeypatch, caplog, code):
    def refuse(*_arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lock_module.fcntl, "flock", refuse)
    with pytest.raises(BundleError, match="cannot be locked") as caught:
        make_bundle(tmp_path / "b")
    assert caught.value.expected == "a file system that locks files"
    assert "local disk" in caught.value.fix
    assert not (tmp_path / "b").exists()
    save_shared(tmp_path / "timings", b"data")  # which only saves time
    assert "is not saved" in caplog.text


@pytest.mark.skipif(os.name == "nt", reason="no locks there")
def test_a_lock_that_fails_otherwise(tmp_path, monkeypatch):
    def refuse(*_arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(lock_module.fcntl, "flock", refuse)
    with pytest.raises(BundleError, match="Input/output error"):
        FolderLock(tmp_path / "b").acquire()


# The manifest


def edited(tmp_path: Path, **changes: object) -> Path:
    make_bundle(tmp_path / "b")
    path = tmp_path / "b" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return tmp_path / "b"


def test_a_manifest_that_was_changed_after_the_build(tmp_path):
    """A change that makes sense, and would draw other images."""
    bundle = edited(tmp_path, sampling={"guidance_scale": 3.0, "tau": 0.5, "top_p": 0.97, "top_k": None})
    with pytest.raises(BundleError, match="was changed after it was written: its checksum is another"):
        Bundle.open(bundle)


def test_a_manifest_of_before_there_were_checksums(tmp_path):
    bundle = edited(tmp_path)
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    assert len(data.pop("checksum")) == 64
    path.write_text(json.dumps(data))
    assert Bundle.open(bundle).manifest.model == "small"


def test_a_manifest_that_is_written_otherwise_is_the_same(tmp_path):
    bundle = edited(tmp_path)
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(data.items())), separators=(",", ":"), ensure_ascii=False))
    assert Bundle.open(bundle).manifest.model == "small"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"address_alignment": 3}, "multiples of 3"),
        ({"text_encoder": "nowhere"}, "no engine 'nowhere'"),
        ({"decoder": ""}, "no engine ''"),
        ({"text_length": -1}, "texts of -1 tokens"),
        ({"sets": []}, "0 guidance rows|guidance rows"),
        ({"engines": {}}, "no engines|no engine"),
        ({"model": 3}, "model: Expected `str`, got `int`"),
        ({"precision": {"compute": "float33", "weights": "", "activations": ""}}, "computes in 'float33'"),
        ({"prompt_format": {"prefix": "", "pad_id": 0, "pad_left": 0, "keeps_padding": False}}, "Expected `bool`"),
        ({"prompt_format": {"prefix": "", "pad_right": True}}, "unknown entries"),
        ({"tiles": {"rows": 1, "stripes": 1 << 40, "stages": []}}, "whole and tiled"),
    ],
)
def test_manifests_that_do_not_hold_together(tmp_path, changes, match):
    with pytest.raises(BundleError, match=match):
        Bundle.open(edited(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"depth": 1 << 40}, "layers"),
        ({"first_tokens": 9}, "first scale has 9 tokens"),
        ({"schedule": {"sizes": [[1, 1], [9999, 9999]], "rope_grid": [1, 1]}}, "up to 9999 tokens wide"),
        ({"schedule": {"sizes": [[1, 1]] * 65, "rope_grid": [1, 1]}}, "65 scales"),
        ({"policy": {"name": "p", "layers": [0, 1], "restore_scale": 1, "scale": {"6": {"keep": "half"}}}}, "float"),
        ({"policy": {"name": "p", "layers": [0, 1], "restore_scale": 1, "scale": {"six": {"keep": 0.5}}}}, "whole num"),
        ({"policy": {"name": "p", "layers": [0, 1], "restore_scale": 1, "scale": {"6": {"drop": 0.5}}}}, "unknown"),
        ({"policy": {"name": "p", "layers": [0], "restore_scale": None, "scale": {}}}, "length 2"),
    ],
)
def test_plans_and_policies_that_are_none(tmp_path, changes, match):
    bundle = edited(tmp_path)
    plan = json.loads((bundle / "manifest.json").read_text())["plan"]
    schedule = {**plan["schedule"], **changes.get("schedule", {})}
    with pytest.raises(BundleError, match=match):
        Bundle.open(edited(tmp_path, plan={**plan, **changes, "schedule": schedule}))


def test_a_manifest_of_absurd_length_is_not_read(tmp_path, monkeypatch):
    from fastvar.engines.bundle import files as bundle_files

    make_bundle(tmp_path / "b")
    monkeypatch.setattr(bundle_files, "MOST_MANIFEST_BYTES", 100)
    with pytest.raises(BundleError, match="more than 100 bytes"):
        Bundle.open(tmp_path / "b")
