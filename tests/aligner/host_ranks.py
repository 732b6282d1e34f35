"""Runs a function on forked ranks, each ready for the real NeMo-Aligner over gloo."""

import gc
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tests.aligner import cpu_host, tiny_actor
from tests.forked_ranks import POLL_S, results_of

# A fork inherits the parent's thread pool in name only: a second thread would wait for ever.
torch.set_num_threads(1)


def run_ranks(
    world_size: int, work: Callable[..., Any], *args: Any, timeout_s: float = 240.0
) -> list[Any]:
    """``work(rank, *args)`` on every rank; the results in rank order.

    The process groups are left to the host: each rank only has the variables that a launcher
    would set. One rank is forked too, so that neither the shims nor the host's global state
    reach the process that runs the tests.

    Args:
        world_size: number of ranks, each a forked process with one thread.
        work: any function, a closure included; what it returns must pickle.
        args: its further arguments, inherited through the fork.
        timeout_s: ranks that still run after this many seconds are killed.

    Raises:
        RankFailure: if a rank did not return.
    """
    # Imported before the fork, so that no rank spends seconds on it again.
    tiny_actor.import_host()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        port = _free_port()
        ranks: list[BaseProcess] = [
            context.Process(target=_run_rank, args=(rank, world_size, port, folder, work, args))
            for rank in range(world_size)
        ]
        return results_of(ranks, folder, timeout_s)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _run_rank(
    rank: int,
    world_size: int,
    port: int,
    folder: Path,
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    # The host collects garbage several times a step; what was imported need not be looked at.
    gc.freeze()
    os.environ.update(_launcher_variables(rank, world_size, port))
    try:
        cpu_host.after_import()
        result = pickle.dumps(work(rank, *args))
    except BaseException:
        partial = folder / f"{rank}.failing"
        partial.write_text(traceback.format_exc())
        partial.rename(folder / f"{rank}.traceback")
        _leave(1)
    partial = folder / f"{rank}.partial"
    partial.write_bytes(result)
    partial.rename(folder / f"{rank}.result")
    _leave_together(world_size, folder)


def _leave_together(world_size: int, folder: Path) -> None:
    """End once every rank has its result: rank 0 serves the store that others may still need."""
    while len(list(folder.glob("*.result"))) + len(list(folder.glob("*.traceback"))) < world_size:
        time.sleep(POLL_S)
    _leave(0)


def _leave(exit_code: int) -> None:
    """End without the exit handlers of torch and Lightning, which wait for the other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _launcher_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun sets on one node; the run's id is what Lightning recognises it by."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
    }
