"""Actors with images that kill them, or that take their time."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from ray.util import get_node_ip_address

from fastvar.bulk.on_ray import Actor
from tests.ray import paced


class Poisoned(Actor):
    """Some prompts kill the process."""

    def __init__(self, arguments: str) -> None:
        super().__init__(arguments)
        pipe = self._drawer._pipe
        draw = pipe.draw

        def deadly(requests: Any, *rest: Any, **named: Any) -> Any:
            if any(request.subject == "poison" for request in requests):
                os.kill(os.getpid(), signal.SIGKILL)
            return draw(requests, *rest, **named)

        pipe.draw = deadly


class Slow(Actor):
    """Every pass takes a second; a file of each machine has a byte for each of its passes."""

    def __init__(self, arguments: str) -> None:
        super().__init__(arguments)
        pipe, passes = self._drawer._pipe, paced.passes(get_node_ip_address())
        draw = pipe.draw

        def slow(requests: Any, *rest: Any, **named: Any) -> Any:
            time.sleep(1)
            with passes.open("ab") as handle:
                handle.write(b".")
            return draw(requests, *rest, **named)

        pipe.draw = slow
