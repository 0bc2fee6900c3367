"""The error hierarchy: a user error says what was got, expected and how to fix it; a bug is another class."""

from __future__ import annotations


class FastvarError(Exception):
    """Base of every error a user can cause; the command line prints it in one piece and exits with code 2."""

    def __init__(self, problem: str, *, expected: str = "", fix: str = "") -> None:
        self.problem, self.expected, self.fix = problem, expected, fix
        lines = [problem]
        if expected:
            lines.append(f"expected: {expected}")
        if fix:
            lines.append(f"fix: {fix}")
        super().__init__("\n".join(lines))

    @property
    def parts(self) -> dict[str, str]:
        """The arguments that make the error again: it is written down, or told to another process."""
        return {"problem": self.problem, "expected": self.expected, "fix": self.fix}


class CheckpointError(FastvarError):
    """A checkpoint cannot be read, or its tensors are not those of the model."""


class PlanError(FastvarError):
    """A size, schedule or pruning policy that cannot be planned."""


class BuildError(FastvarError):
    """A step graph or an engine could not be built."""


class BundleError(FastvarError):
    """A bundle on disk is damaged, incomplete, locked, or made by another version."""


class HubError(FastvarError):
    """A repository of the Hugging Face hub cannot be read, downloaded, or understood."""


class BackendError(FastvarError):
    """A backend is not installed, or cannot run what it was given."""


class DeviceMemoryError(BackendError):
    """A device has too little free memory for what was planned."""


class InputError(FastvarError):
    """A prompt, seed or sampling setting outside what is supported."""


class PipelineBusy(FastvarError):  # noqa: N818  it tells of a state that passes, like BlockingIOError
    """The pipeline draws for somebody else, and the time to wait for it is over."""


class UnknownWordsWarning(UserWarning):
    """The tokenizer has no token for some words of a prompt, so they have no say in the image."""


class RenamedWarning(FutureWarning):
    """Something goes by another name now; the old one works for one version more."""


class RehearsalWarning(UserWarning):
    """A GPU that is not there stands in for one: nothing is computed, and what comes out means nothing."""


class OtherCpuWarning(UserWarning):
    """A bundle's precision was measured to be the fastest on another CPU; on this one another precision is."""


class NumericsError(FastvarError):
    """A weight or an activation is not finite."""


class ImagesFailed(NumericsError):  # noqa: N818  some of them; the others are there
    """Some images of a call have numbers that are not finite. The others were drawn, and are not lost.

    Attributes:
        failed: what is wrong with each that failed, by its index in the call.
        output: the `Output` of the others.
    """

    def __init__(self, failed: dict[int, NumericsError], images: int, output: object) -> None:
        self.failed, self.output = failed, output
        named = "; ".join(f"image {index}: {error.problem}" for index, error in sorted(failed.items()))
        first = next(iter(failed.values()))
        others = images - len(failed)
        kept = f"; the {others} others are in this error's `output`" if others else ""
        super().__init__(
            f"{len(failed)} of {images} images failed: {named}", expected=first.expected, fix=f"{first.fix}{kept}"
        )


class InternalError(RuntimeError):
    """A broken invariant: a bug in fastvar, never the user's fault."""
