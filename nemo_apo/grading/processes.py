"""Linux processes: a parent that adopts orphans, children that die with it, none left over."""

import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
# A process that has been sent SIGKILL may still be busy in the kernel for a moment.
_KILL_S = 10.0


def adopt_orphans() -> None:
    """Become the parent of every descendant that loses its own, so that none gets away."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def signal_at_parents_death(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when the thread that started it ends."""
    _prctl(_PR_SET_PDEATHSIG, number)


def descendants(pid: int) -> list[int]:
    """Children of a process and theirs, zombies included, as far as they can be read."""
    found: list[int] = []
    queue = [pid]
    while queue:
        children = _children(queue.pop())
        found += children
        queue += children
    return found


def kill_descendants() -> None:
    """SIGKILL every descendant of this process, which adopts orphans, and wait for their end.

    Raises:
        TimeoutError: if some are still there after seconds of it.
    """
    deadline = time.monotonic() + _KILL_S
    while True:
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not _reap():
            return
        if time.monotonic() > deadline:
            raise TimeoutError("killed processes do not end")
        time.sleep(0.001)


def _children(pid: int) -> list[int]:
    children: list[int] = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread may have ended
            children += map(int, listed.read_text().split())
    return children


def _reap() -> bool:
    """Collect ended children; whether any child is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0] != 0:
            pass
    except ChildProcessError:
        return False
    return True


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")
