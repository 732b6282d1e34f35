"""KL penalty and entropy bonus."""

import math

import pytest
import torch

from nemo_apo.core.objectives import Columns, Regularizers, TokenInputs
from nemo_apo.core.objectives.regularizers import k2, k3

COLUMNS = Columns(
    coefficient_N=torch.zeros(2, dtype=torch.float64),
    advantage_N=torch.zeros(2, dtype=torch.float64),
    token_weight_N=torch.tensor([0.5, 0.25], dtype=torch.float64),
)


def inputs_of(delta: list[list[float]]) -> TokenInputs:
    delta_BT = torch.tensor(delta, dtype=torch.float64)
    return TokenInputs(
        logprobs_BT=(delta_BT - 1.0).requires_grad_(),
        old_logprobs_BT=torch.zeros_like(delta_BT),
        mask_BT=torch.tensor([[True, True], [True, False]]),
        reference_logprobs_BT=torch.full_like(delta_BT, -1.0),
        entropy_BT=torch.full_like(delta_BT, 0.8).requires_grad_(),
    )


def test_estimators_worked_numbers() -> None:
    delta = torch.tensor([0.0, math.log(2.0), -math.log(2.0)], dtype=torch.float64)
    half_square = math.log(2.0) ** 2 / 2.0
    assert k2(delta).tolist() == pytest.approx([0.0, half_square, half_square])
    assert k3(delta).tolist() == pytest.approx([0.0, math.log(2.0) - 0.5, 1.0 - math.log(2.0)])


def test_k3_is_accurate_next_to_zero() -> None:
    # exp(-d) - 1 + d taken literally has no digit left at 1e-8.
    assert float(k3(torch.tensor(1e-8, dtype=torch.float64))) == pytest.approx(
        5e-17, rel=1e-6, abs=0.0
    )


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_loss_and_slopes(estimator: str) -> None:
    # dk2/dd = d, dk3/dd = 1 - exp(-d); the bonus has slope -coef w in the entropy.
    inputs = inputs_of([[1.0, -1.0], [0.5, 9.0]])
    terms = Regularizers(kl_coef=0.1, kl_estimator=estimator, entropy_coef=0.2)
    loss = terms.token_loss(inputs, COLUMNS)
    value = {"k2": lambda d: d * d / 2, "k3": lambda d: math.exp(-d) - 1 + d}[estimator]
    slope = {"k2": lambda d: d, "k3": lambda d: 1 - math.exp(-d)}[estimator]
    penalty = 0.5 * (value(1.0) + value(-1.0)) + 0.25 * value(0.5)
    assert float(loss.detach()) == pytest.approx(0.1 * penalty - 0.2 * 0.8 * 1.25)
    by_logprob, by_entropy = torch.autograd.grad(loss, (inputs.logprobs_BT, inputs.entropy_BT))
    expected = [0.05 * slope(1.0), 0.05 * slope(-1.0), 0.025 * slope(0.5), 0.0]
    assert by_logprob.flatten().tolist() == pytest.approx(expected)
    assert by_entropy.flatten().tolist() == pytest.approx([-0.1, -0.1, -0.05, 0.0])


def test_k1_is_never_in_the_loss() -> None:
    terms = Regularizers(kl_coef=0.5, kl_estimator="k1")
    assert float(terms.token_loss(inputs_of([[1.0, 2.0], [3.0, 4.0]]), COLUMNS)) == 0.0
    assert terms.needs_reference
    assert not terms.needs_reference_in_loss


def test_penalised_rewards() -> None:
    rewards, own, reference = (torch.tensor(x) for x in ([1.0, 0.0], [-3.0, -2.0], [-5.0, -1.0]))
    k1 = Regularizers(kl_coef=0.1, kl_estimator="k1")
    assert k1.penalised_rewards(rewards, own, reference).tolist() == pytest.approx([0.8, 0.1])
    for off in (Regularizers(kl_coef=0.1), Regularizers(kl_estimator="k1")):
        assert off.penalised_rewards(rewards, own, reference).tolist() == [1.0, 0.0]


def test_nothing_is_asked_for_that_is_not_used() -> None:
    off = Regularizers()
    assert not (off.needs_reference)
    assert not (off.needs_reference_in_loss)
    assert not off.needs_entropy
    assert Regularizers(kl_coef=0.1).needs_reference_in_loss
    assert Regularizers(entropy_coef=0.1).needs_entropy
    bare = TokenInputs(torch.zeros(2, 2), torch.zeros(2, 2), torch.ones(2, 2))
    assert float(off.token_loss(bare, COLUMNS)) == 0.0


@pytest.mark.parametrize(
    ("key", "value"),
    [("kl_coef", -0.1), ("entropy_coef", float("nan")), ("kl_estimator", "k4")],
)
def test_bad_fields_name_key_and_value(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"regularizers\.{key} must be .*{value}"):
        Regularizers(**{key: value})
