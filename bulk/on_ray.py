"""Drawing on Ray: actors hold the bundle and write the images themselves, so that nothing waits for a writer.

Ray Data's own writers would starve: actors that hold every CPU leave none for them. So a row that comes back says only
what became of its image, and a run that is killed has lost nothing that was drawn.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..core.platform import import_extra
from ..errors import BackendError, BundleError, FastvarError, InputError
from .folder import BulkFolder
from .items import Item
from .processes import DrawerArguments
from .run import Draw

LOCAL = "local"
UNREADABLE, UNWRITABLE = "unreadable", "unwritable"  # an actor cannot open the bundle, or not write into the folder
RESTARTS, RETRIES = 3, 2  # Ray's own defaults are without end: an image that kills its process would be drawn for ever
ACTOR = f"{__name__}:Actor"
ROUNDS_WITHOUT_END = 3  # that nothing came of


def draw_on_ray(
    address: str, *, gpus_per_worker: float = 0.0, cpus_per_worker: float = 1.0, actor: str | None = None
) -> Draw:
    """How `BulkRun.run` draws on a cluster.

    Args:
        address: of a cluster, or "local" for one of this machine alone.
        gpus_per_worker, cpus_per_worker: what each worker holds. fastvar, the bundle and the folder of images must be
            at the same path on every machine, on a shared file system say.
        actor: the class that draws, as MODULE:NAME: an `Actor`, as by default, or one derived from it.

    Raises (when it draws):
        BackendError: ray is missing, or does not start.
        BundleError: the bundle is another one on some machine, or cannot be opened there.
        InputError: no cluster answers, or the folder cannot be written on some machine.
    """

    def draw(
        items: Sequence[Item], arguments: DrawerArguments, workers: int, report: Callable[[str, str], object]
    ) -> None:
        is_ours = started(address)
        module, _, name = (actor or ACTOR).partition(":")
        kind = getattr(importlib.import_module(module), name)
        data = import_extra("ray.data", "ray")
        folder = BulkFolder.of(arguments.folder, arguments.image_format)
        resources = {"num_cpus": cpus_per_worker, "num_gpus": gpus_per_worker}
        left, fruitless = {item.key: item for item in items}, 0
        try:
            while left:
                before = len(left), sum(folder.attempts(key) for key in left)
                try:
                    _one_round(data, kind, left, arguments, min(workers, len(left)), resources, report)
                except import_extra("ray.exceptions", "ray").RayError as error:
                    fruitless = 0 if (len(left), sum(folder.attempts(key) for key in left)) != before else fruitless + 1
                    if fruitless >= ROUNDS_WITHOUT_END:
                        raise BackendError(f"ray gave up: {error}", fix="see the logs of its workers") from error
        finally:
            if left:  # it is interrupted: its actors are ended by us, and have not died of what they held
                if is_ours:
                    import_extra("ray", "ray").shutdown()
                folder.ended(list(left))

    return draw


def _one_round(
    data: Any,
    kind: type[Actor],
    left: dict[str, Item],
    arguments: DrawerArguments,
    workers: int,
    resources: Mapping[str, float],
    report: Callable[[str, str], object],
) -> None:
    """Draw what is left, until all is drawn or an image has killed its actor too often."""
    # Named parameters that Ray passes on are told to be deprecated in a form that 2.64 removes; these are not those.
    warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
    # A block for every share: Ray would make its own, whatever fits into a pass.
    items, together = list(left.values()), arguments.share(len(left), workers)
    shares = [items[first : first + together] for first in range(0, len(items), together)]
    rows = data.from_items(
        [{"items": json.dumps([item.to_json() for item in share])} for share in shares],
        override_num_blocks=len(shares),
    )
    results = rows.map_batches(
        kind,
        fn_constructor_args=(json.dumps(vars(arguments)),),
        batch_size=1,
        compute=data.ActorPoolStrategy(size=workers),
        max_restarts=RESTARTS,
        max_task_retries=RETRIES,
        **resources,
    )
    for row in results.iter_rows():
        if row["state"] == UNREADABLE:
            raise BundleError(**json.loads(row["key"]))
        if row["state"] == UNWRITABLE:
            raise InputError(**json.loads(row["key"]))
        if left.pop(row["key"], None):
            report(row["key"], row["state"])


class Actor:
    """Holds the bundle on its machine. What it is called with and what it gives are columns of a batch."""

    def __init__(self, arguments: str) -> None:
        self._drawer: Any = None
        self._error: dict[str, str] | None = None
        try:
            self._drawer = DrawerArguments(**json.loads(arguments)).drawer()
        except FastvarError as error:  # raised here it would be tried again, for ever
            self._error = error.parts

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        if self._error is not None:
            return {"key": [json.dumps(self._error)], "state": [UNREADABLE]}
        found: dict[str, list[str]] = {"key": [], "state": []}

        def report(key: str, state: str) -> None:
            found["key"].append(key)
            found["state"].append(state)

        items = [Item(**one) for share in batch["items"] for one in json.loads(share)]
        try:
            self._drawer.draw(items, report)
        except InputError as error:
            return {"key": [json.dumps(error.parts)], "state": [UNWRITABLE]}
        return found


def started(address: str) -> bool:
    """Join a cluster, or start one of this machine; gives whether it ends with this process.

    Ray's usage statistics are sent to its makers unless they are switched off; who draws images has not asked for that.

    Raises:
        BackendError: ray is missing, or does not start.
        InputError: no cluster answers at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    if address == LOCAL:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # of a cluster that ends with this process
        os.environ.setdefault("RAY_worker_niceness", "0")  # at Ray's own, 15, others on this machine starve it
    ray = import_extra("ray", "ray")
    if ray.is_initialized():
        return False
    ending = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=LOCAL if address == LOCAL else address,
            log_to_driver=False,
            logging_level="ERROR",
            **({"include_dashboard": False} if address == LOCAL else {}),
        )
    except ConnectionError as error:
        fix = "start one with `ray start --head`, or say --ray local"
        raise InputError(f"no cluster answers at {address}: {error}", expected="its address", fix=fix) from error
    except (RuntimeError, ValueError, OSError) as error:
        raise BackendError(f"ray does not start: {error}", fix="try again; a busy machine may be too slow") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ending)  # Ray's own would end with another status, and a dump
    return address == LOCAL
