"""All runs of a batch or a daemon at one moment: a page, metrics for Prometheus, and JSON."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.jobs.fleet import Fleet
from pipeline.jobs.runs import ACTIVE, Run
from pipeline.printed import in_html
from pipeline.sinks.output import CONFIG
from pipeline.watching.charts import timeline
from pipeline.watching.live import page_routes
from pipeline.watching.metrics import Durations, Metrics, Reading, Running
from pipeline.watching.page import duration, fact_list, rates
from pipeline.watching.server import Guarded, Route, routes
from pipeline.watching.state import Sample, Share
from pipeline.watching.units import human_bytes, human_rate

SAMPLE_SECONDS, SAMPLES = 5.0, 720
SHOWN = 100  # rows of a table
LONGEST_ERROR = 4000  # characters
KEPT = 1000  # runs that have ended, in memory


class Overview:
    """Listens to a fleet, and shows it. `name`: the page's title; `next_times`: when each trigger of a daemon fires next."""

    def __init__(self, fleet: Fleet, name: str, next_times: Callable[[], Mapping[str, str]] = dict, dashboard: str = "") -> None:
        self.fleet, self.name, self.next_times, self.dashboard = fleet, name, next_times, dashboard
        self.has_ended = False
        self._begun = time.monotonic()
        self._samples: deque[Sample] = deque([Sample(0.0, 0, 0)], SAMPLES)
        self._stages: dict[str, dict[str, float]] = {}
        self._durations: dict[str, Durations] = {}
        self._ended: Counter[str] = Counter()
        self._stalls = self._written = 0
        fleet.listeners.append(self)

    def __call__(self, event: str, run: Run, _said: Mapping[str, Any]) -> None:
        """Hear of an event, with the fleet's lock held."""
        self._stalls += event == "stalled"
        if event == "ended":
            self._ended[run.state] += 1
            for attempt in run.attempts:
                _add(self._stages, attempt.get("stages") or {})
                self._written += int(attempt.get("bytes_written") or 0)
            if run.attempts:
                took = self._durations.get(run.state, Durations())
                self._durations[run.state] = took.plus(run.total("seconds"))
            ended = [number for number, each in self.fleet.runs.items() if each.state not in ACTIVE]
            if self.name == "schedule":  # a batch sums its runs up at the end
                for number in ended[:-KEPT]:
                    del self.fleet.runs[number]
        self._sample()

    def reading(self) -> Reading:
        """The values of all metrics."""
        with self.fleet.lock:
            active = self.fleet.active()
            stages = {stage: dict(units) for stage, units in self._stages.items()}
            for run in active:
                _add(stages, run.progress.get("stages") or {})
            waiting = Counter(str(run.state) for run in active)
            running = tuple(_running(run) for run in active if run.state == "running")
            states: dict[str, int] = {**self._ended, **waiting}
            queue = len(active) - len(running)
            return Reading(stages, states, queue, self._stalls, dict(self._durations), running)

    def as_json(self) -> dict[str, Any]:
        """All runs as plain values, the newest first."""
        with self.fleet.lock:
            runs = [run.as_json() for run in sorted(self.fleet.runs.values(), key=lambda run: -run.number)]
        return {"runs": runs, "next": dict(self.next_times())}

    def health(self) -> dict[str, Any]:
        """The answer to `/health`: how many runs are in each state, and for how long each at work has written nothing."""
        now = self.reading()
        running = [{"job": each.name, "idle_seconds": round(each.idle_seconds, 1)} for each in now.running]
        return {"status": "ok", "states": dict(now.states), "queue_length": now.queue_length, "running": running}

    def routes(self) -> list[Route]:
        """The page, `/metrics`, `/health` and `/api/jobs`."""
        own: list[Route] = [
            ("/api/jobs", JobsHandler, {"overview": self}),
            (r"/report/(\d{1,12})/(\d{1,6})", ReportHandler, {"overview": self}),
        ]
        return [*page_routes(self), *routes(Metrics(self.reading).text, self.health), *own]

    def look(self) -> tuple[str, str, bool]:
        """The page's content as HTML, its title, and whether the batch has ended."""
        with self.fleet.lock:
            runs = sorted(self.fleet.runs.values(), key=lambda run: -run.number)
            self._sample()
            samples = list(self._samples)
            active = [run for run in runs if run.state in ACTIVE]
            counts = Counter(run.state for run in runs)
            at_work = [run for run in active if run.state == "running"]
            waiting = [run for run in reversed(active) if run.state != "running"]
            ended = [run for run in runs if run.state not in ACTIVE]
            tables = (
                _table("Running", at_work, _live_row, "job", "", "written", "rate", "left", "memory")
                + _table("Waiting", waiting, _waiting_row, "job", "", "why")
                + _table("Ended", ended, _ended_row, "job", "", "when", "took", "written", "message")
            )
        facts: list[tuple[str, str]] = [(str(count), state) for state, count in sorted(counts.items())]
        facts += [(human_bytes(self._total()), "written"), (duration(time.monotonic() - self._begun), "elapsed")]
        times = "".join(f"<li>{in_html(name)}: {in_html(when)}</li>" for name, when in self.next_times().items())
        held = [(sample.seconds, float(sample.memory_bytes)) for sample in samples]
        links = '<a href="metrics">metrics</a> · <a href="health">health</a> · <a href="api/jobs">JSON</a>'
        if self.dashboard:
            links += f' · <a href="{in_html(self.dashboard)}">Dask\'s dashboard</a>'
        body = (
            f"<div class=head><h1>headrace {in_html(self.name)}</h1>{fact_list(facts)}</div>"
            + (f"<section class=wide><h2>Next</h2><ul>{times}</ul></section>" if times else "")
            + tables
            + f"<div class=two>{timeline('Throughput of all', rates(samples), colour='blue', rate=True)}"
            f"{timeline('Memory of all', held, colour='teal')}</div><footer>{links}</footer>"
        )
        left = len(active)
        return body, f"{left} left: headrace" if left else "headrace", self.has_ended

    def _total(self) -> int:
        return self._written + sum(int(run.progress.get("bytes_written") or 0) for run in self.fleet.active())

    def _sample(self) -> None:
        seconds = time.monotonic() - self._begun
        if seconds - self._samples[-1].seconds >= SAMPLE_SECONDS:
            held = sum(max(int(run.progress.get("memory_bytes") or 0), 0) for run in self.fleet.active())
            self._samples.append(Sample(seconds, self._total(), held))


