"""Runs a function on several forked ranks over gloo and brings back what each of them returned."""

import multiprocessing
import pickle
import tempfile
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
from tests.forked_ranks import results_of

# A fork inherits the parent's thread pool in name only: a second thread would wait for ever.
torch.set_num_threads(1)

_RENDEZVOUS_TIMEOUT = timedelta(seconds=60)


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
        return results_of(ranks, folder, timeout_s)


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
