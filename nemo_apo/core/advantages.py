"""Group-relative advantages of N rewards (axes: N sequences, G groups; float64).

In a group whose rewards are all equal every estimator but ``raw`` gives exactly 0: decided by
comparing rewards, since floating-point means of 0.7 or 1/3 leave a residue that a division by the
standard deviation would turn into signal.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nemo_apo.core.groups import Groups, as_float64

# The APO paper does not give its epsilon; 1e-6 is the common choice.
ZSCORE_EPS = 1e-6


def centered(rewards_N: Tensor, groups: Groups) -> Tensor:
    """R - mean(R), [N] (Dr.GRPO, arXiv 2503.20783)."""
    deviation_N = rewards_N - groups.spread(groups.mean(rewards_N))
    return torch.where(groups.spread(groups.all_equal(rewards_N)), 0.0, deviation_N)


def zscore(rewards_N: Tensor, groups: Groups) -> Tensor:
    """(R - mean) / (std + 1e-6) with the population standard deviation, [N] (APO paper, GRPO)."""
    deviation_N = centered(rewards_N, groups)
    std_G = torch.sqrt(groups.mean(deviation_N.square()))
    return deviation_N / groups.spread(std_G + ZSCORE_EPS)


def rloo(rewards_N: Tensor, groups: Groups) -> Tensor:
    """R minus the mean reward of the *other* completions, [N] (RLOO, arXiv 2402.14740).

    Equal to (R - mean) P / (P - 1); 0 in a group of one, which has no others.
    """
    size_N = groups.spread(groups.sizes_G).to(rewards_N.dtype)
    return centered(rewards_N, groups) * size_N / (size_N - 1.0).clamp(min=1.0)


def raw(rewards_N: Tensor, groups: Groups) -> Tensor:
    """R itself, [N]: no baseline, so equal rewards keep their value."""
    return rewards_N.clone()


ADVANTAGES: dict[str, Callable[[Tensor, Groups], Tensor]] = {
    "zscore": zscore,
    "centered": centered,
    "rloo": rloo,
    "raw": raw,
}


def group_advantages(rewards_N: Tensor, groups: Groups, estimator: str) -> Tensor:
    """Advantages [N] float64 by the named estimator.

    Raises:
        ValueError: for an unknown estimator or a reward that is not finite (a failed grade has to
            be settled before: see ``nemo_apo.core.filtering``).
    """
    if estimator not in ADVANTAGES:
        raise ValueError(
            f"unknown advantage estimator {estimator!r}, choose from {sorted(ADVANTAGES)}"
        )
    rewards_N = as_float64(rewards_N)
    if not bool(torch.isfinite(rewards_N).all()):
        raise ValueError("rewards must be finite before advantages are taken")
    return ADVANTAGES[estimator](rewards_N, groups)
