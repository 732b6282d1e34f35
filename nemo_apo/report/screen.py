"""The live view's screen: a rich renderable of constant height for a ``Progress``."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import (
    Console,
    ConsoleOptions,
    Group,
    OverflowMethod,
    RenderableType,
    RenderResult,
)
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from nemo_apo.record import EVAL_ACCURACY, EVAL_MAJ_AT_K, EVAL_PASS_AT_K
from nemo_apo.report.formats import clock_text, number_text
from nemo_apo.report.progress import GAUGES, Gauge, Progress

# Lines of the findings area; what does not fit was printed in full when it appeared.
_FINDING_LINES = 5
# Wider than this the sparklines gain nothing.
_MAX_WIDTH = 132
_LABEL_WIDTH = 10
_VALUE_WIDTH = 7
_GAP = 3
_DOING_WIDTH = 44
# These stand until the next evaluation.
_EVALUATED = (EVAL_ACCURACY, EVAL_PASS_AT_K, EVAL_MAJ_AT_K)
_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII_BLOCKS = "_.-=+*#@"


class Screen:
    """``progress`` as it stands at clock time ``now``; its texts must be printable."""

    def __init__(self, progress: Progress, now: float) -> None:
        self.progress = progress
        self.now = now

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, _MAX_WIDTH)
        inner = max(1, width - 4)
        overflow: OverflowMethod = "crop" if options.ascii_only else "ellipsis"
        body = Group(
            self._progress_line(overflow),
            Text(),
            self._gauges(inner, options.ascii_only),
            # rich checks the encoding of a rule, and then draws it without the result.
            Rule(characters="-" if options.ascii_only else "─", style="dim"),
            *self._finding_lines(console, inner),
        )
        yield Panel(
            body,
            box=box.ASCII if options.ascii_only else box.ROUNDED,
            width=width,
            padding=(0, 1),
            border_style="dim",
            title=self._heading(inner, overflow),
            title_align="left",
        )

    def _heading(self, width: int, overflow: OverflowMethod) -> Text:
        heading = Text(self.progress.run_name, style="not dim bold")
        if self.progress.subtitle:
            heading.append(f"  {self.progress.subtitle}", style="not bold dim")
        heading.truncate(max(1, width - 4), overflow=overflow)
        return heading

    def _progress_line(self, overflow: OverflowMethod) -> RenderableType:
        progress = self.progress
        finished = bool(progress.outcome)
        line = Table.grid(expand=True, padding=(0, 1))
        line.add_column(no_wrap=True, overflow=overflow)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True, justify="right")
        share = progress.share_done()
        elapsed = clock_text(self.now - progress.started)
        left = clock_text(progress.seconds_left(self.now))
        times = f"{share:4.0%}  in {elapsed}" if finished else f"{share:4.0%}  {elapsed} < {left}"
        line.add_row(
            self._doing(overflow),
            ProgressBar(
                total=1.0,
                completed=share,
                style="bright_black",
                complete_style="cyan",
                finished_style="green",
            ),
            Text(times),
        )
        return line

    def _doing(self, overflow: OverflowMethod) -> Text:
        progress = self.progress
        phase = progress.phase
        if phase is not None:
            text = Text(f"{phase.name} {phase.done}/{phase.total}")
            if phase.text:
                text.append(f"  {phase.text}", style="dim")
        else:
            text = Text(f"RL step {progress.step}/{progress.total_steps}")
        if progress.outcome:
            text.append(f"  {progress.outcome}", style="bold")
        text.truncate(_DOING_WIDTH, overflow=overflow)
        return text

    def _gauges(self, width: int, ascii_only: bool) -> RenderableType:
        """Two columns of gauges, each a label, a value and a sparkline."""
        column = (width - _GAP) // 2
        spark = max(0, column - _LABEL_WIDTH - _VALUE_WIDTH - 2)
        blocks = _ASCII_BLOCKS if ascii_only else _BLOCKS
        rows = -(-len(GAUGES) // 2)
        lines = []
        for left, right in zip(GAUGES[:rows], GAUGES[rows:], strict=True):
            line = self._gauge(left, spark, blocks)
            line.append(" " * _GAP)
            line.append_text(self._gauge(right, spark, blocks))
            line.no_wrap, line.overflow = True, "crop"
            lines.append(line)
        return Group(*lines)

    def _gauge(self, gauge: Gauge, spark_width: int, blocks: str) -> Text:
        progress = self.progress
        stale = gauge.metric in _EVALUATED and (progress.evaluated_at != progress.step)
        value = number_text(progress.latest.get(gauge.metric))
        line = Text(f"{gauge.label:<{_LABEL_WIDTH}} ", style="dim")
        line.append(f"{value:>{_VALUE_WIDTH}} ", style="not dim" if stale else "not dim bold")
        limits = (0.0, 1.0) if gauge.unit_range else None
        values = progress.trends[gauge.metric].resampled(spark_width) if spark_width else []
        line.append(f"{sparkline(values, blocks, limits):<{spark_width}}", style="not dim cyan")
        return line

    def _finding_lines(self, console: Console, width: int) -> Iterable[RenderableType]:
        """Exactly ``_FINDING_LINES`` lines, whatever the number and length of the findings."""
        lines: list[Text] = []
        for finding in self.progress.findings:
            text = Text(finding["name"], style="bold yellow")
            text.append(f"  {finding['message']}", style="not bold default")
            text.append(f"  advice: {finding['advice']}", style="not bold dim default")
            lines += text.wrap(console, width)
        if not lines:
            lines = [Text("no findings", style="dim")]
        if len(lines) > _FINDING_LINES:
            count = len(self.progress.findings)
            lines = lines[: _FINDING_LINES - 1]
            lines.append(Text(f"... {count} findings in all, see above", style="dim", no_wrap=True))
        return lines + [Text()] * (_FINDING_LINES - len(lines))


def sparkline(
    values: Sequence[float], blocks: str = _BLOCKS, limits: tuple[float, float] | None = None
) -> str:
    """One character of ``blocks`` per value, scaled to ``limits`` or to the values seen."""
    if not values:
        return ""
    low, high = limits or _widened(min(values), max(values))
    top = len(blocks) - 1
    shares = (min(1.0, max(0.0, (value - low) / (high - low))) for value in values)
    return "".join(blocks[round(share * top)] for share in shares)


def _widened(low: float, high: float) -> tuple[float, float]:
    """The range, but at least a twentieth of its values wide: rounding noise must look flat."""
    room = max(0.05 * max(abs(low), abs(high)), 1e-12)
    if high - low >= room:
        return low, high
    middle = (low + high) / 2
    # Not centred: at the border of two blocks, rounding noise would show as a zigzag.
    return middle - 0.55 * room, middle + 0.45 * room
