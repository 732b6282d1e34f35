"""What a worker inherits, how it starts, and that it never outlives the trainer."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
import torch

import nemo_apo
from nemo_apo.grading import GradingBroken
from nemo_apo.grading import pool as pool_module
from nemo_apo.grading.limits import without_secrets
from nemo_apo.grading.pool import WorkerPool
from nemo_apo.grading.settings import Order
from nemo_apo.tasks import SortTask

from .workers import LONG, MARK, grades, left_running, pool, running, settings

REPOSITORY = Path(nemo_apo.__file__).parent.parent
# A grader whose process ends at "exit"; while there is a file "held", its import lasts.
HELD = """
import os, time
from pathlib import Path
Path("{folder}/importing").touch()
while Path("{folder}/held").exists():
    time.sleep(0.01)
def grade(prompt, completion, reference):
    return os._exit(1) if completion == "exit" else float(completion)
"""
# A grader whose import kills the supervisor and counts, but not for ever: a test may fail.
KILLS_AT_IMPORT = """
import os, signal
from pathlib import Path
Path("{folder}", str(os.getpid())).touch()
if len(os.listdir("{folder}")) < 10:
    os.kill(os.getppid(), signal.SIGKILL)
"""
# A trainer that starts workers, has them do something, and says so.
TRAINER = """
import sys, threading, time
from tests.grading.workers import grades, settings, text
from nemo_apo.grading.pool import WorkerPool
from nemo_apo.grading.settings import Order
from nemo_apo.tasks import SortTask
pool = WorkerPool(Order.of(settings(workers=2, wall_s=600.0, total_s=900.0), SortTask()))
assert [grade.value for grade in grades(pool, "0.25", "0.5")] == [0.25, 0.5]
print("ready", flush=True)
"""
SECRETS = {
    "HF_TOKEN": "canary",
    "WANDB_API_KEY": "canary",
    "AWS_SECRET_ACCESS_KEY": "canary",
    "MY_PASSWORD": "canary",
    "github_token": "canary",
    "SOME_CREDENTIALS": "canary",
    "MY_PROXY": "http://user:canary@proxy:8080",
}


def trainer(code: str, mark: str) -> subprocess.Popen[str]:
    """A trainer in a process of its own that has said it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINER + code],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), MARK: mark},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


