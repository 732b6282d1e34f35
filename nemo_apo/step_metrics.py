"""The metrics of one RL step, under the names of ``nemo_apo.record``, for every host."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from nemo_apo import record
from nemo_apo.core.alpha_schedule import Schedule, ScheduleState
from nemo_apo.core.diagnostics import StepFigures, top_share
from nemo_apo.core.effective_sample import effective_sample_share
from nemo_apo.core.importance import truncated
from nemo_apo.core.objectives import Apo, GroupBatch, Objective, Weighing
from nemo_apo.core.objectives.anchored import anchored_coordinates
from nemo_apo.core.settling import SequenceFigures

T = TypeVar("T")


class Stopwatch:
    """Seconds spent under each metric name."""

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds: dict[str, float] = seconds or {}

    def time(self, name: str, work: Callable[[], T]) -> T:
        """Do the work and add its time to ``name``."""
        start = time.perf_counter()
        result = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return result


@dataclass(frozen=True)
class UpdateFigures:
    """What one optimizer step left behind, global.

    Attributes:
        loss: the loss summed over micro-batches and ranks.
        clipped_tokens, tokens: completion tokens that a clip took out of the gradient, and all.
        grad_norm: before clipping.
        not_finite: what was not finite, a key of ``SKIPPED_BECAUSE``, so that the step was skipped.
    """

    loss: float
    clipped_tokens: float
    tokens: float
    grad_norm: float
    not_finite: str | None = None


# Why an optimizer step is skipped: what was not finite, and the metric that counts it.
SKIPPED_BECAUSE: dict[str, str] = {
    "log-probs": record.SKIPPED_LOGPROBS,
    "coefficients": record.SKIPPED_COEFFICIENTS,
    "loss": record.SKIPPED_LOSS,
    "gradient": record.SKIPPED_GRADIENT,
}


@dataclass
class Tally:
    """Figures gathered over the optimizer steps of one rollout.

    Attributes:
        in_a_row: optimizer steps skipped in a row so far, earlier rollouts included.
        taken: optimizer steps of this rollout.
        skipped_because: those skipped, by what was not finite.
        last_skip: what was not finite in the last of those.
    """

    in_a_row: int
    taken: int = 0
    skipped_because: Counter[str] = field(default_factory=Counter)
    last_skip: str | None = None
    values: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    drifts_N: list[Tensor] = field(default_factory=list)
    top_shares: list[float] = field(default_factory=list)
    log_ratios: list[float] = field(default_factory=list)
    refresh_bias: float | None = None
    clipped: float = 0.0
    counted: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """The figures as plain numbers, ready for JSON."""
        return {**vars(self), "drifts_N": [drift_N.tolist() for drift_N in self.drifts_N]}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Tally":
        """The inverse of ``state_dict``."""
        drifts_N = [torch.tensor(drift, dtype=torch.float64) for drift in state["drifts_N"]]
        skipped = Counter(state["skipped_because"])
        return cls(**{**state, "drifts_N": drifts_N, "skipped_because": skipped})

    @property
    def skipped(self) -> int:
        return self.skipped_because.total()

    @property
    def steps(self) -> int:
        return self.taken + self.skipped

    def skip_metrics(self) -> dict[str, float]:
        """How many optimizer steps were skipped, and why."""
        reasons = {SKIPPED_BECAUSE[name]: n for name, n in self.skipped_because.items()}
        return {record.SKIPPED_STEPS: self.skipped, **reasons}

    def skip(self, not_finite: str) -> None:
        """Take in an optimizer step that was skipped."""
        self.in_a_row += 1
        self.skipped_because[not_finite] += 1
        self.last_skip = not_finite

    def weigh(
        self, objective: Objective, part: GroupBatch, alpha: float, anchor_is_old: bool
    ) -> Weighing:
        """``objective.weigh``, with the drift from the anchor noted where there can be one."""
        # The first step of a rollout stands on the anchor "old" by construction.
        stands_on_anchor = self.steps == 0 and anchor_is_old
        if objective.uses_anchor and not stands_on_anchor:
            reduction = objective.logprob_reduction  # type: ignore[attr-defined]
            self.drifts_N.append(anchored_coordinates(part, reduction))
        return objective.weigh(part, alpha)

    def note(self, objective: Objective, weighing: Weighing, update: UpdateFigures) -> None:
        """Take in one optimizer step."""
        if update.not_finite is None:
            self.in_a_row, self.taken = 0, self.taken + 1
        else:
            self.skip(update.not_finite)
        self.grad_norms.append(update.grad_norm)
        self.values.append(update.loss if weighing.value is None else float(weighing.value))
        if objective.weighs_current_policy:
            self.top_shares.append(float(top_share(weighing.columns.coefficient_N)))
        if weighing.log_ratio_N is not None:
            self.log_ratios.append(float(weighing.log_ratio_N.abs().max()))
        if weighing.clipped_N is not None:
            self.clipped += float(weighing.clipped_N.sum())
            self.counted += weighing.clipped_N.numel()
        else:
            self.clipped += update.clipped_tokens
            self.counted += update.tokens

    def metrics(self, objective: Objective) -> dict[str, float]:
        """The figures of the rollout's optimizer steps."""
        metrics: dict[str, float] = {
            record.OBJECTIVE_VALUE: _mean(self.values),
            record.GRAD_NORM: _mean(self.grad_norms),
            record.CLIPPED_SHARE: self.clipped / max(1.0, self.counted),
        }
        metrics |= self.skip_metrics()
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


