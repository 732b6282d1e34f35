"""The importance-ratio baselines, from their papers, in the same *weigh, split, sum* form.

With r = pi / pi_old per token, w the token weight of the aggregation and sums over completion
tokens:

    GRPO, Dr.GRPO, DAPO   -sum w min(r A, clip(r, 1 - low, 1 + high) A)
                          (arXiv 2402.03300, 2503.20783, 2503.14476; they differ in A, w and clip)
    CISPO                 -sum w sg(clip(r, 1 - low, 1 + high)) A log pi          (arXiv 2506.13585)
    SAPO                  -sum w (4 / t) sigmoid(t (r - 1)) A,  t by the sign of A
                          (arXiv 2511.20347)
    GSPO                  -sum_i v_i min(s_i A_i, clip(s_i, ..) A_i),  s_i = (pi/pi_old)^(1/T_i)
                          per sequence (arXiv 2507.18071)

Axes: N sequences of the batch, B sequences of a micro-batch, T tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nemo_apo.core.advantages import ADVANTAGES
from nemo_apo.core.objectives.interface import (
    AGGREGATIONS,
    Columns,
    GroupBatch,
    TokenInputs,
    Weighing,
    check_choice,
    check_positive,
    linear_token_loss,
    masked,
    no_clipped_tokens,
    token_weights,
)


def _token_ratio(inputs: TokenInputs) -> Tensor:
    """pi / pi_old, [B, T]; 1 on tokens that are not of the completion."""
    return torch.exp(masked(inputs.logprobs_BT - inputs.old_logprobs_BT, inputs.mask_BT))


def _advantage(columns: Columns, like_BT: Tensor) -> Tensor:
    return columns.advantage_N.to(like_BT.dtype).unsqueeze(-1)


def _weighted_sum(values_BT: Tensor, inputs: TokenInputs, columns: Columns) -> Tensor:
    """sum over completion tokens of w times the value (scalar)."""
    sums_B = masked(values_BT, inputs.mask_BT).sum(dim=-1)
    return (columns.token_weight_N.to(sums_B.dtype) * sums_B).sum()


def _token_columns(batch: GroupBatch, aggregation: str) -> Weighing:
    return Weighing(
        Columns(
            coefficient_N=torch.zeros_like(batch.advantages_N),
            advantage_N=batch.advantages_N,
            token_weight_N=token_weights(batch, aggregation),
        )
    )


def _leaves_clip(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """Where min(r A, clip(r) A) is flat in r."""
    return torch.where(advantage > 0.0, ratio > 1.0 + high, ratio < 1.0 - low) & (advantage != 0.0)


def _check_clip(low: float, high: float) -> None:
    if not 0.0 <= low < 1.0:
        raise ValueError(f"objective.clip_low must lie in [0, 1), got {low}")
    check_positive("clip_high", high)


@dataclass(frozen=True)
class ClippedRatio:
    """GRPO, Dr.GRPO and DAPO: the token-wise clipped surrogate.

    Attributes:
        name: "grpo", "dr_grpo" or "dapo"; they share this formula and differ in the defaults.
        advantages: advantage estimator, see ``nemo_apo.core.advantages``.
        aggregation: see ``AGGREGATIONS``.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
    """

    uses_alpha: ClassVar[bool] = False
    uses_anchor: ClassVar[bool] = False
    weighs_current_policy: ClassVar[bool] = False

    name: str = "grpo"
    advantages: str = "zscore"
    aggregation: str = "sequence_mean"
    clip_low: float = 0.2
    clip_high: float = 0.2

    def __post_init__(self) -> None:
        check_choice("name", self.name, ("grpo", "dr_grpo", "dapo"))
        check_choice("advantages", self.advantages, tuple(ADVANTAGES))
        check_choice("aggregation", self.aggregation, tuple(AGGREGATIONS))
        _check_clip(self.clip_low, self.clip_high)

    def weigh(self, batch: GroupBatch, alpha: float) -> Weighing:
        return _token_columns(batch, self.aggregation)

    def token_loss(self, inputs: TokenInputs, columns: Columns) -> Tensor:
        ratio_BT = _token_ratio(inputs)
        advantage_B1 = _advantage(columns, ratio_BT)
        clipped_BT = ratio_BT.clamp(1.0 - self.clip_low, 1.0 + self.clip_high)
        gain_BT = torch.minimum(ratio_BT * advantage_B1, clipped_BT * advantage_B1)
        return -_weighted_sum(gain_BT, inputs, columns)

    def clipped_tokens(self, inputs: TokenInputs, columns: Columns) -> Tensor:
        ratio_BT = _token_ratio(inputs)
        out_BT = _leaves_clip(
            ratio_BT, _advantage(columns, ratio_BT), self.clip_low, self.clip_high
        )
        return (out_BT & inputs.mask_BT.bool()).sum()


@dataclass(frozen=True)
class Cispo:
    """CISPO: a policy gradient weighted by the clipped, detached ratio; no token loses gradient.

    Attributes:
        clip_low: lower clip in [0, 1), or None for no lower bound, as in the paper.
        clip_high: the weight is at most 1 + clip_high (the paper gives no value; ours).
        Others: as those of ``ClippedRatio``.
    """

    uses_alpha: ClassVar[bool] = False
    uses_anchor: ClassVar[bool] = False
    weighs_current_policy: ClassVar[bool] = False

    name: str = "cispo"
    advantages: str = "zscore"
    aggregation: str = "group_token_mean"
    clip_low: float | None = None
    clip_high: float = 4.0

    def __post_init__(self) -> None:
        check_choice("advantages", self.advantages, tuple(ADVANTAGES))
        check_choice("aggregation", self.aggregation, tuple(AGGREGATIONS))
        _check_clip(0.0 if self.clip_low is None else self.clip_low, self.clip_high)

    def weigh(self, batch: GroupBatch, alpha: float) -> Weighing:
        return _token_columns(batch, self.aggregation)

    def _bounds(self) -> tuple[float, float]:
        return 0.0 if self.clip_low is None else 1.0 - self.clip_low, 1.0 + self.clip_high

    def token_loss(self, inputs: TokenInputs, columns: Columns) -> Tensor:
        weight_BT = _token_ratio(inputs).clamp(*self._bounds()).detach()
        gain_BT = weight_BT * _advantage(columns, weight_BT) * inputs.logprobs_BT
        return -_weighted_sum(gain_BT, inputs, columns)

    def clipped_tokens(self, inputs: TokenInputs, columns: Columns) -> Tensor:
        ratio_BT = _token_ratio(inputs)
        low, high = self._bounds()
        return (((ratio_BT < low) | (ratio_BT > high)) & inputs.mask_BT.bool()).sum()


@dataclass(frozen=True)
class Sapo:
    """SAPO: a sigmoid gate in place of the hard clip.

    Attributes:
        gate_positive, gate_negative: gate temperature t for A > 0 and for A <= 0, > 0.
        Others: as those of ``ClippedRatio``.
    """

    uses_alpha: ClassVar[bool] = False
    uses_anchor: ClassVar[bool] = False
    weighs_current_policy: ClassVar[bool] = False

    name: str = "sapo"
    advantages: str = "zscore"
    aggregation: str = "sequence_mean"
    gate_positive: float = 1.0
    gate_negative: float = 1.05

    def __post_init__(self) -> None:
        check_choice("advantages", self.advantages, tuple(ADVANTAGES))
        check_choice("aggregation", self.aggregation, tuple(AGGREGATIONS))
        check_positive("gate_positive", self.gate_positive)
        check_positive("gate_negative", self.gate_negative)

    def weigh(self, batch: GroupBatch, alpha: float) -> Weighing:
        return _token_columns(batch, self.aggregation)

    def token_loss(self, inputs: TokenInputs, columns: Columns) -> Tensor:
        ratio_BT = _token_ratio(inputs)
        advantage_B1 = _advantage(columns, ratio_BT)
        # Not torch.where of two Python numbers, which is float32 whatever the model's dtype.
        gate_B1 = torch.full_like(advantage_B1, self.gate_negative)
        gate_B1 = gate_B1.masked_fill(advantage_B1 > 0.0, self.gate_positive)
        soft_BT = torch.sigmoid(gate_B1 * (ratio_BT - 1.0)) * 4.0 / gate_B1
        return -_weighted_sum(soft_BT * advantage_B1, inputs, columns)

    def clipped_tokens(self, inputs: TokenInputs, columns: Columns) -> Tensor:
        return no_clipped_tokens(inputs, columns)


@dataclass(frozen=True)
class Gspo:
    """GSPO: the clipped surrogate on the length-normalised sequence ratio s.

    Since a sequence's ratio is a scalar, its gradient coefficient -v A s / T is settled in
    ``weigh`` (0 where the clip is active) and the token loss is linear: exact even where a rank
    or micro-batch holds part of a sequence. It therefore always needs fresh log-probs.

    Attributes:
        clip_low, clip_high: bounds on s; they belong to the length of the answers (the paper has
            3e-4 and 4e-4 for thousands of tokens, these suit about ten).
    """

    uses_alpha: ClassVar[bool] = False
    uses_anchor: ClassVar[bool] = False
    weighs_current_policy: ClassVar[bool] = True

    name: str = "gspo"
    advantages: str = "zscore"
    clip_low: float = 0.03
    clip_high: float = 0.04

    def __post_init__(self) -> None:
        check_choice("advantages", self.advantages, tuple(ADVANTAGES))
        _check_clip(self.clip_low, self.clip_high)

    def weigh(self, batch: GroupBatch, alpha: float) -> Weighing:
        advantage_N = batch.advantages_N
        ratio_N = torch.exp((batch.logprob_sums_N - batch.old_logprob_sums_N) / batch.lengths_N)
        out_N = _leaves_clip(ratio_N, advantage_N, self.clip_low, self.clip_high)
        # v / T: the weight of a token under the mean over groups, completions and tokens.
        weight_N = token_weights(batch, "sequence_mean")
        columns = Columns(
            coefficient_N=torch.where(out_N, 0.0, -weight_N * advantage_N * ratio_N),
            advantage_N=advantage_N,
            token_weight_N=weight_N,
        )
        clipped_N = ratio_N.clamp(1.0 - self.clip_low, 1.0 + self.clip_high)
        gain_N = torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N)
        return Weighing(columns, -batch.groups.mean(gain_N).mean(), clipped_N=out_N)

    def token_loss(self, inputs: TokenInputs, columns: Columns) -> Tensor:
        return linear_token_loss(inputs, columns)

    def clipped_tokens(self, inputs: TokenInputs, columns: Columns) -> Tensor:
        return no_clipped_tokens(inputs, columns)
