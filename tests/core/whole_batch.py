"""The objectives as their papers write them: one differentiable loss of the whole batch.

The oracle of the split: dense, loops over groups, float64, gradients by autograd. Nothing here
comes from ``nemo_apo``; of an objective only its hyperparameters are read.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .toy_policy import MAX_RESPONSE_LENGTH, Rollout, entropy

ZSCORE_EPS = 1e-6


@dataclass(frozen=True)
class Completion:
    """One completion; tensors over its own tokens only."""

    logprobs: Tensor
    old: Tensor
    anchor: Tensor
    reference: Tensor
    entropy: Tensor
    reward: float
    tau: float


Prompts = list[list[Completion]]


def completions_by_prompt(rollout: Rollout, rewards: list[float] | None = None) -> Prompts:
    """The rollout as a list of groups."""
    tables = (
        rollout.logprobs(rollout.logits_NTV),
        rollout.logprobs(rollout.old_logits_NTV),
        rollout.logprobs(rollout.anchor_logits_NTV),
        rollout.logprobs(rollout.reference_logits_NTV),
        entropy(rollout.logits_NTV),
    )
    rewards = rollout.rewards_N.tolist() if rewards is None else rewards
    prompts: dict[int, list[Completion]] = {}
    for i, prompt in enumerate(rollout.group_ids_N.tolist()):
        own = [table[i][rollout.mask_NT[i]] for table in tables]
        completion = Completion(*own, reward=rewards[i], tau=float(rollout.tau_N[i]))
        prompts.setdefault(prompt, []).append(completion)
    return list(prompts.values())


def advantages(rewards: list[float], estimator: str) -> list[float]:
    """Group-relative advantages of one group."""
    size, mean = len(rewards), math.fsum(rewards) / len(rewards)
    if estimator == "raw":
        return rewards
    if max(rewards) == min(rewards):
        return [0.0] * size
    if estimator == "centered":
        return [r - mean for r in rewards]
    if estimator == "rloo":
        return [r - (math.fsum(rewards) - r) / (size - 1) for r in rewards]
    assert estimator == "zscore"
    std = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / size)
    return [(r - mean) / (std + ZSCORE_EPS) for r in rewards]


def group_advantages(group: list[Completion], estimator: str) -> list[float]:
    return advantages([completion.reward for completion in group], estimator)


# Anchored objectives: a loss of u and A of one group.


def alpha_divergence(u: Tensor, target: list[float], alpha: float, beta_r: float) -> Tensor:
    q = torch.softmax(torch.tensor(target, dtype=torch.float64) / beta_r, dim=0)
    p = torch.softmax(u, dim=0)
    if alpha == 0.0:
        return (p * (p.log() - q.log())).sum()
    if alpha == 1.0:
        return (q * (q.log() - p.log())).sum()
    return (1.0 - (q**alpha * p ** (1.0 - alpha)).sum()) / (alpha * (1.0 - alpha))


def cross_entropy(u: Tensor, target: list[float], beta_r: float) -> Tensor:
    q = torch.softmax(torch.tensor(target, dtype=torch.float64) / beta_r, dim=0)
    return -(q * torch.log_softmax(u, dim=0)).sum()


def plackett_luce(u: Tensor, target: list[float]) -> Tensor:
    """Ties after Breslow: a block shares the risk set of all that stand in it or below."""
    loss = torch.zeros((), dtype=torch.float64)
    for level in sorted(set(target), reverse=True):
        block = [i for i, a in enumerate(target) if a == level]
        risk_set = [i for i, a in enumerate(target) if a <= level]
        for i in block:
            loss = loss - (u[i] - torch.log(sum(torch.exp(u[j]) for j in risk_set)))
    return loss / len(target)


def pairwise(u: Tensor, target: list[float]) -> Tensor:
    pairs = [(i, j) for i, a in enumerate(target) for j, b in enumerate(target) if a > b]
    losses = [torch.log1p(torch.exp(-(u[i] - u[j]))) for i, j in pairs]
    return sum(losses) / len(pairs) if pairs else 0.0 * u.sum()


def anchored_loss(
    prompts: Prompts, objective: Any, loss: Callable[[Tensor, list[float]], Tensor]
) -> Tensor:
    """Mean over groups; "drop" takes groups with equal rewards out of sum and divisor."""
    losses = []
    for group in prompts:
        if objective.no_signal == "drop" and len({c.reward for c in group}) == 1:
            continue
        reduce = torch.sum if objective.logprob_reduction == "sum" else torch.mean
        u = torch.stack([(reduce(c.logprobs) - reduce(c.anchor)) / c.tau for c in group])
        losses.append(loss(u, group_advantages(group, objective.advantages)))
    return sum(losses) / len(losses)


# Ratio objectives: a loss of every token, then an aggregation.


def clipped(ratio: Tensor, a: float, low: float, high: float) -> Tensor:
    """min(r A, clip(r) A): only the bound on the side where r A still grows is ever active."""
    return a * ratio.clamp(max=1.0 + high) if a > 0.0 else a * ratio.clamp(min=1.0 - low)


def token_terms(completion: Completion, a: float, objective: Any) -> Tensor:
    ratio = torch.exp(completion.logprobs - completion.old)
    if objective.name in ("grpo", "dr_grpo", "dapo"):
        return -clipped(ratio, a, objective.clip_low, objective.clip_high)
    if objective.name == "cispo":
        low = 0.0 if objective.clip_low is None else 1.0 - objective.clip_low
        weight = ratio.detach().clamp(low, 1.0 + objective.clip_high)
        return -weight * a * completion.logprobs
    assert objective.name == "sapo"
    t = objective.gate_positive if a > 0.0 else objective.gate_negative
    return -4.0 / t / (1.0 + torch.exp(-t * (ratio - 1.0))) * a


def aggregate(terms: list[list[Tensor]], aggregation: str) -> Tensor:
    """Terms of each token of each completion of each group to one number."""
    if aggregation == "sequence_mean":
        groups = [sum(t.mean() for t in group) / len(group) for group in terms]
    elif aggregation == "group_token_mean":
        groups = [torch.cat(group).mean() for group in terms]
    elif aggregation == "batch_token_mean":
        groups = [torch.cat([t for group in terms for t in group]).mean()]
    else:
        assert aggregation == "constant"
        groups = [sum(t.sum() for t in g) / len(g) / MAX_RESPONSE_LENGTH for g in terms]
    return sum(groups) / len(groups)


def ratio_loss(prompts: Prompts, objective: Any) -> Tensor:
    terms = [
        [token_terms(c, a, objective) for c, a in zip(group, weights, strict=True)]
        for group in prompts
        for weights in [group_advantages(group, objective.advantages)]
    ]
    return aggregate(terms, objective.aggregation)


def gspo_loss(prompts: Prompts, objective: Any) -> Tensor:
    losses = []
    for group in prompts:
        ratios = [torch.exp((c.logprobs - c.old).mean()) for c in group]
        weights = group_advantages(group, objective.advantages)
        gains = [
            clipped(s, a, objective.clip_low, objective.clip_high)
            for s, a in zip(ratios, weights, strict=True)
        ]
        losses.append(-sum(gains) / len(gains))
    return sum(losses) / len(losses)


def whole_batch_loss(prompts: Prompts, objective: Any, alpha: float) -> Tensor:
    """The loss of any objective, by its name."""
    if objective.name == "apo":
        return anchored_loss(
            prompts, objective, lambda u, a: alpha_divergence(u, a, alpha, objective.beta_r)
        )
    if objective.name == "adpo_softmax":
        return anchored_loss(prompts, objective, lambda u, a: cross_entropy(u, a, objective.beta_r))
    if objective.name == "adpo_plackett_luce":
        return anchored_loss(prompts, objective, plackett_luce)
    if objective.name == "adpo_pairwise":
        return anchored_loss(prompts, objective, pairwise)
    if objective.name == "gspo":
        return gspo_loss(prompts, objective)
    return ratio_loss(prompts, objective)


def regularizer_loss(
    prompts: Prompts, aggregation: str, kl: float, estimator: str, entropy_bonus: float
) -> Tensor:
    """KL penalty in the loss (k2 or k3) minus entropy bonus."""

    def terms(completion: Completion) -> Tensor:
        log_ratio = completion.logprobs - completion.reference
        k3 = torch.exp(-log_ratio) - 1.0 + log_ratio
        penalty = k3 if estimator == "k3" else log_ratio**2 / 2.0
        return kl * penalty - entropy_bonus * completion.entropy

    return aggregate([[terms(c) for c in group] for group in prompts], aggregation)
