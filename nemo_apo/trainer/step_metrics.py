"""The metrics of one RL step, under the names of ``nemo_apo.record``."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from nemo_apo import record
from nemo_apo.core.alpha_schedule import ScheduleState
from nemo_apo.core.anchoring import sequence_sums
from nemo_apo.core.diagnostics import top_share
from nemo_apo.core.effective_sample import effective_sample_share
from nemo_apo.core.objectives import Apo, GroupBatch, Objective, Weighing
from nemo_apo.core.objectives.regularizers import k3
from nemo_apo.trainer.policy import MicroBatch, Update
from nemo_apo.trainer.rollouts import Rollouts, known

T = TypeVar("T")


class Stopwatch:
    """Seconds spent under each metric name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, name: str, work: Callable[[], T]) -> T:
        """Do the work and add its time to ``name``."""
        start = time.perf_counter()
        result = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return result


@dataclass
class Tally:
    """Figures gathered over the optimizer steps of one rollout.

    Attributes:
        in_a_row: optimizer steps skipped in a row so far, earlier rollouts included.
        taken, skipped: optimizer steps of this rollout.
    """

    in_a_row: int
    taken: int = 0
    skipped: int = 0
    values: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    drifts_N: list[Tensor] = field(default_factory=list)
    top_shares: list[float] = field(default_factory=list)
    log_ratios: list[float] = field(default_factory=list)
    refresh_bias: float | None = None
    clipped: float = 0.0
    counted: float = 0.0

    @property
    def steps(self) -> int:
        return self.taken + self.skipped

    def note(
        self,
        objective: Objective,
        weighing: Weighing,
        part: MicroBatch,
        kept: dict[str, Tensor],
        update: Update,
    ) -> None:
        """Take in one optimizer step."""
        self.in_a_row = self.in_a_row + 1 if update.skipped else 0
        self.skipped += int(update.skipped)
        self.taken += int(not update.skipped)
        self.grad_norms.append(update.grad_norm)
        self.values.append(float(kept["loss"] if weighing.value is None else weighing.value))
        if objective.weighs_current_policy:
            self.top_shares.append(float(top_share(weighing.columns.coefficient_N)))
        if weighing.log_ratio_N is not None:
            self.log_ratios.append(float(weighing.log_ratio_N.abs().max()))
        if weighing.clipped_N is not None:
            self.clipped += float(weighing.clipped_N.sum())
            self.counted += weighing.clipped_N.numel()
        else:
            self.clipped += float(kept["clipped"])
            self.counted += float(part.mask_BT.sum())

    def metrics(self, objective: Objective, learning_rate: float) -> dict[str, float]:
        """The figures of the rollout's optimizer steps."""
        metrics: dict[str, float] = {
            record.OBJECTIVE_VALUE: _mean(self.values),
            record.GRAD_NORM: _mean(self.grad_norms),
            record.LEARNING_RATE: learning_rate,
            record.SKIPPED_STEPS: self.skipped,
            record.CLIPPED_SHARE: self.clipped / max(1.0, self.counted),
        }
        if objective.uses_anchor:
            drift = torch.cat(self.drifts_N).std(correction=0) if self.drifts_N else 0.0
            metrics[record.ANCHOR_DRIFT] = float(drift)
        if self.top_shares:
            metrics[record.COEFFICIENT_TOP_SHARE] = _mean(self.top_shares)
        if self.log_ratios:
            metrics[record.MAX_LOG_RATIO] = max(self.log_ratios)
        if self.refresh_bias is not None:
            metrics[record.REFRESH_BIAS] = self.refresh_bias
        return metrics


def rollout_metrics(
    objective: Objective, alpha: float, rollouts: Rollouts, batch: GroupBatch
) -> dict[str, float]:
    """What the rollout shows before any update."""
    groups = batch.groups
    gap_N = (rollouts.sampler_logprob_sums_N - batch.old_logprob_sums_N).abs()
    metrics = {
        record.TOKEN_ENTROPY: token_mean(known(rollouts.entropy_NT), rollouts.mask_NT),
        record.NO_SIGNAL_SHARE: float(groups.all_equal(rollouts.rewards_N).double().mean()),
        record.SAMPLER_MISMATCH: float(gap_N.sum() / rollouts.lengths_N.sum()),
    }
    if rollouts.reference_logprobs_NT is not None:
        delta_NT = known(rollouts.old_logprobs_NT) - rollouts.reference_logprobs_NT
        metrics[record.KL_REFERENCE] = token_mean(k3(delta_NT), rollouts.mask_NT)
    if isinstance(objective, Apo):
        log_q_N, log_p_N = objective.log_target_and_policy(batch)
        metrics[record.ESS_SHARE] = float(effective_sample_share(log_q_N, log_p_N, groups, alpha))
    if objective.uses_anchor:
        metrics[record.TAU_MEAN] = float(batch.tau_N.mean())
    return metrics


def schedule_metrics(state: ScheduleState) -> dict[str, float]:
    """Alpha and what decided it; nothing for an objective without alpha."""
    named = {
        record.ALPHA: state.alpha,
        record.ALPHA_TARGET: state.target,
        record.CONFIDENCE: state.confidence,
        record.IMPROVEMENT: state.improvement,
    }
    return {name: value for name, value in named.items() if value is not None}


def token_mean(values_NT: Tensor, mask_NT: Tensor) -> float:
    """Mean over the completion tokens of the whole rollout."""
    return float(sequence_sums(values_NT, mask_NT).sum() / mask_NT.sum())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
