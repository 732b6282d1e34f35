"""APO: worked coefficients, its limits, groups without signal."""

import math
from dataclasses import replace

import pytest
import torch

from nemo_apo.core.objectives import Apo

from .toy_policy import hand_batch, on_anchor, random_batch

# With beta = 1/2, A = (log 4, 0) / 2 makes q = (0.8, 0.2).
BETA = 0.5
ADVANTAGES = (0.5 * math.log(4.0), 0.0)
APO = Apo(advantages="centered", beta_r=BETA)


@pytest.mark.parametrize(
    ("alpha", "slope"),
    [(0.0, -math.log(2.0) / 2), (0.5, -(math.sqrt(0.4) - math.sqrt(0.1))), (1.0, -0.3)],
)
def test_worked_coefficients_on_the_anchor(alpha: float, slope: float) -> None:
    # One of two groups has signal: dD/du over tau = 0.8 and two groups.
    batch = hand_batch([0, 0, 1, 1], [*ADVANTAGES, 0.0, 0.0])
    columns = APO.weigh(batch, alpha).columns
    expected = [slope / 1.6, -slope / 1.6, 0.0, 0.0]
    assert columns.coefficient_N.tolist() == pytest.approx(expected, abs=1e-16)


@pytest.mark.parametrize(("alpha", "slope"), [(0.0, 0.1875 * math.log(0.75)), (1.0, 0.75 - 0.8)])
def test_worked_coefficients_off_the_anchor(alpha: float, slope: float) -> None:
    # p = (3/4, 1/4); at alpha = 0, dKL(p||q)/du_1 = p_1 p_2 log(p_1 q_2 / (q_1 p_2)).
    batch = hand_batch([0, 0], ADVANTAGES, u=[math.log(3.0), 0.0])
    coefficient_N = APO.weigh(batch, alpha).columns.coefficient_N
    assert coefficient_N.tolist() == pytest.approx([slope / 0.8, -slope / 0.8])


def test_mean_log_probs_divide_by_each_length() -> None:
    batch = hand_batch([0, 0], ADVANTAGES, lengths=[4, 2])
    coefficient_N = replace(APO, logprob_reduction="mean").weigh(batch, 1.0).columns.coefficient_N
    assert coefficient_N.tolist() == pytest.approx([-0.3 / 0.8 / 4, 0.3 / 0.8 / 2])


def test_value_is_the_mean_over_groups() -> None:
    batch = hand_batch([0, 0, 1, 1], [*ADVANTAGES, 0.0, 0.0])
    weighing = APO.weigh(batch, 0.0)
    assert float(weighing.value) == pytest.approx(math.log(1.25) / 2)
    assert weighing.log_ratio_N.tolist() == pytest.approx(
        [math.log(1.6), math.log(0.4), 0.0, 0.0], abs=1e-15
    )
    assert weighing.clipped_N is None


def test_reinforce_limit_on_the_anchor() -> None:
    # c_i = -(log q_i - mean log q) / (tau G P) = -(A_i - mean A) / (beta tau G P) at alpha = 0.
    batch = on_anchor(random_batch(seed=0))
    coefficient_N = APO.weigh(batch, 0.0).columns.coefficient_N
    for g, size in enumerate((3, 2, 4)):
        a = batch.advantages_N[batch.groups.index_N == g]
        expected = -(a - a.mean()) / (BETA * 0.8 * 3 * size)
        actual = coefficient_N[batch.groups.index_N == g]
        assert torch.allclose(actual, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9, 1.0])
def test_on_the_anchor_alpha_only_rescales_the_target(alpha: float) -> None:
    # c_i proportional to q_i^alpha - mean q^alpha, descending on the preferred completions.
    batch = on_anchor(random_batch(seed=1))
    coefficient_N = APO.weigh(batch, alpha).columns.coefficient_N
    for g in range(3):
        rows = batch.groups.index_N == g
        power = torch.softmax(batch.advantages_N[rows] / BETA, dim=0) ** alpha
        ratio = coefficient_N[rows] / (power - power.mean())
        assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-10)
        assert ratio[0] < 0.0


@pytest.mark.parametrize("alpha", [0.0, 0.35, 0.9, 1.0])
def test_with_binary_rewards_alpha_does_not_turn_the_gradient(alpha: float) -> None:
    advantages = [0.75, -0.25, -0.25, -0.25]
    coefficient_N = APO.weigh(hand_batch([0] * 4, advantages), alpha).columns.coefficient_N
    assert (coefficient_N / coefficient_N[0]).tolist() == pytest.approx([1.0, *[-1.0 / 3.0] * 3])


@pytest.mark.parametrize("alpha", [0.0, 0.35, 0.9, 1.0])
def test_no_signal_on_the_anchor_is_exactly_zero(alpha: float) -> None:
    for size in (2, 3, 7, 64):
        columns = APO.weigh(hand_batch([0] * size, [0.0] * size), alpha).columns
        assert columns.coefficient_N.abs().max() <= 1e-17


@pytest.mark.parametrize("alpha", [0.0, 0.35, 0.9, 1.0])
def test_no_signal_off_the_anchor_pulls_back(alpha: float) -> None:
    coefficient_N = APO.weigh(
        hand_batch([0, 0], [0.0, 0.0], u=[1.0, -1.0]), alpha
    ).columns.coefficient_N
    assert coefficient_N[0] > 0.0 > coefficient_N[1]


def test_drop_takes_the_group_out_of_sum_divisor_and_value() -> None:
    batch = hand_batch([0, 0, 1, 1], [*ADVANTAGES, 0.0, 0.0], u=[0.0, 0.0, 1.0, -1.0])
    weighing = replace(APO, no_signal="drop").weigh(batch, 1.0)
    assert weighing.columns.coefficient_N.tolist() == pytest.approx([-0.375, 0.375, 0.0, 0.0])
    assert float(weighing.value) == pytest.approx(0.8 * math.log(1.6) + 0.2 * math.log(0.4))


def test_dropping_every_group_leaves_zero_not_nan() -> None:
    weighing = replace(APO, no_signal="drop").weigh(
        hand_batch([0, 0], [0.0, 0.0], u=[1.0, -1.0]), 0.5
    )
    assert weighing.columns.coefficient_N.tolist() == [0.0, 0.0]
    assert float(weighing.value) == 0.0


def test_ratio_clip_bounds_the_coefficients_and_reports_its_share() -> None:
    batch = hand_batch([0, 0, 0], [0.0, 1.0, 2.0], u=[900.0, 0.0, -900.0])
    weighing = replace(APO, ratio_clip=5.0).weigh(batch, 0.0)
    # |t_i| <= 5 p_i, so |dD/du_i| <= 10; log q - log p is (-4.1, 897.9, 1799.9).
    assert weighing.columns.coefficient_N.abs().max() <= 10.0 / 0.8
    assert weighing.clipped_N.tolist() == [False, True, True]
    assert replace(APO, ratio_clip=4.0).weigh(batch, 0.0).clipped_N.tolist() == [True] * 3
    assert APO.weigh(batch, 0.0).columns.coefficient_N.isfinite().all()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("advantages", "median"),
        ("beta_r", 0.0),
        ("beta_r", float("inf")),
        ("logprob_reduction", "max"),
        ("ratio_clip", -1.0),
        ("no_signal", "keep"),
        ("refresh", "never"),
    ],
)
def test_bad_fields_name_key_and_value(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"objective\.{key} must be .*{value}"):
        Apo(**{key: value})
