"""The fork helper itself: a failure on a rank must fail the test that started it."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.forked_ranks import RankFailure

from .ranks import run_ranks


def test_results_come_back_in_rank_order() -> None:
    offset = 10

    def work(factor: int) -> tuple[int, int, int]:
        return dist.get_rank() * factor + offset, dist.get_world_size(), torch.get_num_threads()

    assert run_ranks(3, work, 2) == [(10, 3, 1), (12, 3, 1), (14, 3, 1)]


def test_the_traceback_of_the_failing_rank_is_shown_not_its_peers() -> None:
    def work() -> None:
        if dist.get_rank() == 1:
            raise KeyError("a name to look for")
        dist.barrier()

    with pytest.raises(RankFailure, match=r"rank 1 of 2 failed(.|\n)*a name to look for"):
        run_ranks(2, work)


def test_a_hanging_rank_is_killed() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailure, match=r"killed after 1\.0 s"):
        run_ranks(2, lambda: time.sleep(600.0), timeout_s=1.0)
    assert time.monotonic() - start < 10.0


def test_a_rank_that_dies_is_noticed() -> None:
    with pytest.raises(RankFailure, match=r"without a result, exit codes \[7\]"):
        run_ranks(1, lambda: os._exit(7))
