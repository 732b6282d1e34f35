"""Whatever a grader does, every sample has its slot, and the next sample has a worker."""

import os
import signal
import threading
import time
import uuid
from pathlib import Path

import pytest

from nemo_apo.grading import Grade
from nemo_apo.grading import pool as pool_module
from nemo_apo.grading.frames import write_frame
from nemo_apo.grading.worker import IS_GRADE

from .workers import LONG, MARK, grades, left_running, pool, running

REPEATS = 20 if LONG else 1
# What a grader does, and the reason that it is counted by.
FAULTS = {
    "raise_error": "raised",
    "raise_base": "raised",
    "recurse": "raised",
    "leave": "raised",
    "huge number": "raised",
    "string": "type",
    "none": "type",
    "list": "type",
    "empty list": "type",
    "number-like": "type",
    "complex": "type",
    "unpicklable": "type",
    "huge text": "type",
    "nan": "not_finite",
    "infinity": "not_finite",
    "exit at once": "exited",
    "segfault": "exited",
    "kill itself": "exited",
    "close_every_pipe": "exited",
    "end_of_supervisor": "exited",
    "write_to_every_pipe": "protocol",
    "claim_a_huge_reply": "protocol",
    "fill_memory": "memory",
}
# Those that last until a limit is reached.
LASTING = {
    "hang": "timeout",
    "fork_and_hang": "timeout",
    "fill_memory_and_hang": "timeout",
}


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """What all processes of the workers carry in their environment."""
    value = uuid.uuid4().hex
    monkeypatch.setenv(MARK, value)
    return value


def test_every_fault_has_its_reason_and_leaves_a_working_worker() -> None:
    with pool(wall_s=20.0) as workers:
        for fault, reason in FAULTS.items():
            for _ in range(REPEATS):
                bad, good = grades(workers, fault, "0.25")
                assert (fault, bad.reason, bad.value == bad.value) == (fault, reason, False)
                assert (fault, good.value, good.reason) == (fault, 0.25, "")


def test_all_faults_in_one_batch_keep_the_order_of_the_samples() -> None:
    asked = [word for fault in FAULTS for word in (fault, "0.5")] * REPEATS
    with pool(workers=3) as workers:
        got = [grade.reason or grade.value for grade in grades(workers, *asked)]
    assert got == [FAULTS.get(word, 0.5) for word in asked]


@pytest.mark.parametrize("fault", LASTING)
def test_a_grader_that_does_not_end_is_killed_with_all_it_started(fault: str, mark: str) -> None:
    with pool(wall_s=2.0) as workers:
        for _ in range(REPEATS):
            bad, good = grades(workers, fault, "0.25")
            assert (bad.reason, good.value) == (LASTING[fault], 0.25)
            # The supervisor and the grading process that came after it.
            assert len(left_at_most(mark, 2)) == 2
    assert left_running(mark) == []


def left_at_most(mark: str, wanted: int, within_s: float = 10.0) -> list[int]:
    deadline = time.monotonic() + within_s
    while len(found := running(mark)) > wanted and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def test_cpu_time_is_bounded_apart_from_wall_time() -> None:
    with pool(cpu_s=1, wall_s=60.0) as workers:
        for _ in range(REPEATS):
            bad, good = grades(workers, "spin", "0.25")
            assert (bad.reason, good.value) == ("cpu", 0.25)


def test_one_of_64_hangs_and_the_others_have_their_grades() -> None:
    asked = [f"{index / 64}" for index in range(64)]
    asked[17] = "hang"
    with pool(workers=2, wall_s=2.0) as workers:
        for _ in range(REPEATS):
            began = time.monotonic()
            got = grades(workers, *asked)
            assert time.monotonic() - began < 30.0
            # By the supervisor, not by the trainer's own last resort.
            assert (got[17].reason, got[17].detail) == ("timeout", "after 2 s")
            assert [grade.value for grade in got if not grade.reason] == [
                float(word) for word in asked if word != "hang"
            ]


def test_all_hang_and_the_time_for_all_of_them_is_bounded() -> None:
    with pool(workers=2, wall_s=1.0, total_s=2.0) as workers:
        began = time.monotonic()
        got = grades(workers, *["hang"] * 64)
        assert time.monotonic() - began < 30.0
    assert [grade.reason for grade in got] == ["timeout"] * 64
    assert "grading.total_s=2" in got[-1].detail


def test_a_gibibyte_of_output_goes_nowhere() -> None:
    with pool() as workers:
        assert [grade.value for grade in grades(workers, "print_a_gibibyte", "0.25")] == [1.0, 0.25]


