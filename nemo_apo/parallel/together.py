"""Work that ranks do at the same time, and whose failure on one of them all learn.

A rank that raised alone would leave the others waiting for it in their next collective.
"""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from nemo_apo.parallel.gather import all_gather_objects

Result = TypeVar("Result")


class RankError(RuntimeError):
    """Work failed on some rank; the message names each that failed and says why."""


def together(work: Callable[[], Result]) -> list[Result]:
    """Do the work on every rank; what each rank returned, in rank order. Collective.

    Args:
        work: takes part in no collective; returns something small that pickles.

    Raises:
        RankError: on every rank, if the work raised on any.
    """
    result, failure, cause = None, None, None
    try:
        result = work()
    except Exception as error:
        failure, cause = f"{type(error).__name__}: {error}", error
    outcomes = all_gather_objects((failure, result))
    failures = [(rank, failure) for rank, (failure, _) in enumerate(outcomes) if failure]
    if failures:
        raise RankError("; ".join(f"rank {rank}: {text}" for rank, text in failures)) from cause
    return [result for _, result in outcomes]


def on_first(work: Callable[[], Result]) -> Result:
    """Do the work on rank 0 alone; what it returned, on every rank. Collective.

    Raises:
        RankError: on every rank, if the work raised.
    """
    return together(lambda: work() if dist.get_rank() == 0 else None)[0]  # type: ignore[return-value]
