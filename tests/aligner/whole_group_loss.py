"""Oracles: the coupled loss of an optimizer step by autograd, on one rank in one piece.

Written from the papers' equations, apart from the package: nothing of it is imported.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus


def sequence_logprobs(actor: Any, tokens: Tensor, mask: Tensor, vocabulary: int) -> Tensor:
    """log pi of each answer [N] under the actor's model, differentiable."""
    return (token_logprobs(actor, tokens, vocabulary).double() * mask).sum(dim=1)


def token_logprobs(actor: Any, tokens: Tensor, vocabulary: int) -> Tensor:
    """log pi of each token after the first [N, T]."""
    attention_mask, _, positions = actor.get_ltor_masks_and_position_ids(tokens)
    logits = actor.model(tokens, positions, attention_mask, labels=None)
    log_p = torch.log_softmax(logits[:, :-1, :vocabulary], dim=-1)
    return log_p.gather(-1, tokens[:, 1:, None]).squeeze(-1)


def token_entropies(actor: Any, tokens: Tensor, vocabulary: int) -> Tensor:
    """Entropy of the distribution of each token after the first [N, T], nats."""
    attention_mask, _, positions = actor.get_ltor_masks_and_position_ids(tokens)
    logits = actor.model(tokens, positions, attention_mask, labels=None)
    log_p = torch.log_softmax(logits[:, :-1, :vocabulary], dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


def zscore(rewards: Tensor) -> Tensor:
    """Rows are groups."""
    gap = rewards - rewards.mean(dim=1, keepdim=True)
    return gap / (rewards.std(dim=1, keepdim=True, correction=0) + 1e-6)


def alpha_loss(u: Tensor, advantages: Tensor, alpha: float, beta_r: float) -> Tensor:
    """Mean over rows of D_alpha(q || softmax(u)) in the plain form, 0 < alpha < 1."""
    q = torch.softmax(advantages / beta_r, dim=1)
    p = torch.softmax(u, dim=1)
    overlap = (q**alpha * p ** (1.0 - alpha)).sum(dim=1)
    return ((1.0 - overlap) / (alpha * (1.0 - alpha))).mean()


def adaptive_tau(entropies: Tensor, rewards: Tensor, base: float, vocabulary: int) -> Tensor:
    """tau of each group by its mean token entropy [G] and mean reward [G]; a = 1/2, b = 1."""
    unsure = entropies / math.log(vocabulary)
    scaled = (rewards - rewards.min()) / (rewards.max() - rewards.min())
    return base * (1.0 + 0.5 * unsure + (1.0 - unsure) * (1.0 - scaled))


def softmax_loss(u: Tensor, advantages: Tensor, beta_r: float) -> Tensor:
    """Mean over rows of -sum q log softmax(u)."""
    q = torch.softmax(advantages / beta_r, dim=1)
    return -(q * torch.log_softmax(u, dim=1)).sum(dim=1).mean()


def plackett_luce_loss(u: Tensor, advantages: Tensor) -> Tensor:
    """Mean over rows, without ties: each answer against those of no larger advantage."""
    total = u.new_zeros(())
    for row, advantage in zip(u, advantages, strict=True):
        for one in range(len(row)):
            below = row[advantage <= advantage[one]]
            total = total - (row[one] - torch.logsumexp(below, dim=0)) / len(row)
    return total / len(u)


def pairwise_loss(u: Tensor, advantages: Tensor) -> Tensor:
    """Mean over rows of the mean logistic loss over the ordered pairs."""
    losses = []
    for row, advantage in zip(u, advantages, strict=True):
        margins = [
            row[i] - row[j]
            for i in range(len(row))
            for j in range(len(row))
            if advantage[i] > advantage[j]
        ]
        losses.append(softplus(-torch.stack(margins)).mean())
    return torch.stack(losses).mean()


def clipped_ratio_loss(
    logprobs: Tensor,
    old: Tensor,
    mask: Tensor,
    advantages: Tensor,
    weights: Tensor,
    clip: float,
    clip_high: float | None = None,
) -> Tensor:
    """-sum w min(r A, clip(r) A) over completion tokens; w [N, 1] is the weight of a token.

    The ratio is clipped ``clip`` below 1, and as far or ``clip_high`` above.
    """
    ratio = torch.exp(logprobs - old)
    high = 1.0 + (clip if clip_high is None else clip_high)
    gain = torch.minimum(
        ratio * advantages[:, None], ratio.clamp(1.0 - clip, high) * advantages[:, None]
    )
    return -(weights * gain * mask).sum()


def sequence_ratio_loss(
    change: Tensor, lengths: Tensor, advantages: Tensor, low: float, high: float
) -> Tensor:
    """Mean over rows of the mean of -min(s A, clip(s) A), with s = exp(change / length)."""
    ratio = torch.exp(change / lengths)
    gain = torch.minimum(ratio * advantages, ratio.clamp(1.0 - low, 1.0 + high) * advantages)
    return -gain.mean()


def k3_penalty(logprobs: Tensor, reference: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """sum w (pi_ref / pi - 1 - log(pi_ref / pi)) over completion tokens."""
    log_ratio = reference - logprobs
    return (weights * (torch.exp(log_ratio) - 1.0 - log_ratio) * mask).sum()
