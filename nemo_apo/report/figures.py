"""The key figures of a run: the cards of one run, or a table row per run of several."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_apo import record
from nemo_apo.record import Summary
from nemo_apo.report.formats import MISSING, count_text, duration_text, number_text
from nemo_apo.report.history import Run


@dataclass(frozen=True)
class KeyFigure:
    """One figure: what it is, its value and a remark (may be empty)."""

    label: str
    value: str
    detail: str = ""


def key_figures(run: Run) -> list[KeyFigure]:
    """The same figures in the same order for every run; an unfinished one gives what it has."""
    return [
        _accuracy(run),
        _pass_at_k(run),
        _reward(run),
        _alpha(run),
        _steps(run),
        KeyFigure("samples", count_text(_samples(run)), "completions"),
        _wall_time(run),
        _layout(run.summary),
    ]


def identity(run: Run) -> str:
    """What was run, in one line: objective, schedule, task, reward and seed."""
    summary = run.summary
    if summary is None:
        return f"unfinished run, {run.steps} steps so far"
    schedule = "no alpha" if summary.schedule == "none" else f"{summary.schedule} alpha"
    parts = [summary.objective, schedule, summary.task, f"reward {summary.reward}"]
    return " · ".join([*parts, f"seed {summary.seed}"])


def headline(run: Run) -> str:
    """The most telling figures in one line, for the title of an image."""
    figures = key_figures(run)
    parts = [f"{figure.label} {figure.value}" for figure in figures if figure.value != MISSING]
    return " · ".join(parts)


def config_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Configuration keys whose values differ between the runs, with one value per run."""
    flat = [_flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for config in flat for key in config)
    rows = [(key, [config.get(key, MISSING) for config in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _flatten(config: Mapping[Any, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{path}."))
        else:
            flat[path] = "null" if value is None else str(value)
    return flat


def _change(start: float | None, final: float | None) -> str:
    if start is None and final is None:
        return MISSING
    return f"{number_text(start)} → {number_text(final)}"


def _accuracy(run: Run) -> KeyFigure:
    summary = run.summary
    start = summary.accuracy_start if summary else run.first(record.EVAL_ACCURACY)
    final = summary.accuracy_final if summary else run.last(record.EVAL_ACCURACY)
    return KeyFigure("greedy accuracy", _change(start, final), "held out")


def _pass_at_k(run: Run) -> KeyFigure:
    summary = run.summary
    if summary is None:
        return KeyFigure("pass@k", number_text(run.last(record.EVAL_PASS_AT_K)), "held out")
    if summary.pass_at_8 is not None:
        return KeyFigure("pass@8", number_text(summary.pass_at_8), "held out")
    return KeyFigure(f"pass@{summary.pass_k}", number_text(summary.pass_at_k), "held out")


def _reward(run: Run) -> KeyFigure:
    summary = run.summary
    start = summary.reward_start if summary else run.first(record.EVAL_REWARD)
    final = summary.reward_final if summary else run.last(record.EVAL_REWARD)
    return KeyFigure("greedy reward", _change(start, final), "held out")


def _alpha(run: Run) -> KeyFigure:
    summary = run.summary
    if summary:
        first, last, lowest = summary.alpha_first, summary.alpha_last, summary.alpha_lowest
    else:
        first, last = run.first(record.ALPHA), run.last(record.ALPHA)
        lowest = min(run.finite(record.ALPHA), default=None)
    detail = "" if lowest is None else f"lowest {number_text(lowest)}"
    return KeyFigure("alpha", _change(first, last), detail)


def _steps(run: Run) -> KeyFigure:
    summary = run.summary
    if summary is None:
        return KeyFigure("RL steps", count_text(run.steps), "unfinished")
    detail = f"{count_text(summary.optimizer_steps)} optimizer steps"
    if summary.skipped_steps:
        detail += f", {count_text(summary.skipped_steps)} skipped"
    return KeyFigure("RL steps", count_text(summary.steps), detail)


def _samples(run: Run) -> float | None:
    return run.summary.samples if run.summary else run.last(record.SAMPLES)


def _wall_time(run: Run) -> KeyFigure:
    summary = run.summary
    if summary is None:
        seconds = run.finite(record.STEP_SECONDS)
        return KeyFigure("wall time", duration_text(math.fsum(seconds)), "RL steps only")
    refresh = MISSING if summary.refresh_share is None else f"{summary.refresh_share:.1%}"
    return KeyFigure("wall time", duration_text(summary.wall_s), f"coefficient refresh {refresh}")


def _layout(summary: Summary | None) -> KeyFigure:
    if summary is None:
        return KeyFigure("ranks", MISSING)
    layout = (
        f"TP {summary.tensor_model_parallel_size} × PP {summary.pipeline_model_parallel_size}"
        f" × CP {summary.context_parallel_size} × DP {summary.data_parallel_size}"
    )
    if summary.peak_memory_mib is not None:
        layout += f", {count_text(summary.peak_memory_mib)} MiB peak"
    return KeyFigure("ranks", count_text(summary.world_size), layout)
