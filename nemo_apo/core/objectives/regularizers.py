"""KL penalty against the reference and entropy bonus, added to any objective.

With d = log pi - log pi_ref per token (Schulman's estimators of KL(pi || pi_ref)):

    k1 = d            in the *reward* only: as a loss its expected on-policy gradient is zero
    k2 = d^2 / 2      in the loss
    k3 = exp(-d) - 1 + d    in the loss

The terms are weighed with the objective's token weights, so they are sums as well.
Axes: N sequences, B sequences of a micro-batch, T tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_apo.core.objectives.interface import Columns, TokenInputs, masked


def k2(delta: Tensor) -> Tensor:
    """d^2 / 2."""
    return 0.5 * delta.square()


def k3(delta: Tensor) -> Tensor:
    """exp(-d) - 1 + d, never negative."""
    return torch.expm1(-delta) + delta


LOSS_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k2": k2, "k3": k3}
KL_ESTIMATORS = ("k1", *LOSS_ESTIMATORS)


@dataclass(frozen=True)
class Regularizers:
    """Strength and form of the two terms.

    Attributes:
        kl_coef: weight of the KL penalty, >= 0.
        kl_estimator: "k1" (in the reward), "k2" or "k3" (in the loss).
        entropy_coef: weight of the entropy bonus, >= 0; its gradient is that of the entropy.
    """

    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        for key in ("kl_coef", "entropy_coef"):
            if not 0.0 <= getattr(self, key) < float("inf"):
                raise ValueError(
                    f"regularizers.{key} must be >= 0 and finite, got {getattr(self, key)}"
                )
        if self.kl_estimator not in KL_ESTIMATORS:
            raise ValueError(
                f"regularizers.kl_estimator must be one of {sorted(KL_ESTIMATORS)}, "
                f"got {self.kl_estimator!r}"
            )

    @property
    def needs_reference_in_loss(self) -> bool:
        return self.kl_coef > 0.0 and self.kl_estimator in LOSS_ESTIMATORS

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0.0

    @property
    def needs_entropy(self) -> bool:
        return self.entropy_coef > 0.0

    def penalised_rewards(
        self, rewards_N: Tensor, logprob_sums_N: Tensor, reference_logprob_sums_N: Tensor
    ) -> Tensor:
        """R_i - kl_coef (l_i - l_ref_i) under k1, R_i otherwise; [N]."""
        if self.kl_estimator != "k1" or self.kl_coef == 0.0:
            return rewards_N
        return rewards_N - self.kl_coef * (logprob_sums_N - reference_logprob_sums_N)

    def token_loss(self, inputs: TokenInputs, columns: Columns) -> Tensor:
        """The micro-batch's part of both terms, a sum over its tokens (scalar)."""
        penalty_BT = torch.zeros_like(inputs.logprobs_BT)
        if self.needs_reference_in_loss:
            assert inputs.reference_logprobs_BT is not None
            delta_BT = masked(inputs.logprobs_BT - inputs.reference_logprobs_BT, inputs.mask_BT)
            penalty_BT = penalty_BT + self.kl_coef * LOSS_ESTIMATORS[self.kl_estimator](delta_BT)
        if self.needs_entropy:
            assert inputs.entropy_BT is not None
            penalty_BT = penalty_BT - self.entropy_coef * inputs.entropy_BT
        sums_B = masked(penalty_BT, inputs.mask_BT).sum(dim=-1)
        return (columns.token_weight_N.to(sums_B.dtype) * sums_B).sum()
