"""What a caller asks for, checked at once and drawn later: images, enlargements, and parts of images drawn anew."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

from ...engines.bundle.bundle import Bundle
from ...errors import InputError
from ..editing.edits import Editing, inpainting, upscaling
from ..editing.source_image import ImageSource, read_image, read_mask, several
from .inputs import ConditioningInputs, Label, Subject
from .params import SamplingParams
from .passes import Asked, ImageRequest, asked_of, requests_of

Params = SamplingParams | Sequence[SamplingParams] | None


class RequestReader:
    """Reads requests for one bundle. Its memory is not touched, so any thread may read while another draws.

    Every method takes what the method of the pipeline takes, and gives the images in order; `changes` are fields of
    `SamplingParams` by name.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._manifest = bundle.manifest
        self.subjects = ConditioningInputs(bundle)

    def generation(
        self,
        prompt: str | Iterable[str] | None = None,
        params: Params = None,
        *,
        class_labels: Label | Iterable[Label] | None = None,
        **changes: Any,
    ) -> list[ImageRequest]:
        """Images of prompts or class labels.

        Raises:
            InputError, BundleError: as a call of the pipeline.
        """
        return requests_of(self._manifest, self._asked(self.subjects.of(prompt, class_labels), params, changes))

    def upscaling(
        self,
        image: ImageSource | Sequence[ImageSource],
        prompt: str | Iterable[str] | None = None,
        params: Params = None,
        *,
        class_labels: Label | Iterable[Label] | None = None,
        keep_scales: int | None = None,
        fit: str = "exact",
        consistency: bool = True,
        **changes: Any,
    ) -> list[ImageRequest]:
        """Images enlarged.

        Raises:
            InputError, BundleError: as `Pipeline.upscale`.
        """
        asked = self._edited(self.subjects.of(prompt, class_labels), params, changes)
        plan = self._manifest.plan
        edits = [
            upscaling(read_image(one), plan, keep_scales=keep_scales, fit=fit, consistency=consistency)
            for one in several("image", image, len(asked))
        ]
        return requests_of(self._manifest, asked, edits)

    def inpainting(
        self,
        image: ImageSource | Sequence[ImageSource],
        mask: ImageSource | Sequence[ImageSource],
        prompt: str | Iterable[str] | None = None,
        params: Params = None,
        *,
        class_labels: Label | Iterable[Label] | None = None,
        fit: str = "exact",
        composite: bool = True,
        **changes: Any,
    ) -> list[ImageRequest]:
        """Images of which a part is drawn anew.

        Raises:
            InputError, BundleError: as `Pipeline.inpaint`.
        """
        asked = self._edited(self.subjects.of(prompt, class_labels), params, changes)
        images, masks = several("image", image, len(asked)), several("mask", mask, len(asked))
        pairs = zip(images, masks, strict=True) if len(images) == len(masks) else product(images, masks)
        edits: list[Editing] = [
            inpainting(read_image(one), read_mask(own), self._manifest.plan, fit=fit, composite=composite)
            for one, own in pairs
        ]
        return requests_of(self._manifest, asked, edits)

    def one(self, prompt: object, label: object, params: SamplingParams | None, changes: dict[str, Any]) -> Asked:
        """The only subject of a stream.

        Raises:
            InputError, BundleError: as `Pipeline.stream`.
        """
        (asked,) = self._asked(self.subjects.one(prompt, label), params, changes)
        if asked.params.num_images != 1:
            found = asked.params.num_images
            raise InputError(f"num_images {found} of a stream", expected="1: a stream draws one image")
        return asked

    def _edited(self, subjects: Sequence[Subject], params: Params, changes: dict[str, Any]) -> list[Asked]:
        if not self._manifest.encoder:
            raise InputError(
                "this bundle has no image encoder, so it cannot read an image",
                fix="rebuild it with `fastvar build --with-encoder` (with_encoder=True)",
            )
        return self._asked(subjects, params, changes)

    def _asked(self, subjects: Sequence[Subject], params: Params, changes: dict[str, Any]) -> list[Asked]:
        """What is drawn, and how: checked, an entry for each subject."""
        return asked_of(self._manifest, self.subjects, subjects, params, changes)
