"""Runs a function on several forked ranks over gloo and brings back what each of them returned."""

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Imported before the fork (megatron-core with it), so that no rank spends seconds on it again.
import nemo_apo.trainer.checkpoint
import nemo_apo.trainer.rl_step  # noqa: F401

# A fork inherits the parent's thread pool in name only: a second thread would wait for ever.
torch.set_num_threads(1)

_RENDEZVOUS_TIMEOUT = timedelta(seconds=60)
# How long the other ranks may go on after one has failed, seconds.
_GRACE_S = 2.0
_POLL_S = 0.01


class RankFailure(AssertionError):
    """A rank raised, died or did not end in time; the message holds its traceback."""


def run_ranks(
    world_size: int, work: Callable[..., Any], *args: Any, timeout_s: float = 120.0
) -> list[Any]:
    """``work(*args)`` on every rank of a fresh gloo process group; the results in rank order.

    Args:
        world_size: number of ranks, each a forked process with one thread.
        work: any function, a closure included; what it returns must pickle.
        args: its arguments, inherited through the fork.
        timeout_s: ranks that still run after this many seconds are killed.

    Raises:
        RankFailure: if a rank did not return.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks: list[BaseProcess] = [
            context.Process(target=_run_rank, args=(rank, world_size, folder, work, args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            in_time = _wait(ranks, timeout_s)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        results = [folder / f"{rank}.result" for rank in range(world_size)]
        if not all(path.exists() for path in results):
            raise RankFailure(_what_failed(folder, ranks, in_time, timeout_s))
        return [pickle.loads(path.read_bytes()) for path in results]


def _run_rank(
    rank: int, world_size: int, folder: Path, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'rendezvous'}",
            rank=rank,
            world_size=world_size,
            timeout=_RENDEZVOUS_TIMEOUT,
        )
        result = pickle.dumps(work(*args))
    except BaseException:
        (folder / f"{rank}.traceback").write_text(traceback.format_exc())
        raise SystemExit(1) from None
    partial = folder / f"{rank}.partial"
    partial.write_bytes(result)
    partial.rename(folder / f"{rank}.result")


def _wait(ranks: list[BaseProcess], timeout_s: float) -> bool:
    """Wait for all ranks, or shortly after the first failure; whether all ended in time."""
    deadline = time.monotonic() + timeout_s
    while any(process.is_alive() for process in ranks):
        now = time.monotonic()
        if now >= deadline:
            return False
        if any(process.exitcode not in (None, 0) for process in ranks):
            deadline = min(deadline, now + _GRACE_S)
        time.sleep(_POLL_S)
    return True


def _what_failed(folder: Path, ranks: list[BaseProcess], in_time: bool, timeout_s: float) -> str:
    """The traceback of the rank that failed first: the others only lost their peer."""
    tracebacks = sorted(folder.glob("*.traceback"), key=lambda path: path.stat().st_mtime_ns)
    if tracebacks:
        first = tracebacks[0]
        return f"rank {first.stem} of {len(ranks)} failed\n{first.read_text()}"
    codes = [process.exitcode for process in ranks]
    if not in_time:
        return f"ranks were killed after {timeout_s} s, exit codes {codes}"
    return f"a rank ended without a result, exit codes {codes}"
