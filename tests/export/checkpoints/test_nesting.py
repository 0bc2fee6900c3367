"""State dicts as training programs leave them: found by their keys, under plain names."""

import pytest
import torch

from fastvar.errors import CheckpointError
from fastvar.export.checkpoints.checkpoint import (
    IMAGE_TOKENIZER_KEYS,
    TRANSFORMER_KEYS,
    load_image_tokenizer,
    load_transformer,
    read_transformer,
    transformer_shapes,
)
from fastvar.export.checkpoints.nesting import DEEPEST, StateKeys, find_state, plain_names
from fastvar.export.checkpoints.random_weights import RandomWeights
from fastvar.export.models.registry import ADAPTERS
from fastvar.families.var import VarConfig
from tests.export.checkpoints.test_checkpoint import IMAGES, MODEL, _equal, _image_state, _state

STATE = {"a.weight": torch.ones(2), "b": torch.zeros(1)}
OTHER = {"a.weight": torch.zeros(2), "b": torch.zeros(1)}
VAR = VarConfig(2, 64, 1, 256, 10, 64, 32)


def found(data, keys=TRANSFORMER_KEYS):
    return find_state(data, "w.pth", keys)


NESTED = {
    "plain": (STATE, ""),
    "trainer": ({"trainer": STATE}, "trainer"),
    "VAR": (
        {"trainer": {"config": {}, "var_wo_ddp": STATE, "vae_local": OTHER, "var_opt": {"state": {}}}, "epoch": 1},
        "trainer > var_wo_ddp",
    ),
    "gpt_fsdp": ({"trainer": {"gpt_fsdp": STATE, "gpt_fsdp_opt": {"state": {}}}}, "trainer > gpt_fsdp"),
    "gpt_wo_ddp": ({"trainer": {"gpt_wo_ddp": STATE, "gpt_fsdp": None}}, "trainer > gpt_wo_ddp"),
    "an average alone": ({"trainer": {"gpt_ema_fsdp": STATE}}, "trainer > gpt_ema_fsdp"),
    "state_dict": ({"state_dict": STATE, "callbacks": {}, "optimizer_states": [{"state": {}}]}, "state_dict"),
    "model and numbers": ({"model": STATE, "step": torch.tensor(3), "opt": {"lr": 1.0}}, "model"),
    "model_state_dict": ({"model_state_dict": STATE}, "model_state_dict"),
    "module": ({"module": STATE, "optimizer": None}, "module"),
    "several": ({"state_dict": {"model": {"module": STATE}}}, "state_dict > model > module"),
}  # fmt: skip


@pytest.mark.parametrize("name", NESTED)
def test_a_state_dict_is_found_and_its_keys_are_told(name):
    data, origin = NESTED[name]
    state = found(data)
    _equal(state.tensors, STATE)
    assert state.origin == origin


@pytest.mark.parametrize(
    ("data", "others"),
    [
        ({"trainer": {"gpt_fsdp": OTHER, "gpt_ema_fsdp": STATE}}, "gpt_fsdp"),
        ({"trainer": {"gpt_wo_ddp": OTHER, "gpt_ema_for_vis": STATE}}, "gpt_wo_ddp"),
        ({"model": OTHER, "ema": STATE, "epoch": 3}, "model"),
        ({"model": OTHER, "ema": {"state_dict": STATE}}, "model"),
    ],
)
def test_averaged_weights_come_first_and_it_is_said(data, others):
    state = found(data)
    _equal(state.tensors, STATE)
    assert state.passed_over == (others,)
    assert f", the averaged weights; not {others}" in state.origin


def test_an_average_that_holds_no_tensors_is_none():
    _equal(found({"model": STATE, "ema": {"decay": 0.99}}).tensors, STATE)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"model": STATE, "state_dict": OTHER}, r"2 state dicts: state_dict, model"),
        ({"trainer": {"var_wo_ddp": STATE, "gpt_fsdp": OTHER}}, r"2 state dicts under trainer: .*gpt_fsdp"),
        ({"ema": STATE, "gpt_ema_fsdp": STATE}, r"2 state dicts: gpt_ema_fsdp, ema"),
    ],
)
def test_two_candidates_without_a_rule_are_named(data, named):
    with pytest.raises(CheckpointError, match=named):
        found(data)


