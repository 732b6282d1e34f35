"""``report.png``: the same panels in one image, drawn with matplotlib's object interface.

No pyplot and no global settings: the host process may use matplotlib for itself.
"""

from collections.abc import Sequence
from io import BytesIO
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text

from nemo_apo.record import METRICS
from nemo_apo.report.figures import headline, identity
from nemo_apo.report.history import Run
from nemo_apo.report.html import report_title
from nemo_apo.report.panels import (
    Panel,
    colour,
    last_step,
    metrics_with_data,
    split_by_data,
    stacked_series,
    y_limits,
)

WIDTH_PX = 1600
_DPI = 100
_COLUMNS = 3
# The parts of a panel, inches. The room is fixed, not found by a layout engine: that would take
# as long again as drawing, and the panels would not line up.
_AXES_HEIGHT = 1.95
_AXES_LEFT = 0.78
_BARS_LEFT = 1.45
_AXES_RIGHT = 0.14
_BELOW_AXES = 0.56
_PANEL_TITLE = 0.3
_LEGEND_ROW = 0.174
_HEAD_TITLE = 0.42
_HEAD_LINE = 0.24
_POINTS_PER_INCH = 72
_FEW_POINTS = 40
_DASHES: tuple[Any, ...] = ("solid", "dotted", "dashed", "dashdot", (0, (9, 3)))
_INK = "#1d2733"
_GREY = "#555555"
_SIZE = 9.5
# Letters of a legend row that fit beside each other over one panel.
_LEGEND_LETTERS = 57


def render_png(runs: Sequence[Run]) -> bytes:
    """The report of one run, or of several overlaid, as a PNG of ``WIDTH_PX`` pixels width."""
    shown, empty = split_by_data(runs)
    rows = [shown[i : i + _COLUMNS] for i in range(0, len(shown), _COLUMNS)]
    titles = [_PANEL_TITLE + _LEGEND_ROW * _most_legend_rows(row, runs) for row in rows]
    lines = _head_lines(runs, empty)
    head = _HEAD_TITLE + _HEAD_LINE * len(lines) + 0.1
    height = round(head + sum(titles) + len(rows) * (_AXES_HEIGHT + _BELOW_AXES), 2)
    figure = Figure(figsize=(WIDTH_PX / _DPI, height), dpi=_DPI, facecolor="white")
    _draw_head(figure, _shortened(report_title(runs), 110), lines)
    top = head
    for row, title in zip(rows, titles, strict=True):
        top += title
        for column, panel in enumerate(row):
            _draw_panel(_add_axes(figure, column, top, panel, runs), panel, runs)
        top += _AXES_HEIGHT + _BELOW_AXES
    return _encode(figure)


def _most_legend_rows(panels: Sequence[Panel], runs: Sequence[Run]) -> int:
    return max(_legend_rows(_legend_labels(panel, runs)) for panel in panels)


def _add_axes(figure: Figure, column: int, top: float, panel: Panel, runs: Sequence[Run]) -> Axes:
    """Axes whose upper edge lies ``top`` inches under that of the figure."""
    width, height = figure.get_size_inches()
    cell = width / _COLUMNS
    left = _BARS_LEFT if _is_bars(panel, runs) else _AXES_LEFT
    return figure.add_axes(
        (
            (column * cell + left) / width,
            1 - (top + _AXES_HEIGHT) / height,
            (cell - left - _AXES_RIGHT) / width,
            _AXES_HEIGHT / height,
        )
    )


def _encode(figure: Figure) -> bytes:
    buffer = BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)  # type: ignore[no-untyped-call]
    return buffer.getvalue()


def _head_lines(runs: Sequence[Run], empty: Sequence[Panel]) -> list[tuple[str, str]]:
    """(text, colour) of the lines under the title: key figures per run, what was left out."""
    if len(runs) == 1:
        lines = [(identity(runs[0]), _GREY), (headline(runs[0]), _INK)]
    else:
        lines = [
            (f"■ {_shortened(run.label, 44)}:  {headline(run)}", colour(i))
            for i, run in enumerate(runs)
        ]
    if empty:
        titles = ", ".join(panel.title for panel in empty)
        lines.append((f"Not recorded: {titles}.", _GREY))
    return lines


def _draw_head(figure: Figure, title: str, lines: Sequence[tuple[str, str]]) -> None:
    height = figure.get_figheight()

    def draw(inches_from_top: float, text: str, size: float, ink: str, weight: str) -> None:
        y = 1 - inches_from_top / height
        drawn = figure.text(0.008, y, text, size=size, color=ink, weight=weight, va="center")
        _plain(drawn)

    draw(0.24, title, 17, _INK, "bold")
    for i, (text, ink) in enumerate(lines):
        draw(_HEAD_TITLE + (i + 0.5) * _HEAD_LINE, text, 10, ink, "normal")


def _is_bars(panel: Panel, runs: Sequence[Run]) -> bool:
    return panel.total is not None and len(runs) > 1


