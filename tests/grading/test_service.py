"""Grading in this process and in workers, as the trainer calls it."""

import math
import os
import signal
import threading
import time

import pytest

from nemo_apo.grading import Grading, GradingBroken, GradingSettings, Sample
from nemo_apo.grading.service import check_grader
from nemo_apo.tasks import SortTask

from .misbehaving import DEED_OF_SUM, REASON_OF_DEED, MisbehavingTask, deed_of
from .workers import settings, text

IN_PROCESS = GradingSettings()
# Deeds that a process survives, by a completion's only token.
SURVIVABLE = {
    total: deed for total, deed in DEED_OF_SUM.items() if deed not in ("exit at once", "hang")
}


def tokens(*completion: int) -> Sample:
    return Sample("", (), "", completion, "")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failing_task_grader_fails_the_same_in_both(workers: int) -> None:
    grading = Grading(GradingSettings(workers=workers), MisbehavingTask())
    totals = sorted({*SURVIVABLE, 1, 2})
    grades = grading.grade([tokens(total) for total in totals])
    grading.close()
    for total, grade in zip(totals, grades, strict=True):
        deed = deed_of([total])
        assert grade.reason == ("" if deed is None else REASON_OF_DEED[deed])
        assert math.isnan(grade.value) if deed else grade.value == total / 7.0


def test_no_sample_needs_no_grade() -> None:
    for workers in (0, 1):
        grading = Grading(GradingSettings(workers=workers), SortTask())
        assert grading.grade([]) == []
        grading.close()


def test_a_reason_is_new_once() -> None:
    grading = Grading(IN_PROCESS, SortTask())
    assert grading.first_time(["timeout", "timeout", "raised"]) == ["timeout", "raised"]
    assert grading.first_time(["raised", "type"]) == ["type"]


def test_workers_start_again_after_close() -> None:
    grading = Grading(settings(), SortTask())
    for _ in range(2):
        assert [grade.value for grade in grading.grade([text("0.5")])] == [0.5]
        grading.close()


def test_a_grader_that_cannot_start_is_found_before_a_run() -> None:
    check_grader(settings(), SortTask())
    check_grader(IN_PROCESS, SortTask())
    with pytest.raises(GradingBroken, match="no_such_package"):
        check_grader(settings(grader="no_such_package:grade"), SortTask())


def test_an_interrupted_call_does_not_mix_its_grades_into_the_next() -> None:
    grading = Grading(settings(grader="tests.grading.misbehaving:slow_grade"), SortTask())
    threading.Thread(target=lambda: (time.sleep(0.5), os.kill(os.getpid(), signal.SIGINT))).start()
    with pytest.raises(KeyboardInterrupt):
        grading.grade([text("0.25")] * 20)
    assert [grade.value for grade in grading.grade([text("0.5")])] == [0.5]
    grading.close()
