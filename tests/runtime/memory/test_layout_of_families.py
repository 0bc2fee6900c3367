"""Every byte that an engine of any family reads was written, last, by whoever should have written it."""

import numpy as np
import pytest
import torch

from fastvar.core.noise import DRAWN, SCALARS
from fastvar.core.plan import SamplingMode, make_plan
from fastvar.core.policy import PruningPolicy, ScaleRule
from fastvar.core.precision import Precision
from fastvar.engines.bundle.manifest import Manifest
from fastvar.engines.registry import backend_class
from fastvar.export.checkpoints.random_weights import random_checkpoint_for
from fastvar.export.describe import describe
from fastvar.families import family_of
from fastvar.families.codebook import VqTokenizerConfig
from fastvar.families.hart import HART
from fastvar.families.var import VarConfig
from fastvar.runtime.memory.layout import Layout, View, build_layout
from tests.models import tiny_hart
from tests.models.described_engines import manifest_for, model
from tests.runtime.memory.generations import LADDER

SCALES = (1, 2, 3, 5, 8)
VAR_TINY = VarConfig(depth=3, width=32, heads=2, mlp_width=64, classes=5, codes=16, code_channels=4, scales=SCALES)
IMAGES = VqTokenizerConfig(
    codes=16, code_channels=4, base_channels=32, channel_multipliers=(1, 1, 1, 1, 1), residual_blocks=1
)
POLICIES = {
    "dense": PruningPolicy("dense"),
    "pruned": PruningPolicy("pruned", {3: ScaleRule(0.5), 4: ScaleRule(0.25)}, 1, 3, 2),
    "skipping": PruningPolicy("skipping", {3: ScaleRule(skip=True), 4: ScaleRule(0.5)}, 0, 3, 2),
    "unguided": PruningPolicy("unguided", {3: ScaleRule(0.5), 4: ScaleRule(0.25, guidance=False)}, 0, 3, 2),
}
# What an input may have been written as.
SOURCES = {"x": {"x", "x_out", "x_next"}, "summed": {"summed_out", "summed"}, "kept": {"kept"}}


def manifest_of(config, policy: PruningPolicy, sampling_mode: SamplingMode) -> Manifest:
    family = family_of(config)
    plan = family.plan(config.schedule, policy, config, sampling_mode)
    made = random_checkpoint_for(config, IMAGES, dtype=torch.float32)
    return describe(made, plan, backend_class("onnxruntime"), Precision())


class Memory:
    """Who wrote every byte last, as tensor names."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.names = layout, [""]
        self.owner = np.zeros(layout.arena_bytes, np.int32)

    def _bytes(self, view: View) -> np.ndarray:
        start = self.layout.buffers[view.buffer].offset + view.start
        return self.owner[start : start + view.size]

    def write(self, name: str, view: View) -> None:
        self.names.append(name)
        self._bytes(view)[:] = len(self.names) - 1

    def writers(self, view: View) -> set[str]:
        return {self.names[i] for i in np.unique(self._bytes(view))}


def play(manifest: Manifest, rows: int) -> None:
    layout = build_layout(manifest, rows)
    memory, started = Memory(layout), False
    in_steps = {id(call) for step in layout.steps for call in step.calls}
    for call in layout.calls():
        spec = manifest.engines[call.engine]
        if id(call) in in_steps and not started:
            started = True
            first = {n: v for step in layout.steps for c in step.calls for n, v in c.tensors.items() if n in SCALARS}
            for name, view in {**first, "summed": layout.steps[0].sampling_head.tensors["summed"]}.items():
                memory.write(name, view)
        for tensor in spec.inputs:
            view = call.tensors[tensor.name]
            if not isinstance(view, View):
                continue
            if tensor.name in DRAWN or tensor.name in ("labels", "cond", "uncond", "mask", "ids", "attention_mask"):
                memory.write(tensor.name, view)
            name = tensor.name.removeprefix("guided_").replace("cached_", "cache_")
            allowed = SOURCES.get(name, {name})
            assert memory.writers(view) <= allowed, f"{call.engine} layer {call.layer}: {tensor.name}"
        if call.scratch is not None:
            memory.write("scratch", call.scratch)
        for tensor in spec.outputs:
            memory.write(tensor.name, call.tensors[tensor.name])
        for copy in call.copies:
            memory.write(_copied(call, copy), copy.target)


def _copied(call, copy) -> str:
    return next(name for name, view in call.tensors.items() if view == copy.source)


@pytest.mark.parametrize("rows", [2, 1])
@pytest.mark.parametrize("sampling_mode", [SamplingMode(), SamplingMode(smooth=True)], ids=["hard", "smooth"])
@pytest.mark.parametrize("policy", POLICIES)
def test_var(policy, sampling_mode, rows):
    play(manifest_of(VAR_TINY, POLICIES[policy], sampling_mode), rows)


def test_what_heads_read_from_the_host_goes_by_the_names_it_knows():
    """Everything else that a step reads is a weight, or what an engine before it has written."""
    everything = SamplingMode(smooth=True, final_iterations=2)
    hart = HART.plan(tiny_hart.CONFIG.schedule, PruningPolicy("dense"), tiny_hart.CONFIG, everything)
    made = random_checkpoint_for(tiny_hart.CONFIG, tiny_hart.TOKENIZER, dtype=torch.float32)
    manifests = (
        manifest_of(VAR_TINY, POLICIES["dense"], SamplingMode(smooth=True)),
        describe(made, hart, backend_class("onnxruntime"), Precision()),
        manifest_for(make_plan(LADDER, PruningPolicy("dense"), 2), model(2)),
    )
    read: set[str] = set()
    for manifest in manifests:
        written = {tensor.name for spec in manifest.engines.values() for tensor in spec.outputs}
        for step in (step for own in manifest.sets for step in own.steps):
            for name in filter(None, (step.sampling_head, step.pick, step.residual)):
                spec = manifest.engines[name]
                read |= {tensor.name for tensor in spec.inputs if tensor.name not in spec.weights} - written
    assert read - {"summed"} == {*DRAWN, *SCALARS}, "the sum begins with zeros"