def _draw_panel(axis: Axes, panel: Panel, runs: Sequence[Run]) -> None:
    if _is_bars(panel, runs):
        _draw_mean_bars(axis, panel, runs)
    else:
        draw = _draw_lines if panel.total is None else _draw_stack
        handles = draw(axis, panel, runs)
        axis.set_xlabel("RL step", size=_SIZE, labelpad=1)
        axis.set_xlim(-0.015 * last_step(runs), 1.015 * last_step(runs))
        axis.set_ylabel(panel.y_label, size=_SIZE)
        axis.set_ylim(y_limits(panel, runs))
        _draw_legend(axis, handles, _legend_labels(panel, runs))
    legend_height = _LEGEND_ROW * _legend_rows(_legend_labels(panel, runs))
    pad = 5 + _POINTS_PER_INCH * legend_height
    axis.set_title(panel.title, size=11.5, weight="bold", loc="left", color=_INK, pad=pad)
    axis.tick_params(labelsize=_SIZE, color="#bbbbbb")
    axis.grid(True, color="#e6e8eb", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#bbbbbb")


def _draw_lines(axis: Axes, panel: Panel, runs: Sequence[Run]) -> list[Line2D | Patch]:
    """Draw a line per metric and run; return what the legend shows, one per metric."""
    single = len(runs) == 1
    handles: list[Line2D | Patch] = []
    for metric_index, metric in enumerate(metrics_with_data(panel, runs)):
        stands_out = single or metric_index == 0
        dash: Any = "solid" if single else _DASHES[metric_index % len(_DASHES)]
        for run_index, run in enumerate(runs):
            steps, values = run.series(metric)
            axis.plot(
                steps,
                np.array(values, dtype=float),
                color=colour(metric_index if single else run_index),
                linestyle=dash,
                linewidth=1.6 if stands_out else 1.1,
                alpha=1.0 if stands_out else 0.7,
                marker="o" if len(steps) <= _FEW_POINTS else None,
                markersize=3,
            )
        ink = colour(metric_index) if single else _GREY
        handles.append(Line2D([], [], color=ink, linestyle=dash, linewidth=1.8))
    return handles


def _draw_stack(axis: Axes, panel: Panel, runs: Sequence[Run]) -> list[Line2D | Patch]:
    """Draw the parts of one run on top of each other; return what the legend shows."""
    run = runs[0]
    metrics = metrics_with_data(panel, runs)
    steps, columns = stacked_series(run, metrics)
    colours = [colour(i) for i in range(len(metrics))]
    axis.stackplot(steps, columns, colors=colours, alpha=0.6, linewidth=0)
    handles: list[Line2D | Patch] = [Patch(color=ink, alpha=0.6) for ink in colours]
    if panel.total is not None and run.finite(panel.total):
        total_steps, totals = run.series(panel.total)
        handles += axis.plot(total_steps, np.array(totals, dtype=float), color=_INK, linewidth=1)
    return handles


def _draw_mean_bars(axis: Axes, panel: Panel, runs: Sequence[Run]) -> None:
    """Draw the mean of each part as one bar per run."""
    metrics = metrics_with_data(panel, runs)
    thickness = 0.8 / len(runs)
    for i, run in enumerate(runs):
        means = [run.mean(metric) or 0.0 for metric in metrics]
        top = np.arange(len(metrics)) - 0.4 + i * thickness
        axis.barh(top, means, thickness * 0.94, align="edge", color=colour(i))
    axis.set_yticks(range(len(metrics)), [fill(METRICS[metric].label, 18) for metric in metrics])
    axis.invert_yaxis()
    axis.set_xlabel(panel.y_label, size=_SIZE, labelpad=1)


def _legend_labels(panel: Panel, runs: Sequence[Run]) -> list[str]:
    """One label per metric; none where the panel's title says it all."""
    metrics = metrics_with_data(panel, runs)
    if len(metrics) == 1 or _is_bars(panel, runs):
        return []
    if panel.total is not None and runs[0].finite(panel.total):
        metrics.append(panel.total)
    return [METRICS[metric].label for metric in metrics]


def _legend_columns(labels: Sequence[str]) -> int:
    return max(1, min(len(labels), _LEGEND_LETTERS // max(map(len, labels))))


def _legend_rows(labels: Sequence[str]) -> int:
    return -(-len(labels) // _legend_columns(labels)) if labels else 0


def _draw_legend(axis: Axes, handles: Sequence[Line2D | Patch], labels: Sequence[str]) -> None:
    """Draw the legend between the axes and their title, never over data."""
    if not labels:
        return
    axis.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(-0.015, 1.0),
        ncols=_legend_columns(labels),
        fontsize=8.5,
        frameon=False,
        handlelength=1.9,
        columnspacing=1.0,
        handletextpad=0.5,
        borderaxespad=0.0,
        borderpad=0.1,
        labelspacing=0.2,
    )


def _plain(text: Text) -> Text:
    """``text`` without TeX: a run's name may hold dollar signs."""
    text.set_parse_math(False)
    return text


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