def test_what_is_no_state_dict_is_named_with_the_keys_that_would_do():
    with pytest.raises(CheckpointError, match=r"entries that are not tensors: net, step") as caught:
        found({"net": STATE, "step": 3})
    assert "(dictionaries: net)" in str(caught.value)
    assert "state_dict, model, model_state_dict, module" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"\(trainer\) holds 1 entries that are not tensors: step"):
        found({"trainer": {**STATE, "step": 3}})
    with pytest.raises(CheckpointError, match="holds no state dict but a list"):
        found([STATE])


def test_dictionaries_without_end_end():
    data = {"model": STATE}
    data["model"] = data
    with pytest.raises(CheckpointError):
        found(data)
    deep = STATE
    for _ in range(DEEPEST - 1):
        deep = {"model": deep}
    _equal(found(deep).tensors, STATE)


def test_the_image_tokenizer_in_a_trainer_is_its_own():
    data = {"trainer": {"var_wo_ddp": OTHER, "vae_local": STATE}}
    _equal(found(data, IMAGE_TOKENIZER_KEYS).tensors, STATE)


WRAPPED = {
    "module.": lambda name: f"module.{name}",
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "_fsdp_wrapped_module.": lambda name: f"_fsdp_wrapped_module.{name}",
    "stacked": lambda name: f"module._orig_mod._fsdp_wrapped_module.{name}",
    "twice": lambda name: f"module.module.{name}",
    "anywhere": lambda name: name.replace("module.0.", "module.0._fsdp_wrapped_module._orig_mod."),
    "round a layer": lambda name: name.replace("sa.", "module.sa."),
    "checkpointed layers": lambda name: name.replace("module.0.", "module.0._checkpoint_wrapped_module."),
    "round a list": lambda name: name.replace(".module.", "._fsdp_wrapped_module.module."),
}


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_wrappers_are_taken_out_of_names(tmp_path, wrapped):
    """`module.` with a number behind it is an official part of names."""
    state = _state()
    assert any(".module.0." in name for name in state)
    torch.save({WRAPPED[wrapped](name): tensor for name, tensor in state.items()}, tmp_path / "w.pth")
    config, weights = load_transformer(tmp_path / "w.pth")
    assert config == MODEL
    _equal(weights, state)


def test_two_names_that_become_one():
    with pytest.raises(CheckpointError, match=r"two tensors a\.weight, one of them as module\.a\.weight"):
        plain_names({"a.weight": STATE["b"], "module.a.weight": STATE["b"]}, "w.pth")


def test_names_that_only_look_wrapped():
    names = ("my_module.weight", "x_orig_mod.weight", "blocks.module.3.weight", "module")
    assert list(plain_names(dict.fromkeys(names, STATE["b"]), "w.pth")) == list(names)


def test_a_training_checkpoint_of_each_program(tmp_path):
    var = dict(RandomWeights(transformer_shapes(VAR)))
    torch.save({"trainer": {"config": {"patch_nums": (1, 2)}, "var_wo_ddp": var, "vae_local": {}}}, tmp_path / "v.pth")
    assert load_transformer(tmp_path / "v.pth")[0] == VAR
    average = {name: tensor + 1 for name, tensor in _state().items()}
    torch.save({"trainer": {"gpt_fsdp": _state(), "gpt_ema_fsdp": average}}, tmp_path / "i.pth")
    read = read_transformer(tmp_path / "i.pth")
    _equal(read.weights, average)
    assert read.nested == "trainer > gpt_ema_fsdp, the averaged weights; not gpt_fsdp"


@pytest.mark.parametrize("prefix", ["", "vae.", "module.", "module.vae."])
def test_an_image_tokenizer_within_a_model_that_holds_it(tmp_path, prefix):
    state = {prefix + name: tensor for name, tensor in _image_state().items()}
    extras = {f"{prefix.removesuffix('vae.')}discriminator.main.0.weight": torch.zeros(2)}
    torch.save(state | extras, tmp_path / "w.pth")
    config, weights = load_image_tokenizer(tmp_path / "w.pth", ADAPTERS["infinity"])
    assert config == IMAGES
    _equal(weights, _image_state())


def test_keys_of_one_rank_have_no_order():
    keys = StateKeys(trained=("one", "two"))
    assert keys.ranks[1] == ("one", "two")
    _equal(find_state({"two": STATE, "model": OTHER}, "w.pth", keys).tensors, STATE)
