"""The importance correction scales the gradient of each token, and nothing else."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nemo_apo.core.importance import importance_ratios, truncated, with_scaled_gradient
from nemo_apo.core.objectives import OBJECTIVES, Columns, Objective

from .toy_policy import Rollout, cut, group_batch, make_rollout, token_inputs
from .whole_batch import completions_by_prompt, whole_batch_loss

CAP = 2.0


def noisy_ratios(rollout: Rollout) -> Tensor:
    """exp(old - sampler) of a sampler that is off by a third of a nat, more on some tokens."""
    random = torch.Generator().manual_seed(8)
    gap_NT = torch.randn(rollout.mask_NT.shape, generator=random, dtype=torch.float64) / 3.0
    gap_NT[::3, ::2] += 1.0
    old_NT = rollout.logprobs(rollout.old_logits_NTV)
    return importance_ratios(old_NT, old_NT - gap_NT, rollout.mask_NT)


def corrected_loss(
    rollout: Rollout,
    objective: Objective,
    columns: Columns,
    weights_NT: Tensor,
    micro_batches: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Sum of the micro-batch losses with the correction, and its gradient in the logits."""
    total = torch.zeros((), dtype=torch.float64)
    grad_NTV = torch.zeros_like(rollout.logits_NTV)
    for rows in micro_batches:
        inputs = token_inputs(rollout, rows)
        scaled_BT = with_scaled_gradient(inputs.logprobs_BT, weights_NT[rows])
        loss = objective.token_loss(replace(inputs, logprobs_BT=scaled_BT), columns.select(rows))
        grad_NTV += torch.autograd.grad(loss, rollout.logits_NTV)[0]
        total += loss.detach()
    return total, grad_NTV


def test_weights_by_hand() -> None:
    old = torch.tensor([[-1.0, -2.0, -0.5, math.nan, -1.0]], dtype=torch.float64)
    sampler = torch.tensor([[-1.0, -1.0, -3.0, -1.0, -math.inf]])
    mask = torch.tensor([[True, True, True, False, True]])
    ratios = importance_ratios(old, sampler, mask)
    expected = [[1.0, math.exp(-1.0), math.exp(2.5), 1.0, math.inf]]
    torch.testing.assert_close(ratios, torch.tensor(expected, dtype=torch.float64))
    assert ratios.dtype == torch.float64
    capped = [[1.0, math.exp(-1.0), 2.0, 1.0, 2.0]]
    torch.testing.assert_close(truncated(ratios, 2.0), torch.tensor(capped, dtype=torch.float64))


def test_a_log_prob_that_is_no_number_is_not_hidden() -> None:
    old = torch.tensor([[-1.0, math.nan]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    weights = truncated(importance_ratios(old, torch.tensor([[math.nan, -1.0]]), mask), 2.0)
    assert weights.isnan().all()
    assert with_scaled_gradient(torch.zeros(1, 2), weights).isnan().all()


def test_the_gradient_of_a_shared_parameter_by_hand() -> None:
    """Two answers of a group of two tokens each: sum_i c_i sum_t w_it grad log pi_it."""
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    slopes = torch.tensor([[1.0, -2.0], [0.5, 4.0]], dtype=torch.float64)
    weights = torch.tensor([[0.5, 2.0], [1.0, 0.25]], dtype=torch.float64)
    coefficients = torch.tensor([0.75, -0.4], dtype=torch.float64)
    scaled = with_scaled_gradient(slopes * theta, weights)
    (gradient,) = torch.autograd.grad((coefficients * scaled.sum(dim=1)).sum(), theta)
    # 0.75 (0.5 x 1 - 2 x 2) - 0.4 (1 x 0.5 + 0.25 x 4)
    assert float(gradient) == pytest.approx(0.75 * -3.5 - 0.4 * 1.5, abs=1e-15)


def test_the_weight_itself_is_not_differentiated() -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    weights = torch.tensor([0.5, 2.0], requires_grad=True)
    scaled = with_scaled_gradient(logprobs, weights)
    (gradient,) = torch.autograd.grad(scaled.sum(), logprobs)
    assert gradient.tolist() == [0.5, 2.0]
    scaled = with_scaled_gradient(logprobs, weights)
    assert torch.autograd.grad(scaled.sum(), weights, allow_unused=True) == (None,)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_tokens_gradient_of_the_whole_loss_is_scaled(name: str) -> None:
    """Every token has logits of its own: theirs is the whole-batch gradient times w."""
    objective, rollout = OBJECTIVES[name], make_rollout()
    ratios_NT = noisy_ratios(rollout)
    weights_NT = ratios_NT.clamp(max=CAP)
    inside = ratios_NT[rollout.mask_NT]
    assert 0 < int((inside > CAP).sum()) < inside.numel(), "the example caps nothing, or all"
    columns = objective.weigh(group_batch(rollout, objective), 0.6).columns
    rows = torch.arange(rollout.size)
    total, grad = corrected_loss(
        rollout, objective, columns, truncated(ratios_NT, CAP), cut(rows, 3)
    )

    whole = whole_batch_loss(completions_by_prompt(rollout), objective, 0.6)
    (plain,) = torch.autograd.grad(whole, rollout.logits_NTV)
    expected = plain * weights_NT.unsqueeze(-1)
    scale = float(expected.abs().max())
    assert scale > 1e-6
    assert float((expected - plain).abs().max()) > 0.1 * scale, "the weights do not matter"
    assert float((grad - expected).abs().max()) < 1e-10 * scale

    # The value is that of the uncorrected loss, and the cut does not matter.
    inputs = token_inputs(rollout, rows)
    plain_total = objective.token_loss(inputs, columns).detach()
    assert abs(float(total - plain_total)) < 1e-12
    for order in (rows, rows.flip(0)):
        for size in (1, 2, rollout.size):
            _, again = corrected_loss(rollout, objective, columns, weights_NT, cut(order, size))
            assert float((again - grad).abs().max()) < 1e-12 * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_weights_of_one_keep_value_and_gradient_to_the_last_bit(
    name: str, dtype: torch.dtype
) -> None:
    objective, rollout = OBJECTIVES[name], make_rollout()
    columns = objective.weigh(group_batch(rollout, objective), 0.6).columns
    inputs = token_inputs(rollout, torch.arange(rollout.size))
    logprobs = inputs.logprobs_BT.detach().to(dtype).requires_grad_()
    inputs = replace(
        inputs, logprobs_BT=logprobs, old_logprobs_BT=inputs.old_logprobs_BT.detach().to(dtype)
    )
    scaled = with_scaled_gradient(logprobs, torch.ones_like(logprobs))
    assert torch.equal(scaled, logprobs)
    plain, corrected = (
        objective.token_loss(each, columns)
        for each in (inputs, replace(inputs, logprobs_BT=scaled))
    )
    assert torch.equal(plain, corrected)
    gradients = [torch.autograd.grad(loss, logprobs)[0] for loss in (plain, corrected)]
    assert torch.equal(*gradients)
