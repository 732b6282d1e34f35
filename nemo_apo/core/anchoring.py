"""Sequence log-probs and anchored coordinates (axes: N or B sequences, T tokens).

    l_i = sum_t m_it log pi(y_it)             u_i = (l_i - l_ref_i) / tau           p = softmax(u)

(ADPO, arXiv 2510.18913.) The anchor is the policy behind l_ref: see ``ANCHORS``.
"""

import torch
from torch import Tensor

# Which policy the anchor log-probs come from. "old" is the papers' choice.
ANCHORS: dict[str, str] = {
    "old": "the policy that sampled the rollout",
    "reference": "the policy at the start of RL, frozen",
    "ema": "an exponential moving average of the policy, updated every RL step",
    "lagged": "a copy of the policy, refreshed every k RL steps",
}

# Sequence log-prob reductions: "sum" is the likelihood of the whole answer, "mean" divides by its
# length and then needs a tau about 1/T of the one that suits "sum".
LOGPROB_REDUCTIONS = ("sum", "mean")


def sequence_sums(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Sum over completion tokens in float64, [B]. A masked token never counts, not even as NaN."""
    values_BT = values_BT.to(torch.float64)
    return torch.where(mask_BT.bool(), values_BT, 0.0).sum(dim=-1)


def reduce_logprobs(logprob_sums_N: Tensor, lengths_N: Tensor, reduction: str) -> Tensor:
    """Sequence log-probs l [N] from their sums over tokens: the sum itself, or divided by T_i.

    Args:
        logprob_sums_N: sum of the token log-probs of each completion, nats.
        lengths_N: number of completion tokens T_i, at least 1.
        reduction: "sum" or "mean".

    Raises:
        ValueError: for an unknown reduction.
    """
    return logprob_sums_N * token_factor(lengths_N, reduction)


def token_factor(lengths_N: Tensor, reduction: str) -> Tensor:
    """dl_i / d(sum of token log-probs) [N]: 1 for "sum", 1/T_i for "mean"."""
    lengths_N = lengths_N.to(torch.float64)
    if reduction == "sum":
        return torch.ones_like(lengths_N)
    if reduction == "mean":
        return 1.0 / lengths_N
    raise ValueError(
        f"unknown sequence log-prob reduction {reduction!r}, choose from {LOGPROB_REDUCTIONS}"
    )


def anchored_logits(logprobs_N: Tensor, anchor_logprobs_N: Tensor, tau_N: Tensor) -> Tensor:
    """u = (l - l_ref) / tau, [N] float64, with one tau > 0 per sequence (equal in a group)."""
    return (logprobs_N - anchor_logprobs_N) / tau_N
