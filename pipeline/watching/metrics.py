"""The metrics for Prometheus, in a registry of headrace's own: the same names for one conversion and for `headrace serve`.

Every metric that headrace exports is a row of METRICS, or the histogram DURATIONS. A Reading holds their values at one moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from pipeline.version import VERSION
from pipeline.watching.state import Share, Snapshot

# Upper bounds of the histogram in seconds: from a small model to one of hundreds of gigabytes.
BUCKETS = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 43200.0)


@dataclass(frozen=True)
class Running:
    """A conversion that is running: sizes in bytes, times in seconds, None for a value that is not known."""

    name: str
    done_bytes: int
    total_bytes: int
    idle_seconds: float
    bytes_per_second: float | None = None
    eta_seconds: float | None = None
    memory_bytes: int | None = None
    memory_limit_bytes: int | None = None
    tasks: int | None = None
    done_tasks: int | None = None
    ranks: tuple[Share, ...] = ()


@dataclass(frozen=True)
class Durations:
    """A histogram of how long attempts took.

    `counts[i]` is the number of attempts that took at most `BUCKETS[i]` seconds, `total` the number of all attempts, and `seconds`
    their sum.
    """

    counts: tuple[int, ...] = (0,) * len(BUCKETS)
    total: int = 0
    seconds: float = 0.0

    def plus(self, seconds: float) -> Durations:
        """Return the histogram with one more attempt of this many seconds."""
        counts = tuple(count + (seconds <= bound) for count, bound in zip(self.counts, BUCKETS, strict=True))
        return Durations(counts, self.total + 1, self.seconds + seconds)


@dataclass(frozen=True)
class Reading:
    """The values of all metrics at one moment. Counters count from the start of the process.

    `stages`: {stage: {"bytes" | "seconds": total}}; `states`: jobs by state; `durations`: of ended attempts, by outcome.
    """

    stages: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    states: Mapping[str, int] = field(default_factory=dict)
    queue_length: int = 0
    stalls: int = 0
    durations: Mapping[str, Durations] = field(default_factory=dict)
    running: Sequence[Running] = ()


Values = Iterable[tuple[tuple[str, ...], float | None]]


@dataclass(frozen=True)
class MetricRow:
    """A metric: its name (Prometheus adds `_total` to counters), help text and labels, and the function that reads its values.

    `values` returns (label values, number) pairs; a pair whose number is None is not exported.
    """

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    labels: tuple[str, ...]
    values: Callable[[Reading], Values]


def _stage(unit: str) -> Callable[[Reading], Values]:
    return lambda reading: [((stage,), totals.get(unit, 0.0)) for stage, totals in sorted(reading.stages.items())]


def _job(field: str) -> Callable[[Reading], Values]:
    return lambda reading: [((job.name,), getattr(job, field)) for job in reading.running]


def _rank(field: str) -> Callable[[Reading], Values]:
    return lambda reading: [
        ((job.name, share.target, str(share.rank)), getattr(share, field)) for job in reading.running for share in job.ranks
    ]


METRICS = (
    MetricRow("headrace_stage_bytes", "counter", "Bytes that a stage has handled.", ("stage",), _stage("bytes")),
    MetricRow("headrace_stage_seconds", "counter", "Seconds spent in a stage, summed over workers.", ("stage",), _stage("seconds")),
    MetricRow("headrace_stalls", "counter", "Times that a conversion wrote nothing for too long.", (), lambda r: [((), r.stalls)]),
    MetricRow("headrace_jobs", "gauge", "Jobs by state.", ("state",), lambda r: [((s,), n) for s, n in sorted(r.states.items())]),
    MetricRow("headrace_queue_length", "gauge", "Jobs that wait.", (), lambda r: [((), r.queue_length)]),
    MetricRow(
        "headrace_job_bytes", "gauge", "Bytes written of a running job, earlier attempts' included.", ("job",), _job("done_bytes")
    ),
    MetricRow("headrace_job_size_bytes", "gauge", "Bytes that a running job writes in all.", ("job",), _job("total_bytes")),
    MetricRow("headrace_job_bytes_per_second", "gauge", "How fast a running job writes.", ("job",), _job("bytes_per_second")),
    MetricRow("headrace_job_eta_seconds", "gauge", "Seconds that a running job has left.", ("job",), _job("eta_seconds")),
    MetricRow("headrace_job_idle_seconds", "gauge", "Seconds since a running job ended a task.", ("job",), _job("idle_seconds")),
    MetricRow("headrace_job_tasks", "gauge", "Tasks of a running job.", ("job",), _job("tasks")),
    MetricRow("headrace_job_done_tasks", "gauge", "Tasks of a running job that are done.", ("job",), _job("done_tasks")),
    MetricRow("headrace_job_memory_bytes", "gauge", "Memory that a running job's process holds.", ("job",), _job("memory_bytes")),
    MetricRow("headrace_job_memory_limit_bytes", "gauge", "Memory that it may use.", ("job",), _job("memory_limit_bytes")),
    MetricRow("headrace_rank_bytes", "gauge", "Bytes written of a rank file.", ("job", "target", "rank"), _rank("done_bytes")),
    MetricRow("headrace_rank_size_bytes", "gauge", "Bytes that a rank file gets.", ("job", "target", "rank"), _rank("total_bytes")),
    MetricRow("headrace_build_info", "gauge", "The version at work.", ("version",), lambda _: [((VERSION,), 1)]),
)
DURATIONS = "headrace_job_duration_seconds"


class Metrics(Collector):
    """A Prometheus collector: it calls `look()` for a Reading whenever it is scraped."""

    def __init__(self, look: Callable[[], Reading]) -> None:
        self._look = look
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Yield Prometheus's metric families, each with the values that are known."""
        reading = self._look()
        for row in METRICS:
            family = (CounterMetricFamily if row.kind == "counter" else GaugeMetricFamily)(row.name, row.help, labels=row.labels)
            for labels, value in row.values(reading):
                if value is not None:
                    family.add_metric(labels, value)
            yield family
        histogram = HistogramMetricFamily(DURATIONS, "Seconds that attempts took.", labels=("outcome",))
        for outcome, durations in sorted(reading.durations.items()):
            buckets = [(str(bound), count) for bound, count in zip(BUCKETS, durations.counts, strict=True)]
            histogram.add_metric((outcome,), [*buckets, ("+Inf", durations.total)], durations.seconds)
        yield histogram

    def describe(self) -> list[Metric]:
        """Return nothing, so that registering does not collect: no other collector is in this registry, so no name can clash."""
        return []

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format, as bytes."""
        return generate_latest(self.registry)


def of_conversion(now: Snapshot) -> Reading:
    """Return the Reading of a process that runs one conversion."""
    states = {"running": int(not now.ended), "done": int(now.state == "done")}
    return Reading(
        stages=now.stages,
        states=states,
        running=() if now.state != "running" else (_running(now),),
    )


def _running(now: Snapshot) -> Running:
    return Running(
        name=now.name,
        done_bytes=now.done_bytes,
        total_bytes=now.total_bytes,
        idle_seconds=now.idle_seconds,
        bytes_per_second=now.bytes_per_second,
        eta_seconds=now.eta_seconds,
        memory_bytes=now.memory_bytes if now.memory_bytes >= 0 else None,
        memory_limit_bytes=now.memory_limit_bytes,
        tasks=now.tasks,
        done_tasks=now.done_tasks,
        ranks=now.ranks,
    )