class JobsHandler(Guarded):
    """`GET /api/jobs`."""

    def initialize(self, overview: Overview) -> None:
        self.overview = overview

    def get(self) -> None:
        self.set_header("Cache-Control", "no-store")
        self.write(self.overview.as_json())


class ReportHandler(Guarded):
    """`GET /report/7/0`: the report of the first output of run 7.

    It is the one that `headrace report` has left beside the output, with its verification; else one is made of the headers.
    """

    def initialize(self, overview: Overview) -> None:
        self.overview = overview

    async def get(self, number: str, place: str) -> None:
        run = self.overview.fleet.runs.get(int(number))
        output = dict(_reports(run)).get(int(place)) if run else None
        if output is None:
            self.refuse(404, "no such report")
            return
        text = await asyncio.get_running_loop().run_in_executor(None, _report, output)
        self.set_header("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; img-src data:")
        self.write(text)


def _reports(run: Run) -> list[tuple[int, Path]]:
    """The outputs of a run that there is something to report of, with their places among all."""
    outputs = [(place, Path(output)) for place, output in enumerate(run.unit.outputs)]
    return [(place, output) for place, output in outputs if _beside(output).is_file() or (output / CONFIG).is_file()]


def _beside(output: Path) -> Path:
    return output.with_name(f"{output.name}.report.html")


def _report(output: Path) -> str:
    """The text of an output's report."""
    if _beside(output).is_file():
        return _beside(output).read_text()
    from pipeline.reporting.report import unverified_page

    return unverified_page(output)