@pytest.mark.parametrize(("file_mib", "reason", "size"), [(0, "raised", 0), (2, "", 2**20)])
def test_a_file_is_bounded(
    file_mib: int, reason: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "written"
    monkeypatch.setenv("GRADING_TEST_FILE", str(path))
    with pool(file_mib=file_mib) as workers:
        (grade,) = grades(workers, "write_a_file")
    assert (grade.reason, path.stat().st_size) == (reason, size)


def test_a_fork_bomb_is_bounded_and_ends(mark: str) -> None:
    with pool(processes=8, wall_s=30.0) as workers:
        for _ in range(REPEATS):
            bad, good = grades(workers, "fork_bomb", "0.25")
            assert (bad.reason, good.value) == ("processes", 0.25)
            assert len(running(mark)) == 2
    assert left_running(mark) == []


def test_a_grader_that_kills_its_supervisor_dies_with_it(mark: str) -> None:
    with pool(wall_s=60.0) as workers:
        for _ in range(REPEATS):
            bad, good = grades(workers, "end_of_supervisor", "0.25")
            assert (bad.reason, good.value) == ("exited", 0.25)
            assert len(left_at_most(mark, 2)) == 2
    assert left_running(mark) == []


def test_what_a_grader_leaves_behind_ends_with_its_sample(mark: str) -> None:
    with pool() as workers:
        left, good = grades(workers, "fork_and_return", "0.25")
        assert (left.value, good.value) == (1.0, 0.25)
        assert len(running(mark)) == 2


def test_a_program_that_was_waited_for_is_no_fault() -> None:
    with pool() as workers:
        assert [g.value for g in grades(workers, "run_a_program", "own_socket")] == [0.0, 1.0]


def test_an_answer_that_comes_late_is_not_the_next_ones() -> None:
    with pool() as workers:
        grades(workers, "speak_later")
        time.sleep(0.5)
        assert [grade.value for grade in grades(workers, "0.25", "0.5")] == [0.25, 0.5]


def test_a_second_answer_is_never_the_next_ones() -> None:
    with pool() as workers:
        first, victim, after = grades(workers, "answer_again_later", "take_two_seconds", "0.25")
    assert (first.value, after.value) == (1.0, 0.25)
    assert victim.reason == "protocol"


def test_a_spoilt_process_grades_on() -> None:
    with pool() as workers:
        assert [g.value for g in grades(workers, "spoil_the_process", "0.25")] == [1.0, 0.25]


@pytest.mark.skipif(not LONG, reason="waits for the grace of a supervisor; NEMO_APO_ABUSE=long")
def test_a_stopped_supervisor_is_replaced() -> None:
    with pool(wall_s=1.0) as workers:
        bad, good = grades(workers, "stop_supervisor", "0.25")
        assert (bad.reason, good.value) == ("timeout", 0.25)


def test_a_supervisor_stopped_while_idle_holds_up_nobody(
    mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "_GRACE_S", 1.0)
    for _ in range(REPEATS):
        with pool(workers=2, wall_s=2.0) as workers:
            stopped = workers._workers[0].process
            os.kill(stopped.pid, signal.SIGSTOP)
            # Frees a trainer that would wait for ever; the reason is then another one.
            rescue = threading.Timer(30.0, stopped.kill)
            rescue.start()
            bad, *good = grades(workers, "0" * 2**20 + "1", "0.25", "0.5")
            rescue.cancel()
            assert (bad.reason, bad.detail) == ("timeout", "the supervisor is stuck")
            assert [grade.value for grade in good] == [0.25, 0.5]
        assert left_running(mark) == []


@pytest.mark.parametrize("length", [1, 2**20])
def test_a_supervisor_that_ended_while_idle_fails_one_grade(length: int) -> None:
    with pool() as workers:
        process = workers._workers[0].process
        process.terminate()
        process.wait()
        bad, good = grades(workers, "1".zfill(length), "0.25")
    assert (bad.reason, good.value) == ("exited", 0.25)


def test_a_grade_for_a_sample_that_was_not_yet_sent_is_refused() -> None:
    with pool(wall_s=20.0) as workers:
        process = workers._workers[0].process
        os.kill(process.pid, signal.SIGSTOP)
        assert process.stdout is not None
        forged = os.open(f"/proc/self/fd/{process.stdout.fileno()}", os.O_WRONLY)
        write_frame(forged, IS_GRADE + Grade(9.0).to_bytes())
        os.close(forged)
        bad, good = grades(workers, "0" * 2**20 + "1", "0.25")
    assert (bad.reason, good.value) == ("protocol", 0.25)


def test_a_bool_and_an_integer_are_numbers() -> None:
    with pool() as workers:
        assert [grade.value for grade in grades(workers, "true", "integer")] == [1.0, 3.0]


def test_a_message_of_an_exception_does_not_leave_the_worker() -> None:
    with pool() as workers:
        (grade,) = grades(workers, "raise_error")
    assert grade.detail.startswith("ValueError at misbehaving.py:")
    assert "canary" not in grade.detail


def test_a_sample_larger_than_a_pipe() -> None:
    with pool() as workers:
        (grade,) = grades(workers, "0" * 2**22 + "1")
    assert grade.value == 1.0
