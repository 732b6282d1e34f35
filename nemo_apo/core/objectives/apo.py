"""APO: the alpha-divergence from a Boltzmann target to the anchored policy (arXiv 2512.22953).

loss = mean over groups of D_alpha(q || p)
q = softmax(A / beta_r),    p = softmax((l - l_ref) / tau)
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nemo_apo.core.divergence import alpha_divergence, alpha_divergence_grad, log_ratio
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
    check_positive,
    linear_token_loss,
    no_clipped_tokens,
)
from nemo_apo.core.target import boltzmann_log_target


@dataclass(frozen=True)
class Apo:
    """Alpha-Divergence Preference Optimization.

    Attributes:
        advantages: advantage estimator, see ``nemo_apo.core.advantages``.
        beta_r: temperature of the target, > 0. tau / beta_r is the width of the trust region.
        logprob_reduction: "sum" or "mean" over the tokens of an answer.
        ratio_clip: bound on |log q - log p| inside phi, or None (ours).
        no_signal: "anchor" or "drop", see ``NO_SIGNAL_RULES`` (ours).
        refresh: "forward" or "stale", see ``REFRESH_RULES`` (ours).
    """

    uses_alpha: ClassVar[bool] = True
    uses_anchor: ClassVar[bool] = True
    weighs_current_policy: ClassVar[bool] = True

    name: str = "apo"
    advantages: str = "zscore"
    beta_r: float = 0.3
    logprob_reduction: str = "sum"
    ratio_clip: float | None = None
    no_signal: str = "anchor"
    refresh: str = "forward"

    def __post_init__(self) -> None:
        check_anchored(self.advantages, self.logprob_reduction, self.no_signal, self.refresh)
        check_positive("beta_r", self.beta_r)
        if self.ratio_clip is not None:
            check_positive("ratio_clip", self.ratio_clip)

    def log_target_and_policy(self, batch: GroupBatch) -> tuple[Tensor, Tensor]:
        """log q and log p over each group, both [N] float64."""
        log_q_N = boltzmann_log_target(batch.advantages_N, batch.groups, self.beta_r)
        u_N = anchored_coordinates(batch, self.logprob_reduction)
        return log_q_N, batch.groups.log_softmax(u_N)

    def weigh(self, batch: GroupBatch, alpha: float) -> Weighing:
        log_q_N, log_p_N = self.log_target_and_policy(batch)
        parts = (log_q_N, log_p_N, batch.groups, alpha, self.ratio_clip)
        loss = GroupLoss(alpha_divergence(*parts), alpha_divergence_grad(*parts))
        columns, value = anchored_columns(batch, loss, self.logprob_reduction, self.no_signal)
        log_ratio_N = log_ratio(log_q_N, log_p_N)
        clipped_N = None if self.ratio_clip is None else log_ratio_N.abs() > self.ratio_clip
        return Weighing(columns, value, log_ratio_N, clipped_N)

    def token_loss(self, inputs: TokenInputs, columns: Columns) -> Tensor:
        return linear_token_loss(inputs, columns)

    def clipped_tokens(self, inputs: TokenInputs, columns: Columns) -> Tensor:
        return no_clipped_tokens(inputs, columns)
