"""Numbers that meet between ranks: right for one rank, for several, and for strided tensors."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_apo.parallel.gather import (
    all_gather_objects,
    all_gather_rows,
    all_true,
    broadcast_from_last,
    first_not_finite,
    highest,
    sum_over,
)

from .ranks import run_ranks

CPU = torch.device("cpu")


def numbers(rank: int) -> Tensor:
    """A matrix [4, 3] whose numbers tell the rank."""
    return (torch.arange(12.0).reshape(3, 4) + 100.0 * rank).t().contiguous()


def transposed(rank: int) -> Tensor:
    """The same numbers, column by column in memory."""
    return numbers(rank).t().contiguous().t()


def sliced(rank: int) -> Tensor:
    """The same numbers, with gaps between them in memory."""
    return numbers(rank).repeat_interleave(2, dim=1)[:, ::2]


def transposed_on_the_last(rank: int) -> Tensor:
    """Ranks that do not even agree on the order in memory."""
    return transposed(rank) if rank == dist.get_world_size() - 1 else numbers(rank)


LAYOUTS = (numbers, transposed, sliced, transposed_on_the_last)


def every_function(values: Tensor) -> dict[str, object]:
    rank = dist.get_rank()
    return {
        "rows": all_gather_rows(values),
        "sum": sum_over(values),
        "last": broadcast_from_last(values, dist.group.WORLD),  # after the others: in place
        "objects": all_gather_objects({"rank": rank}),
        "all yes": all_true(True, CPU),
        "all no": all_true(False, CPU),
        "first no": all_true(rank != 0, CPU),
        "last no": all_true(rank != dist.get_world_size() - 1, CPU),
        "highest": highest(rank + 5, CPU),
        "finite": first_not_finite({"loss": 1.0, "gradient": 2.0}, CPU),
        "one": first_not_finite({"loss": 1.0, "gradient": math.inf if rank == 0 else 2.0}, CPU),
        # Ranks that have different troubles hear of the same one.
        "first": first_not_finite(
            {"loss": math.nan if rank == 0 else 1.0, "gradient": math.nan}, CPU
        ),
    }


def assert_numbers(got: dict[str, object], world_size: int) -> None:
    of_rank = [numbers(rank) for rank in range(world_size)]
    for name, wanted in {
        "rows": torch.cat(of_rank),
        "sum": torch.stack(of_rank).sum(dim=0),
        "last": of_rank[-1],
    }.items():
        actual = got[name]
        assert isinstance(actual, Tensor)
        assert torch.equal(actual, wanted), name
    assert got["objects"] == [{"rank": rank} for rank in range(world_size)]
    votes = {name: got[name] for name in ("all yes", "all no", "first no", "last no")}
    assert votes == {"all yes": True, "all no": False, "first no": False, "last no": False}
    assert got["highest"] == world_size + 4
    assert (got["finite"], got["one"], got["first"]) == (None, "gradient", "loss")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_agree_on_every_number_whatever_its_place_in_memory(world_size: int) -> None:
    def work() -> list[dict[str, object]]:
        return [every_function(layout(dist.get_rank())) for layout in LAYOUTS]

    for rank in run_ranks(world_size, work):
        for got in rank:
            assert_numbers(got, world_size)


def test_the_sum_leaves_its_argument_alone() -> None:
    def work() -> Tensor:
        values = torch.ones(3)
        sum_over(values)
        return values

    for values in run_ranks(2, work):
        assert torch.equal(values, torch.ones(3))


def test_a_group_is_served_apart_from_the_others() -> None:
    """Ranks 0, 2 and 1, 3 form groups: nothing crosses from one to the other."""

    def work() -> tuple[Tensor, Tensor, Tensor]:
        groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        group = groups[dist.get_rank() % 2]
        mine = torch.tensor([float(dist.get_rank())])
        return (
            all_gather_rows(mine, group),
            sum_over(mine, group),
            broadcast_from_last(mine.clone(), group),
        )

    for rank, (rows, total, last) in enumerate(run_ranks(4, work)):
        first = rank % 2
        assert rows.tolist() == [first, first + 2]
        assert total.tolist() == [2 * first + 2]
        assert last.tolist() == [first + 2]
