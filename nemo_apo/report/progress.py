"""What the live view knows of a run: the latest metrics, their history, the pace of the steps."""

import copy
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from nemo_apo import record

# Values kept per metric for its sparkline: at least twice as many as a wide terminal shows.
_TREND_VALUES = 128
# RL steps over which the pace is averaged, so that the ETA follows a change of speed.
_PACE_STEPS = 20


@dataclass(frozen=True)
class Gauge:
    """A metric in the live view.

    Attributes:
        label: its short name; at most 10 letters, so that it fits at 80 columns.
        metric: its name in ``nemo_apo.record``.
        unit_range: whether its sparkline spans [0, 1] rather than the values seen.
    """

    label: str
    metric: str
    unit_range: bool = False


GAUGES: tuple[Gauge, ...] = (
    Gauge("reward", record.REWARD_MEAN),
    Gauge("accuracy", record.EVAL_ACCURACY, unit_range=True),
    Gauge("pass@k", record.EVAL_PASS_AT_K, unit_range=True),
    Gauge("maj@k", record.EVAL_MAJ_AT_K, unit_range=True),
    Gauge("alpha", record.ALPHA, unit_range=True),
    Gauge("confidence", record.CONFIDENCE, unit_range=True),
    Gauge("improving", record.IMPROVEMENT, unit_range=True),
    Gauge("entropy", record.TOKEN_ENTROPY),
    Gauge("drift", record.ANCHOR_DRIFT),
    Gauge("ess/P", record.ESS_SHARE, unit_range=True),
    Gauge("grad norm", record.GRAD_NORM),
    Gauge("length", record.RESPONSE_LENGTH),
    Gauge("tokens/s", record.TOKENS_PER_SECOND),
    Gauge("s/step", record.STEP_SECONDS),
)


class Trend:
    """A metric over a whole run in a bounded number of values.

    When they become too many, neighbours are averaged; each value then stands for twice as many
    steps.
    """

    def __init__(self) -> None:
        self._means: list[float] = []
        self._steps_per_mean = 1
        self._sum = 0.0
        self._count = 0

    def add(self, value: float) -> None:
        """Append a finite value."""
        self._sum += value
        self._count += 1
        if self._count < self._steps_per_mean:
            return
        self._means.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self._means) == _TREND_VALUES:
            pairs = zip(self._means[::2], self._means[1::2], strict=True)
            self._means = [(first + second) / 2 for first, second in pairs]
            self._steps_per_mean *= 2

    def resampled(self, most: int) -> list[float]:
        """The whole run in at most ``most`` averages, oldest first."""
        values = list(self._means)
        if self._count:
            values.append(self._sum / self._count)
        if len(values) <= most:
            return values
        edges = [i * len(values) // most for i in range(most + 1)]
        return [math.fsum(values[low:high]) / (high - low) for low, high in pairwise(edges)]


@dataclass
class Phase:
    """A stretch of work with a known end: the warm start, the RL steps, an evaluation.

    Attributes:
        name: what is going on.
        done, total: progress in units of the phase.
        text: a remark, such as the current loss.
        started: clock time of its first report, seconds.
        done_at_start: ``done`` at that time (not 0 in a resumed run).
    """

    name: str
    done: int
    total: int
    text: str
    started: float
    done_at_start: int


@dataclass
class Progress:
    """The live view's state. Times are readings of one monotonic clock, seconds."""

    run_name: str
    total_steps: int
    subtitle: str
    started: float
    step: int = 0
    phase: Phase | None = None
    outcome: str = ""
    latest: dict[str, float | None] = field(default_factory=dict)
    evaluated_at: int | None = None
    findings: list[dict[str, str]] = field(default_factory=list)
    trends: dict[str, Trend] = field(
        default_factory=lambda: {gauge.metric: Trend() for gauge in GAUGES}
    )
    _arrivals: deque[tuple[float, int]] = field(
        default_factory=lambda: deque(maxlen=_PACE_STEPS + 1)
    )

    def start_phase(self, name: str, done: int, total: int, text: str, now: float) -> bool:
        """Report on a phase; return whether it is another one than before."""
        new = self.phase is None or self.phase.name != name
        if self.phase is None or new:
            self.phase = Phase(name, done, total, text, now, done)
        else:
            self.phase.done, self.phase.total, self.phase.text = done, total, text
        return new

    def add(
        self,
        step: int,
        metrics: Mapping[str, float | None],
        findings: list[dict[str, str]],
        now: float,
    ) -> None:
        """Take over the metrics and findings of an RL step; older evaluations stay visible."""
        self.phase = None
        self.step = step
        self.findings = list(findings)
        self._arrivals.append((now, step))
        self.latest.update(metrics)
        for name, trend in self.trends.items():
            value = metrics.get(name)
            if value is not None and math.isfinite(value):
                trend.add(value)
        if record.EVAL_ACCURACY in metrics:
            self.evaluated_at = step

    def end(self, outcome: str, finished: bool) -> None:
        """Note how it ended; a run that was stopped keeps showing in which phase."""
        self.outcome = outcome
        if finished:
            self.phase = None

    def snapshot(self) -> "Progress":
        """A copy that no later call changes, for the thread that draws."""
        return copy.deepcopy(self)

    def share_done(self) -> float:
        """Progress of the current phase, or of the RL steps, in [0, 1]."""
        done, total = (
            (self.phase.done, self.phase.total) if self.phase else (self.step, self.total_steps)
        )
        return min(1.0, max(0.0, done / total)) if total > 0 else 0.0

    def seconds_left(self, now: float) -> float | None:
        """Time to the end of the current phase, or of the RL steps; None while unknown."""
        if self.phase is not None:
            done = self.phase.done - self.phase.done_at_start
            if done <= 0:
                return None
            return (now - self.phase.started) / done * (self.phase.total - self.phase.done)
        pace = self._seconds_per_step()
        if pace is None:
            return None
        since_last = now - self._arrivals[-1][0]
        return max(0.0, pace * (self.total_steps - self.step) - since_last)

    def _seconds_per_step(self) -> float | None:
        """Pace of the latest steps with everything between them, evaluations included."""
        if len(self._arrivals) >= 2:
            (first_time, first_step), (last_time, last_step) = (
                self._arrivals[0],
                self._arrivals[-1],
            )
            if last_step > first_step:
                return (last_time - first_time) / (last_step - first_step)
        return self.latest.get(record.STEP_SECONDS)
