"""What is settled on a rollout before its optimizer steps, and what each of them takes of it.

Everything is on the CPU: a few numbers per sequence, the same on every rank to the last bit. Axes:
N sequences of the global rollout, n of those that are trained on, m of those of them that an
optimizer step (of M sequences) takes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_apo import record
from nemo_apo.core.alpha_schedule import ScheduleState
from nemo_apo.core.filtering import SettledGroups
from nemo_apo.core.objectives import Columns, GroupBatch
from nemo_apo.core.settling import (
    RolloutLimits,
    SequenceFigures,
    in_finite_groups,
    optimizer_step_part,
    schedule_alpha,
    settle,
)
from nemo_apo.plugin.settings import ApoSettings
from nemo_apo.step_metrics import rollout_metrics, schedule_metrics


@dataclass
class SettledRollout:
    """A rollout under training.

    Attributes:
        batch: the sequences that are trained on; None if there are none.
        row_N: for every sequence of the rollout its row in ``batch``, -1 if it is not there.
        broken_N: whether a sequence is in a group that would be trained on, were all its log-probs
            finite.
        known_n: the last sequence log-probs known of each row of ``batch``, nats.
        alpha: this RL step's.
        schedule: the schedule's next state.
        metrics: of the rollout.
    """

    batch: GroupBatch | None
    row_N: Tensor
    broken_N: Tensor
    known_n: Tensor
    alpha: float
    schedule: ScheduleState
    metrics: dict[str, float]

    def advantages(self, positions: Tensor) -> Tensor:
        """Advantages at some positions of the rollout; 0 where nothing is trained."""
        if self.batch is None:
            return torch.zeros(len(positions), dtype=torch.float64)
        rows = self.row_N[positions]
        return torch.where(rows >= 0, self.batch.advantages_N[rows.clamp(min=0)], 0.0)

    def part(self, rows_m: Tensor) -> GroupBatch:
        """The rows of an optimizer step, with the log-probs known of them now."""
        assert self.batch is not None
        return optimizer_step_part(self.batch, rows_m, self.known_n)

    def holds_whole_groups(self, rows_m: Tensor) -> bool:
        """Whether the rows of an optimizer step cut no group."""
        assert self.batch is not None
        groups = self.batch.groups
        here_G = torch.bincount(groups.index_N[rows_m], minlength=groups.count)
        return bool(((here_G == 0) | (here_G == groups.sizes_G)).all())


def settle_rollout_steps(
    figures: SequenceFigures,
    groups: SettledGroups,
    apo: ApoSettings,
    limits: RolloutLimits,
    schedule: ScheduleState,
    step: int,
    total_steps: int,
) -> SettledRollout:
    """Advantages, alpha and metrics of a rollout.

    Args:
        figures: of all its sequences.
        groups: which of its groups the rules keep, and the rewards.
        apo, limits: the run's settings.
        schedule: the schedule's state; a rollout that nothing can be learnt from leaves it alone.
        step, total_steps: RL steps done and in all.
    """
    finite_N = in_finite_groups(figures)
    keep_N = groups.keep_N & finite_N
    settled = SettledRollout(
        batch=None,
        row_N=torch.where(keep_N, keep_N.to(torch.int64).cumsum(0) - 1, -1),
        broken_N=groups.keep_N & ~finite_N,
        known_n=figures.old_logprob_sums_N[keep_N].clone(),
        alpha=float("nan"),
        schedule=schedule,
        metrics=_reward_metrics(groups, figures),
    )
    if keep_N.any():
        _weigh(settled, figures.select(keep_N), apo, limits, step, total_steps)
    return settled


def _weigh(
    settled: SettledRollout,
    figures: SequenceFigures,
    apo: ApoSettings,
    limits: RolloutLimits,
    step: int,
    total_steps: int,
) -> None:
    """Fill in what needs sequences to train on."""
    batch = settle(figures, apo.objective, apo.tau, apo.regularizers, limits)
    settled.batch = batch
    settled.alpha, settled.schedule = schedule_alpha(
        apo.objective,
        apo.schedule,
        settled.schedule,
        batch,
        step=step,
        total_steps=total_steps,
        reward_mean=settled.metrics[record.REWARD_MEAN],
        token_entropy=figures.token_entropy,
        limits=limits,
    )
    settled.metrics |= rollout_metrics(apo.objective, settled.alpha, figures, batch)
    if apo.objective.uses_alpha:
        settled.metrics |= schedule_metrics(settled.schedule)


def _reward_metrics(groups: SettledGroups, figures: SequenceFigures) -> dict[str, float]:
    """Rewards of the groups that the rules keep (of all, if none), and what was dropped."""
    rewards_N = groups.rewards_N[groups.keep_N] if groups.keep_N.any() else groups.rewards_N
    return {
        record.REWARD_MEAN: float(rewards_N.mean()),
        record.REWARD_STD: float(rewards_N.std(correction=0)),
        record.REWARD_FAILED: groups.failed_grades,
        record.RESPONSE_LENGTH: float(figures.lengths_N.mean()),
        record.DROPPED_GROUPS: sum(groups.dropped.values()),
    }


def spread_columns(columns_m: Columns, trained_M: Tensor) -> Columns:
    """The columns of all sequences of an optimizer step; one that is not trained on weighs nothing.

    Args:
        columns_m: of those that are trained on, in order.
        trained_M: which these are, bool.
    """

    def spread(column_m: Tensor) -> Tensor:
        column_M = column_m.new_zeros(len(trained_M))
        column_M[trained_M] = column_m
        return column_M

    return columns_m.map(spread)
