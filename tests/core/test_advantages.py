"""Advantage estimators: worked numbers, and exactly no signal where rewards are equal."""

import pytest
import torch

from nemo_apo.core.advantages import ADVANTAGES, group_advantages
from nemo_apo.core.groups import Groups

# Group 0: rewards 1, 0, 0, 0 (mean 1/4, population std sqrt(3)/4). Group 1: rewards 2, 5.
IDS = torch.tensor([0, 1, 0, 0, 1, 0])
REWARDS = torch.tensor([1.0, 2.0, 0.0, 0.0, 5.0, 0.0])
WORKED = {
    # 0.75 / (0.4330127018922193 + 1e-6); with the sample std it would be 1.5.
    "zscore": [
        1.732046807578,
        -0.999999333334,
        -0.577348935859,
        -0.577348935859,
        0.999999333334,
        -0.577348935859,
    ],
    "centered": [0.75, -1.5, -0.25, -0.25, 1.5, -0.25],
    # Against the mean of the others: 1 - 0, 2 - 5, 0 - 1/3, ...
    "rloo": [1.0, -3.0, -1.0 / 3.0, -1.0 / 3.0, 3.0, -1.0 / 3.0],
    "raw": [1.0, 2.0, 0.0, 0.0, 5.0, 0.0],
}


@pytest.mark.parametrize("estimator", WORKED)
def test_worked_numbers(estimator: str) -> None:
    advantages_N = group_advantages(REWARDS, Groups.from_ids(IDS), estimator)
    assert advantages_N.dtype == torch.float64
    assert advantages_N.tolist() == pytest.approx(WORKED[estimator], rel=1e-11)


def test_every_estimator_is_worked() -> None:
    assert set(WORKED) == set(ADVANTAGES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reward", [0.7, 1.0 / 3.0])
@pytest.mark.parametrize("estimator", ["zscore", "centered", "rloo"])
def test_equal_rewards_give_exactly_zero(estimator: str, reward: float, dtype: torch.dtype) -> None:
    # Their floating-point mean is off by 1e-16, which z-scoring would blow up to order 1.
    groups = Groups.from_ids(torch.tensor([0] * 64 + [1] * 3))
    rewards_N = torch.tensor([reward] * 64 + [0.0, 1.0, 1.0], dtype=dtype)
    advantages_N = group_advantages(rewards_N, groups, estimator)
    assert not advantages_N[:64].any()
    assert advantages_N[64:].all()


def test_raw_keeps_equal_rewards() -> None:
    rewards_N = torch.full((64,), 0.7, dtype=torch.float64)
    groups = Groups.from_ids(torch.zeros(64, dtype=torch.int64))
    assert torch.equal(group_advantages(rewards_N, groups, "raw"), rewards_N)


def test_a_group_of_one_has_no_advantage() -> None:
    groups = Groups.from_ids(torch.tensor([0]))
    for estimator in ("zscore", "centered", "rloo"):
        assert group_advantages(torch.tensor([0.3]), groups, estimator).tolist() == [0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("estimator", sorted(ADVANTAGES))
def test_a_reward_that_is_not_finite_is_refused(estimator: str, bad: float) -> None:
    with pytest.raises(ValueError, match="rewards must be finite"):
        group_advantages(torch.tensor([0.0, bad]), Groups.from_ids(torch.tensor([0, 0])), estimator)


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown advantage estimator 'median'"):
        group_advantages(torch.zeros(2), Groups.from_ids(torch.tensor([0, 0])), "median")
