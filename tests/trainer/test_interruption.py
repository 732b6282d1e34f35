"""Signals and the time limit, as they arrive at real processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from nemo_apo.trainer.interruption import Interruption, StoppedEarly, check_stop
from tests.parallel.ranks import run_ranks

CPU = torch.device("cpu")


def test_all_ranks_learn_of_a_signal_to_one() -> None:
    def work() -> list[str | None]:
        import torch.distributed as dist

        with Interruption(CPU, None) as stop:
            heard = [stop.requested()]
            if dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            return [*heard, stop.requested(), stop.requested()]

    assert run_ranks(3, work) == [[None, "signal USR1", "signal USR1"]] * 3


@pytest.mark.parametrize(("number", "told"), [("USR1", "signal USR1"), ("TERM", "signal TERM")])
def test_work_is_abandoned_at_the_next_check(number: str, told: str) -> None:
    def work() -> str:
        with Interruption(CPU, None) as stop:
            check_stop(stop)
            os.kill(os.getpid(), getattr(signal, f"SIG{number}"))
            with pytest.raises(StoppedEarly) as stopped:
                check_stop(stop)
            return str(stopped.value)

    assert run_ranks(1, work) == [told]


def test_the_time_limit_of_any_rank_stops_all() -> None:
    def work() -> list[str | None]:
        import torch.distributed as dist

        now = [100.0]
        stop = Interruption(CPU, 60.0 if dist.get_rank() == 0 else None, clock=lambda: now[0])
        heard = [stop.requested()]
        now[0] = 159.9
        heard.append(stop.requested())
        now[0] = 160.0
        return [*heard, stop.requested()]

    assert run_ranks(2, work) == [[None, None, "run.max_time is reached"]] * 2


def test_a_signal_that_a_launcher_held_back_is_heard() -> None:
    code = (
        "import os, signal, torch, torch.distributed as dist\n"
        "from nemo_apo.trainer.interruption import Interruption\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "with Interruption(torch.device('cpu'), None) as stop:\n"
        "    print(stop.requested())\n"
        "print({signal.SIGUSR1, signal.SIGTERM} <= signal.pthread_sigmask(signal.SIG_BLOCK, []))\n"
        "dist.destroy_process_group()\n"
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert done.stdout == "signal USR1\nTrue\n", done.stderr


def test_handlers_are_put_back() -> None:
    def work() -> None:
        before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
        _, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write)
        threads = threading.active_count()
        with Interruption(CPU, None):
            assert signal.getsignal(signal.SIGTERM) != before[0]
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before
        assert signal.set_wakeup_fd(-1) == write
        assert threading.active_count() == threads

    run_ranks(1, work)


WAITING = """
import time, torch
from nemo_apo.trainer import interruption
interruption.SAME_SIGNAL_S = {same}
with interruption.Interruption(torch.device("cpu"), None):
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("same", "ends"), [(0.0, True), (30.0, False)])
def test_a_second_signal_ends_the_process_unless_it_is_the_first_passed_on(
    same: float, ends: bool
) -> None:
    code = WAITING.format(same=same)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
        if ends:
            assert process.wait(timeout=30) == 128 + signal.SIGTERM
        else:
            assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


COLLECTIVE = """
import sys, time, torch
import torch.distributed as dist
from nemo_apo.trainer import interruption
interruption.SAME_SIGNAL_S = 0.2
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
with interruption.Interruption(torch.device("cpu"), None):
    print("ready", flush=True)
    if rank == 0:
        dist.all_reduce(torch.ones(1))
    time.sleep(60)
"""


def test_a_second_signal_ends_a_process_that_waits_in_a_collective(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", COLLECTIVE, str(tmp_path / "rendezvous"), str(rank)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        time.sleep(1.0)
        waiting = processes[0]
        waiting.send_signal(signal.SIGTERM)
        time.sleep(1.0)
        assert waiting.poll() is None
        waiting.send_signal(signal.SIGTERM)
        assert waiting.wait(timeout=30) == 128 + signal.SIGTERM
    finally:
        for process in processes:
            process.kill()
            process.communicate()
