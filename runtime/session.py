"""A bundle brought to life on one device: weights, engines, memory, and a workspace for each kind of pass."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

from ..core.plan import Batch
from ..engines.base import Backend, Engine
from ..engines.bundle.bundle import Bundle
from ..engines.registry import get_backend
from ..errors import InputError
from .memory.arena import Memory
from .memory.fit import require_fit, total_need
from .memory.layout import Layout
from .memory.soundness import UNCONDITIONAL, check_weights, sound_layout
from .workspace import Workspace

_log = logging.getLogger(__name__)


class Session:
    """What `Pipeline` draws with.

    Args:
        threads: CPU threads; the library's choice by default.
        offload_text_encoder: on a GPU, bring the text encoder's weights for every prompt instead of keeping them.
        cuda_graphs: on a GPU, record the launches of a scale and replay them as one.
        memory_budget: bytes that weights and memory may take together; no limit by default.
        batch: most images of one pass; by default the most that the bundle has engines for and that fit.
        backend: in place of the one that the bundle names.

    Raises:
        BackendError: the backend's library, driver or device is missing or does not fit.
        BundleError: engines, weights and plan do not fit together.
        InputError: a batch that the bundle has no engines for.
        DeviceMemoryError: the device has too little free memory, or the budget is too small; nothing was allocated.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        offload_text_encoder: bool = False,
        cuda_graphs: bool = True,
        memory_budget: int | None = None,
        backend: Backend | None = None,
        batch: int | None = None,
    ) -> None:
        self.manifest, self._bundle = bundle.manifest, bundle
        self._cuda_graphs = cuda_graphs
        self.weights = bundle.weights
        self._backend = backend or get_backend(
            self.manifest.backend, threads=threads, cache_folder=bundle.kernel_folder, target=self.manifest.target
        )
        self.device = self._backend.device()
        offloads = offload_text_encoder and not self.device.shares_host_memory
        layouts = [sound_layout(self.manifest, *s.batch, offload_text_encoder=offloads) for s in self.manifest.sets]
        check_weights(self.manifest, layouts, self.weights)
        layouts = self._fitting(layouts, batch, memory_budget, offloads)
        self._batches = [(layout.rows, layout.images) for layout in layouts]
        self.engines = LazyEngines(bundle, self._backend)
        self._memory = Memory(self.device, layouts, self.weights)
        self._workspaces: dict[Batch, Workspace] = {}
        self._settled = 0

    def _fitting(
        self, layouts: Sequence[Layout], batch: int | None, budget: int | None, offloads: bool
    ) -> list[Layout]:
        """The layouts of passes of at most `batch` images; where nobody says how many, of as many as fit.

        Raises:
            InputError: the bundle has no engines for such a batch.
            DeviceMemoryError: not even they fit.
        """
        sizes = sorted({layout.images for layout in layouts})
        if batch is not None and batch not in sizes:
            raise InputError(
                f"batch {batch}, and the bundle has engines for passes of {', '.join(map(str, sizes))}",
                expected="one of these",
                fix=f"leave batch away, or rebuild with --batch {','.join(map(str, sorted({*sizes, batch})))}",
            )
        free, on_host = self.device.free_bytes(), self.device.shares_host_memory
        limit = min((n for n in (free, budget) if n is not None), default=None)
        for most in [batch] if batch is not None else sizes[::-1]:
            chosen = [layout for layout in layouts if layout.images <= most]
            need = total_need(self.manifest, chosen, on_host=on_host)
            if limit is None or need.total_bytes <= limit:
                break
        if len(chosen) < len(layouts) and batch is None:
            _log.info("passes of at most %d images fit", most)
        self.need = need
        require_fit(self.manifest, chosen, need, free_bytes=free, budget_bytes=budget, offloads=offloads)
        packs = limit is None or need.total_bytes + need.packed_bytes <= limit
        self._backend.pack_weights(packs)
        if not packs:
            _log.info("%d bytes are not left to pack matrices: products take longer", need.packed_bytes)
        return chosen

    def batch_sizes(self, rows: int) -> list[int]:
        """How many images a pass with so many guidance rows may draw, in rising order."""
        return sorted(images for guidance_rows, images in self._batches if guidance_rows == rows)

    def workspace(self, rows: int, images: int = 1) -> Workspace:
        """The workspace of a pass: so many images with so many guidance rows each; made when first asked for.

        Raises:
            BundleError: the bundle holds no engines for it.
        """
        batch = Batch(rows, images)
        if batch not in self._workspaces:
            self.manifest.engine_set(*batch)
            uncond = self.weights[UNCONDITIONAL] if UNCONDITIONAL in self.weights else None  # noqa: SIM401 no mapping
            self._workspaces[batch] = Workspace(
                self.manifest, self.engines, self._memory, rows, uncond, captures=self._cuda_graphs, images=images
            )
        return self._workspaces[batch]

    def save_compiled_kernels(self) -> None:
        """After an image: keep what the library compiled for engines that ran for the first time."""
        if self.engines.loaded != self._settled:
            if self._bundle.is_current():  # else they would lie in the folder of another bundle
                self._backend.save_compiled_kernels()
            self._settled = self.engines.loaded


class LazyEngines(Mapping[str, Engine]):
    """Engines of a bundle, each loaded when it is first asked for: one guidance mode costs only its own.

    Their bytes are the opened bundle's: another build into its folder changes nothing here.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self._bundle, self._backend = bundle, backend
        self._specs = bundle.manifest.engines
        self._loaded: dict[str, Engine] = {}

    def __getitem__(self, name: str) -> Engine:
        if name not in self._loaded:
            spec = self._specs[name]
            self._loaded[name] = self._backend.load(self._bundle.read_engine(spec), spec)
        return self._loaded[name]

    @property
    def loaded(self) -> int:
        """How many have been asked for."""
        return len(self._loaded)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)
