"""The published programs' way of working, in eager torch: the baseline that engines are timed against.

It runs the reference's own block (transformer/pruning.py), so that there is no second model to trust. In that block
every pruned sub-layer selects for itself in fp32, gathers, restores by an enlarged map and a scatter, and makes the
text's keys and values anew at every scale; caches grow by `torch.cat`. Guidance is a batch of two. What the reference
does for comparing only (traces, tables made at every scale) is left out. The fused kernels of the published programs
are torch's scaled_dot_product_attention here, and prompts come without padding, as theirs do, so that nothing is
masked. In 16 bits everything runs under autocast, and the matrices of the blocks are stored in 16 bits, as the
published program stores its blocks; all other weights, the residual stream, the selection and the head are fp32.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastvar.core.plan import GenerationPlan, StepPlan
from fastvar.core.precision import COMPUTE
from fastvar.core.rotary import rotary_table
from fastvar.errors import BackendError, CheckpointError
from fastvar.export.checkpoints.checkpoint import Checkpoint
from fastvar.export.models.common.tokenizer_blocks import enlarge
from fastvar.export.models.infinity.model import Conditioning, InfinityTransformer
from fastvar.export.models.infinity.reference import Sampling, codes_grid, guide, next_tokens, sample_bits
from fastvar.export.models.infinity.tokenizer import Decoder
from fastvar.export.models.transformer.attention import attention_override, torch_attention
from fastvar.export.models.transformer.pruning import LayerState, ScaleRun, run_block
from fastvar.export.models.transformer.reference_loop import conditional_only
from fastvar.families.infinity import TransformerConfig

HostNoise = Callable[[int, tuple[int, ...]], NDArray[np.float32]]  # as core/noise.py has it
Config = TypeVar("Config")
See = Callable[[Tensor], None]


class EagerModel:
    """A checkpoint's modules on a device, loaded once for all plans that run on it.

    Args:
        precision: one of `precision.COMPUTE`, "bf16" say.
        device: "cpu" or "cuda".

    Raises:
        BackendError: torch sees no GPU.
        CheckpointError: no Infinity model.
    """

    def __init__(self, checkpoint: Checkpoint, precision: str, device: str = "cpu") -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise BackendError("torch sees no GPU", expected="an NVIDIA GPU and a torch built for it")
        self.device, self.dtype = torch.device(device), getattr(torch, COMPUTE[precision])
        self.transformer = self._transformer(checkpoint)
        self.decoder = _loaded(Decoder, checkpoint.image_tokenizer, self._decoder_state(checkpoint))
        self.text_encoder: nn.Module | None = None
        if checkpoint.text_encoder is not None:
            self.text_encoder = self._text_encoder(checkpoint)

    def autocast(self) -> AbstractContextManager[Any]:
        """Products and attention in 16 bits; nothing at all for fp32."""
        if self.dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def record_event(self) -> Any:
        """A point in time, on the GPU in the order of what it was given."""
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two marks; waits for the second."""
        if self.device.type == "cpu":
            return float((end - start) * 1e3)
        end.synchronize()
        return float(start.elapsed_time(end))

    def _transformer(self, checkpoint: Checkpoint) -> InfinityTransformer:
        config = checkpoint.transformer
        if not isinstance(config, TransformerConfig):
            raise CheckpointError(
                f"{checkpoint.name} is a {checkpoint.family.name} model", expected="an Infinity model"
            )
        with torch.device("meta"):
            shape = InfinityTransformer(config)
        matrices = {id(m.weight) for block in shape.layers for m in block.modules() if isinstance(m, nn.Linear)}
        stored = {name for name, weight in shape.named_parameters() if id(weight) in matrices}
        source = checkpoint.transformer_weights
        state = {name: self._placed(source[name], self.dtype if name in stored else torch.float32) for name in source}
        shape.load_state_dict(state, assign=True)
        return shape.eval().requires_grad_(False)

    def _decoder_state(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        prefix, source = "decoder.", checkpoint.image_tokenizer_weights
        return {name[len(prefix) :]: self._placed(source[name]) for name in source if name.startswith(prefix)}

    def _text_encoder(self, checkpoint: Checkpoint) -> nn.Module:
        from transformers import T5EncoderModel  # seconds to import

        state = {name: self._placed(weight) for name, weight in checkpoint.text_encoder_weights.items()}
        encoder: Any = _loaded(T5EncoderModel, checkpoint.text_encoder, state)
        encoder.tie_weights()
        loaded: nn.Module = encoder
        return loaded

    def _placed(self, weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return weight.to(self.device, dtype)


class EagerContender:
    """A plan on an `EagerModel`, with a text; draws one image after another.

    Args:
        text: ids [1, T] of a prompt where the checkpoint has a text encoder, else features [2, T, Ct]; every token
            counts. The learned unconditional text, cut to the prompt's length, is row 1 of an encoded prompt.
    """

    def __init__(self, model: EagerModel, plan: GenerationPlan, text: NDArray[Any], sampling: Sampling) -> None:
        self.plan = plan
        self._model, self._sampling = model, sampling
        self._text = torch.from_numpy(text).to(model.device)
        self._runs = [_scale_run(model, plan, step) for step in plan.steps]
        self._condition: Conditioning | None = None
        self._summed: Tensor | None = None

    def text(self) -> float:
        """Text encoder, where there is one, and condition; milliseconds."""
        start = self._model.record_event()
        with torch.inference_mode(), self._model.autocast(), attention_override(torch_attention):
            self._condition = self._model.transformer.conditioning(self._features(), None)
        return self._model.elapsed_ms(start, self._model.record_event())

    def scales(self, noise: HostNoise) -> list[float]:
        """Milliseconds of every executed scale, of the text last given."""
        return self._draw(noise)

    def logits(self, noise: HostNoise) -> list[NDArray[np.float32]]:
        """Guided logits [L, 2 * code channels] of every executed scale."""
        found: list[NDArray[np.float32]] = []
        self._draw(noise, lambda logits: found.append(logits.float().cpu().numpy()))
        return found

    def decode(self) -> float:
        """The image of the codes last drawn, on the host; milliseconds."""
        assert self._summed is not None
        start = self._model.record_event()
        with torch.inference_mode(), self._model.autocast():
            self._model.decoder(self._summed).clamp(-1, 1).float().cpu()
        return self._model.elapsed_ms(start, self._model.record_event())

    def summed_codes(self) -> NDArray[np.float32]:
        """What was drawn last: [1, bits, h, w]."""
        assert self._summed is not None
        codes: NDArray[np.float32] = self._summed.cpu().numpy()
        return codes

    def _features(self) -> Tensor:
        """[2, T, Ct]."""
        if self._model.text_encoder is None:
            return self._text
        encoded = self._model.text_encoder(input_ids=self._text).last_hidden_state[0].float()
        return torch.stack((encoded, self._model.transformer.cfg_uncond[: len(encoded)]))

    @torch.inference_mode()
    def _draw(self, noise: HostNoise, see: See = lambda _: None) -> list[float]:
        assert self._condition is not None
        model, conditioning = self._model.transformer, self._condition
        patch = model.config.patch
        final = (self.plan.schedule.final[0] * patch, self.plan.schedule.final[1] * patch)
        states = [LayerState() for _ in model.layers]
        block_in = model.first_tokens(conditioning.sos)  # [2, 1, C]
        summed = torch.zeros(1, model.config.bits, *final, device=self._model.device)
        uniform = {step.index: self._uniform(noise, step) for step in self.plan.steps}  # on the device beforehand
        marks = []
        for step, run in zip(self.plan.steps, self._runs, strict=True):
            start = self._model.record_event()
            if not step.guided and len(block_in) > 1:
                conditioning, block_in = conditional_only(conditioning, block_in, states)
            rows = len(block_in)
            with self._model.autocast(), attention_override(torch_attention):
                x = self._through_layers(block_in, conditioning, step, run, states)  # [rows, L, C]
            logits = guide(model.logits(x, conditioning.sos.float()), self._sampling)  # [L, 2 * bits a token]
            bits = sample_bits(logits, uniform[step.index], self._sampling.top_p)
            summed = summed + enlarge(codes_grid(bits, step.size, patch), final)
            if step.next_index is not None:
                with self._model.autocast():
                    block_in = next_tokens(model, summed, self.plan.schedule.sizes[step.next_index])
                block_in = block_in.expand(rows, -1, -1)
            marks.append((start, self._model.record_event()))
            see(logits)
        self._summed = summed
        return [self._model.elapsed_ms(*pair) for pair in marks]

    def _uniform(self, noise: HostNoise, step: StepPlan) -> Tensor:
        """[L, bits a token]."""
        shape = (step.tokens, self._model.transformer.config.code_channels)
        return torch.from_numpy(noise(step.index, shape)).to(self._model.device)

    def _through_layers(
        self, block_in: Tensor, conditioning: Conditioning, step: StepPlan, run: ScaleRun, states: list[LayerState]
    ) -> Tensor:
        model = self._model.transformer
        x = block_in + model.lvl_embed.weight[step.index]  # fp32, and stays so
        for layer, (block, state) in enumerate(zip(model.layers, states, strict=True)):
            x = run_block(block, x, conditioning, run, state, self.plan.policy.prunes(layer))
        return x


def _scale_run(model: EagerModel, plan: GenerationPlan, step: StepPlan) -> ScaleRun:
    table = rotary_table(step.size, plan.schedule.rope_grid, model.transformer.config.head_dim)
    rotary = torch.from_numpy(table).to(model.device)
    shared = plan.policy.shared_selection
    return ScaleRun(step.size, step.kept, rotary, plan.cached_size, step.writes_restore_cache, shared, step.text)


def _loaded(factory: Callable[[Config], nn.Module], config: Config, state: Mapping[str, Tensor]) -> nn.Module:
    with torch.device("meta"):
        module = factory(config)
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def import_text_encoder() -> None:
    """The library that the text encoder comes from; seconds, and not a little memory."""
    from transformers import T5EncoderModel  # noqa: F401 so that it is there


def use_threads(threads: int | None) -> None:
    """CPU threads of torch; its own choice for None."""
    if threads is not None:
        torch.set_num_threads(threads)


def release_memory() -> None:
    """Give the GPU back what torch keeps of tensors that are gone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device_facts(device: str) -> dict[str, Any]:
    """What torch says of a device, for the record."""
    facts: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        facts |= {"gpu": found.name, "gpu_memory_bytes": found.total_memory, "cuda": torch.version.cuda}
    return facts
