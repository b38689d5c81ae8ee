"""The parts of a page that is a Bokeh document: a line over time and bars by name. Each has an `update` that shows new values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from bokeh.core.properties import value
from bokeh.events import ConnectionLost
from bokeh.layouts import column
from bokeh.models import (
    AdaptiveTicker,
    ColumnDataSource,
    CustomJS,
    Div,
    FactorRange,
    HoverTool,
    NumeralTickFormatter,
    Range1d,
    Span,
)
from bokeh.models.formatters import CustomJSTickFormatter
from bokeh.plotting import figure

from pipeline.watching.units import human_bytes

BLUE, TEAL, RED, GREY = "#2563eb", "#0d9488", "#dc2626", "#64748b"
FONT = "system-ui, sans-serif"
ROW_PIXELS = 22  # the height of a bar
MILLISECONDS = 1000
LONGEST_NAME = 26  # of a longer group name the last characters are shown: they tell more than the first

_BYTES_JS = """
const units = ["B", "KiB", "MiB", "GiB", "TiB"];
let n = 0, value = tick;
while (Math.abs(value) >= 1024 && n < units.length - 1) { value /= 1024; n += 1; }
return +value.toFixed(value < 10 ? 1 : 0) + " " + units[n] + suffix;
"""
_SECONDS_JS = """
const s = Math.round(tick), pad = (n) => String(n).padStart(2, "0");
const hours = Math.floor(s / 3600), minutes = Math.floor(s / 60) % 60;
return (hours ? hours + ":" + pad(minutes) : minutes) + ":" + pad(s % 60);
"""

STYLE = """
:host { font-family: system-ui, sans-serif; color: #0f172a; }
.bk-clearfix { width: 100%; }
h1 { font-size: 20px; margin: 0 0 2px; font-weight: 600; }
h2 { font-size: 15px; margin: 14px 0 4px; font-weight: 600; }
.sub { color: #64748b; margin: 0 0 10px; overflow-wrap: anywhere; }
.bar { height: 14px; border-radius: 7px; background: #e2e8f0; overflow: hidden; margin: 6px 0 12px; }
.bar > div { height: 100%; background: #2563eb; }
.facts { display: flex; flex-wrap: wrap; gap: 10px 36px; margin-bottom: 4px; }
.facts b { display: block; font-size: 17px; font-weight: 600; }
.facts span { color: #64748b; font-size: 12px; }
.pill { display: inline-block; padding: 1px 10px; border-radius: 10px; font-size: 12px; vertical-align: 3px; }
.pill { background: #dbeafe; color: #1e40af; }
.pill.ended, .pill.done { background: #dcfce7; color: #166534; }
.pill.lost, .pill.failed { background: #fee2e2; color: #991b1b; }
a { color: #2563eb; }
table { border-collapse: collapse; width: 100%; margin-bottom: 14px; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid #e2e8f0; vertical-align: top; }
th { color: #64748b; font-weight: 500; font-size: 12px; }
pre { white-space: pre-wrap; margin: 0; font-size: 12px; }
"""


class Timeline:
    """A line chart of bytes (or, with `rate`, bytes per second) over the seconds of a run, with an optional limit line."""

    def __init__(self, title: str, *, rate: bool, colour: str) -> None:
        self._source = ColumnDataSource({"x": [], "y": [], "text": []})
        self.figure = _figure(title, height=230)
        self.figure.xaxis.formatter = CustomJSTickFormatter(code=_SECONDS_JS)
        _bytes_axis(self.figure.yaxis, "/s" if rate else "")
        self.figure.varea(x="x", y1=0, y2="y", source=self._source, fill_color=colour, fill_alpha=0.15)
        line = self.figure.line("x", "y", source=self._source, line_color=colour, line_width=2)
        self.figure.add_tools(HoverTool(tooltips="@text", renderers=[line], mode="vline"))
        self.figure.x_range, self.figure.y_range = self._seconds, self._range = Range1d(0, 1), Range1d(0, 1)
        self._limit = Span(location=0, dimension="width", line_color=RED, line_dash="dashed", line_width=2, visible=False)
        self.figure.add_layout(self._limit)
        self._suffix = "/s" if rate else ""

    def update(self, points: Sequence[tuple[float, float]], limit: float | None = None) -> None:
        """Show `points`, each (seconds, bytes), and the limit in bytes where there is one."""
        text = [human_bytes(y) + self._suffix for _, y in points]
        self._source.data = {"x": [x for x, _ in points], "y": [y for _, y in points], "text": text}
        self._seconds.end = max([1.0, *(x for x, _ in points)])
        self._range.end = _binary_ceiling(max([1.0, limit or 0.0, *(y for _, y in points)]) * 1.1)
        if limit:
            self._limit.update(location=limit, visible=True)


class Bars:
    """A bar chart: one horizontal bar for each name, followed by a text. A name may be (group, name)."""

    def __init__(self, title: str, *, share: bool, colour: str) -> None:
        """With `share`, values are fractions from 0 to 1, shown as percentages; otherwise they are bytes."""
        self._source = ColumnDataSource({"y": [], "x": [], "text": []})
        self._factors = FactorRange(range_padding=0.3, range_padding_units="absolute")
        self._share = share
        self.figure = _figure(title, height=230, y_range=self._factors)
        self.figure.ygrid.grid_line_color = None
        self.figure.yaxis.group_label_orientation = "horizontal"
        self.figure.yaxis.group_text_font = FONT
        self.figure.x_range = self._range = Range1d(0, 1)
        if share:
            self.figure.xaxis.formatter, self.figure.xaxis.ticker = NumeralTickFormatter(format="0%"), [0, 0.25, 0.5, 0.75, 1]
        else:
            _bytes_axis(self.figure.xaxis, "")
        self.figure.hbar(y="y", left=0, right="x", height=0.7, source=self._source, fill_color=colour, line_color=None)
        self.figure.text(
            x="x",
            y="y",
            text="text",
            source=self._source,
            x_offset=6,
            text_baseline="middle",
            text_font_size="12px",
            text_font=value(FONT),
        )

    def update(self, rows: Sequence[tuple[str | tuple[str, str], float, str]]) -> None:
        """Show `rows`, each (name, value, text), the first at the top."""
        names = [name if isinstance(name, str) else (_shortened(name[0]), name[1]) for name, _, _ in rows]
        factors = list(reversed(names))
        if self._factors.factors != factors:
            self._factors.factors = factors
            self.figure.height = max(230, 90 + ROW_PIXELS * len(rows))
        longest = max([0.0, *(value for _, value, _ in rows)])
        # Leave room for the text after the longest bar.
        self._range.end = 1.3 if self._share else max(longest, 1.0) * 1.7
        self._source.data = {"y": names, "x": [value for _, value, _ in rows], "text": [text for _, _, text in rows]}


def document_of(document: Any, update: Callable[[], None], head: Div, parts: Sequence[Any]) -> None:
    """Fill a document with a heading and `parts` below it, and call `update` now and once a second."""
    update()
    document.title = "headrace"
    document.add_root(column(head, *parts, sizing_mode="stretch_width", margin=16))
    document.js_on_event(ConnectionLost, lost(head))
    document.add_periodic_callback(update, MILLISECONDS)


def lost(head: Div) -> CustomJS:
    """Return a script that says in the browser, when the connection is lost, that the run's process has ended."""
    code = "if (!head.text.includes('pill lost')) { head.text += \"<p><span class='pill lost'>the process has ended</span></p>\"; }"
    return CustomJS(args={"head": head}, code=code)


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"


def _figure(title: str, height: int, **more: object) -> figure:
    plot = figure(
        title=title, height=height, sizing_mode="stretch_width", toolbar_location=None, tools="", output_backend="svg", **more
    )
    plot.title.text_font = plot.axis.major_label_text_font = FONT
    plot.title.text_font_size, plot.axis.major_label_text_font_size = "14px", "12px"
    plot.axis.axis_line_color = plot.axis.major_tick_line_color = plot.axis.minor_tick_line_color = plot.outline_line_color = None
    plot.grid.grid_line_color = "#e2e8f0"
    plot.min_border_right = 20
    return plot


def _bytes_axis(axis: Any, suffix: str) -> None:
    """Label an axis in KiB, MiB and so on, with ticks at power-of-two multiples."""
    axis.formatter = CustomJSTickFormatter(code=f"const suffix = '{suffix}';\n{_BYTES_JS}")
    axis.ticker = AdaptiveTicker(base=1024, mantissas=[2.0**n for n in range(10)], desired_num_ticks=5, num_minor_ticks=0)


def _binary_ceiling(value: float) -> float:
    """Round up to a multiple of a quarter of the largest power of two that is at most `value`."""
    step = 2.0 ** (math.floor(math.log2(value)) - 2)
    return math.ceil(value / step) * step