def sampler_metrics(figures: SequenceFigures) -> dict[str, float]:
    """How far the sampler's own log-probs are from the trainer's, where it told them.

    All are of whole sequences, in which the gaps of tokens may cancel: the mean is the sum of their
    sizes over the number of tokens; the spread is that of the importance weights, standard
    deviation over mean.
    """
    if figures.sampler_logprob_sums_N is None:
        return {}
    gap_N = figures.old_logprob_sums_N - figures.sampler_logprob_sums_N
    weight_N = torch.exp(gap_N - gap_N.max())
    return {
        record.SAMPLER_MISMATCH: float(gap_N.abs().sum() / figures.lengths_N.sum()),
        record.SAMPLER_MISMATCH_MAX: float(gap_N.abs().max()),
        record.SAMPLER_WEIGHT_SPREAD: float(weight_N.std(correction=0) / weight_N.mean()),
    }


def importance_metrics(ratios_NT: Tensor, mask_NT: Tensor, cap: float) -> dict[str, float]:
    """Mean weight of a completion token after truncation, and the share that was truncated.

    Args:
        ratios_NT: trainer/sampler importance ratios, 1 on other tokens.
        mask_NT: true on completion tokens.
        cap: see ``nemo_apo.core.importance``.
    """
    ratios_n = ratios_NT[mask_NT].to(torch.float64)
    return {
        record.IMPORTANCE_WEIGHT: float(truncated(ratios_n, cap).mean()),
        record.IMPORTANCE_CAPPED_SHARE: float((ratios_n > cap).double().mean()),
    }


def coefficient_error(stale: Weighing, exact: Weighing) -> float:
    """Sum of the coefficients' errors over the sum of their sizes; 0 where there is none."""
    error_N = stale.columns.coefficient_N - exact.columns.coefficient_N
    total = exact.columns.coefficient_N.abs().sum()
    return float(error_N.abs().sum() / total) if total > 0.0 else 0.0


def rollout_metrics(
    objective: Objective, alpha: float, figures: SequenceFigures, batch: GroupBatch
) -> dict[str, float]:
    """What the rollout shows before any update."""
    groups = batch.groups
    metrics = {
        record.TOKEN_ENTROPY: figures.token_entropy,
        record.NO_SIGNAL_SHARE: float(groups.all_equal(figures.rewards_N).double().mean()),
    }
    metrics |= sampler_metrics(figures)
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


def step_figures(metrics: dict[str, float], schedule: Schedule) -> StepFigures | None:
    """The figures for diagnostics; None for a step whose groups were all dropped."""
    if record.TOKEN_ENTROPY not in metrics:
        return None
    start = getattr(schedule, "alpha_max", getattr(schedule, "alpha_start", None))
    alpha = metrics.get(record.ALPHA)
    return StepFigures(
        reward_mean=metrics[record.REWARD_MEAN],
        token_entropy=metrics[record.TOKEN_ENTROPY],
        no_signal_share=metrics[record.NO_SIGNAL_SHARE],
        alpha=alpha,
        alpha_start=alpha if start is None else start,
        improvement=metrics.get(record.IMPROVEMENT),
        anchor_drift=metrics.get(record.ANCHOR_DRIFT),
        coefficient_top_share=metrics.get(record.COEFFICIENT_TOP_SHARE),
        max_log_ratio=metrics.get(record.MAX_LOG_RATIO),
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
