"""SIGKILL at any point of a save: there is always a whole checkpoint, of one state or the other."""

import os
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch.distributed as dist

from nemo_apo.config import Config
from tests.forked_ranks import RankFailure
from tests.parallel.ranks import run_ranks
from tests.trainer.tiny_runs import parallel

from .effort import report, spread, tries
from .traced import saved_under_strace
from .two_states import (
    STEP,
    Outcome,
    abuse_config,
    at,
    copies,
    initialize,
    outcomes,
    save_a,
    save_at,
)

# Calls of C functions by which Python changes files. What torch writes from C++ on its own is left
# to the test with strace.
_FILE_CALLS = {"open", "write", "flush", "fsync", "close", "rename", "mkdir", "unlink", "rmdir"}
# The same as system calls.
_SYSTEM_CALLS = (
    "openat",
    "write",
    "fsync",
    "close",
    "rename",
    "mkdir",
    "unlink",
    "unlinkat",
    "rmdir",
)


class Trap:
    """Counts the calls that change files, in every thread, and kills the process at one of them."""

    def __init__(self, kill_at: int | None) -> None:
        self.kill_at = kill_at
        self.names: list[str] = []

    def __call__(self, frame: FrameType, event: str, called: Any) -> None:
        if event != "c_call" or called.__name__ not in _FILE_CALLS:
            return
        self.names.append(called.__name__)
        if len(self.names) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, work: Callable[[], object]) -> None:
        threading.setprofile(self)
        sys.setprofile(self)
        try:
            work()
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]


def save_b(root: Path, config: Config, kill_at: int | None, victim: int = 0) -> list[str]:
    """Save B, killing the victim at a call; the calls of this rank if it lives."""
    training = at(STEP["B"], config, initialize(config))
    trap = Trap(kill_at if dist.get_rank() == victim else None)
    trap.around(lambda: save_at(root, training, STEP["B"]))
    return trap.names


def points_among(calls: list[str], count: int) -> list[int]:
    """Where to kill: at each rename and the two calls after it, where folders change names, and
    spread over the other calls; most of these write a few bytes each.
    """
    numbers = range(1, len(calls) + 1)
    renames = [number for number in numbers if calls[number - 1] == "rename"]
    near = {number + later for number in renames for later in range(3)} & set(numbers)
    rare = [number for number in numbers if calls[number - 1] != "write"]
    among_rare = {rare[index - 1] for index in spread(len(rare), count // 2)}
    return sorted({*near, *among_rare, *spread(len(calls), count // 2)})


def killed(root: Path, config: Config, point: int, ranks: int = 1, victim: int = 0) -> bool:
    """Whether the kill came before the save was over."""
    try:
        run_ranks(ranks, save_b, root, config, point, victim)
    except RankFailure as failure:
        # The victim leaves no traceback, another rank perhaps that it lost its peer.
        if "SaveFailed" in str(failure) or "AssertionError" in str(failure):
            raise
        return True
    return False


def check(found: list[Outcome], seen: set[str]) -> None:
    """Every folder loads as A or B (checked on loading); both occur, and no left-over stays."""
    assert {outcome.loads for outcome in found} == seen
    assert all(outcome.damaged == () for outcome in found)
    assert {outcome.left for outcome in found} == {("step_000003",)}


@pytest.mark.slow(reason="a process is killed for every point")
def test_a_kill_at_any_call_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    config, original = abuse_config(), tmp_path / "a"
    save_a(original, config)
    counting = copies(original, 1, "count")[0]
    calls = run_ranks(1, save_b, counting, config, None)[0]
    points = points_among(calls, tries(12, 400))
    roots = copies(original, len(points))
    for root, point in zip(roots, points, strict=True):
        assert killed(root, config, point)
    check(outcomes(roots, config), {"A", "B"})
    report(f"SIGKILL at a file call of a save ({len(calls)} calls)", len(points))


@pytest.mark.slow(reason="two processes are started for every point")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_kill_of_one_of_two_ranks_leaves_a_whole_checkpoint(victim: int, tmp_path: Path) -> None:
    config, original = replace(abuse_config(), parallel=parallel(2, 1)), tmp_path / "a"
    save_a(original, config, ranks=2)
    counting = copies(original, 1, "count")[0]
    calls = run_ranks(2, save_b, counting, config, None, victim)[victim]
    points = spread(len(calls), tries(2, 60))
    roots = copies(original, len(points))
    for root, point in zip(roots, points, strict=True):
        assert killed(root, config, point, 2, victim)
    found = outcomes(roots, config, 2)
    check(found, {outcome.loads for outcome in found})
    report(f"SIGKILL of rank {victim} of two at a file call of a save", len(points))


def calls_of_main_thread(trace: Path, root: Path) -> list[tuple[str, int]]:
    """Name and running number of each call, up to the last one that names the folder.

    strace counts the calls of each name and thread apart.
    """
    lines = [line.split(maxsplit=1) for line in trace.read_text().splitlines()]
    own = [text for thread, text in lines if thread == lines[0][0]]
    last = max(number for number, text in enumerate(own) if str(root) in text)
    counted: Counter[str] = Counter()
    calls = []
    for text in own[: last + 1]:
        name = text.split("(")[0]
        if name in _SYSTEM_CALLS:
            counted[name] += 1
            calls.append((name, counted[name]))
    return calls


@pytest.mark.slow(reason="a process is killed for every point")
@pytest.mark.skipif(shutil.which("strace") is None, reason="NOT TESTED: no strace here")
def test_a_kill_at_any_system_call_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    config, original = abuse_config(), tmp_path / "a"
    save_a(original, config)
    counting = copies(original, 1, "count")[0]
    trace = tmp_path / "trace"
    calls = f"trace={','.join(_SYSTEM_CALLS)}"
    assert saved_under_strace(counting, config, ["-o", str(trace), "-e", calls]) == 0
    made = calls_of_main_thread(trace, counting)
    points = [made[number - 1] for number in spread(len(made), tries(6, 250))]
    roots = copies(original, len(points))
    codes = []
    for root, (name, number) in zip(roots, points, strict=True):
        inject = f"inject={name}:signal=KILL:when={number}"
        arguments = ["-o", os.devnull, "-e", calls, "-e", inject]
        codes.append(saved_under_strace(root, config, arguments))
    # The number of calls differs a little from one save to the next.
    assert codes.count(-signal.SIGKILL) >= len(codes) - max(1, len(codes) // 20), codes
    check(outcomes(roots, config), {"A", "B"})
    report(f"SIGKILL at a system call of a save ({len(made)} calls)", len(points))
