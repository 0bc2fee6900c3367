"""What a server counts and times, for Prometheus."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from ..errors import BackendError
from ..profiling.nvml_probe import NvmlProbe

QUEUE = (0.005, 0.05, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120)
IMAGE = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 60)
SCALE = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
PASS = (1, 2, 4, 8, 16, 32)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        ProcessCollector(registry=r)
        self.requests = Counter(
            "fastvar_requests", "Requests answered.", ["endpoint", "model", "status"], registry=r
        )  # status 499: the client was gone
        self.images = Counter("fastvar_images", "Images drawn.", ["model"], registry=r)
        self.cancelled = Counter("fastvar_cancelled", "Requests whose client was gone.", ["model", "stage"], registry=r)
        self.queue_length = Gauge("fastvar_queue_length", "Requests that wait.", ["model"], registry=r)
        self.running = Gauge("fastvar_running", "Images being drawn.", ["model"], registry=r)
        self.ready = Gauge("fastvar_ready", "Whether the bundle is loaded.", ["model"], registry=r)
        self.pass_images = Histogram("fastvar_pass_images", "Images of a pass.", ["model"], buckets=PASS, registry=r)
        self.queue_seconds = Histogram(
            "fastvar_queue_seconds", "Wait of a request for its first image.", ["model"], buckets=QUEUE, registry=r
        )
        self.image_seconds = Histogram(
            "fastvar_image_seconds", "An image, as its share of a pass.", ["model"], buckets=IMAGE, registry=r
        )
        self.scale_seconds = Histogram(
            "fastvar_scale_seconds", "A scale of a pass.", ["model", "scale"], buckets=SCALE, registry=r
        )
        with contextlib.suppress(BackendError):  # no GPU, or no package that reads it: the series are absent
            r.register(_Gpu(NvmlProbe()))

    def text(self) -> bytes:
        """All of them, in Prometheus's text format."""
        return generate_latest(self.registry)


class _Gpu(Collector):
    def __init__(self, probe: NvmlProbe) -> None:
        self._probe = probe

    def collect(self) -> Iterator[GaugeMetricFamily]:
        try:
            sample = self._probe.sample(0.0)
        except BackendError:
            return  # the GPU no longer answers
        for name, about, value in (
            ("process", "Memory of this process on the first GPU, by NVML.", sample.process_bytes),
            ("used", "Used memory of the first GPU, by NVML.", sample.device_used_bytes),
            ("total", "Memory of the first GPU, by NVML.", sample.device_total_bytes),
        ):
            if value is not None:
                yield GaugeMetricFamily(f"fastvar_gpu_memory_{name}_bytes", about, value)