def _add(totals: dict[str, dict[str, float]], stages: Mapping[str, Mapping[str, float]]) -> None:
    for stage, units in stages.items():
        mine = totals.setdefault(stage, {})
        for unit, value in units.items():
            mine[unit] = mine.get(unit, 0.0) + value


def _running(run: Run) -> Running:
    said = run.progress
    memory = said.get("memory_bytes", -1)
    return Running(
        name=f"{run.number} {run.unit.name}",  # names alone may be those of several
        done_bytes=said.get("bytes", 0),
        total_bytes=said.get("total_bytes", 0),
        idle_seconds=time.monotonic() - run.moved,
        bytes_per_second=said.get("bytes_per_second"),
        eta_seconds=said.get("eta_seconds"),
        memory_bytes=memory if memory >= 0 else None,
        memory_limit_bytes=said.get("memory_limit_bytes"),
        tasks=said.get("tasks"),
        done_tasks=said.get("done_tasks"),
        ranks=tuple(Share(str(rank[0]), *rank[1:]) for rank in said.get("ranks", ())),
    )


def _table(title: str, runs: list[Run], row: Callable[[Run], str], *columns: str) -> str:
    heads = "".join(f"<th>{column}</th>" for column in columns)
    more = f"<p class=sub>and {len(runs) - SHOWN} more</p>" if len(runs) > SHOWN else ""
    rows = "".join(map(row, runs[:SHOWN]))
    table = f"<table class=jobs><tr>{heads}</tr>{rows}</table>{more}" if runs else "<p class=sub>none</p>"
    return f"<section class=wide><h2>{title}</h2>{table}</section>"


def _row(run: Run, *cells: str) -> str:
    name = in_html(run.unit.name)
    if page := run.place.get("page"):
        name = f'<a href="{in_html(str(page))}">{name}</a>' if run.state == "running" else name
    outputs = f"<span class=sub>{in_html(', '.join(run.unit.outputs))}</span>"
    for place, output in _reports(run):
        of = f" of {in_html(output.name)}" if len(run.unit.outputs) > 1 else ""
        outputs += f' <a href="report/{run.number}/{place}">report{of}</a>'
    pill = f"<span class='pill {run.state.split()[0]}'>{run.state}</span>"
    attempt = len(run.attempts) + (run.state == "running")
    again = f"<br>attempt {attempt}" if attempt > 1 else ""
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in (f"{run.number} {name}<br>{outputs}", pill + again, *cells)) + "</tr>"


def _live_row(run: Run) -> str:
    said, (done, total) = run.progress, (run.progress.get("bytes", 0), run.progress.get("total_bytes", 0))
    share = 100 * done / total if total else 0.0
    bar = f"<div class=bar><div style='width:{share:.1f}%'></div></div>"
    memory = (
        f"{human_bytes(said['memory_bytes'])} of {human_bytes(said['memory_limit_bytes'])}"
        if said.get("memory_bytes", -1) >= 0
        else ""
    )
    rate, left = (human_rate(said["bytes_per_second"]), duration(said["eta_seconds"])) if "eta_seconds" in said else ("", "")
    return _row(
        run, f"{bar}{human_bytes(done)} of {human_bytes(total)}" if total else "", "stalled" if run.stalled else rate, left, memory
    )


def _waiting_row(run: Run) -> str:
    why = f"again at {_moment(run.not_before)}" if run.state == "waiting" else f"after {run.unit.after}" if run.unit.after else ""
    return _row(run, f"{in_html(why)} {_message(run.error)}")


def _ended_row(run: Run) -> str:
    took, written = run.total("seconds"), int(run.total("bytes_written"))
    return _row(
        run, _moment(run.ended), duration(took) if took else "", human_bytes(written) if written else "", _message(run.error)
    )


def _message(error: str) -> str:
    return f"<pre>{in_html(error[:LONGEST_ERROR])}</pre>" if error else ""


def _moment(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds)) if seconds else ""
