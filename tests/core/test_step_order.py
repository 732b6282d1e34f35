"""The order under which a host that cuts the rollout by rank first still trains whole groups."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_apo.core.step_order import whole_group_order


def host_steps(order: list[int], batch_size: int, ranks: int) -> list[list[int]]:
    """What each optimizer step holds: every rank has a chunk and gives its next slice."""
    chunk, share = len(order) // ranks, batch_size // ranks
    chunks = [order[rank * chunk : (rank + 1) * chunk] for rank in range(ranks)]
    return [
        [row for rows in chunks for row in rows[start : start + share]]
        for start in range(0, chunk, share)
    ]


def test_worked_order_at_two_ranks() -> None:
    # Three groups of two, shuffled; steps of one group, each rank gives one row to each step.
    ids = torch.tensor([7, 3, 9, 3, 9, 7])
    order = whole_group_order(ids, batch_size=2, ranks=2).tolist()
    assert order == [0, 1, 2, 5, 3, 4]
    assert host_steps(order, 2, 2) == [[0, 5], [1, 3], [2, 4]]


@st.composite
def rollouts(draw: st.DrawFn) -> tuple[list[int], int, int, int]:
    size = draw(st.sampled_from([2, 3, 4, 6]))
    per_step = draw(st.integers(1, 4))
    steps = draw(st.integers(1, 4))
    ranks = draw(st.sampled_from([r for r in range(1, 9) if (per_step * size) % r == 0]))
    ids = draw(st.permutations(list(range(per_step * steps)) * size))
    return ids, size, per_step * size, ranks


@given(rollouts())
def test_every_optimizer_step_holds_whole_groups(case: tuple[list[int], int, int, int]) -> None:
    ids, size, batch_size, ranks = case
    order = whole_group_order(torch.tensor(ids), batch_size, ranks).tolist()
    assert sorted(order) == list(range(len(ids)))
    for rows in host_steps(order, batch_size, ranks):
        assert set(Counter(ids[row] for row in rows).values()) == {size}


@given(rollouts())
def test_the_steps_do_not_depend_on_the_ranks(case: tuple[list[int], int, int, int]) -> None:
    ids, _, batch_size, ranks = case
    split = whole_group_order(torch.tensor(ids), batch_size, ranks).tolist()
    whole = whole_group_order(torch.tensor(ids), batch_size, 1).tolist()
    assert host_steps(split, batch_size, ranks) == host_steps(whole, batch_size, 1)


@pytest.mark.parametrize(
    ("ids", "batch_size", "ranks", "message"),
    [
        ([0, 0, 1, 1, 1], 5, 1, r"same size, got sizes \[2, 3\]"),
        ([0, 0, 1, 1], 3, 1, "group size must divide the optimizer step's batch size, got 2 and 3"),
        ([0, 0, 1, 1, 2, 2], 4, 1, "batch size must divide the rollout's size, got 4 and 6"),
        ([0, 0, 1, 1], 2, 4, "data-parallel size must divide .* batch size, got 4 and 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    ids: list[int], batch_size: int, ranks: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        whole_group_order(torch.tensor(ids), batch_size, ranks)
