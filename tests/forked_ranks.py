"""Forked ranks under watch: what each left in a folder, or why one of them left nothing.

A rank writes its pickled result to ``RANK.result``, or a traceback to ``RANK.traceback``.
"""

import pickle
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# How long the other ranks may go on after one has failed, seconds.
_GRACE_S = 2.0
POLL_S = 0.01


class RankFailure(AssertionError):
    """A rank raised, died or did not end in time; the message holds its traceback."""


def results_of(ranks: Sequence[BaseProcess], folder: Path, timeout_s: float) -> list[Any]:
    """Start the ranks and wait for them; their results in rank order. None is left running.

    Raises:
        RankFailure: if a rank did not return.
    """
    for process in ranks:
        process.start()
    try:
        in_time = _wait(ranks, timeout_s)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    results = [folder / f"{rank}.result" for rank in range(len(ranks))]
    if not all(path.exists() for path in results):
        raise RankFailure(_what_failed(folder, ranks, in_time, timeout_s))
    return [pickle.loads(path.read_bytes()) for path in results]


def _wait(ranks: Sequence[BaseProcess], timeout_s: float) -> bool:
    """Wait for all ranks, or shortly after the first failure; whether all ended in time."""
    deadline = time.monotonic() + timeout_s
    while any(process.is_alive() for process in ranks):
        now = time.monotonic()
        if now >= deadline:
            return False
        if any(process.exitcode not in (None, 0) for process in ranks):
            deadline = min(deadline, now + _GRACE_S)
        time.sleep(POLL_S)
    return True


def _what_failed(
    folder: Path, ranks: Sequence[BaseProcess], in_time: bool, timeout_s: float
) -> str:
    """The traceback of the rank that failed first: the others only lost their peer."""
    tracebacks = sorted(folder.glob("*.traceback"), key=lambda path: path.stat().st_mtime_ns)
    if tracebacks:
        first = tracebacks[0]
        return f"rank {first.stem} of {len(ranks)} failed\n{first.read_text()}"
    codes = [process.exitcode for process in ranks]
    if not in_time:
        return f"ranks were killed after {timeout_s} s, exit codes {codes}"
    return f"a rank ended without a result, exit codes {codes}"
