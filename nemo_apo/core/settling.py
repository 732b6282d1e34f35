"""From the per-sequence figures of a rollout to what an objective weighs: *settle*, then split.

A host gathers one row of scalars per sequence of the global rollout (``SequenceFigures``). What
couples the sequences of a group, and the groups of the rollout, is settled here in one place for
every host: advantages, temperature, k1 penalty, alpha. Axes: N sequences, G groups.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from nemo_apo.core.advantages import group_advantages
from nemo_apo.core.alpha_schedule import Schedule, ScheduleSignals, ScheduleState
from nemo_apo.core.groups import Groups
from nemo_apo.core.objectives import Apo, GroupBatch, Objective, Regularizers
from nemo_apo.core.temperature import Temperature


@dataclass(frozen=True)
class SequenceFigures:
    """One row per sequence of the global rollout; ``settle`` wants dropped groups left out.

    Attributes:
        group_ids_N: explicit group id from sampling, int64.
        rewards_N: settled rewards, float64.
        lengths_N: completion tokens T_i, float64, at least 1.
        entropy_sums_N: sum over completion tokens of the next-token entropy of the policy that
            sampled, nats, float64.
        old_logprob_sums_N: sequence log-probs under the policy that sampled, nats, float64.
        anchor_logprob_sums_N: the same under the anchor.
        reference_logprob_sums_N: the same under the reference, where a k1 penalty reads it.
        sampler_logprob_sums_N: the same as the sampler itself computed them, where it told.
    """

    group_ids_N: Tensor
    rewards_N: Tensor
    lengths_N: Tensor
    entropy_sums_N: Tensor
    old_logprob_sums_N: Tensor
    anchor_logprob_sums_N: Tensor
    reference_logprob_sums_N: Tensor | None = None
    sampler_logprob_sums_N: Tensor | None = None

    @property
    def token_entropy(self) -> float:
        """Entropy of the policy that sampled, nats per completion token of the whole rollout."""
        return float(self.entropy_sums_N.sum() / self.lengths_N.sum())

    @property
    def finite_N(self) -> Tensor:
        """Whether all that is known of a sequence's log-probs is finite, bool [N]."""
        figures = [self.entropy_sums_N, self.old_logprob_sums_N, self.anchor_logprob_sums_N]
        if self.reference_logprob_sums_N is not None:
            figures.append(self.reference_logprob_sums_N)
        return torch.isfinite(torch.stack(figures)).all(dim=0)

    def select(self, rows: Tensor) -> "SequenceFigures":
        """Some of the sequences: rows is a bool mask or an index."""
        selected: dict[str, Any] = {}
        for field in fields(self):
            values_N = getattr(self, field.name)
            selected[field.name] = None if values_N is None else values_N[rows]
        return SequenceFigures(**selected)


def in_finite_groups(figures: SequenceFigures) -> Tensor:
    """Sequences of groups whose log-probs are all finite, bool [N]."""
    groups = Groups.from_ids(figures.group_ids_N)
    return groups.spread(groups.min(figures.finite_N.to(torch.int64))) > 0


@dataclass(frozen=True)
class RolloutLimits:
    """What the host's task fixes for every rollout.

    Attributes:
        vocab_size: size of the (unpadded) vocabulary.
        max_response_length: length limit of a completion, tokens.
    """

    vocab_size: int
    max_response_length: int


def settle(
    figures: SequenceFigures,
    objective: Objective,
    tau: Temperature,
    regularizers: Regularizers,
    limits: RolloutLimits,
) -> GroupBatch:
    """The whole rollout as a batch to weigh; an optimizer step takes some of its groups."""
    groups = Groups.from_ids(figures.group_ids_N)
    rewards_N = _penalised(figures, regularizers)
    entropy_G = groups.sum(figures.entropy_sums_N) / groups.sum(figures.lengths_N)
    tau_G = tau.tau(groups.mean(rewards_N), entropy_G, limits.vocab_size)
    return GroupBatch(
        groups=groups,
        advantages_N=group_advantages(rewards_N, groups, objective.advantages),
        lengths_N=figures.lengths_N,
        logprob_sums_N=figures.old_logprob_sums_N,
        old_logprob_sums_N=figures.old_logprob_sums_N,
        anchor_logprob_sums_N=figures.anchor_logprob_sums_N,
        tau_N=groups.spread(tau_G),
        max_response_length=limits.max_response_length,
    )


def _penalised(figures: SequenceFigures, regularizers: Regularizers) -> Tensor:
    """Rewards, less the k1 penalty where one is set."""
    if not regularizers.needs_reference:
        return figures.rewards_N
    assert figures.reference_logprob_sums_N is not None
    return regularizers.penalised_rewards(
        figures.rewards_N, figures.old_logprob_sums_N, figures.reference_logprob_sums_N
    )


def schedule_alpha(
    objective: Objective,
    schedule: Schedule,
    state: ScheduleState,
    batch: GroupBatch,
    *,
    step: int,
    total_steps: int,
    reward_mean: float,
    token_entropy: float,
    limits: RolloutLimits,
) -> tuple[float, ScheduleState]:
    """Alpha of this RL step and the schedule's next state; called once per rollout.

    An objective without alpha leaves the state alone and gets NaN, which it never reads.
    """
    if not isinstance(objective, Apo):
        return float("nan"), state
    log_q_N, log_p_N = objective.log_target_and_policy(batch)
    signals = ScheduleSignals(
        step=step,
        total_steps=total_steps,
        reward_mean=reward_mean,
        token_entropy=token_entropy,
        vocab_size=limits.vocab_size,
        log_q_N=log_q_N,
        log_p_N=log_p_N,
        groups=batch.groups,
    )
    return schedule.step(state, signals)


def optimizer_step_part(batch: GroupBatch, rows: Tensor, known_N: Tensor) -> GroupBatch:
    """The rows of one optimizer step, with the log-probs known of them now.

    Args:
        batch: the whole rollout.
        rows: index of the rows, whole groups.
        known_N: the last sequence log-probs known of every row of the rollout.
    """
    return GroupBatch(
        groups=Groups.from_ids(batch.groups.ids_G[batch.groups.index_N[rows]]),
        advantages_N=batch.advantages_N[rows],
        lengths_N=batch.lengths_N[rows],
        logprob_sums_N=known_N[rows],
        old_logprob_sums_N=batch.old_logprob_sums_N[rows],
        anchor_logprob_sums_N=batch.anchor_logprob_sums_N[rows],
        tau_N=batch.tau_N[rows],
        max_response_length=batch.max_response_length,
    )
