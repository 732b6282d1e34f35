"""The HTML and PNG reports. All numbers are synthetic (see conftest)."""

import io
import json
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

import nemo_apo
from nemo_apo.record import (
    ALPHA,
    EVAL_REWARD,
    FINDINGS,
    GRAD_NORM,
    METRICS_FILE,
    REPORT_HTML,
    REPORT_PNG,
    REWARD_MEAN,
    ROLLOUT_SECONDS,
    STEP,
    TOKEN_ENTROPY,
    TRAIN_SECONDS,
)
from nemo_apo.report import write_report
from nemo_apo.report.history import read_run, read_runs
from nemo_apo.report.html import render_html
from nemo_apo.report.panels import PANELS, colour, split_by_data
from nemo_apo.report.plotly_figures import panel_figure
from nemo_apo.report.png import WIDTH_PX, render_png

HOSTILE = "<script>alert(1)</script> $x_1$ </title>"


class Page(HTMLParser):
    """The parts of a page that the tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._inside = tag
        self.loads += [
            value for name, value in attrs if name in ("src", "href", "srcset", "data") and value
        ]
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data


def plots_of(page: Page) -> list[dict]:
    """The figures that the page's last script draws."""
    found = re.search(r"const figures = (\[.*\]);", page.scripts[-1])
    assert found
    return json.loads(found.group(1))


@pytest.fixture(scope="module")
def single(tmp_path_factory, write_run):
    """A hostile run with gaps: (folder, its page)."""

    def change(lines):
        lines[4][GRAD_NORM] = None
        lines[5][TOKEN_ENTROPY] = None
        lines[6][FINDINGS] = [{"name": "<b>x", "message": "<i>", "advice": "<u>y</u>"}]

    folder = write_run(
        tmp_path_factory.mktemp("single") / "run",
        name=HOSTILE,
        config="note: '</pre><script>alert(2)</script>'\n",
        change=change,
    )
    return folder, Page(render_html(read_runs([folder])))


def test_page_loads_nothing(single):
    assert single[1].loads == []


def test_plotly_is_embedded_once(single):
    big = [script for script in single[1].scripts if len(script) > 1_000_000]
    assert len(big) == 1
    assert len(single[1].scripts) == 2


def test_page_forbids_network(single):
    page = render_html([read_run(single[0])])
    assert "default-src 'none'" in page
    assert not re.search(r"url\(|@import", page.split("<body>")[0])


def test_hostile_names_are_text(single):
    _, page = single
    assert page.text.count("<script>alert(1)</script>") >= 2
    assert "<script>alert(2)</script>" in page.text
    assert "<u>y</u>" in page.text
    assert not any("alert(" in script for script in page.scripts[:1])


def test_page_has_every_panel_with_data(single):
    folder, page = single
    shown, empty = split_by_data([read_run(folder)])
    for panel in PANELS:
        assert panel.title in page.text
    assert len(plots_of(page)) == len(shown)
    assert empty
    assert f"no run recorded them: {', '.join(panel.title for panel in empty)}." in page.text


def test_null_is_a_gap_in_the_plot(single):
    folder, page = single
    shown, _ = split_by_data([read_run(folder)])
    index = next(i for i, panel in enumerate(shown) if GRAD_NORM in panel.metrics)
    (trace,) = plots_of(page)[index]["data"]
    assert [x for x, y in zip(trace["x"], trace["y"], strict=True) if y is None] == [4]
    assert trace["connectgaps"] is False


def test_key_figures_and_findings_are_shown(single):
    text = " ".join(single[1].text.split())
    assert "20,480" not in text
    assert "5,120" in text
    assert "0.260 → " in text
    assert "TP 2 × PP 1 × CP 1 × DP 2" in text
    assert "no signal" in text
    assert "megatron-core" in text


