"""Work that fails on one rank, and what the others are told."""

from collections.abc import Callable

import pytest
import torch.distributed as dist

from nemo_apo.parallel.together import RankError, on_first, together
from tests.parallel.ranks import run_ranks


def told(do: Callable[[Callable[[], int]], object], failing: set[int]) -> str | object:
    """What this rank gets from work that fails on the given ranks."""

    def work() -> int:
        if dist.get_rank() in failing:
            raise OSError(f"no disk {dist.get_rank()}")
        return 10 * dist.get_rank()

    try:
        return do(work)
    except RankError as error:
        return f"{error} ({type(error.__cause__).__name__})"


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        ({1}, "rank 1: OSError: no disk 1"),
        ({0, 2}, "rank 0: OSError: no disk 0; rank 2: OSError: no disk 2"),
    ],
)
def test_all_ranks_learn_of_a_failure_and_whose_it_is(failing: set[int], message: str) -> None:
    causes = ["OSError" if rank in failing else "NoneType" for rank in range(3)]
    assert run_ranks(3, told, together, failing) == [f"{message} ({cause})" for cause in causes]


def test_without_a_failure_all_ranks_have_all_results() -> None:
    assert run_ranks(3, told, together, set()) == [[0, 10, 20]] * 3


def test_the_first_alone_does_its_work() -> None:
    assert run_ranks(2, told, on_first, {1}) == [0, 0]
    assert run_ranks(2, told, on_first, {0}) == [
        "rank 0: OSError: no disk 0 (OSError)",
        "rank 0: OSError: no disk 0 (NoneType)",
    ]
