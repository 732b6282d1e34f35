"""The graders of a run: in this process for what is trusted and quick, else in workers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nemo_apo.grading.loading import SampleGrader, load, of_task
from nemo_apo.grading.outcome import Grade, attempt
from nemo_apo.grading.pool import WorkerPool
from nemo_apo.grading.settings import TASK_GRADER, GradingSettings, Order, Sample


class Grading:
    """Grades samples of one task. Workers start at the first call and stay until ``close``.

    Args:
        settings: grader, workers and limits.
        task: whose completions are graded.
    """

    def __init__(self, settings: GradingSettings, task: Any) -> None:
        self._settings = settings
        self._task = task
        self._pool: WorkerPool | None = None
        self._told: set[str] = set()

    def grade(self, samples: Sequence[Sample]) -> list[Grade]:
        """One grade per sample, in order.

        Raises:
            GradingBroken: if workers cannot be started.
        """
        if self._settings.workers == 0:
            grader = self._in_process()
            return [attempt(lambda s=sample: grader(s)) for sample in samples]
        if self._pool is None:
            self._pool = WorkerPool(Order.of(self._settings, self._task))
        try:
            return self._pool.grade(samples)
        except BaseException:
            # Its workers may still be at samples that nobody waits for any more.
            self.close()
            raise

    def first_time(self, reasons: Sequence[str]) -> list[str]:
        """Those of the reasons that this was never called with before."""
        new = [reason for reason in dict.fromkeys(reasons) if reason not in self._told]
        self._told.update(new)
        return new

    def close(self) -> None:
        """End the workers, if there are any; a later call starts new ones."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _in_process(self) -> SampleGrader:
        if self._settings.grader == TASK_GRADER:
            return of_task(self._task)
        return load(Order.of(self._settings, self._task))


def check_grader(settings: GradingSettings, task: Any) -> None:
    """Start a worker, if there are to be any, and end it again.

    Raises:
        GradingBroken: if it cannot start, for example because its grader cannot be imported.
    """
    if settings.workers > 0:
        WorkerPool(Order.of(replace(settings, workers=1), task)).close()
