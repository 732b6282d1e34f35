"""What APO and the ADPO family share: from dLoss/du of each group to columns.

    grad_theta loss_g = sum_i c_i grad_theta l_i,    c_i = (1 / tau) dLoss_g/du_i    (detached)

and the batch loss is the mean over groups, so c_i is divided by the number of groups (ours:
ALGORITHM "weigh, split, sum"). Axes: N sequences, G groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_apo.core.advantages import ADVANTAGES
from nemo_apo.core.anchoring import (
    LOGPROB_REDUCTIONS,
    anchored_logits,
    reduce_logprobs,
    token_factor,
)
from nemo_apo.core.objectives.interface import (
    Columns,
    GroupBatch,
    Objective,
    check_choice,
    token_weights,
)

# What becomes of a group whose advantages are all equal. "anchor" keeps it: its coefficients are 0
# at u = 0 and pull back to the anchor elsewhere. "drop" takes it out of the sum and the divisor.
NO_SIGNAL_RULES = ("anchor", "drop")
# How coefficients are renewed after the first optimizer step of a rollout: from an exact no-grad
# forward, or from the last log-probs that training happened to see (biased).
REFRESH_RULES = ("forward", "stale")


def uses_stale_logprobs(objective: Objective) -> bool:
    """Whether later optimizer steps of a rollout weigh with the last log-probs known."""
    return getattr(objective, "refresh", "forward") == "stale"


def needs_refresh(objective: Objective) -> bool:
    """Whether later optimizer steps of a rollout weigh with log-probs of a fresh forward pass."""
    return objective.weighs_current_policy and not uses_stale_logprobs(objective)


@dataclass(frozen=True)
class GroupLoss:
    """Loss of each group [G] and its derivative with respect to u [N]; float64."""

    value_G: Tensor
    grad_N: Tensor


def anchored_coordinates(batch: GroupBatch, reduction: str) -> Tensor:
    """u = (l - l_ref) / tau of the batch, [N] float64, with l reduced by "sum" or "mean"."""
    return anchored_logits(
        reduce_logprobs(batch.logprob_sums_N, batch.lengths_N, reduction),
        reduce_logprobs(batch.anchor_logprob_sums_N, batch.lengths_N, reduction),
        batch.tau_N,
    )


def anchored_columns(
    batch: GroupBatch, loss: GroupLoss, reduction: str, no_signal: str
) -> tuple[Columns, Tensor]:
    """Columns and batch value (mean over groups, scalar) of a group loss given in u."""
    groups = batch.groups
    counted_G = torch.ones(groups.count, dtype=torch.bool, device=batch.tau_N.device)
    if no_signal == "drop":
        counted_G = ~groups.all_equal(batch.advantages_N)
    divisor = counted_G.sum().clamp(min=1)
    per_token_N = token_factor(batch.lengths_N, reduction) / batch.tau_N
    coefficient_N = loss.grad_N * per_token_N / divisor
    columns = Columns(
        coefficient_N=torch.where(groups.spread(counted_G), coefficient_N, 0.0),
        advantage_N=batch.advantages_N,
        token_weight_N=token_weights(batch, "sequence_mean"),
    )
    value = torch.where(counted_G, loss.value_G, 0.0).sum() / divisor
    return columns, value


def check_anchored(advantages: str, logprob_reduction: str, no_signal: str, refresh: str) -> None:
    """Raise ``ValueError`` for a bad choice among the fields that all anchored objectives have."""
    check_choice("advantages", advantages, tuple(ADVANTAGES))
    check_choice("logprob_reduction", logprob_reduction, LOGPROB_REDUCTIONS)
    check_choice("no_signal", no_signal, NO_SIGNAL_RULES)
    check_choice("refresh", refresh, REFRESH_RULES)
