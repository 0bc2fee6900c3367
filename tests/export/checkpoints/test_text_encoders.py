"""Text encoders that are not as published: quantised, described wrongly, or with a tokenizer of another model."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fastvar.core.plan import make_plan
from fastvar.core.policy import DENSE
from fastvar.core.schedule import ScaleSchedule
from fastvar.errors import CheckpointError, FastvarError
from fastvar.export.build import build_bundle
from fastvar.export.checkpoints.checkpoint import Checkpoint
from fastvar.export.checkpoints.text_encoders import load_text_encoder
from fastvar.export.checkpoints.tokenizer_files import check_tokenizer
from fastvar.families.base import PromptFormat
from tests.conftest import REPOSITORY, TOKENIZER
from tests.export.models.hart.test_checkpoint import encoder_config, encoder_weights, write_encoder

DEMO = REPOSITORY / "demo" / "checkpoint" / "text_encoder"
QUERY = "encoder.block.0.layer.0.SelfAttention.q.weight"


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint_folder: Path) -> Path:
    """A T5 folder; read only."""
    return tiny_checkpoint_folder / "text_encoder"


@pytest.fixture
def copy(t5: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(t5, tmp_path / "text_encoder"))


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen2") / "text_encoder"
    write_encoder(folder, encoder_weights(), encoder_config().to_json_string())
    return folder


def store(folder: Path, **changes: Any) -> None:
    """Tensors in place of those of a folder; None leaves one out. Names have two underscores for a full stop."""
    state = load_file(folder / "model.safetensors") | {n.replace("__", "."): t for n, t in changes.items()}
    state = {name: tensor.clone() for name, tensor in state.items() if tensor is not None}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def describe(folder: Path, **changes: Any) -> None:
    data = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(data))


def test_scaled_float8_is_multiplied_out(copy: Path):
    true = load_text_encoder(copy)[1][QUERY].float()
    scale = true.abs().max() / 448
    parent = QUERY.removesuffix("weight")
    store(copy, **{QUERY: (true / scale).to(torch.float8_e4m3fn), parent + "scale_weight": scale.reshape(())})
    found = load_text_encoder(copy)[1][QUERY]
    assert 0 < (found - true).norm() < 0.05 * true.norm()


@pytest.mark.parametrize(
    "beside",
    [{}, {"SCB": torch.ones(64)}, {"weight_scale_inv": torch.ones(7)}, {"weight__absmax": torch.ones(4)}],
    ids=str,
)
def test_other_quantised_tensors_are_refused(copy: Path, beside: dict[str, torch.Tensor]):
    parent = QUERY.removesuffix("weight")
    values = load_file(copy / "model.safetensors")[QUERY]
    store(copy, **{QUERY: values.to(torch.float8_e4m3fn)}, **{parent + name: t for name, t in beside.items()})
    with pytest.raises(CheckpointError, match=r"stored in 8 bits without a scale|not understood"):
        load_text_encoder(copy)
    store(copy, **{QUERY: values, parent + "left": torch.ones(2)})
    with pytest.raises(CheckpointError):
        load_text_encoder(copy)


def test_a_tensor_that_nobody_reads_is_told(copy: Path):
    store(
        copy,
        encoder__block__0__extra=torch.ones(2),
        decoder__block__0__any=torch.ones(2),
        lm_head__weight=torch.ones(2),
    )
    with pytest.raises(CheckpointError, match=r"1 tensors not part of the model: encoder\.block\.0\.extra"):
        load_text_encoder(copy)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float64, torch.complex64], ids=str)
def test_types_that_are_no_weights(copy: Path, dtype: torch.dtype):
    store(copy, **{QUERY: load_file(copy / "model.safetensors")[QUERY].to(dtype)})
    with pytest.raises(CheckpointError, match="of another type"):
        load_text_encoder(copy)


def test_an_embedding_of_two_names_must_be_one(copy: Path):
    shared = load_file(copy / "model.safetensors")["shared.weight"]
    store(copy, shared__weight=None, encoder__embed_tokens__weight=shared)
    assert torch.equal(load_text_encoder(copy)[1]["shared.weight"], shared)
    store(copy, shared__weight=shared * 2)
    with pytest.raises(CheckpointError, match="different tensors"):
        load_text_encoder(copy)


def test_other_layouts_of_the_same_weights(copy: Path, t5: Path):
    _, expected, *_ = load_text_encoder(t5)
    state = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(state, copy / "pytorch_model.bin")
    found = load_text_encoder(copy)[1]
    names = sorted(state)
    for part in range(2):
        save_file({n: state[n] for n in names[part::2]}, copy / f"m-{part}.safetensors")
    index = {n: f"m-{i % 2}.safetensors" for i, n in enumerate(names)}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (copy / "pytorch_model.bin").unlink()
    for weights in (found, load_text_encoder(copy)[1]):
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


# config.json


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
            "quantised \\('bitsandbytes'\\)",
        ),
        ({"quantization_config": 8}, "quantised"),
        ({"d_model": "128"}, "says d_model '128'\nexpected: a positive whole number"),
        ({"d_model": 64}, "says d_model 64\nexpected: 128, as its tensors have"),
        ({"num_layers": 10**9}, "says num_layers 1000000000"),
        ({"feed_forward_proj": "gated-none"}, "says feed_forward_proj 'gated-none'"),
        ({"feed_forward_proj": "relu"}, "says feed_forward_proj 'relu'\nexpected: 'gated-relu' or"),
        ({"dense_act_fn": "relu"}, "says dense_act_fn 'relu'\nexpected: 'gelu_new'"),
        ({"layer_norm_epsilon": math.inf}, "says layer_norm_epsilon inf"),
        ({"relative_attention_max_distance": 3}, "relative_attention_max_distance"),
        ({"model_type": ["t5"]}, "of type"),
    ],
)
def test_descriptions_that_are_wrong_are_told(copy: Path, change: dict[str, Any], problem: str):
    describe(copy, **change)
    with pytest.raises(CheckpointError, match=problem):
        load_text_encoder(copy)


def test_what_says_nothing_of_the_numbers_is_not_looked_at(copy: Path, t5: Path):
    expected, weights, *_ = load_text_encoder(t5)
    describe(copy, return_dict=False, is_decoder=True, dropout_rate="x", pruned_heads={"0": [1]}, dtype="int3")
    found, others, *_ = load_text_encoder(copy)
    assert found.to_dict() == expected.to_dict()
    assert all(torch.equal(others[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"num_attention_heads": 3}, "32 does not divide into 3"),
        ({"num_attention_heads": None}, "says num_attention_heads None"),
        ({"num_key_value_heads": 4}, "says num_key_value_heads 4\nexpected: 2"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "says rope_type 'yarn'"),
        ({"rope_parameters": {"rope_type": "default"}}, "has no rope_theta"),
        ({"rope_parameters": [1]}, r"says rope_parameters \[1\]"),
        ({"rope_theta": 5.0}, "says rope_theta 5.0 and 1000000.0"),
        ({"use_sliding_window": True}, "says use_sliding_window True"),
        ({"hidden_act": "softplus"}, "says hidden_act 'softplus'"),
    ],
)
def test_descriptions_of_qwen2_that_are_wrong_are_told(
    qwen2: Path, tmp_path: Path, change: dict[str, Any], problem: str
):
    folder = Path(shutil.copytree(qwen2, tmp_path / "te"))
    describe(folder, **change)
    with pytest.raises(CheckpointError, match=problem):
        load_text_encoder(folder)


ODD = st.sampled_from(
    [None, True, False, "", "128", -1, 0, 1, 3, 10**9, 10**30, 1e300, math.nan, math.inf, [], {}, [1], {"a": 1}]
)
JSON = ODD | st.recursive(
    st.integers() | st.floats() | st.text(max_size=4), lambda x: st.lists(x, max_size=3), max_leaves=4
)


@pytest.mark.parametrize("kind", ["t5", "qwen2"])
@settings(max_examples=150, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_description_says_it_is_read_or_refused_in_words(
    kind: str, data: st.DataObject, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
):
    source = request.getfixturevalue(kind)
    folder = tmp_path_factory.getbasetemp() / f"fuzzed-{kind}"
    if not folder.exists():
        shutil.copytree(source, folder)
    description = json.loads((source / "config.json").read_text())
    name = data.draw(st.sampled_from(sorted(description)) | st.text(max_size=6) | st.just("quantization_config"))
    leaf, value = description.get(name), data.draw(JSON)
    if isinstance(leaf, dict) and leaf and data.draw(st.booleans()):
        description[name] = {**leaf, data.draw(st.sampled_from(sorted(leaf))): value}
    else:
        description[name] = value
    (folder / "config.json").write_text(json.dumps(description))
    try:
        _, weights, *_ = load_text_encoder(folder)
    except FastvarError:
        return
    _, expected, *_ = load_text_encoder(source)
    assert all(torch.equal(weights[n], tensor) for n, tensor in expected.items())


# tokenizer.json


def tokenizer(tmp_path: Path, change: Any) -> Path:
    data = json.loads(TOKENIZER.read_text())
    change(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    return tmp_path / "tokenizer.json"


def _template(data: dict[str, Any]) -> None:
    data["post_processor"]["special_tokens"]["</s>"]["ids"] = [41]


CHANGES = {
    "a word": lambda d: d["model"]["vocab"].update(atlas=40),
    "an added token": lambda d: d["added_tokens"].append({**d["added_tokens"][0], "id": 70, "content": "<extra>"}),
    "what ends every prompt": _template,
    "inside a sequence": lambda d: (
        _template(d),
        d.update(post_processor={"type": "Sequence", "processors": [d["post_processor"]]}),
    ),
    "of BERT's kind": lambda d: d.update(
        post_processor={"type": "BertProcessing", "sep": ["</s>", 99], "cls": ["</s>", 1]}
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_ids_beyond_the_embedding_are_refused(tmp_path: Path, change: Any):
    path = tokenizer(tmp_path, change)
    with pytest.raises(CheckpointError, match=r"ids beyond the text encoder's embedding of 40 rows: (40|70|41|99)"):
        check_tokenizer(path, 40, PromptFormat())
    check_tokenizer(path, 100, PromptFormat())


def test_the_id_of_padding_must_be_a_row_too():
    check_tokenizer(TOKENIZER, 40, PromptFormat(pad_id=39))
    with pytest.raises(CheckpointError, match="40 \\('padding'\\)"):
        check_tokenizer(TOKENIZER, 40, PromptFormat(pad_id=40))


@pytest.mark.parametrize(
    "content",
    [
        '{"model": {"type": "WordLevel"}}',
        '{"model": {"type": "New"}}',
        '{"version": "9", "model": null}',
        "{}",
        "[",
        '{"model": []}',
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_refused_before_anything_is_traced(
    tiny_checkpoint: Checkpoint, tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    monkeypatch.setattr("fastvar.export.factory.EngineFactory.make", lambda *_: pytest.fail("traced"))
    schedule = ScaleSchedule(((1, 1), (2, 2)), (64, 64))
    broken = replace(tiny_checkpoint, tokenizer_file=path)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        build_bundle(broken, make_plan(schedule, DENSE, 2), tmp_path / "b")
    tokenizer(tmp_path, CHANGES["a word"])
    with pytest.raises(CheckpointError, match="beyond the text encoder's embedding"):
        build_bundle(broken, make_plan(schedule, DENSE, 2), tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.skipif(not DEMO.is_dir(), reason="the demo's checkpoint is not here")
def test_the_demo_goes_through():
    config, _, path, prompt_format = load_text_encoder(DEMO)
    check_tokenizer(path, config.vocab_size, prompt_format)
