"""The table of panels. All numbers are synthetic (see conftest)."""

from dataclasses import replace

import pytest

from nemo_apo.record import (
    DROPPED_GROUPS,
    GRAD_NORM,
    METRICS,
    REFRESH_SECONDS,
    RESAMPLED_GROUPS,
    STEP_SECONDS,
)
from nemo_apo.report.figures import config_differences, key_figures
from nemo_apo.report.formats import clock_text, duration_text, number_text
from nemo_apo.report.history import read_run
from nemo_apo.report.panels import PALETTE, PANELS, colour, split_by_data, stacked_series, y_limits


def test_panels_use_known_metrics_once():
    metrics = [metric for panel in PANELS for metric in panel.metrics]
    assert set(metrics) <= set(METRICS)
    assert len(set(metrics)) == len(metrics)
    assert len({panel.title for panel in PANELS}) == len(PANELS)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.title)
def test_panel_explains_itself(panel):
    assert panel.caption.endswith(".")
    assert ". " not in panel.caption
    assert panel.y_label


def test_panel_without_data_is_left_out(tmp_path, write_run):
    run = read_run(write_run(tmp_path / "run"))
    shown, empty = split_by_data([run])
    assert [p.metrics for p in empty if DROPPED_GROUPS in p.metrics] == [
        (DROPPED_GROUPS, RESAMPLED_GROUPS)
    ]
    assert [panel for panel in PANELS if panel in shown or panel in empty] == list(PANELS)


def test_metric_that_is_never_finite_counts_as_no_data(tmp_path, write_run):
    def change(lines):
        for line in lines:
            line[GRAD_NORM] = None

    run = read_run(write_run(tmp_path / "run", change=change))
    assert GRAD_NORM in [metric for panel in split_by_data([run])[1] for metric in panel.metrics]


def test_stack_counts_a_missing_part_as_zero(tmp_path, write_run):
    def change(lines):
        del lines[2][REFRESH_SECONDS]

    run = read_run(write_run(tmp_path / "run", steps=3, change=change))
    steps, (refresh, total) = stacked_series(run, [REFRESH_SECONDS, STEP_SECONDS])
    assert steps == [1, 2, 3]
    assert refresh == [0.3, 0.0, 0.3]
    assert min(total) > 0


def test_y_limits_hold_the_data(tmp_path, write_run):
    run = read_run(write_run(tmp_path / "run"))
    for panel in PANELS:
        limits = y_limits(panel, [run])
        if limits is None or panel.total is not None:
            continue
        for metric in panel.metrics:
            assert all(limits[0] <= value <= limits[1] for value in run.finite(metric))
    stacked = next(panel for panel in PANELS if panel.total == STEP_SECONDS)
    limits = y_limits(stacked, [run])
    assert limits is not None
    assert limits[1] > max(run.finite(STEP_SECONDS))


def test_colours_differ_and_never_run_out():
    assert len(set(PALETTE)) == len(PALETTE)
    assert colour(len(PALETTE)) == colour(0)


def test_key_figures_have_the_same_labels_for_every_run(tmp_path, write_run):
    finished = read_run(write_run(tmp_path / "a"))
    unfinished = read_run(write_run(tmp_path / "b", finished=False))
    labels = [figure.label for figure in key_figures(finished)]
    assert labels[1] == "pass@8"
    assert [f.label for f in key_figures(unfinished)] == [labels[0], "pass@k", *labels[2:]]


def test_key_figures_without_alpha(tmp_path, write_run):
    run = read_run(write_run(tmp_path / "a"))
    assert run.summary is not None
    summary = replace(run.summary, alpha_first=None, alpha_last=None, alpha_lowest=None)
    figures = {f.label: f for f in key_figures(replace(run, summary=summary))}
    assert (figures["alpha"].value, figures["alpha"].detail) == ("-", "")


def test_config_differences(tmp_path, write_run):
    a = read_run(write_run(tmp_path / "a", config="x: 1\ny: {z: 2, w: 3}\n"))
    b = read_run(write_run(tmp_path / "b", config="x: 1\ny: {z: 5}\n"))
    assert config_differences([a, b]) == [("y.z", ["2", "5"]), ("y.w", ["3", "-"])]


def test_number_text():
    values = [None, float("nan"), 0, 0.6134, 12.44, 1520.4, 4.1e-5, -0.5]
    texts = ["-", "-", "0", "0.613", "12.4", "1,520", "4.1e-05", "-0.500"]
    assert [number_text(value) for value in values] == texts


def test_times():
    assert [duration_text(s) for s in (0.04, 9.97, 59.6, 192, 7500)] == [
        "0.0 s",
        "10 s",
        "1 min 00 s",
        "3 min 12 s",
        "2 h 05 min",
    ]
    assert [clock_text(s) for s in (None, 42, 192, 7509)] == ["-:--", "0:42", "3:12", "2:05:09"]
