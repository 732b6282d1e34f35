"""Segment operations against loops over the groups."""

import math

import pytest
import torch

from nemo_apo.core.groups import Groups, as_float64

IDS = [9, 2, 9, 5, 2, 9]
VALUES = [0.5, -1.0, 3.0, 7.0, 2.0, -4.0]
# Group ids in ascending order: 2 holds (-1, 2), 5 holds (7), 9 holds (0.5, 3, -4).


def ragged() -> tuple[Groups, torch.Tensor]:
    return Groups.from_ids(torch.tensor(IDS)), torch.tensor(VALUES, dtype=torch.float64)


def test_ids_in_any_order() -> None:
    groups, _ = ragged()
    assert groups.count == 3
    assert groups.ids_G.tolist() == [2, 5, 9]
    assert groups.sizes_G.tolist() == [2, 1, 3]
    assert groups.index_N.tolist() == [2, 0, 2, 1, 0, 2]


@pytest.mark.parametrize(
    "ids", [torch.tensor([0.0, 1.0]), torch.tensor([[0, 1]]), torch.tensor([0j, 1j])]
)
def test_ids_must_be_a_flat_integer_tensor(ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="one-dimensional integer tensor, got shape"):
        Groups.from_ids(ids)


def test_reductions_of_each_group() -> None:
    groups, values_N = ragged()
    assert groups.sum(values_N).tolist() == [1.0, 7.0, -0.5]
    assert groups.mean(values_N).tolist() == pytest.approx([0.5, 7.0, -1.0 / 6.0])
    assert groups.max(values_N).tolist() == [2.0, 7.0, 3.0]
    assert groups.min(values_N).tolist() == [-1.0, 7.0, -4.0]
    expected = [
        math.log(math.exp(-1.0) + math.exp(2.0)),
        7.0,
        math.log(math.exp(0.5) + math.exp(3.0) + math.exp(-4.0)),
    ]
    assert groups.logsumexp(values_N).tolist() == pytest.approx(expected)
    assert groups.spread(torch.tensor([1, 2, 3])).tolist() == [3, 1, 3, 2, 1, 3]


def test_extremes_of_negative_values_are_not_the_zero_they_start_from() -> None:
    groups = Groups.from_ids(torch.tensor([0, 0, 1]))
    values_N = torch.tensor([-3.0, -2.0, -5.0])
    assert groups.max(values_N).tolist() == [-2.0, -5.0]
    assert groups.min(-values_N).tolist() == [2.0, 5.0]


def test_log_softmax_within_each_group() -> None:
    groups, values_N = ragged()
    log_softmax_N = groups.log_softmax(values_N)
    for group in (2, 5, 9):
        rows = [i for i, own in enumerate(IDS) if own == group]
        norm = math.log(sum(math.exp(VALUES[i]) for i in rows))
        assert log_softmax_N[rows].tolist() == pytest.approx([VALUES[i] - norm for i in rows])


def test_log_softmax_and_logsumexp_do_not_overflow() -> None:
    groups = Groups.from_ids(torch.tensor([0, 0, 1, 1]))
    values_N = torch.tensor([1e4, -1e4, -1e4, -1e4], dtype=torch.float64)
    assert groups.log_softmax(values_N).tolist() == [0.0, -2e4, -math.log(2.0), -math.log(2.0)]
    assert groups.logsumexp(values_N).tolist() == [1e4, -1e4 + math.log(2.0)]


def test_pad_keeps_the_order_and_flatten_undoes_it() -> None:
    groups, values_N = ragged()
    padded_GP = groups.pad(values_N, -9.0)
    assert padded_GP.tolist() == [[-1.0, 2.0, -9.0], [7.0, -9.0, -9.0], [0.5, 3.0, -4.0]]
    assert groups.flatten(padded_GP).tolist() == VALUES


@pytest.mark.parametrize("value", [0.7, 1.0 / 3.0, 0.1])
def test_equal_values_are_found_by_comparison(value: float) -> None:
    groups = Groups.from_ids(torch.tensor([0] * 64 + [1] * 64))
    values_N = torch.full((128,), value, dtype=torch.float64)
    values_N[100] += 1e-12
    assert groups.all_equal(values_N).tolist() == [True, False]


def test_group_arithmetic_is_float64_and_detached() -> None:
    values_N = as_float64(torch.ones(2, dtype=torch.bfloat16, requires_grad=True))
    assert values_N.dtype == torch.float64
    assert not values_N.requires_grad
