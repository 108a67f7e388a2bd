"""What Prometheus is told: requests as they are counted, everything else as the store has it when it is asked."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric

from runtime.serve.jobs import Store

FAST = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 30.0)  # seconds


class Metrics:
    """The registry of one server."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.registry = CollectorRegistry()
        self.requests = Counter("dit_requests", "Requests answered.", ["method", "status"], registry=self.registry)
        self.seconds = Histogram(
            "dit_request_seconds", "Seconds until a request was answered whole.", ["method"], buckets=FAST,
            registry=self.registry,
        )  # fmt: skip
        self.ready = lambda: 0  # workers
        self.registry.register(self)

    def count(self, method: str, status: int, seconds: float) -> None:
        """Count a request."""
        self.requests.labels(method, str(status)).inc()
        self.seconds.labels(method).observe(seconds)

    def describe(self) -> Iterable[Metric]:
        """Tell nothing beforehand: the store is asked when the metrics are."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Yield what the store knows."""
        jobs = GaugeMetricFamily("dit_jobs", "Jobs in each status.", labels=["status"])
        for status, count in self.store.counts().items():
            jobs.add_metric([status], count)
        yield jobs
        waits = SummaryMetricFamily("dit_queue_seconds", "Seconds that jobs waited for a worker.", labels=["kind"])
        for kind, waited, taken in self.store.waits():
            waits.add_metric([kind], count_value=taken, sum_value=waited)
        yield waits
        stages = SummaryMetricFamily("dit_stage_seconds", "Seconds per stage of all jobs.", labels=["stage"])
        for name, seconds, calls in self.store.stages():
            stages.add_metric([name], count_value=calls, sum_value=seconds)
        yield stages
        paces = GaugeMetricFamily("dit_pace", "Seconds taken by seconds predicted.", labels=["model", "size"])
        for (model, size), pace in self.store.paces().items():
            paces.add_metric([model, str(size)], pace)
        yield paces
        refusals = CounterMetricFamily("dit_refusals", "What the operator's rules refused.", labels=["stage", "code"])
        for (stage, code), count in self.store.refusals().items():
            refusals.add_metric([stage, code], count)
        yield refusals
        yield GaugeMetricFamily("dit_workers_ready", "Workers that take jobs.", value=self.ready())
