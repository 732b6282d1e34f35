"""``report.html``: one file that needs no network, with plotly.js inside."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from nemo_apo.report.figures import config_differences, headline, identity, key_figures
from nemo_apo.report.formats import printable
from nemo_apo.report.history import FindingSpan, Run
from nemo_apo.report.panels import colour, split_by_data
from nemo_apo.report.plotly_figures import panel_figure, panel_key
from nemo_apo.report.samples import shown_groups

_TEMPLATE = "template.html"


@dataclass(frozen=True)
class FindingRow:
    """A line of the findings table; ``marks`` are (left, width) in percent of the run's steps."""

    run: int
    span: FindingSpan
    marks: list[tuple[float, float]]


def render_html(runs: Sequence[Run]) -> str:
    """The report of one run, or of several overlaid, as the text of an HTML page."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("nemo_apo.report").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    shown, empty = split_by_data(runs)
    return environment.from_string(source).render(
        title=report_title(runs),
        runs=runs,
        single=len(runs) == 1,
        identities=[identity(run) for run in runs],
        headlines=[headline(run) for run in runs],
        figures=[key_figures(run) for run in runs],
        colours=[colour(i) for i in range(len(runs))],
        panels=[(panel, panel_key(panel, runs)) for panel in shown],
        plots=[panel_figure(panel, runs) for panel in shown],
        empty_titles=[panel.title for panel in empty],
        findings=[row for i, run in enumerate(runs) for row in _finding_rows(i, run)],
        samples=[shown_groups(run.samples) for run in runs],
        differences=config_differences(runs) if len(runs) > 1 else [],
        notices=[notice for run in runs for notice in _notices(run)],
        plotly_js=_plotly_js(),
    )


def report_title(runs: Sequence[Run]) -> str:
    """The name of the run, or how many are compared."""
    return runs[0].label if len(runs) == 1 else f"{len(runs)} runs compared"


def _plotly_js() -> Markup:
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

    # The only text that enters the page unescaped; it comes from the installed package.
    return Markup(get_plotlyjs())


def _finding_rows(index: int, run: Run) -> list[FindingRow]:
    return [FindingRow(index, span, _marks(span.steps, run)) for span in run.finding_spans()]


def _marks(steps: Sequence[int], run: Run) -> list[tuple[float, float]]:
    """Stretches of consecutive records at which a finding was active, in percent of the run."""
    recorded = [record.step for record in run.records]
    active = set(steps)
    width = 100.0 / len(recorded)
    marks: list[tuple[float, float]] = []
    for i, step in enumerate(recorded):
        if step not in active:
            continue
        if marks and i and recorded[i - 1] in active:
            left, length = marks.pop()
            marks.append((left, length + width))
        else:
            marks.append((i * width, width))
    return [(round(left, 2), round(length, 2)) for left, length in marks]


def _notices(run: Run) -> list[str]:
    """What a reader must know before trusting the figures of a run."""
    notices = []
    if run.summary is None:
        notices.append(f"{run.label} is unfinished: it has no summary yet, figures are so far.")
    if run.truncated_lines:
        notices.append(
            f"{run.label}: the last line of its metrics was half-written and was skipped."
        )
    if not run.records:
        notices.append(f"{run.label} has no metrics yet (folder {printable(str(run.folder))}).")
    return notices
