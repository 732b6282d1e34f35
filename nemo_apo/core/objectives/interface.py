"""What an objective takes and gives: *weigh, split, sum*.

    weighing = objective.weigh(batch, alpha)                   once, on the global batch
    loss     = objective.token_loss(inputs, columns)           a plain sum, per micro-batch

Every divisor, advantage and flag is settled in ``weigh`` on the whole optimizer-step batch, so the
sum of ``token_loss`` over micro-batches, and its gradient, do not depend on the cut.

Axes: N sequences of the optimizer-step batch, B sequences of a micro-batch, T tokens.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from nemo_apo.core.groups import Groups


@dataclass(frozen=True)
class GroupBatch:
    """Per-sequence scalars of one optimizer-step batch: whole groups, all ranks. Float64.

    Attributes:
        groups: which sequence belongs to which group; every group has at least two sequences.
        advantages_N: group-relative advantages.
        lengths_N: completion tokens T_i, at least 1.
        logprob_sums_N: sum of token log-probs under the policy that is about to be updated, nats.
        old_logprob_sums_N: the same under the policy that sampled.
        anchor_logprob_sums_N: the same under the anchor.
        tau_N: anchoring temperature, > 0, equal within a group.
        max_response_length: the length limit of the rollout, tokens.
    """

    groups: Groups
    advantages_N: Tensor
    lengths_N: Tensor
    logprob_sums_N: Tensor
    old_logprob_sums_N: Tensor
    anchor_logprob_sums_N: Tensor
    tau_N: Tensor
    max_response_length: int


@dataclass(frozen=True)
class Columns:
    """The numbers that travel with each sequence into its micro-batch, [N] (or [B] of them).

    Attributes:
        coefficient_N: weight of each completion token's log-prob in a linear objective.
        advantage_N: advantage, for objectives that look at single tokens.
        token_weight_N: 1 / divisor of each completion token under the chosen aggregation.
    """

    coefficient_N: Tensor
    advantage_N: Tensor
    token_weight_N: Tensor

    def select(self, rows: Tensor) -> "Columns":
        """The columns of some sequences, in the order of ``rows``."""
        return self.map(lambda column_N: column_N[rows])

    def to(self, device: torch.device) -> "Columns":
        """The same on a device; float64 stays float64."""
        return self.map(lambda column_N: column_N.to(device))

    @property
    def all_finite(self) -> bool:
        """Whether every number of every column is finite."""
        return all(bool(getattr(self, field.name).isfinite().all()) for field in fields(self))

    def map(self, change: Callable[[Tensor], Tensor]) -> "Columns":
        """Every column changed in the same way."""
        return Columns(**{field.name: change(getattr(self, field.name)) for field in fields(self)})


@dataclass(frozen=True)
class Weighing:
    """The result of ``weigh``.

    Attributes:
        columns: what is split over ranks and micro-batches.
        value: the objective's value on the batch where it is known from scalars, else None.
        log_ratio_N: log q - log p where the objective has a target, else None.
        clipped_N: sequences whose ratio was clipped, where that is decided per sequence, else None.
    """

    columns: Columns
    value: Tensor | None = None
    log_ratio_N: Tensor | None = None
    clipped_N: Tensor | None = None


@dataclass(frozen=True)
class TokenInputs:
    """What the forward pass of a micro-batch knows of its tokens, [B, T].

    Attributes:
        logprobs_BT: log-prob of each token under the policy being trained, differentiable.
        old_logprobs_BT: the same under the policy that sampled.
        mask_BT: true on completion tokens; values elsewhere are never read.
        reference_logprobs_BT: the same under the reference, where a KL penalty asks for it.
        entropy_BT: entropy of the next-token distribution, nats, differentiable, where an entropy
            bonus asks for it.
    """

    logprobs_BT: Tensor
    old_logprobs_BT: Tensor
    mask_BT: Tensor
    reference_logprobs_BT: Tensor | None = None
    entropy_BT: Tensor | None = None


class Objective(Protocol):
    """One policy objective; its implementations are frozen dataclasses of hyperparameters.

    Class attributes:
        uses_alpha: whether ``weigh`` reads alpha, so that a schedule has a meaning.
        uses_anchor: whether ``weigh`` reads the anchor and tau.
        weighs_current_policy: whether the coefficients depend on the policy as it stands, so that
            every optimizer step after the first needs fresh sequence log-probs.
    """

    uses_alpha: ClassVar[bool]
    uses_anchor: ClassVar[bool]
    weighs_current_policy: ClassVar[bool]

    @property
    def name(self) -> str: ...

    @property
    def advantages(self) -> str:
        """The advantage estimator, a key of ``ADVANTAGES``."""
        ...

    def weigh(self, batch: GroupBatch, alpha: float) -> Weighing:
        """Settle everything that couples sequences; nothing in it is differentiable."""
        ...

    def token_loss(self, inputs: TokenInputs, columns: Columns) -> Tensor:
        """The micro-batch's part of the loss, a sum over its tokens (scalar)."""
        ...

    def clipped_tokens(self, inputs: TokenInputs, columns: Columns) -> Tensor:
        """How many completion tokens a clip took out of the gradient (scalar)."""
        ...


