"""The importance-ratio baselines: worked numbers, clips, published defaults."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from nemo_apo.core.objectives import (
    OBJECTIVES,
    Cispo,
    ClippedRatio,
    Columns,
    Gspo,
    Regularizers,
    Sapo,
    TokenInputs,
)

from .toy_policy import cut, group_batch, hand_batch, make_rollout, split_loss, token_inputs

RATIO = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo")
# One completion with A = 2 and one with A = -1, two tokens each, weights 0.5 and 0.25.
RATIOS = [[1.5, 0.9], [1.1, 0.5]]
COLUMNS = Columns(
    coefficient_N=torch.zeros(2, dtype=torch.float64),
    advantage_N=torch.tensor([2.0, -1.0], dtype=torch.float64),
    token_weight_N=torch.tensor([0.5, 0.25], dtype=torch.float64),
)


def inputs_of(ratios: list[list[float]]) -> TokenInputs:
    logprobs_BT = torch.tensor(ratios, dtype=torch.float64).log().requires_grad_()
    return TokenInputs(
        logprobs_BT=logprobs_BT,
        old_logprobs_BT=torch.zeros_like(logprobs_BT),
        mask_BT=torch.ones_like(logprobs_BT, dtype=torch.bool),
    )


def loss_and_slopes(objective: Any) -> tuple[float, list[list[float]]]:
    inputs = inputs_of(RATIOS)
    loss = objective.token_loss(inputs, COLUMNS)
    return float(loss.detach()), torch.autograd.grad(loss, inputs.logprobs_BT)[0].tolist()


def assert_matrix(actual: list[list[float]], expected: list[list[float]]) -> None:
    for row, wanted in zip(actual, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-12)


def test_clipped_ratio_worked_numbers() -> None:
    # min(r A, clip(r) A): 2 * 1.2 (clipped), 2 * 0.9; -1.1, -0.8 (clipped).
    loss, slopes = loss_and_slopes(ClippedRatio())
    assert loss == pytest.approx(-(0.5 * (2.4 + 1.8) + 0.25 * (-1.1 - 0.8)))
    assert_matrix(slopes, [[0.0, -0.9], [0.275, 0.0]])


def test_clip_bounds_are_separate() -> None:
    objective = ClippedRatio(clip_low=0.6, clip_high=0.28)
    loss, slopes = loss_and_slopes(objective)
    assert loss == pytest.approx(-(0.5 * (2.56 + 1.8) + 0.25 * (-1.1 - 0.5)))
    assert_matrix(slopes, [[0.0, -0.9], [0.275, 0.125]])
    assert int(objective.clipped_tokens(inputs_of(RATIOS), COLUMNS)) == 1


def test_cispo_clips_the_weight_and_keeps_the_gradient() -> None:
    # Slope -w clip(r) A: the clipped tokens keep theirs.
    _, slopes = loss_and_slopes(Cispo(clip_low=0.3, clip_high=0.2))
    assert_matrix(slopes, [[-1.2, -0.9], [0.275, 0.175]])
    _, slopes = loss_and_slopes(Cispo(clip_low=None, clip_high=0.2))
    assert_matrix(slopes, [[-1.2, -0.9], [0.275, 0.125]])


def test_sapo_worked_numbers() -> None:
    # (4 / t) sigmoid(t (r - 1)) A with t = 2 for A > 0 and t = 1 otherwise.
    def gate(r: float, t: float) -> float:
        return 4.0 / t / (1.0 + math.exp(-t * (r - 1.0)))

    loss, _ = loss_and_slopes(Sapo(gate_positive=2.0, gate_negative=1.0))
    expected = -0.5 * 2.0 * (gate(1.5, 2.0) + gate(0.9, 2.0)) + 0.25 * (gate(1.1, 1) + gate(0.5, 1))
    assert loss == pytest.approx(expected, rel=1e-12)
    assert int(Sapo().clipped_tokens(inputs_of(RATIOS), COLUMNS)) == 0


def test_gspo_worked_numbers() -> None:
    # s = exp((l - l_old) / T) = 1.02, 1.1 (clipped), 0.9, 0.9 (clipped); weights 1 / (2 * T).
    lengths, ratios = [4, 2, 5, 1], [1.02, 1.1, 0.9, 0.9]
    old = [-t * math.log(s) for t, s in zip(lengths, ratios, strict=True)]
    batch = hand_batch([0, 0, 1, 1], [1.0, 2.0, 1.5, -1.0], lengths=lengths, old=old)
    weighing = Gspo().weigh(batch, 0.5)
    expected = [-1.0 * 1.02 / 16, 0.0, -1.5 * 0.9 / 20, 0.0]
    assert weighing.columns.coefficient_N.tolist() == pytest.approx(expected, rel=1e-12)
    assert weighing.clipped_N.tolist() == [False, True, False, True]
    gains = (1.02 + 2.0 * 1.04) / 2, (1.5 * 0.9 - 0.97) / 2
    assert float(weighing.value) == pytest.approx(-sum(gains) / 2, rel=1e-12)


def test_clipped_tokens_are_those_without_gradient() -> None:
    rollout = make_rollout()
    for name in ("grpo", "dr_grpo", "dapo"):
        objective = OBJECTIVES[name]
        columns = objective.weigh(group_batch(rollout, objective), 0.5).columns
        inputs = token_inputs(rollout, torch.arange(rollout.size))
        logprobs_BT = inputs.logprobs_BT.detach().requires_grad_()
        inputs = replace(inputs, logprobs_BT=logprobs_BT)
        slopes_BT = torch.autograd.grad(objective.token_loss(inputs, columns), logprobs_BT)[0]
        has_signal_B1 = (columns.advantage_N != 0.0).unsqueeze(1)
        flat = (slopes_BT == 0.0) & inputs.mask_BT & has_signal_B1
        assert 0 < int(flat.sum()) == int(objective.clipped_tokens(inputs, columns))


def test_cispo_counts_the_tokens_at_its_bounds() -> None:
    inputs = replace(inputs_of(RATIOS), mask_BT=torch.tensor([[True, True], [True, False]]))
    assert int(Cispo(clip_low=0.3, clip_high=0.2).clipped_tokens(inputs, COLUMNS)) == 1
    assert int(Cispo(clip_low=0.05, clip_high=0.05).clipped_tokens(inputs, COLUMNS)) == 3
    assert int(Cispo(clip_low=None, clip_high=9.0).clipped_tokens(inputs, COLUMNS)) == 0


@pytest.mark.parametrize("name", RATIO)
@pytest.mark.parametrize("reward", [0.7, 1.0 / 3.0])
def test_a_group_of_equal_rewards_has_exactly_no_gradient(name: str, reward: float) -> None:
    objective, rollout = OBJECTIVES[name], make_rollout()
    equal_N = rollout.group_ids_N == 7
    rollout = replace(rollout, rewards_N=torch.where(equal_N, reward, rollout.rewards_N))
    columns = objective.weigh(group_batch(rollout, objective), 0.5).columns
    micro_batches = cut(torch.arange(rollout.size), 4)
    _, grad = split_loss(rollout, objective, Regularizers(), columns, micro_batches)
    assert not grad[equal_N].any()
    assert grad[~equal_N].any()
    assert not columns.coefficient_N[equal_N].any()


def test_published_defaults() -> None:
    fields = {
        name: (objective.advantages, getattr(objective, "aggregation", None))
        for name, objective in OBJECTIVES.items()
        if name in RATIO
    }
    assert fields == {
        "grpo": ("zscore", "sequence_mean"),
        "dr_grpo": ("centered", "constant"),
        "dapo": ("zscore", "group_token_mean"),
        "gspo": ("zscore", None),
        "cispo": ("zscore", "group_token_mean"),
        "sapo": ("zscore", "sequence_mean"),
    }
    assert (OBJECTIVES["grpo"].clip_low, OBJECTIVES["grpo"].clip_high) == (0.2, 0.2)
    assert (OBJECTIVES["dapo"].clip_low, OBJECTIVES["dapo"].clip_high) == (0.2, 0.28)
    assert OBJECTIVES["cispo"].clip_low is None
    assert (OBJECTIVES["sapo"].gate_positive, OBJECTIVES["sapo"].gate_negative) == (1.0, 1.05)


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        (ClippedRatio, "clip_low", 1.0),
        (ClippedRatio, "clip_low", -0.1),
        (ClippedRatio, "clip_high", 0.0),
        (ClippedRatio, "aggregation", "token_mean"),
        (ClippedRatio, "advantages", "median"),
        (Cispo, "clip_low", 1.5),
        (Cispo, "clip_high", float("inf")),
        (Sapo, "gate_positive", 0.0),
        (Sapo, "gate_negative", -1.0),
        (Gspo, "clip_low", float("nan")),
        (Gspo, "advantages", "median"),
    ],
)
def test_bad_fields_name_key_and_value(kind: type, key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"objective\.{key} must .*{value}"):
        kind(**{key: value})
