"""The live console view. All numbers are synthetic (see conftest)."""

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from nemo_apo.record import (
    ALPHA,
    EVAL_ACCURACY,
    GRAD_NORM,
    REWARD_MEAN,
    STEP_SECONDS,
)
from nemo_apo.report.console import LiveView, is_live_terminal
from nemo_apo.report.progress import GAUGES, Progress, Trend
from nemo_apo.report.screen import Screen, sparkline

FINDING = {"name": "no signal", "message": "half of the groups", "advice": "resample"}


class Clock:
    """A clock that only moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain_view(steps: int, encoding: str = "utf-8", **options):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    return file, LiveView("run", steps, "apo", live=False, console=Console(file=file), **options)


def written(file: io.TextIOWrapper) -> list[str]:
    file.seek(0)
    return file.read().splitlines()


@pytest.fixture
def filled_progress(synthetic_steps):
    """Makes the state after 30 of 40 steps, with so many long findings."""

    def fill(findings: int) -> Progress:
        progress = Progress("run [bold]", 40, "a subtitle " * 20, started=0.0)
        for step, metrics, _ in synthetic_steps(30):
            long = {"name": "x" * 30, "message": "message " * 30, "advice": "advice " * 30}
            progress.add(step, metrics, [long] * findings, now=float(step))
        return progress

    return fill


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_screen_keeps_its_width_and_height(width, filled_progress):
    console = Console(width=width, force_terminal=True, record=True, file=io.StringIO())
    heights = set()
    for findings in (0, 1, 5):
        console.print(Screen(filled_progress(findings), now=31.0))
        lines = console.export_text().splitlines()
        assert all(cell_len(line) <= width for line in lines)
        heights.add(len(lines))
    console.print(Screen(Progress("run", 10, "", started=0.0), now=0.0))
    heights.add(len(console.export_text().splitlines()))
    assert len(heights) == 1
    assert heights.pop() <= 23


@pytest.mark.parametrize("width", [80, 120])
def test_screen_shows_every_gauge_and_the_name_as_it_is(width, filled_progress):
    console = Console(width=width, force_terminal=True, record=True, file=io.StringIO())
    progress = filled_progress(1)
    console.print(Screen(progress, now=31.0))
    text = console.export_text()
    for gauge in GAUGES:
        assert gauge.label in text
    assert "run [bold]" in text
    assert "RL step 30/40" in text
    assert "0:31 < 0:09" in text
    assert f"{progress.latest[ALPHA]:.3f}" in text


def test_screen_in_ascii(filled_progress):
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(file=file, width=80, force_terminal=True, color_system=None)
    console.print(Screen(filled_progress(2), now=31.0))
    assert len(written(file)) > 10


def test_live_view_leaves_the_last_state_and_the_cursor(synthetic_steps):
    file = io.StringIO()
    console = Console(file=file, width=80, height=30, force_terminal=True)
    with LiveView("run", 20, "apo", live=True, console=console) as view:
        view.phase("warm start", 1, 2, "loss 1.0")
        for step, metrics, findings in synthetic_steps(20):
            view.update(step, metrics, findings)
        view.note("a note [with brackets]\x1b[2J")
    output = file.getvalue()
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")
    assert "\x1b[2J" not in output
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    assert "a note [with brackets]" in plain
    assert "step 11, no signal:" in plain
    assert "RL step 20/20  finished" in plain[plain.rindex("╭") :]


@pytest.mark.parametrize("live", [True, False])
def test_exception_passes_and_is_named(live):
    file = io.StringIO()
    console = Console(file=file, width=80, height=30, force_terminal=live)

    def train() -> None:
        with LiveView("run", 20, live=live, console=console) as view:
            view.update(1, {REWARD_MEAN: 0.5})
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        train()
    output = file.getvalue()
    assert "stopped: RuntimeError" in output
    if live:
        assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")


def test_plain_output_has_no_control_characters(synthetic_steps):
    file, view = plain_view(20)
    with view:
        view.phase("warm start", 0, 100, "loss\x1b[31m 2.0")
        view.phase("warm start", 100, 100, "loss 1.0")
        for step, metrics, findings in synthetic_steps(20):
            view.update(step, metrics, findings)
        view.note("two\nlines\r\x07")
    lines = written(file)
    assert all(line.isprintable() for line in lines)
    assert {"two", "lines"} <= set(lines)
    assert any(line.startswith("warm start 100/100") for line in lines)
    assert lines[-1].startswith("finished after")


def test_plain_lines_come_every_k_steps_and_at_events():
    file, view = plain_view(100, plain_every=25)
    with view:
        for step in range(1, 101):
            metrics = {REWARD_MEAN: 0.5, ALPHA: 0.7}
            if step == 10:
                metrics[EVAL_ACCURACY] = 0.25
            view.update(step, metrics, [FINDING] if 40 <= step < 60 else [])
    lines = written(file)
    steps = [int(found[1]) for line in lines if (found := re.match(r"step +(\d+)/100", line))]
    assert steps == [10, 25, 40, 50, 75, 100]
    assert [line for line in lines if "no signal" in line] == [
        "step 40, no signal: half of the groups. Advice: resample"
    ]
    assert any("accuracy 0.250" in line for line in lines)


def test_missing_and_non_finite_metrics_are_a_dash():
    file, view = plain_view(10, plain_every=1)
    with view:
        view.update(1, {REWARD_MEAN: float("nan"), GRAD_NORM: None})
    assert "reward -  grad -" in " ".join(written(file))


def test_plain_output_in_ascii():
    file, view = plain_view(10, encoding="ascii", plain_every=1)
    with view:
        view.note("café ▁")
    assert "caf? ?" in written(file)


def test_eta_follows_the_pace_and_counts_down():
    progress = Progress("run", 10, "", started=0.0)
    assert progress.seconds_left(0.0) is None
    progress.add(1, {STEP_SECONDS: 4.0}, [], now=10.0)
    assert progress.seconds_left(10.0) == pytest.approx(36.0)
    progress.add(2, {STEP_SECONDS: 4.0}, [], now=15.0)
    assert progress.seconds_left(15.0) == pytest.approx(40.0)
    assert progress.seconds_left(18.0) == pytest.approx(37.0)
    progress.start_phase("evaluation", 5, 20, "", now=20.0)
    progress.start_phase("evaluation", 10, 20, "", now=25.0)
    assert progress.seconds_left(25.0) == pytest.approx(10.0)


def test_resumed_run_has_a_sane_eta():
    progress = Progress("run", 100, "", started=0.0)
    progress.add(90, {}, [], now=1.0)
    progress.add(91, {}, [], now=3.0)
    assert progress.seconds_left(3.0) == pytest.approx(18.0)


def test_trend_keeps_the_whole_run():
    trend = Trend()
    for i in range(10_000):
        trend.add(float(i))
    values = trend.resampled(20)
    assert len(values) == 20
    assert values == sorted(values)
    assert values[0] < 600
    assert values[-1] > 9_400


def test_sparkline():
    assert sparkline([0.0, 0.5, 1.0], "012345678", (0.0, 1.0)) == "048"
    assert sparkline([]) == ""
    assert len(set(sparkline([2.0, 2.0 + 1e-12]))) == 1


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "dumb"}, False),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({}, False),
    ],
)
def test_terminal_is_told_by_stdout_and_environment(monkeypatch, variables, expected):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("TERM", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert is_live_terminal() is expected
    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert is_live_terminal() is False


def test_refuses_a_bad_interval():
    with pytest.raises(ValueError, match="plain_every"):
        LiveView("run", 10, plain_every=0)