def masked(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The values on completion tokens, exactly 0 elsewhere (a NaN there does not spread)."""
    return torch.where(mask_BT.bool(), values_BT, torch.zeros_like(values_BT))


def linear_token_loss(inputs: TokenInputs, columns: Columns) -> Tensor:
    """sum_i c_i sum_t m_it log pi(y_it): the loss whose gradient is that of the group objective."""
    sums_B = masked(inputs.logprobs_BT, inputs.mask_BT).sum(dim=-1)
    return (columns.coefficient_N.to(sums_B.dtype) * sums_B).sum()


def no_clipped_tokens(inputs: TokenInputs, columns: Columns) -> Tensor:
    """Nothing is clipped token by token."""
    return inputs.logprobs_BT.new_zeros(())


def _sequence_mean(batch: GroupBatch) -> Tensor:
    """Mean over groups of the mean over completions of the mean over tokens (GRPO)."""
    per_group_N = batch.groups.spread(batch.groups.sizes_G)
    return 1.0 / (batch.groups.count * per_group_N * batch.lengths_N)


def _group_token_mean(batch: GroupBatch) -> Tensor:
    """Mean over groups of the mean over all tokens of the group (DAPO as published)."""
    tokens_N = batch.groups.spread(batch.groups.sum(batch.lengths_N))
    return 1.0 / (batch.groups.count * tokens_N)


def _batch_token_mean(batch: GroupBatch) -> Tensor:
    """Mean over all completion tokens of the batch."""
    return torch.ones_like(batch.lengths_N) / batch.lengths_N.sum()


def _constant(batch: GroupBatch) -> Tensor:
    """Mean over groups and completions of the token sum over the length limit (Dr.GRPO)."""
    per_group_N = batch.groups.spread(batch.groups.sizes_G).to(torch.float64)
    return 1.0 / (batch.groups.count * per_group_N * batch.max_response_length)


AGGREGATIONS: dict[str, Callable[[GroupBatch], Tensor]] = {
    "sequence_mean": _sequence_mean,
    "group_token_mean": _group_token_mean,
    "batch_token_mean": _batch_token_mean,
    "constant": _constant,
}


def token_weights(batch: GroupBatch, aggregation: str) -> Tensor:
    """Weight of each completion token of a sequence, [N] float64, by the named aggregation.

    Raises:
        ValueError: for an unknown aggregation.
    """
    check_choice("aggregation", aggregation, AGGREGATIONS)
    return AGGREGATIONS[aggregation](batch).to(torch.float64)


def check_choice(key: str, value: str, choices: Collection[str]) -> None:
    """Raise ``ValueError`` unless the value is one of the choices of ``objective.<key>``."""
    if value not in choices:
        raise ValueError(f"objective.{key} must be one of {sorted(choices)}, got {value!r}")


def check_positive(key: str, value: float) -> None:
    """Raise ``ValueError`` unless ``objective.<key>`` is > 0 and finite."""
    if not 0.0 < value < float("inf"):
        raise ValueError(f"objective.{key} must be > 0 and finite, got {value}")
