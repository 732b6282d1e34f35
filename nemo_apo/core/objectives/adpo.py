"""The ADPO family: supervised losses in anchored coordinates (arXiv 2510.18913).

    softmax          -sum_i q_i log p_i  =  KL(q || p) + H(q)
    Plackett-Luce    -(1/P) sum_k sum_{i in B_k} (u_i - logsumexp_{R_k} u)
    pairwise         mean over pairs with A_i > A_j of softplus(-(u_i - u_j))

B_k are the blocks of completions with equal advantage, R_k block k and everything below it (ties
after Breslow): no order among ties is invented. Axes: N sequences, G groups, P their size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from nemo_apo.core.groups import Groups
from nemo_apo.core.objectives.anchored import (
    GroupLoss,
    anchored_columns,
    anchored_coordinates,
    check_anchored,
)
from nemo_apo.core.objectives.interface import (
    Columns,
    GroupBatch,
    TokenInputs,
    Weighing,
    check_choice,
    check_positive,
    linear_token_loss,
    no_clipped_tokens,
)
from nemo_apo.core.target import boltzmann_log_target


def softmax_loss(log_q_N: Tensor, log_p_N: Tensor, groups: Groups) -> GroupLoss:
    """Cross-entropy from q to p = softmax(u) and its gradient in u, p - q."""
    q_N = torch.exp(log_q_N)
    return GroupLoss(-groups.sum(q_N * log_p_N), torch.exp(log_p_N) - q_N)


def plackett_luce_loss(u_N: Tensor, advantages_N: Tensor, groups: Groups) -> GroupLoss:
    """Plackett-Luce loss of each group (ties after Breslow) and its gradient in u."""
    u_GP = groups.pad(u_N, float("-inf"))
    advantages_GP = groups.pad(advantages_N, float("nan"))
    # below[g, i, j]: j stands in i's risk set (a NaN in a gap compares false).
    below_GPP = advantages_GP.unsqueeze(1) <= advantages_GP.unsqueeze(2)
    below_u_GPP = torch.where(below_GPP, u_GP.unsqueeze(1), float("-inf"))
    risk_GP = torch.logsumexp(below_u_GPP, dim=2)
    share_GPP = torch.where(below_GPP, torch.exp(u_GP.unsqueeze(1) - risk_GP.unsqueeze(2)), 0.0)
    gap_N = u_N - groups.flatten(risk_GP)
    taken_N = groups.flatten(share_GPP.sum(dim=1))
    return GroupLoss(-groups.mean(gap_N), (taken_N - 1.0) / groups.spread(groups.sizes_G))


def pairwise_loss(u_N: Tensor, advantages_N: Tensor, groups: Groups) -> GroupLoss:
    """Logistic loss over the ordered pairs of each group and its gradient in u; 0 without pairs."""
    u_GP = groups.pad(u_N, 0.0)
    advantages_GP = groups.pad(advantages_N, float("nan"))
    margin_GPP = u_GP.unsqueeze(2) - u_GP.unsqueeze(1)
    better_GPP = advantages_GP.unsqueeze(2) > advantages_GP.unsqueeze(1)
    pairs_G = better_GPP.sum(dim=(1, 2)).clamp(min=1)
    value_G = torch.where(better_GPP, softplus(-margin_GPP), 0.0).sum(dim=(1, 2)) / pairs_G
    push_GPP = torch.where(better_GPP, torch.sigmoid(-margin_GPP), 0.0)
    grad_GP = (push_GPP.sum(dim=1) - push_GPP.sum(dim=2)) / pairs_G.unsqueeze(1)
    return GroupLoss(value_G, groups.flatten(grad_GP))


@dataclass(frozen=True)
class AdpoSoftmax:
    """ADPO with the softmax (listwise cross-entropy) loss; the gradient of APO at alpha = 1.

    Attributes: as those of ``Apo``.
    """

    uses_alpha: ClassVar[bool] = False
    uses_anchor: ClassVar[bool] = True
    weighs_current_policy: ClassVar[bool] = True

    name: str = "adpo_softmax"
    advantages: str = "zscore"
    beta_r: float = 0.3
    logprob_reduction: str = "sum"
    no_signal: str = "anchor"
    refresh: str = "forward"

    def __post_init__(self) -> None:
        check_anchored(self.advantages, self.logprob_reduction, self.no_signal, self.refresh)
        check_positive("beta_r", self.beta_r)

    def weigh(self, batch: GroupBatch, alpha: float) -> Weighing:
        groups = batch.groups
        log_q_N = boltzmann_log_target(batch.advantages_N, groups, self.beta_r)
        log_p_N = groups.log_softmax(anchored_coordinates(batch, self.logprob_reduction))
        loss = softmax_loss(log_q_N, log_p_N, groups)
        columns, value = anchored_columns(batch, loss, self.logprob_reduction, self.no_signal)
        return Weighing(columns, value, log_q_N - log_p_N)

    def token_loss(self, inputs: TokenInputs, columns: Columns) -> Tensor:
        return linear_token_loss(inputs, columns)

    def clipped_tokens(self, inputs: TokenInputs, columns: Columns) -> Tensor:
        return no_clipped_tokens(inputs, columns)


@dataclass(frozen=True)
class AdpoRanking:
    """ADPO with a loss on the order of the advantages only: Plackett-Luce or pairwise.

    Attributes:
        name: "adpo_plackett_luce" or "adpo_pairwise", a key of ``RANKING_LOSSES``.
        Others: as those of ``Apo``; there is no target, hence no beta_r.
    """

    uses_alpha: ClassVar[bool] = False
    uses_anchor: ClassVar[bool] = True
    weighs_current_policy: ClassVar[bool] = True

    name: str = "adpo_plackett_luce"
    advantages: str = "zscore"
    logprob_reduction: str = "sum"
    no_signal: str = "anchor"
    refresh: str = "forward"

    def __post_init__(self) -> None:
        check_choice("name", self.name, RANKING_LOSSES)
        check_anchored(self.advantages, self.logprob_reduction, self.no_signal, self.refresh)

    def weigh(self, batch: GroupBatch, alpha: float) -> Weighing:
        u_N = anchored_coordinates(batch, self.logprob_reduction)
        loss = RANKING_LOSSES[self.name](u_N, batch.advantages_N, batch.groups)
        columns, value = anchored_columns(batch, loss, self.logprob_reduction, self.no_signal)
        return Weighing(columns, value)

    def token_loss(self, inputs: TokenInputs, columns: Columns) -> Tensor:
        return linear_token_loss(inputs, columns)

    def clipped_tokens(self, inputs: TokenInputs, columns: Columns) -> Tensor:
        return no_clipped_tokens(inputs, columns)


RANKING_LOSSES: dict[str, Callable[[Tensor, Tensor, Groups], GroupLoss]] = {
    "adpo_plackett_luce": plackett_luce_loss,
    "adpo_pairwise": pairwise_loss,
}
