"""Every objective, split over micro-batches, has the gradient of its whole-batch loss."""

from dataclasses import replace

import pytest
import torch

from nemo_apo.core.objectives import OBJECTIVES, Objective, Regularizers

from .toy_policy import cut, group_batch, make_rollout, split_loss
from .whole_batch import completions_by_prompt, regularizer_loss, whole_batch_loss

ANCHORED = ("apo", "adpo_softmax", "adpo_plackett_luce", "adpo_pairwise")
TOKEN_RATIO = ("grpo", "dr_grpo", "dapo", "cispo", "sapo")
AGGREGATIONS = ("sequence_mean", "group_token_mean", "batch_token_mean", "constant")
# What the papers prescribe for the regularizers' token weights; anchored losses and GSPO are means
# over sequences.
PAPER_AGGREGATION = {
    **dict.fromkeys((*ANCHORED, "gspo", "grpo", "sapo"), "sequence_mean"),
    "dr_grpo": "constant",
    "dapo": "group_token_mean",
    "cispo": "group_token_mean",
}
NO_REGULARIZERS = Regularizers()


def variants() -> dict[str, tuple[Objective, float]]:
    """Objectives with an alpha, by a readable id."""
    cases: dict[str, tuple[Objective, float]] = {
        f"{name} as published": (objective, 0.6) for name, objective in OBJECTIVES.items()
    }
    for name in ANCHORED:
        for reduction in ("sum", "mean"):
            for no_signal in ("anchor", "drop"):
                objective = replace(
                    OBJECTIVES[name], logprob_reduction=reduction, no_signal=no_signal
                )
                for alpha in (0.0, 0.35, 0.9, 1.0) if name == "apo" else (0.6,):
                    cases[f"{name} {reduction} {no_signal} {alpha}"] = (objective, alpha)
    for name in TOKEN_RATIO:
        for aggregation in AGGREGATIONS:
            objective = replace(OBJECTIVES[name], aggregation=aggregation)
            cases[f"{name} {aggregation}"] = (objective, 0.6)
    for estimator in ("centered", "rloo", "raw"):
        for name in ("apo", "grpo"):
            objective = replace(OBJECTIVES[name], advantages=estimator)
            cases[f"{name} {estimator}"] = (objective, 0.6)
    cases["apo wide target"] = (replace(OBJECTIVES["apo"], beta_r=1.7), 0.6)
    cases["cispo tight"] = (replace(OBJECTIVES["cispo"], clip_low=0.2, clip_high=0.3), 0.6)
    cases["gspo wide"] = (replace(OBJECTIVES["gspo"], clip_low=0.2, clip_high=0.3), 0.6)
    cases["sapo gates"] = (replace(OBJECTIVES["sapo"], gate_positive=3, gate_negative=0.5), 0.6)
    return cases


VARIANTS = variants()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    scale = expected.abs().max()
    assert scale > 1e-6, "an oracle without gradient proves nothing"
    return float((actual - expected).abs().max() / scale)


@pytest.mark.parametrize("case", VARIANTS)
def test_split_gradient_is_that_of_the_whole_loss(case: str) -> None:
    objective, alpha = VARIANTS[case]
    rollout = make_rollout()
    weighing = objective.weigh(group_batch(rollout, objective), alpha)
    micro_batches = cut(torch.arange(rollout.size), 3)
    total, grad = split_loss(rollout, objective, NO_REGULARIZERS, weighing.columns, micro_batches)

    whole = whole_batch_loss(completions_by_prompt(rollout), objective, alpha)
    expected = torch.autograd.grad(whole, rollout.logits_NTV)[0]
    assert relative_error(grad, expected) < 1e-10
    # Linear objectives know their value from scalars, token objectives as the sum of the parts.
    value = total if weighing.value is None else weighing.value
    assert abs(float(value - whole.detach())) < 1e-10


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_regularizers_add_their_whole_batch_gradient(name: str, estimator: str) -> None:
    objective, rollout = OBJECTIVES[name], make_rollout()
    regularizers = Regularizers(kl_coef=0.3, kl_estimator=estimator, entropy_coef=0.2)
    columns = objective.weigh(group_batch(rollout, objective), 0.6).columns
    _, grad = split_loss(
        rollout, objective, regularizers, columns, cut(torch.arange(rollout.size), 4)
    )

    prompts = completions_by_prompt(rollout)
    whole = whole_batch_loss(prompts, objective, 0.6)
    whole = whole + regularizer_loss(prompts, PAPER_AGGREGATION[name], 0.3, estimator, 0.2)
    assert relative_error(grad, torch.autograd.grad(whole, rollout.logits_NTV)[0]) < 1e-10


@pytest.mark.parametrize("name", OBJECTIVES)
def test_k1_enters_through_the_reward_only(name: str) -> None:
    objective, rollout = OBJECTIVES[name], make_rollout()
    regularizers = Regularizers(kl_coef=0.3, kl_estimator="k1")
    old_N = rollout.sums(rollout.old_logits_NTV)
    reference_N = rollout.sums(rollout.reference_logits_NTV)
    penalised = replace(
        rollout, rewards_N=regularizers.penalised_rewards(rollout.rewards_N, old_N, reference_N)
    )
    columns = objective.weigh(group_batch(penalised, objective), 0.6).columns
    _, grad = split_loss(
        penalised, objective, regularizers, columns, cut(torch.arange(rollout.size), 4)
    )

    rewards = [
        reward - 0.3 * (old - reference)
        for reward, old, reference in zip(
            rollout.rewards_N.tolist(), old_N.tolist(), reference_N.tolist(), strict=True
        )
    ]
    whole = whole_batch_loss(completions_by_prompt(rollout, rewards), objective, 0.6)
    assert relative_error(grad, torch.autograd.grad(whole, rollout.logits_NTV)[0]) < 1e-10


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_cut_and_the_order_do_not_matter(name: str) -> None:
    objective, rollout = OBJECTIVES[name], make_rollout()
    regularizers = Regularizers(kl_coef=0.3, entropy_coef=0.2)
    columns = objective.weigh(group_batch(rollout, objective), 0.6).columns
    rows = torch.arange(rollout.size)
    shuffled = torch.randperm(rollout.size, generator=torch.Generator().manual_seed(5))
    expected_loss, expected = split_loss(rollout, objective, regularizers, columns, [rows])
    largest = int(torch.unique(rollout.group_ids_N, return_counts=True)[1].max())
    for order in (rows, shuffled):
        for size in (1, 2, 3, largest, 2 * largest):
            loss, grad = split_loss(rollout, objective, regularizers, columns, cut(order, size))
            assert relative_error(grad, expected) < 1e-12, size
            assert abs(float(loss - expected_loss)) < 1e-12, size
