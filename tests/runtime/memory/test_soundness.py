"""What a bundle's engines, weights and plan must agree on; test_layout.py plays layouts in full."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fastvar.engines.bundle.bundle import Bundle
from fastvar.engines.bundle.manifest import Manifest
from fastvar.engines.bundle.weight_file import WeightFile
from fastvar.engines.spec import EngineSpec, TensorSpec
from fastvar.errors import BundleError
from fastvar.runtime.memory.layout import build_layout
from fastvar.runtime.memory.soundness import check_weights, sound_layout


@pytest.fixture(scope="module")
def bundle(editing_bundle: Path) -> Bundle:
    return Bundle.open(editing_bundle)


def with_engine(m: Manifest, name: str, **changes: object) -> Manifest:
    return replace(m, engines={**m.engines, name: replace(m.engines[name], **changes)})


def reshaped(spec: EngineSpec, name: str, /, **changes: object) -> dict[str, object]:
    """An engine's tensors, with one in another shape or type."""

    def change(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(replace(t, **changes) if t.name == name else t for t in tensors)

    return {"inputs": change(spec.inputs), "outputs": change(spec.outputs)}


def checked(m: Manifest) -> None:
    for engine_set in m.sets:
        sound_layout(m, engine_set.rows)


def test_a_built_bundle_is_sound(bundle: Bundle):
    checked(bundle.manifest)
    layouts = [build_layout(bundle.manifest, rows) for rows in (2, 1)]
    check_weights(bundle.manifest, layouts, bundle.weights)
    brought = [sound_layout(bundle.manifest, rows, offload_text_encoder=True) for rows in (2, 1)]
    check_weights(bundle.manifest, brought, bundle.weights)


@pytest.mark.parametrize(
    ("role", "tensor", "changes"),
    [
        ("attn_mlp", "x_out", {"shape": (2, 32)}),
        ("attn_mlp", "x", {"dtype": "int32"}),
        ("attn_mlp", "q", {"shape": (2, 1, 32)}),
        ("attn_mlp", "keys", {"shape": (3, 4, 32)}),
        ("attn_mlp", "modulation", {"dtype": "float16"}),
        ("qkv", "values", {"shape": (1, 4, 16)}),
        ("sampling_head", "noise", {"shape": (2, 8)}),
        ("sampling_head", "tau", {"shape": (2,)}),
        ("sampling_head", "noise", {"name": "residual_noise"}),
        ("sampling_head", "summed", {"shape": (1, 8, 16, 17)}),
        ("sampling_head", "x_next", {"shape": (8, 128)}),
    ],
)
def test_a_tensor_that_is_read_otherwise_than_it_was_written(bundle: Bundle, role: str, tensor: str, changes: dict):
    m = bundle.manifest
    name = getattr(m.sets[0].steps[0], role)
    with pytest.raises(BundleError, match=r"the bundle is inconsistent: engine '"):
        checked(with_engine(m, name, **reshaped(m.engines[name], tensor, **changes)))


@pytest.mark.parametrize("role", ["sampling_head", "qkv", "attn_mlp", "qkv_pruned", "attn_mlp_pruned"])
def test_every_engine_is_of_its_role_and_of_its_scale(bundle: Bundle, role: str):
    """Any engine of the bundle in another's place is refused, unless both do the same."""
    m = bundle.manifest
    engine_set = m.sets[0]
    for position, step in enumerate(engine_set.steps):
        for name, spec in m.engines.items():
            own = m.engines[getattr(step, role)]
            fills = name.removesuffix("-fill") == own.name  # and writes what later scales may restore from
            if fills or (spec.inputs, spec.outputs) == (own.inputs, own.outputs):
                continue
            steps = list(engine_set.steps)
            steps[position] = replace(step, **{role: name})
            with pytest.raises(BundleError):
                checked(replace(m, sets=(replace(engine_set, steps=tuple(steps)),)))


@pytest.mark.parametrize("role", ["decoder", "encoder", "text_encoder"])
def test_the_coders_are_coders(bundle: Bundle, role: str):
    m = bundle.manifest
    for name in m.engines.keys() - {getattr(m, role)}:
        with pytest.raises(BundleError, match="the bundle is inconsistent"):
            checked(replace(m, **{role: name}))


def test_a_condition_draws_nothing(bundle: Bundle):
    m = bundle.manifest
    name = m.sets[0].conditioning
    with pytest.raises(BundleError, match="runs before the scales and takes residual_noise"):
        checked(with_engine(m, name, **reshaped(m.engines[name], "cond", name="residual_noise")))


def test_weights_that_are_missing_or_of_another_shape(bundle: Bundle):
    m = bundle.manifest
    name = m.sets[0].steps[0].attn_mlp
    spec = m.engines[name]
    for changed, match in (
        (with_engine(m, name, weights={**spec.weights, "ffn.fc1.bias": "nowhere.{layer}"}), r"no tensor 'nowhere\.0'"),
        (with_engine(m, name, weights={**spec.weights, "ffn.fc1.bias": "{layer.__class__}"}), "no tensor '{layer.__cl"),
        (with_engine(m, name, **reshaped(spec, "ffn.fc1.bias", shape=(127,))), r"fc1.bias' .* is float32\[128\]"),
        (with_engine(m, name, **reshaped(spec, "ffn.fc1.bias", dtype="float16")), r"engines take float16\[128\]"),
    ):
        with pytest.raises(BundleError, match=match):
            check_weights(changed, [build_layout(changed, 2)], bundle.weights)


@pytest.fixture(scope="module")
def of_codes(var_editing_bundle: Path) -> Bundle:
    return Bundle.open(var_editing_bundle)


def test_the_latent_is_what_the_decoder_reads(bundle: Bundle, of_codes: Bundle):
    for m in (bundle.manifest, of_codes.manifest):
        checked(m)
        for shape in ((1, 8, 5, 9), (1, 7, *m.plan.schedule.final), (8, *m.plan.schedule.final)):
            changed = with_engine(m, m.encoder, **reshaped(m.engines[m.encoder], "latent", shape=shape))
            with pytest.raises(BundleError, match="makes a latent of another size than the decoder's"):
                checked(changed)


def test_what_a_given_image_is_quantised_with_is_there(of_codes: Bundle):
    m = of_codes.manifest
    check_weights(m, [], of_codes.weights)
    check_weights(replace(m, encoder=""), [], Without(of_codes.weights, "transformer.codebook.weight"))
    for name in ("transformer.codebook.weight", "transformer.phi.0.weight", "transformer.phi.3.bias"):
        with pytest.raises(BundleError, match=f"its weight file holds no tensor '{name}'"):
            check_weights(m, [], Without(of_codes.weights, name))
    more = replace(m, image_tokenizer=replace(m.image_tokenizer, codes=65))
    with pytest.raises(BundleError, match=r"codebook.weight' .* is float32\[64, 8\], engines take float32\[65, 8\]"):
        check_weights(more, [], of_codes.weights)


class Without:
    """A weight file that lacks a tensor."""

    def __init__(self, weights: WeightFile, name: str) -> None:
        self._weights, self._name = weights, name

    def __contains__(self, name: str) -> bool:
        return name != self._name and name in self._weights

    def __getattr__(self, name: str) -> object:
        return getattr(self._weights, name)