class TestNothingIsInherited:
    def test_secrets_do_not_reach_a_grader(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in SECRETS.items():
            monkeypatch.setenv(name, value)
        with pool() as workers:
            (grade,) = grades(workers, "count_secrets")
        assert (grade.value, grade.reason) == (0.0, "")

    def test_the_count_of_secrets_sees_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HARMLESS", "canary")
        with pool() as workers:
            (grade,) = grades(workers, "count_secrets")
        assert grade.value > 0.0

    def test_other_variables_stay(self) -> None:
        kept = {"PATH": "/bin", "HOME": "/root", "LANG": "C", "URL": "https://host:80/a@b"}
        assert without_secrets({**kept, **SECRETS}) == kept

    def test_no_module_thread_or_socket_of_the_trainer(self) -> None:
        assert torch.__name__ in sys.modules
        with socket.socket() as held, pool() as workers:
            held.set_inheritable(True)
            got = grades(workers, "heavy_modules", "threads", "open_sockets", "core_limit")
        assert [grade.value for grade in got] == [0.0, 1.0, 0.0, 0.0]


class TestStart:
    @pytest.mark.parametrize(
        ("grader", "why"),
        [
            ("no_such_package.module:grade", "No module named 'no_such_package'"),
            ("tests.grading.misbehaving:nothing", "no attribute 'nothing'"),
            ("tests.grading.misbehaving:NOT_CALLABLE", "is a str, which cannot be called"),
            ("tests.grading.broken_imports.raises:grade", "RuntimeError: cannot be imported"),
            ("tests.grading.broken_imports.leaves:grade", "SystemExit"),
            ("tests.grading.broken_imports.dies:grade", "the grading process ended: status 7"),
            ("tests.grading.broken_imports.hangs:grade", "ran out of time: after 1 s"),
        ],
    )
    def test_a_grader_that_cannot_start_is_an_error_that_says_why(
        self, grader: str, why: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mark = uuid.uuid4().hex
        monkeypatch.setenv(MARK, mark)
        start_s = 1.0 if "hangs" in grader else 60.0
        with pytest.raises(GradingBroken, match=why), pool(grader=grader, start_s=start_s):
            pass
        assert left_running(mark) == []

    def test_a_supervisor_that_cannot_start_is_one_too(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "path", [])
        with pytest.raises(GradingBroken, match="a worker ended before it was ready"), pool():
            pass

    def test_an_interpreter_that_is_not_there_is_one_too(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "executable", "/no/python")
        with pytest.raises(GradingBroken, match=r"could not be started: .*No such file"), pool():
            pass

    def test_a_grader_that_cannot_start_again_is_one_too(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "once.py").write_text("import os\ndef grade(*texts): os._exit(1)\n")
        monkeypatch.syspath_prepend(tmp_path)
        with pool(grader="once:grade") as workers:
            (tmp_path / "once.py").unlink()
            with pytest.raises(GradingBroken, match="No module named 'once'"):
                grades(workers, "0.25", "0.5")

    @pytest.mark.parametrize(
        ("number", "times"),
        # A stopped worker is waited for.
        [(signal.SIGTERM, 2), (signal.SIGKILL, 2), (signal.SIGSTOP, 1)],
        ids=["SIGTERM", "SIGKILL", "SIGSTOP"],
    )
    def test_a_worker_that_a_signal_ends_before_it_is_ready_is_launched_again(
        self, number: int, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mark = uuid.uuid4().hex
        monkeypatch.setenv(MARK, mark)
        monkeypatch.setattr(pool_module, "_GRACE_S", 1.0)
        (tmp_path / "slow.py").write_text(HELD.format(folder=tmp_path))
        monkeypatch.syspath_prepend(tmp_path)
        with pool(grader="slow:grade", start_s=3.0) as workers:
            for _ in range(times):
                (tmp_path / "importing").unlink()
                (tmp_path / "held").touch()
                (bad,) = grades(workers, "exit")
                while not (tmp_path / "importing").exists():
                    time.sleep(0.01)
                os.kill(workers._workers[0].process.pid, number)
                (tmp_path / "held").unlink()
                assert bad.reason == "exited"
                assert [grade.value for grade in grades(workers, "0.25", "0.5")] == [0.25, 0.5]
        assert left_running(mark) == []

    def test_a_worker_that_ends_twice_before_it_is_ready_is_given_up(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        launches = tmp_path / "launches"
        launches.mkdir()
        (tmp_path / "kills.py").write_text(KILLS_AT_IMPORT.format(folder=launches))
        monkeypatch.syspath_prepend(tmp_path)
        why = r"ended before it was ready, twice \(the supervisor ended, status -9\)"
        with pytest.raises(GradingBroken, match=why), pool(grader="kills:grade"):
            pass
        assert len(list(launches.iterdir())) == 2

    def test_a_grader_in_the_working_directory_is_found_and_hides_no_module(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "mine.py").write_text("def grade(*texts): return 0.75\n")
        (tmp_path / "json.py").write_text("raise RuntimeError('not the standard library')\n")
        monkeypatch.chdir(tmp_path)
        with pool(grader="mine:grade") as workers:
            assert [grade.value for grade in grades(workers, "x")] == [0.75]


class TestNoOrphans:
    @pytest.mark.parametrize("deed", ["hang", "fork_and_hang"])
    def test_when_the_trainer_is_killed_while_grading(self, deed: str) -> None:
        for _ in range(10 if LONG else 1):
            mark = uuid.uuid4().hex
            code = (
                "threading.Thread(target=lambda: (time.sleep(1.0), print('go', flush=True)))"
                f".start()\ngrades(pool, '{deed}', '{deed}')"
            )
            process = trainer(code, mark)
            assert process.stdout is not None
            assert process.stdout.readline() == "go\n"
            # The trainer, two supervisors and their grading processes, at least.
            assert len(running(mark)) >= 5
            process.kill()
            process.wait()
            assert left_running(mark) == []

    def test_when_the_trainer_is_killed_between_steps(self) -> None:
        mark = uuid.uuid4().hex
        process = trainer("time.sleep(600)", mark)
        assert len(running(mark)) == 5
        process.kill()
        process.wait()
        assert left_running(mark) == []

    def test_when_another_process_holds_the_trainers_pipes(self) -> None:
        mark = uuid.uuid4().hex
        process = trainer(
            "import os\nif os.fork() == 0:\n    os.setsid(); time.sleep(60)\n"
            "    os._exit(0)\nprint('go', flush=True)\ntime.sleep(600)",
            mark,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
        copy = [pid for pid in running(mark) if parent_of(pid) == process.pid and leads(pid)]
        process.kill()
        process.wait()
        try:
            deadline = time.monotonic() + 20.0
            while running(mark) != copy and time.monotonic() < deadline:
                time.sleep(0.02)
            assert running(mark) == copy
        finally:
            os.kill(copy[0], signal.SIGKILL)

    @pytest.mark.parametrize("code", ["", "raise SystemExit(1)", "pool = None; time.sleep(0)"])
    def test_when_the_trainer_ends_by_itself(self, code: str) -> None:
        mark = uuid.uuid4().hex
        trainer(code, mark).wait(timeout=60)
        assert left_running(mark) == []

    def test_when_the_trainer_is_interrupted(self) -> None:
        mark = uuid.uuid4().hex
        process = trainer("grades(pool, 'hang')", mark)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        assert left_running(mark) == []

    def test_a_forked_copy_of_the_trainer_that_leaves_ends_no_worker(self) -> None:
        with pool() as workers:
            code = os.fork()
            if code == 0:
                workers.close()
                os._exit(0)
            os.waitpid(code, 0)
            assert [grade.value for grade in grades(workers, "0.25")] == [0.25]

    def test_closing_does_not_wait_for_a_copy_of_the_pipe(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mark = uuid.uuid4().hex
        monkeypatch.setenv(MARK, mark)
        made = WorkerPool(Order.of(settings(), SortTask()))
        copy = os.fork()
        if copy == 0:
            time.sleep(60)
            os._exit(0)
        try:
            made.close()
            assert running(mark) == []
            (worker,) = made._workers
            assert worker.process.returncode == 0, "it had to be killed"
        finally:
            os.kill(copy, signal.SIGKILL)
            os.waitpid(copy, 0)

    def test_workers_outlive_the_thread_that_started_them(self) -> None:
        made: list[WorkerPool] = []
        order = Order.of(settings(), SortTask())
        thread = threading.Thread(target=lambda: made.append(WorkerPool(order)))
        thread.start()
        thread.join()
        time.sleep(0.2)
        try:
            assert [grade.value for grade in grades(made[0], "0.25")] == [0.25]
        finally:
            made[0].close()


def parent_of(pid: int) -> int:
    """The parent's process id."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def leads(pid: int) -> bool:
    """Whether it is no worker: it runs the trainer's own command line."""
    return b"nemo_apo.grading.worker import main" not in Path(f"/proc/{pid}/cmdline").read_bytes()
