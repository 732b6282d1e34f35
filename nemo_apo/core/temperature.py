"""The anchoring temperature tau (axes: G groups; float64, detached).

``fixed`` is the papers' default. ``adaptive`` (ADPO, arXiv 2510.18913) widens the trust region of
a prompt where the policy is unsure or the reward low:

    tau = tau_base (1 + a Hbar + b (1 - Hbar) (1 - Rbar_n)),  Hbar = H / log V

with Rbar_n the prompt's mean reward, min-max scaled over the batch (0.5 if all are equal).
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Means of equal rewards such as 0.7 differ in their last bits where group sizes differ; scaled to
# [0, 1], that difference would become the whole range.
EQUAL_MEANS = 1e-12


class Temperature(Protocol):
    """A rule for tau, one value per group."""

    def tau(self, rewards_G: Tensor, token_entropy_G: Tensor, vocab_size: int) -> Tensor:
        """tau > 0 of each group, [G] float64.

        Args:
            rewards_G: mean reward of each group.
            token_entropy_G: mean entropy of the sampling policy over the group's completion
                tokens, nats.
            vocab_size: size of the (unpadded) vocabulary.
        """
        ...


@dataclass(frozen=True)
class FixedTemperature:
    """The same tau for every prompt."""

    name: str = "fixed"
    base: float = 0.24

    def __post_init__(self) -> None:
        _check_base(self.base)

    def tau(self, rewards_G: Tensor, token_entropy_G: Tensor, vocab_size: int) -> Tensor:
        return torch.full_like(rewards_G, self.base, dtype=torch.float64)


@dataclass(frozen=True)
class AdaptiveTemperature:
    """tau by the prompt's entropy and reward (ADPO, arXiv 2510.18913), bounded to [min, max].

    The bounds are the paper's; they belong to the formula and are not a repair.
    """

    name: str = "adaptive"
    base: float = 0.24
    entropy_weight: float = 0.5
    reward_weight: float = 1.0
    min: float = 0.1
    max: float = 5.0

    def __post_init__(self) -> None:
        _check_base(self.base)
        if not 0.0 < self.min <= self.max:
            raise ValueError(f"tau.min must lie in (0, tau.max], got {self.min} and {self.max}")
        for key in ("entropy_weight", "reward_weight"):
            if not 0.0 <= getattr(self, key) < math.inf:
                raise ValueError(f"tau.{key} must be >= 0 and finite, got {getattr(self, key)}")

    def tau(self, rewards_G: Tensor, token_entropy_G: Tensor, vocab_size: int) -> Tensor:
        entropy_G = token_entropy_G / math.log(vocab_size)
        doubt_G = self.entropy_weight * entropy_G
        failure_G = self.reward_weight * (1.0 - entropy_G) * (1.0 - _min_max_scaled(rewards_G))
        return (self.base * (1.0 + doubt_G + failure_G)).clamp(self.min, self.max)


def _min_max_scaled(rewards_G: Tensor) -> Tensor:
    low, high = rewards_G.min(), rewards_G.max()
    if bool(high - low <= EQUAL_MEANS * torch.maximum(low.abs(), high.abs())):
        return torch.full_like(rewards_G, 0.5)
    return (rewards_G - low) / (high - low)


def _check_base(base: float) -> None:
    if not 0.0 < base < math.inf:
        raise ValueError(f"tau.base must be > 0 and finite, got {base}")


TEMPERATURES: dict[str, type[FixedTemperature] | type[AdaptiveTemperature]] = {
    "fixed": FixedTemperature,
    "adaptive": AdaptiveTemperature,
}
