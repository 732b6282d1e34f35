"""Pools of workers with small limits, samples for them, and a count of what is left running."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_apo.grading import Grade, GradingSettings, Sample
from nemo_apo.grading.pool import WorkerPool
from nemo_apo.grading.settings import Order
from nemo_apo.tasks import SortTask

# More of everything: NEMO_APO_ABUSE=long.
LONG = os.environ.get("NEMO_APO_ABUSE") == "long"
MISBEHAVING = "tests.grading.misbehaving:grade"
MARK = "GRADING_TEST_MARK"


def settings(**changes: Any) -> GradingSettings:
    """One worker with small limits."""
    small = {
        "grader": MISBEHAVING,
        "workers": 1,
        "wall_s": 5.0,
        "cpu_s": 5,
        "memory_mib": 512,
        "total_s": 120.0,
    }
    return GradingSettings(**{**small, **changes})


@contextlib.contextmanager
def pool(**changes: Any) -> Iterator[WorkerPool]:
    """A pool of workers, ended afterwards."""
    made = WorkerPool(Order.of(settings(**changes), SortTask()))
    try:
        yield made
    finally:
        made.close()


def text(completion: str, reference: str = "") -> Sample:
    """A sample of a completion that is text alone."""
    return Sample("", (), completion, (), reference)


def grades(made: WorkerPool, *completions: str) -> list[Grade]:
    """The grades of some completions."""
    return made.grade([text(completion) for completion in completions])


def running(mark: str) -> list[int]:
    """Processes that inherited the mark in their environment, zombies not."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdecimal() and mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def left_running(mark: str, within_s: float = 20.0) -> list[int]:
    """Processes with the mark that are still there when the time is over."""
    deadline = time.monotonic() + within_s
    while (found := running(mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found