def test_overlay_has_one_colour_per_run_in_every_panel(tmp_path, write_run):
    names = ["apo", "<script>grpo</script>", "gspo"]
    folders = [
        write_run(tmp_path / f"run{i}", name=name, gain=1 - 0.2 * i, seed=i, finished=i != 2)
        for i, name in enumerate(names)
    ]
    runs = read_runs(folders)
    page = Page(render_html(runs))
    assert page.text.count("What differs in the configuration") == 0
    assert "run2 is unfinished" in page.text
    plots = plots_of(page)
    assert len(plots) == len(split_by_data(runs)[0])
    for plot in plots:
        for trace in plot["data"]:
            paint = trace["marker"] if trace["type"] == "bar" else trace["line"]
            assert paint["color"] == colour(trace["meta"]["run"])
        assert {trace["meta"]["run"] for trace in plot["data"]} == {0, 1, 2}
    names_shown = {unescape(trace["name"]) for trace in plots[0]["data"]}
    assert any(name.startswith("<script>grpo") for name in names_shown)
    assert not any("<" in trace["name"] for plot in plots for trace in plot["data"])


def test_panel_shows_runs_of_different_objectives(tmp_path, write_run):
    def without_alpha(lines):
        for line in lines:
            line.pop(ALPHA, None)

    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", change=without_alpha)]
    runs = read_runs(folders)
    panel = next(panel for panel in PANELS if ALPHA in panel.metrics)
    lines = panel_figure(panel, runs)["data"]
    lengths = {t["meta"]["run"]: len(t["x"]) for t in lines if t["meta"]["metric"] == 0}
    assert lengths == {0: 20, 1: 0}


def test_unfinished_run_with_truncated_line(tmp_path, write_run):
    folder = write_run(tmp_path / "run", finished=False)
    with (folder / METRICS_FILE).open("a") as file:
        file.write('{"step": 21, "rew')
    text = Page(render_html(read_runs([folder]))).text
    assert "unfinished" in text
    assert "half-written" in text


def test_run_without_metrics(tmp_path, write_run):
    runs = read_runs(
        [write_run(tmp_path / "run", finished=False, change=lambda rows: rows.clear())]
    )
    assert "nothing to plot yet" in Page(render_html(runs)).text
    assert Image.open(io.BytesIO(render_png(runs))).width == WIDTH_PX


def test_write_report_single(tmp_path, single):
    html, png = write_report([single[0]], tmp_path / "new" / "out")
    assert (html.name, png.name) == (REPORT_HTML, REPORT_PNG)
    assert html.read_text(encoding="utf-8").startswith("<!doctype html>")
    with Image.open(png) as image:
        image.load()
        assert image.format == "PNG"
        assert image.width == WIDTH_PX
        assert image.height > 1000
        # More than a white sheet.
        assert len(image.convert("RGB").getcolors(1_000_000) or ()) > 50


def test_png_overlay_has_the_colour_of_every_run(tmp_path, write_run):
    def few_panels(lines):
        keep = {STEP, FINDINGS, REWARD_MEAN, EVAL_REWARD, ROLLOUT_SECONDS, TRAIN_SECONDS}
        lines[:] = [{key: line[key] for key in keep & line.keys()} for line in lines]

    folders = [
        write_run(
            tmp_path / f"run{i}",
            name=f"$\\frac{{{i}",
            seed=i,
            gain=1 - 0.3 * i,
            change=few_panels,
        )
        for i in range(2)
    ]
    with Image.open(io.BytesIO(render_png(read_runs(folders)))) as image:
        seen = {value for _, value in image.convert("RGB").getcolors(1_000_000) or ()}
    for i in range(2):
        paint = colour(i)
        assert tuple(int(paint[k : k + 2], 16) for k in (1, 3, 5)) in seen


def test_errors_are_value_errors(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        write_report([], tmp_path)
    with pytest.raises(ValueError, match="no run folder"):
        write_report([tmp_path / "absent"], tmp_path)


def test_import_is_cheap():
    code = (
        "import sys, nemo_apo.report, nemo_apo.report.console;"
        "print([m for m in ('matplotlib', 'plotly', 'jinja2', 'torch') if m in sys.modules])"
    )
    root = Path(nemo_apo.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert done.stdout.strip() == "[]"
