"""The face of the runtime: load a bundle, call it with a prompt, get images. Never imports torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

from ..core.arguments import callback, flag, seconds, shown
from ..engines.bundle.bundle import Bundle
from ..engines.bundle.hub_bundle import found_bundle
from ..engines.bundle.precision_note import warn_of_another_cpu
from ..errors import InputError
from .editing.source_image import ImageSource
from .open_bundle import OpenBundle
from .output import Output
from .pickled import reduced
from .requests.diffusers_names import translated
from .requests.inputs import Label
from .requests.params import SamplingParams
from .requests.passes import ImageRequest
from .requests.reading import RequestReader
from .requests.settings import recorded
from .sampling import Listeners, OnImageEnd, OnScaleEnd
from .stream import Stream, StreamTurn
from .turns import closed


class Pipeline(OpenBundle):
    """Draws images from a bundle.

    Thread-safe: memory is static, so images are drawn one at a time, first come first served. Pickled and copied, it is
    its path and the arguments of `load`: whoever unpickles it loads the bundle anew, unless that has changed.
    """

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        verify: str = "auto",
        offload_text_encoder: bool = False,
        cuda_graphs: bool = True,
        memory_budget: str | int | None = None,
        trust_remote_code: bool = False,
        require_signature: str | Path | bytes | None = None,
        busy_timeout: float | None = None,
        batch: int | None = None,
    ) -> Pipeline:
        """Open a bundle, check its digests, place its weights and memory on the device. Warns, `OtherCpuWarning`, where
        its precision was the fastest on the CPU that built it, and is not on this one.

        Args:
            path: folder made by `fastvar build`.
            threads: CPU threads; the library's choice by default.
            verify: "auto" hashes engines, and weights up to 256 MiB; "all" hashes everything.
            offload_text_encoder: on a GPU, copy the text encoder's weights there for every prompt, into memory that
                drawing uses afterwards; no effect on the CPU.
            cuda_graphs: on a GPU, replay the launches of a scale as one; no effect on the CPU.
            memory_budget: "15GiB", or bytes: refuse a bundle that would take more, rather than fail while drawing.
            batch: most images that are drawn in one pass, of the numbers that the bundle has engines for; by default
                the most that fit into memory and budget.
            trust_remote_code: run the native code of a bundle in a Hugging Face hub cache.
            require_signature: a public Ed25519 key in PEM, or its file: refuse a bundle that its owner did not sign.
            busy_timeout: seconds that a call waits for others to draw theirs, before `PipelineBusy`. None waits for as
                long as they draw, but for ten minutes at most where one is inside its own callback. A stream that
                nobody reads keeps nobody waiting: calls draw its remaining scales for it.

        Raises:
            BundleError: damaged, incomplete, made for another version, or not trusted.
            BackendError: the backend's library, driver or device is missing or does not fit.
            DeviceMemoryError: the GPU has too little free memory, or the budget is too small; says what would fit.
            PlanError: the budget is no amount of memory.
            InputError: an argument of another kind, or out of range.
        """
        # Before anything else has a name: whatever `load` takes, a pickled pipeline is loaded with again.
        arguments = {name: value for name, value in locals().items() if name not in ("cls", "path")}
        if not isinstance(path, str | os.PathLike):
            raise InputError(f"the path {shown(path)} is a {type(path).__name__}", expected="the folder of a bundle")
        bundle = Bundle.open(
            Path(path).absolute(), verify, trust_remote_code=trust_remote_code, require_signature=require_signature
        )
        pipe = cls(
            bundle,
            threads=threads,
            offload_text_encoder=offload_text_encoder,
            cuda_graphs=cuda_graphs,
            memory_budget=memory_budget,
            busy_timeout=busy_timeout,
            batch=batch,
        )
        pipe._origin = bundle.path, arguments
        warn_of_another_cpu(bundle.manifest)
        return pipe

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **load_options: Any,
    ) -> Pipeline:
        """`load` a bundle that lies in a folder here, or in a repository of the Hugging Face hub.

        What its manifest names is downloaded, once, into the hub's cache, by huggingface_hub. Native code in it is run
        with `trust_remote_code` alone.

        Args:
            repo_or_folder: a folder; or "ORG/NAME" or "hub:ORG/NAME".
            revision: a branch, tag or commit of the repository; its main branch by default.
            token: an access token, or False for none; by default HF_TOKEN, or that of `hf auth login`.
            cache_dir: where downloads are kept; the hub's cache by default.
            local_files_only: take what was downloaded before, and ask nobody; as HF_HUB_OFFLINE.
            load_options: arguments of `load`.

        Raises:
            HubError: the repository cannot be read or downloaded; says why.
            BackendError, BundleError, DeviceMemoryError, PlanError, InputError: as `load`; huggingface_hub is not
                installed; the repository holds no bundle; a revision of a folder.
        """
        signature(cls.load).bind(repo_or_folder, **load_options)  # before anything is downloaded
        folder = found_bundle(repo_or_folder, revision, token, cache_dir, flag("local_files_only", local_files_only))
        return cls.load(folder, **load_options)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.closed:
            raise closed()
        return reduced(self, self._origin)

    def __call__(
        self,
        prompt: str | Iterable[str] | None = None,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        class_labels: Label | Iterable[Label] | None = None,
        callback_on_scale_end: OnScaleEnd | None = None,
        callback_on_image_end: OnImageEnd | None = None,
        timeout: float | None = None,
        **changes: Any,
    ) -> Output:
        """Draw images, of prompts or of class labels, as the bundle's family draws.

        Args:
            prompt: one text, or several.
            params: how they are sampled; the bundle's own way by default. A list holds those of each prompt or label.
            class_labels: one class or several, by number, or by name where the checkpoint has names; "unconditional"
                (`fastvar.UNCONDITIONAL`) for an image of no class, which guidance has no effect on.
            callback_on_scale_end: called with a `ScaleEvent` after every scale; may not draw with this pipeline.
            callback_on_image_end: called with a `GeneratedImage` as soon as each image is complete; may draw.
            timeout: seconds to wait for others before the first image; `busy_timeout` by default.
            changes: fields of `SamplingParams` by name (seed, guidance_scale, tau or temperature, top_p, top_k,
                num_images, negative_prompt), in place of those of `params`; a list holds one for each prompt or
                label, a list of seeds perhaps one for each image. diffusers' names are understood too:
                num_images_per_prompt, generator, width, height, and output_type "np" for images as one array.

        Raises:
            InputError: a parameter out of range or unknown to the family, a prompt too long for the bundle, or a class
                that it does not know. Nothing was drawn then.
            PipelineBusy: the time to wait for others is over, or this is a callback of a drawing that has not ended.
            BundleError: the bundle has no engines for this guidance.
            ImagesFailed: numbers of some images are not finite; its `output` holds the others.

        Warns:
            UnknownWordsWarning: the tokenizer does not know some words of a prompt.
        """
        output_type = translated(changes, self.size)
        requests = self.requests.generation(prompt, params, class_labels=class_labels, **changes)
        output = self.draw(requests, callback_on_scale_end, callback_on_image_end, timeout=timeout)
        return output if output_type == "pil" else output.as_array()

    def upscale(
        self,
        image: ImageSource | Sequence[ImageSource],
        prompt: str | Iterable[str] | None = None,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        class_labels: Label | Iterable[Label] | None = None,
        keep_scales: int | None = None,
        fit: str = "exact",
        consistency: bool = True,
        callback_on_scale_end: OnScaleEnd | None = None,
        callback_on_image_end: OnImageEnd | None = None,
        timeout: float | None = None,
        **changes: Any,
    ) -> Output:
        """Enlarge an image to the bundle's size: its coarse scales are kept, the model draws the finer ones.

        Args:
            image: a PIL image; a file by path, as bytes, or opened in binary; or an array [H, W] or [H, W, 3 or 4] of
                uint8, or of floats from 0 to 1.
            prompt: what the image shows; of several, each is drawn.
            class_labels: the same, of models that draw classes.
            keep_scales: how many scales are the image's; by default those whose token grid, at 16 pixels a token,
                does not exceed the image.
            fit: "crop" to cut another aspect ratio around the centre; "exact" refuses it.
            consistency: correct the result until, averaged down, it gives the image again (back-projection).

        The other arguments are those of a call.

        Raises:
            InputError: no encoder in the bundle, an image that cannot be used, or a setting out of range.
            PipelineBusy, BundleError: as a call.
        """
        requests = self.requests.upscaling(
            image,
            prompt,
            params,
            class_labels=class_labels,
            keep_scales=keep_scales,
            fit=fit,
            consistency=consistency,
            **changes,
        )
        return self.draw(requests, callback_on_scale_end, callback_on_image_end, timeout=timeout)

    def inpaint(
        self,
        image: ImageSource | Sequence[ImageSource],
        mask: ImageSource | Sequence[ImageSource],
        prompt: str | Iterable[str] | None = None,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        class_labels: Label | Iterable[Label] | None = None,
        fit: str = "exact",
        composite: bool = True,
        callback_on_scale_end: OnScaleEnd | None = None,
        callback_on_image_end: OnImageEnd | None = None,
        timeout: float | None = None,
        **changes: Any,
    ) -> Output:
        """Redraw a part of an image: at every scale, tokens that the mask does not touch are the image's, given what
        was drawn under them.

        Args:
            image: as for `upscale`; resized to the bundle's size.
            mask: of the image's aspect ratio, given in the same ways, or an array of booleans: white, True or 1 is
                redrawn. Of a picture with holes, the holes are: where it is transparent.
            prompt: what the whole image shall show; of several, each is drawn.
            class_labels: the same, of models that draw classes: another class than the image's edits what it shows.
            fit: "crop" to cut another aspect ratio around the centre, of image and mask; "exact" refuses it.
            composite: put the image's own pixels back outside the mask, with a soft edge.

        The other arguments are those of a call.

        Raises:
            InputError: no encoder in the bundle, an image or mask that cannot be used, a mask that marks nothing or
                everything, or a setting out of range.
            PipelineBusy, BundleError: as a call.
        """
        requests = self.requests.inpainting(
            image, mask, prompt, params, class_labels=class_labels, fit=fit, composite=composite, **changes
        )
        return self.draw(requests, callback_on_scale_end, callback_on_image_end, timeout=timeout)

    @property
    def requests(self) -> RequestReader:
        """Checks what is asked for, to be drawn later by `draw`.

        Raises:
            InputError: the pipeline is closed.
        """
        if self.closed:
            raise closed()
        return self._reader

    def draw(
        self,
        requests: Sequence[ImageRequest],
        callback_on_scale_end: OnScaleEnd | None = None,
        callback_on_image_end: OnImageEnd | None = None,
        *,
        timeout: float | None = None,
    ) -> Output:
        """Draw what `requests` has checked, of one caller or of several: all of them, in as few passes as can be.

        An image's index is its place here, in events and output.

        Raises:
            PipelineBusy, ImagesFailed, InputError: as a call.
        """
        listeners = Listeners(
            callback("callback_on_scale_end", callback_on_scale_end),
            callback("callback_on_image_end", callback_on_image_end),
        )
        placed = [replace(request, index=place) for place, request in enumerate(requests)]
        return self._sampler.images(placed, listeners, seconds("timeout", timeout))

    def stream(
        self,
        prompt: str | None = None,
        params: SamplingParams | None = None,
        *,
        class_label: Label | None = None,
        timeout: float | None = None,
        **changes: Any,
    ) -> Stream:
        """Draw one image scale by scale; `preview()` of the last event is not the image, call the pipeline for that.

        Settings are checked here; the pipeline draws from the first event on, for which it waits `timeout` seconds at
        most. Other calls may be made between events: they have the remaining scales drawn first.

        Raises:
            InputError, BundleError: as a call.

        Warns:
            UnknownWordsWarning: as a call.
        """
        asked = self.requests.one(prompt, class_label, params, changes)
        events = self._sampler.scales(asked.given, asked.seeds[0], asked.settings)
        turn = StreamTurn(self._turns, events, seconds("timeout", timeout))
        return Stream(turn, asked.seeds[0], recorded(self.manifest, asked.settings, asked.params.negative_prompt))
