"""What a GPU does, told by a device: every stand-in for one tells the same, and a GPU would."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastvar.core.tensors import Launch, TensorRef
from fastvar.engines.device import Device
from fastvar.errors import BackendError

SIZE = 256  # bytes of a tensor
STORY = [
    "fresh memory: 0",
    "written and read: 7",
    "copied: 7",
    "recorded: the launches ran once, for libraries to set themselves up",
    "replayed twice: kernels 2, the copy 9",
    "memory freed while recording: the graph runs",
    "awaiting the stream while recording: refused",
    "reading while recording: refused",
    "a broken launch while recording: broken",
    "after all that, written and read: 3",
    "recorded and replayed again: kernels 1",
]


class BrokenLaunchError(Exception):
    """A launch's own fault."""


def tell(device: Device, kernel: Launch, launched: Callable[[], int]) -> list[str]:
    """The story of a device; `kernel` launches one kernel, `launched` is how many have run."""
    memory = device.allocate(2 * SIZE)
    first, second = (TensorRef(memory.address + at, "uint8", (SIZE,)) for at in (0, SIZE))
    told = [f"fresh memory: {_value(device, first)}"]
    device.write(first, np.uint8(7))
    told.append(f"written and read: {_value(device, first)}")
    device.copy(second, first)
    told.append(f"copied: {_value(device, second)}")
    told += _recording(device, kernel, launched, first, second)
    told += _refusals(device, kernel, first)
    device.write(first, np.uint8(3))
    told.append(f"after all that, written and read: {_value(device, first)}")
    replay = device.capture_graph([kernel])
    told.append(f"recorded and replayed again: kernels {_ran(device, launched, replay)}")
    return told


def _recording(
    device: Device, kernel: Launch, launched: Callable[[], int], first: TensorRef, second: TensorRef
) -> list[str]:
    def copy() -> None:
        device.copy(second, first)

    graphs: list[Launch] = []
    own = _ran(device, launched, lambda: device.capture_graph([copy]))  # torch 2.11 launches kernels to record
    ran = _ran(device, launched, lambda: graphs.append(device.capture_graph([kernel, copy]))) - own
    told = ["recorded: " + ("the launches ran once, for libraries to set themselves up" if ran == 1 else f"ran {ran}")]
    device.write(first, np.uint8(9))
    before = launched()
    for _ in range(2):
        graphs[0]()
    value = _value(device, second)
    told.append(f"replayed twice: kernels {launched() - before}, the copy {value}")
    held = [device.allocate(SIZE)]

    def frees() -> None:
        kernel()
        if launched() > before + 2:  # not in the run before
            held.clear()

    runs = _ran(device, launched, device.capture_graph([frees]))
    return [*told, "memory freed while recording: " + ("the graph runs" if runs == 1 else f"ran {runs}")]


def _refusals(device: Device, kernel: Launch, ref: TensorRef) -> list[str]:
    def waits() -> None:
        kernel()
        device.wait()

    def reads() -> None:
        kernel()
        device.read(ref)

    calls: list[None] = []

    def breaks() -> None:
        kernel()
        calls.append(None)
        if len(calls) == 2:  # the second time it is recorded
            raise BrokenLaunchError("broken")

    told = []
    for name, launch in (("awaiting the stream", waits), ("reading", reads), ("a broken launch", breaks)):
        try:
            device.capture_graph([launch])
            told.append(f"{name} while recording: recorded")
        except BrokenLaunchError as error:
            told.append(f"{name} while recording: {error}")
        except BackendError as error:
            told.append(f"{name} while recording: {'refused' if 'captur' in str(error).lower() else error}")
    return told


def _value(device: Device, ref: TensorRef) -> int:
    (value,) = np.unique(device.read(ref))
    return int(value)


def _ran(device: Device, launched: Callable[[], int], act: Callable[[], object]) -> int:
    """How many kernels that launched."""
    before = launched()
    act()
    device.wait()
    return launched() - before
