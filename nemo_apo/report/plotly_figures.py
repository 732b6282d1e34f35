"""Panels as plotly figures: plain dictionaries of plotly's JSON form, without importing plotly.

Each trace carries ``meta = {"run": index, "metric": index}``, by which the page's own legend
switches it on and off.
"""

from collections.abc import Sequence
from html import escape
from textwrap import wrap
from typing import Any

from nemo_apo.record import METRICS
from nemo_apo.report.history import Run
from nemo_apo.report.panels import (
    Panel,
    colour,
    last_step,
    metrics_with_data,
    stacked_series,
    y_limits,
)

# Up to this many points get a marker each: evaluations are few, and a line hides where they are.
_FEW_POINTS = 40
_TOTAL_COLOUR = "#222222"
_GRID_COLOUR = "#e6e8eb"
_SIGNIFICANT_DIGITS = 6
# Plotly's names of the line styles, and the same as an SVG dash array for the key of a panel.
DASHES = (
    ("solid", ""),
    ("dot", "2 3"),
    ("dash", "7 4"),
    ("dashdot", "7 3 2 3"),
    ("longdash", "12 4"),
)

Trace = dict[str, Any]


def panel_figure(panel: Panel, runs: Sequence[Run]) -> dict[str, Any]:
    """``{"data", "layout"}`` of one panel; colour tells runs apart, or metrics of a single run."""
    if panel.total is None:
        data = _line_traces(panel, runs)
    elif len(runs) == 1:
        data = _stacked_traces(panel, runs[0])
    else:
        data = _mean_bars(panel, runs)
    return {"data": data, "layout": _layout(panel, runs)}


def panel_key(panel: Panel, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What the line styles of a panel mean: ``label``, ``colour``, ``dash`` and metric index."""
    if _is_bars(panel, runs):
        return []
    single = len(runs) == 1
    metrics = metrics_with_data(panel, runs)
    if panel.total is not None and runs[0].finite(panel.total):
        metrics = [*metrics, panel.total]
    return [
        {
            "label": METRICS[metric].label,
            "colour": _metric_colour(panel, metric, i) if single else "#555555",
            "dash": "" if single else DASHES[i % len(DASHES)][1],
            "metric": i,
        }
        for i, metric in enumerate(metrics)
    ]


def _is_bars(panel: Panel, runs: Sequence[Run]) -> bool:
    return panel.total is not None and len(runs) > 1


def _metric_colour(panel: Panel, metric: str, index: int) -> str:
    return _TOTAL_COLOUR if metric == panel.total else colour(index)


def _line_traces(panel: Panel, runs: Sequence[Run]) -> list[Trace]:
    single = len(runs) == 1
    traces = []
    for metric_index, metric in enumerate(metrics_with_data(panel, runs)):
        for run_index, run in enumerate(runs):
            steps, values = run.series(metric)
            label = METRICS[metric].label
            name = label if single else f"{run.label} · {label}"
            trace = _line(name, steps, values, run_index, metric_index)
            trace["line"] = {
                "color": colour(metric_index if single else run_index),
                "width": 1.8 if single or metric_index == 0 else 1.2,
                "dash": "solid" if single else DASHES[metric_index % len(DASHES)][0],
            }
            # Of several runs the panel's main metric stands out from its companions.
            trace["opacity"] = 1.0 if single or metric_index == 0 else 0.65
            traces.append(trace)
    return traces


def _line(
    name: str, steps: list[int], values: Sequence[float | None], run: int, metric: int
) -> Trace:
    return {
        "type": "scatter",
        # Plotly reads a small HTML dialect in names; a run's name must be shown as it is.
        "name": escape(name),
        "x": steps,
        "y": [_rounded(value) for value in values],
        "mode": "lines+markers" if len(steps) <= _FEW_POINTS else "lines",
        "marker": {"size": 5},
        "connectgaps": False,
        "hovertemplate": "%{y:.4~g}",
        "meta": {"run": run, "metric": metric},
    }


def _stacked_traces(panel: Panel, run: Run) -> list[Trace]:
    metrics = metrics_with_data(panel, [run])
    steps, columns = stacked_series(run, metrics)
    traces = []
    for i, (metric, column) in enumerate(zip(metrics, columns, strict=True)):
        trace = _line(METRICS[metric].label, steps, column, 0, i)
        trace |= {"mode": "lines", "stackgroup": "parts", "fillcolor": _translucent(colour(i))}
        trace["line"] = {"color": colour(i), "width": 0.8}
        traces.append(trace)
    if panel.total is not None and run.finite(panel.total):
        total = _line(METRICS[panel.total].label, *run.series(panel.total), 0, len(metrics))
        total |= {"mode": "lines", "line": {"color": _TOTAL_COLOUR, "width": 1.2}}
        traces.append(total)
    return traces


def _mean_bars(panel: Panel, runs: Sequence[Run]) -> list[Trace]:
    metrics = metrics_with_data(panel, runs)
    return [
        {
            "type": "bar",
            "orientation": "h",
            "name": escape(run.label),
            "y": ["<br>".join(wrap(METRICS[metric].label, 18)) for metric in metrics],
            "x": [_rounded(run.mean(metric)) for metric in metrics],
            "marker": {"color": colour(index)},
            "hovertemplate": "%{x:.4~g} s",
            "meta": {"run": index, "metric": None},
        }
        for index, run in enumerate(runs)
    ]


def _layout(panel: Panel, runs: Sequence[Run]) -> dict[str, Any]:
    bars = _is_bars(panel, runs)
    return {
        "margin": {"l": 54, "r": 10, "t": 8, "b": 38},
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', sans-serif", "size": 11.5},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "hovermode": "y unified" if bars else "x unified",
        "hoverlabel": {"namelength": -1, "font": {"size": 11}},
        "showlegend": False,
        "xaxis": _axis(panel.y_label) if bars else _step_axis(runs),
        "yaxis": {**_axis(""), "autorange": "reversed"} if bars else _value_axis(panel, runs),
    }


def _axis(title: str) -> dict[str, Any]:
    return {
        "title": {"text": title, "standoff": 6, "font": {"size": 11.5}},
        "gridcolor": _GRID_COLOUR,
        "zeroline": False,
        "automargin": True,
        "exponentformat": "e",
        "minexponent": 5,
    }


def _step_axis(runs: Sequence[Run]) -> dict[str, Any]:
    last = last_step(runs)
    return {**_axis("RL step"), "range": [-0.015 * last, 1.015 * last], "hoverformat": "d"}


def _value_axis(panel: Panel, runs: Sequence[Run]) -> dict[str, Any]:
    limits = y_limits(panel, runs)
    return _axis(panel.y_label) if limits is None else {**_axis(panel.y_label), "range": limits}


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{_SIGNIFICANT_DIGITS}g}")


def _translucent(hex_colour: str) -> str:
    red, green, blue = (int(hex_colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.55)"
