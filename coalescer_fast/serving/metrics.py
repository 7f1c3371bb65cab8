"""What a server counts, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest


class Metrics:
    """Counters of one server.

    Args:
        sizes: of batches.
        waiting: tells how many pictures wait.

    Attributes:
        requests: answered, by path and status.
        seconds: of a request, from its head to the end of its answer, by path.
        in_progress: requests that are not answered yet.
        pictures: that were drawn.
        batch: pictures of a batch.
        abandoned: requests whose clients went away before they were answered.
    """

    def __init__(self, sizes: list[int], waiting: Callable[[], float]):
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        name = "coalescer_fast_{}".format
        self.requests = Counter(name("requests"), "Requests answered", ["path", "status"], registry=registry)
        self.seconds = Histogram(name("request_seconds"), "Seconds of a request", ["path"], registry=registry)
        self.in_progress = Gauge(name("requests_in_progress"), "Requests not yet answered", registry=registry)
        self.pictures = Counter(name("pictures"), "Pictures drawn", registry=registry)
        self.batch = Histogram(name("batch_pictures"), "Pictures of a batch", buckets=sizes, registry=registry)
        self.abandoned = Counter(name("abandoned"), "Requests whose clients went away", registry=registry)
        Gauge(name("pictures_waiting"), "Pictures in the queue", registry=registry).set_function(waiting)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)
