"""Ranks and a store that are stopped, as real processes over TCP."""

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nemo_apo.parallel.liveness import Liveness, RanksLost, end_silent
from nemo_apo.parallel.process_identity import kill, this_process
from tests.parallel.ranks import run_ranks

FORK = multiprocessing.get_context("fork")


class Stage:
    """A folder in which ranks and the test tell each other how far they are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def tell(self, name: str, text: str = "") -> None:
        partial = self.folder / f".{name}"
        partial.write_text(text)
        partial.rename(self.folder / name)

    def await_told(self, name: str, timeout_s: float = 30.0) -> str:
        deadline = time.monotonic() + timeout_s
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline, f"nobody told {name}"
            time.sleep(0.02)
        return (self.folder / name).read_text()


Work = Callable[[Stage], None]
# The one that holds the store, and the ranks.
Processes = tuple[BaseProcess, list[BaseProcess]]


def _hold_store(stage: Stage) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stage.tell("store", str(store.port))
    signal.pause()


def _be_rank(rank: int, ranks: int, port: int, stage: Stage, work: Work) -> None:
    sys.stderr = (stage.folder / f"stderr{rank}").open("w")
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, timeout=timedelta(seconds=30))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    work(stage)
    # An orderly end would wait for ranks that this test has stopped.
    os._exit(0)


@contextlib.contextmanager
def started(ranks: int, stage: Stage, work: Work) -> Iterator[Processes]:
    """A process that holds the store, and ranks at ``work``; none is left at the end."""
    holder = FORK.Process(target=_hold_store, args=(stage,))
    processes: list[BaseProcess] = [holder]
    holder.start()
    try:
        port = int(stage.await_told("store"))
        for rank in range(ranks):
            processes.append(FORK.Process(target=_be_rank, args=(rank, ranks, port, stage, work)))
            processes[-1].start()
        yield holder, processes[1:]
    finally:
        for process in processes:
            process.kill()
            process.join()


def stop(process: BaseProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)


def go_on(process: BaseProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGCONT)


def test_a_single_process_is_never_silent() -> None:
    def work() -> list:
        with Liveness(timeout_s=0.1) as alive:
            time.sleep(1.0)
            return alive.silent()

    assert run_ranks(1, work) == [[]]


def test_a_stopped_rank_is_named_and_the_others_take_over_the_verdict(tmp_path: Path) -> None:
    def work(stage: Stage) -> None:
        rank = dist.get_rank()
        with Liveness(timeout_s=60.0) as alive:
            stage.tell(f"entered{rank}")
            stage.await_told(f"ask{rank}", 60.0)
            stage.tell(f"told{rank}", ", ".join(map(str, alive.silent())))
            stage.await_told("leave", 60.0)

    stage = Stage(tmp_path)
    with started(3, stage, work) as (_, ranks):
        for rank in range(3):
            stage.await_told(f"entered{rank}")
        time.sleep(1.0)
        stop(ranks[2])
        named = f"rank 2 ({socket.gethostname()}, process {ranks[2].pid})"
        stage.tell("ask0")
        assert stage.await_told("told0") == named
        # It counts again, so only the verdict can name it now.
        go_on(ranks[2])
        time.sleep(1.5)
        stage.tell("ask1")
        assert stage.await_told("told1") == named
        stage.tell("ask2")
        assert stage.await_told("told2") == ""
        stage.tell("leave")


def test_ranks_that_left_or_count_are_not_silent_and_one_that_never_came_is(tmp_path: Path) -> None:
    def work(stage: Stage) -> None:
        rank = dist.get_rank()
        if rank == 2:
            stage.await_told("leave", 60.0)
            return
        with Liveness(timeout_s=60.0) as alive:
            if rank == 0:
                stage.await_told("left1")
                stage.tell("told", ", ".join(map(str, alive.silent())))
        stage.tell(f"left{rank}")
        stage.await_told("leave", 60.0)

    stage = Stage(tmp_path)
    with started(3, stage, work):
        assert stage.await_told("told") == "rank 2 (never heard of)"
        stage.tell("leave")


def test_a_stopped_neighbour_is_ended_though_nobody_asks(tmp_path: Path) -> None:
    def work(stage: Stage) -> None:
        with Liveness(timeout_s=1.0):
            stage.tell(f"entered{dist.get_rank()}")
            time.sleep(60.0)

    stage = Stage(tmp_path)
    with started(2, stage, work) as (_, ranks):
        for rank in range(2):
            stage.await_told(f"entered{rank}")
        time.sleep(1.0)
        stop(ranks[1])
        for process in ranks:
            process.join(30.0)
        assert [process.exitcode for process in ranks] == [1, -signal.SIGKILL]
    said = (tmp_path / "stderr0").read_text()
    assert f"nemo-apo: rank 1 ({socket.gethostname()}, process {ranks[1].pid})" in said


def test_a_stopped_store_ends_the_process_that_waits(tmp_path: Path) -> None:
    def work(stage: Stage) -> None:
        with Liveness(timeout_s=0.5):
            stage.tell(f"entered{dist.get_rank()}")
            time.sleep(60.0)

    stage = Stage(tmp_path)
    with started(2, stage, work) as (holder, ranks):
        for rank in range(2):
            stage.await_told(f"entered{rank}")
        stop(holder)
        for process in ranks:
            process.join(30.0)
        assert [process.exitcode for process in ranks] == [1, 1]
    said = (tmp_path / "stderr0").read_text()
    assert "nemo-apo: the store of the process group does not answer" in said


@pytest.mark.slow(reason="waits for as long as a store may take to answer")
def test_a_stopped_store_delays_neither_the_question_nor_leaving_for_ever(tmp_path: Path) -> None:
    def work(stage: Stage) -> None:
        with Liveness(timeout_s=60.0) as alive:
            stage.tell(f"entered{dist.get_rank()}")
            stage.await_told("ask")
            with pytest.raises(RanksLost, match="the store of the process group") as lost:
                alive.silent()
        stage.tell(f"left{dist.get_rank()}", str(lost.value))

    stage = Stage(tmp_path)
    with started(2, stage, work) as (holder, _):
        for rank in range(2):
            stage.await_told(f"entered{rank}")
        time.sleep(1.0)
        stop(holder)
        time.sleep(1.0)
        stage.tell("ask")
        for rank in range(2):
            assert stage.await_told(f"left{rank}").endswith("does not answer")


@pytest.mark.slow(reason="waits for longer than the store may take, stopped and going")
def test_a_job_that_was_stopped_as_a_whole_goes_on(tmp_path: Path) -> None:
    def work(stage: Stage) -> None:
        with Liveness(timeout_s=0.5):
            stage.tell(f"entered{dist.get_rank()}")
            stage.await_told("leave", 60.0)

    stage = Stage(tmp_path)
    with started(2, stage, work) as (holder, ranks):
        for rank in range(2):
            stage.await_told(f"entered{rank}")
        time.sleep(1.0)
        for process in (*ranks, holder):
            stop(process)
        time.sleep(5.0)
        for process in (holder, *ranks):
            go_on(process)
        # Longer than a store that does not answer is waited for.
        time.sleep(4.5)
        stage.tell("leave")
        for process in ranks:
            process.join(30.0)
        assert [process.exitcode for process in ranks] == [0, 0]


@pytest.fixture
def victim() -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(["sleep", "60"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def started_at(pid: int) -> str:
    """Clock ticks, as ps knows the process's fields; the name, sleep, has no space."""
    return Path(f"/proc/{pid}/stat").read_text().split()[21]


def test_the_process_that_is_meant_is_killed(victim: subprocess.Popen) -> None:
    kill(replace(this_process(), pid=victim.pid, started=started_at(victim.pid)))
    assert victim.wait(timeout=10) == -signal.SIGKILL


@pytest.mark.parametrize(
    "other",
    [
        {"host": "elsewhere"},
        {"started": "1"},
        {"started": ""},
        {"namespace": "pid:[1]"},
        {"namespace": ""},
    ],
    ids=str,
)
def test_no_other_process_of_the_same_number_is(
    other: dict[str, str], victim: subprocess.Popen
) -> None:
    meant = replace(this_process(), pid=victim.pid, started=started_at(victim.pid))
    kill(replace(meant, **other))
    time.sleep(0.2)
    assert victim.poll() is None


def test_a_process_that_is_gone_is_no_error(victim: subprocess.Popen) -> None:
    meant = replace(this_process(), pid=victim.pid, started=started_at(victim.pid))
    victim.kill()
    victim.wait()
    kill(meant)
    end_silent([])
