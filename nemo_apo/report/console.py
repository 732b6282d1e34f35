"""The live view of a training run, on a terminal or as plain lines in a log.

    with LiveView(run_name, total_steps, subtitle) as view:
        view.phase("warm start", done, total, "loss 0.42")
        view.update(step, metrics, findings)
        view.note("saved a checkpoint")

Used by rank 0 alone. On a terminal it redraws one block of constant height; elsewhere (a pipe, a
Slurm log, ``TERM=dumb``, or with ``NO_COLOR`` set) it prints a plain line now and then.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import final

from rich.console import Console
from rich.live import Live
from rich.text import Text

from nemo_apo import record
from nemo_apo.report.formats import clock_text, number_text, printable
from nemo_apo.report.progress import Progress
from nemo_apo.report.screen import Screen

# Training runs in the same process: twice a second is enough to see the clock move.
_REFRESHES_PER_SECOND = 2
# A plain log gets about this many lines for the RL steps, and for each phase, if nothing happens.
_PLAIN_STEP_LINES = 20
_PLAIN_PHASE_LINES = 5

_PLAIN_METRICS: tuple[tuple[str, str], ...] = (
    ("reward", record.REWARD_MEAN),
    ("alpha", record.ALPHA),
    ("confidence", record.CONFIDENCE),
    ("improvement", record.IMPROVEMENT),
    ("entropy", record.TOKEN_ENTROPY),
    ("drift", record.ANCHOR_DRIFT),
    ("grad", record.GRAD_NORM),
    ("tokens/s", record.TOKENS_PER_SECOND),
    ("s/step", record.STEP_SECONDS),
)
_PLAIN_EVALUATION: tuple[tuple[str, str], ...] = (
    ("accuracy", record.EVAL_ACCURACY),
    ("pass@k", record.EVAL_PASS_AT_K),
    ("maj@k", record.EVAL_MAJ_AT_K),
)


def is_live_terminal() -> bool:
    """Whether stdout is a terminal that may be redrawn."""
    # Not rich's own test: it takes FORCE_COLOR, which CI systems set, for a terminal.
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "") in ("", "dumb", "unknown")
    return sys.stdout.isatty() and not plain


@final
class LiveView:
    """Shows a run while it trains; a context manager.

    Args:
        run_name: heading of the view.
        total_steps: RL steps of the whole run.
        subtitle: a remark beside the name, such as objective and schedule.
        plain_every: RL steps between two plain lines; None for about twenty lines in a run.
        live: True redraws a terminal, False prints plain lines, None decides by stdout.
        console: where to draw; None for stdout.
        clock: a monotonic clock, seconds.
    """

    def __init__(
        self,
        run_name: str,
        total_steps: int,
        subtitle: str = "",
        *,
        plain_every: int | None = None,
        live: bool | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if plain_every is not None and plain_every < 1:
            raise ValueError(f"plain_every must be at least 1, got {plain_every}")
        self._clock = clock
        self._every = plain_every or max(1, total_steps // _PLAIN_STEP_LINES)
        # The refresh thread of the display reads what the training thread writes.
        self._lock = threading.Lock()
        self._announced: dict[str, int] = {}
        self._console = console or Console()
        self._progress = Progress(
            self._clean(run_name), total_steps, self._clean(subtitle), started=clock()
        )
        self._live: Live | None = None
        if is_live_terminal() if live is None else live:
            self._live = Live(
                get_renderable=self._screen,
                console=self._console,
                refresh_per_second=_REFRESHES_PER_SECOND,
                vertical_overflow="crop",
            )

    def __enter__(self) -> "LiveView":
        self._progress.started = self._clock()
        if self._live is not None:
            self._live.start(refresh=True)
        else:
            subtitle = self._progress.subtitle
            self._print_plain(self._progress.run_name + (f"  {subtitle}" if subtitle else ""))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            outcome = "finished" if kind is None else f"stopped: {kind.__name__}"
            self._progress.end(outcome, finished=kind is None)
        if self._live is not None:
            # Draws the last state, leaves it on the terminal and shows the cursor again.
            self._live.stop()
        else:
            elapsed = clock_text(self._clock() - self._progress.started)
            self._print_plain(f"{outcome} after {elapsed}")

    def phase(self, name: str, done: int, total: int, text: str = "") -> None:
        """Show the progress of work outside the RL steps; ends with the next ``update``."""
        name, text = self._clean(name), self._clean(text)
        with self._lock:
            new = self._progress.start_phase(name, done, total, text, self._clock())
        if self._live is None and (new or done == total or self._phase_line_due(done, total)):
            self._print_plain(f"{name} {done}/{total}" + (f"  {text}" if text else ""))

    def update(
        self,
        step: int,
        metrics: Mapping[str, float | None],
        findings: Sequence[Mapping[str, str]] = (),
    ) -> None:
        """Show the metrics and the active findings of an RL step.

        Args:
            step: RL steps completed.
            metrics: names from ``nemo_apo.record``; absent ones keep their last value on screen.
            findings: ``{"name", "message", "advice"}`` of each.
        """
        clean = [{key: self._clean(text) for key, text in found.items()} for found in findings]
        with self._lock:
            self._progress.add(step, metrics, clean, self._clock())
        evaluated = record.EVAL_ACCURACY in metrics
        last = step == self._progress.total_steps
        new = self._new_findings(step, clean)
        if self._live is None and (evaluated or last or new or step % self._every == 0):
            self._print_plain(self._plain_line(metrics))
        for finding in new:
            self.note(
                f"step {step}, {finding['name']}: {finding['message']}. Advice: {finding['advice']}"
            )

    def note(self, text: str) -> None:
        """Print ``text`` for good: above the live block, or as plain lines."""
        for line in text.splitlines():
            if self._live is None:
                self._print_plain(line)
            else:
                self._live.console.print(Text(self._clean(line)))

    def _screen(self) -> Screen:
        with self._lock:
            return Screen(self._progress.snapshot(), self._clock())

    def _phase_line_due(self, done: int, total: int) -> bool:
        return done % max(1, total // _PLAIN_PHASE_LINES) == 0

    def _new_findings(
        self, step: int, findings: Sequence[Mapping[str, str]]
    ) -> list[Mapping[str, str]]:
        """Findings that were not active lately; one that flickers is announced once."""
        new = []
        for finding in findings:
            last_active = self._announced.get(finding["name"])
            if last_active is None or step - last_active > max(self._every, 10):
                new.append(finding)
            self._announced[finding["name"]] = step
        return new

    def _plain_line(self, metrics: Mapping[str, float | None]) -> str:
        progress = self._progress
        width = len(str(progress.total_steps))
        parts = [f"step {progress.step:>{width}}/{progress.total_steps}"]
        shown = [pair for pair in (*_PLAIN_EVALUATION, *_PLAIN_METRICS) if pair[1] in metrics]
        parts += [f"{label} {number_text(metrics[metric])}" for label, metric in shown]
        if progress.step < progress.total_steps:
            parts.append(f"eta {clock_text(progress.seconds_left(self._clock()))}")
        return "  ".join(parts)

    def _print_plain(self, text: str) -> None:
        """Write one line, without rich: no wrapping, no styles, no control characters."""
        stream = self._console.file
        stream.write(self._clean(text) + "\n")
        stream.flush()

    def _clean(self, text: str) -> str:
        """``text`` on one line, with nothing that steers a terminal or that it cannot encode."""
        encoding = self._console.encoding
        return printable(text).encode(encoding, errors="replace").decode(encoding)
