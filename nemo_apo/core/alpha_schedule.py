"""Alpha schedules: one alpha per RL step, the same on every rank.

    alpha, state = schedule.step(state, signals)

A schedule is a value (its parameters); what it remembers is explicit data (``ScheduleState``) that
the host owns, passes in, gets back and saves. It is called after the rewards of a rollout are
known and before the coefficients of its first optimizer step are computed.

``guarded`` (APO, arXiv 2512.22953) lowers alpha only while the policy is confident *and* the
reward improves:

    target_t = alpha_max - (alpha_max - alpha_min) c_t g_t
    alpha_t  = rho alpha_{t-1} + (1 - rho) target_t,                       alpha_{-1} = alpha_max

The forms of the confidence c and the improvement g are ours (the paper's exact ones are not in
its public part); ``ess`` is ours too.

Axes: N sequences (see ``nemo_apo.core``).
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nemo_apo.core.effective_sample import effective_sample_share
from nemo_apo.core.groups import Groups

# RL steps over which the "relative" confidence averages the entropy that it later compares with.
REFERENCE_ENTROPY_STEPS = 3
# Alphas tried by the ess schedule before the best bracket is refined.
_ESS_GRID = 33
_ESS_REFINEMENTS = 3


@dataclass(frozen=True)
class ScheduleSignals:
    """What a schedule may look at, of the global rollout as it stands before the update.

    Attributes:
        step: index of the RL step, from 0.
        total_steps: RL steps of the whole run.
        reward_mean: mean reward of the rollout.
        token_entropy: entropy of the sampling policy, nats per completion token.
        vocab_size: size of the (unpadded) vocabulary.
        log_q_N: log target of the kept sequences, [N] float64.
        log_p_N: log anchored policy of the kept sequences, [N] float64.
        groups: their groups.
    """

    step: int
    total_steps: int
    reward_mean: float
    token_entropy: float
    vocab_size: int
    log_q_N: Tensor
    log_p_N: Tensor
    groups: Groups


@dataclass(frozen=True)
class ScheduleState:
    """A schedule's whole memory, plain numbers only; unused fields stay None.

    Attributes:
        alpha: the last alpha.
        target: where the last step pulled alpha to, before smoothing.
        confidence: the last confidence gate c, in [0, 1].
        improvement: the last improvement gate g, in [0, 1).
        reward_baseline: exponential moving average b of the mean reward.
        entropy_sum: sum of the token entropies of the first steps, nats.
        entropy_count: how many entropies ``entropy_sum`` holds.
        ess_share: mean effective sample size over P at the chosen alpha.
    """

    alpha: float | None = None
    target: float | None = None
    confidence: float | None = None
    improvement: float | None = None
    reward_baseline: float | None = None
    entropy_sum: float = 0.0
    entropy_count: int = 0
    ess_share: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "ScheduleState":
        """The inverse of ``state_dict``.

        Raises:
            ValueError: if a field is missing or unknown.
        """
        expected = {field.name for field in dataclasses.fields(cls)}
        if set(state) != expected:
            raise ValueError(
                f"schedule state has fields {sorted(state)}, expected {sorted(expected)}"
            )
        return cls(**state)


class Schedule(Protocol):
    """A rule for alpha."""

    def step(self, state: ScheduleState, signals: ScheduleSignals) -> tuple[float, ScheduleState]:
        """Alpha of this RL step, and the state to pass at the next one. Changes nothing."""
        ...


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"schedule.{name} must lie in [{low:g}, {high:g}], got {value}")


def _check_alpha_bounds(alpha_min: float, alpha_max: float) -> None:
    _check_range("alpha_min", alpha_min, 0.0, 1.0)
    _check_range("alpha_max", alpha_max, 0.0, 1.0)
    if alpha_min > alpha_max:
        raise ValueError(
            "schedule.alpha_min must not exceed schedule.alpha_max, "
            f"got alpha_min={alpha_min} and alpha_max={alpha_max}"
        )


@dataclass(frozen=True)
class FixedSchedule:
    """The same alpha at every step."""

    name: str = "fixed"
    alpha: float = 0.6

    def __post_init__(self) -> None:
        _check_range("alpha", self.alpha, 0.0, 1.0)

    def step(self, state: ScheduleState, signals: ScheduleSignals) -> tuple[float, ScheduleState]:
        return self.alpha, dataclasses.replace(state, alpha=self.alpha)


def _progress(signals: ScheduleSignals, decay_steps: int | None) -> float:
    """Share of the decay that is done, in [0, 1]; the last step of the decay is at 1."""
    steps = signals.total_steps if decay_steps is None else decay_steps
    return min(1.0, signals.step / max(1, steps - 1))


def _check_decay(alpha_start: float, alpha_end: float, decay_steps: int | None) -> None:
    _check_range("alpha_start", alpha_start, 0.0, 1.0)
    _check_range("alpha_end", alpha_end, 0.0, 1.0)
    if decay_steps is not None and decay_steps < 1:
        raise ValueError(f"schedule.decay_steps must be at least 1 or null, got {decay_steps}")


@dataclass(frozen=True)
class LinearSchedule:
    """A straight line from ``alpha_start`` to ``alpha_end`` over ``decay_steps`` RL steps.

    ``decay_steps`` None means the whole run; afterwards alpha stays at ``alpha_end``.
    """

    name: str = "linear"
    alpha_start: float = 0.9
    alpha_end: float = 0.35
    decay_steps: int | None = None

    def __post_init__(self) -> None:
        _check_decay(self.alpha_start, self.alpha_end, self.decay_steps)

    def step(self, state: ScheduleState, signals: ScheduleSignals) -> tuple[float, ScheduleState]:
        progress = _progress(signals, self.decay_steps)
        alpha = (1.0 - progress) * self.alpha_start + progress * self.alpha_end
        return alpha, dataclasses.replace(state, alpha=alpha)


@dataclass(frozen=True)
class CosineSchedule:
    """Half a cosine from ``alpha_start`` to ``alpha_end`` over ``decay_steps`` RL steps.

    ``decay_steps`` None means the whole run; afterwards alpha stays at ``alpha_end``.
    """

    name: str = "cosine"
    alpha_start: float = 0.9
    alpha_end: float = 0.35
    decay_steps: int | None = None

    def __post_init__(self) -> None:
        _check_decay(self.alpha_start, self.alpha_end, self.decay_steps)

    def step(self, state: ScheduleState, signals: ScheduleSignals) -> tuple[float, ScheduleState]:
        share_left = 0.5 * (1.0 + math.cos(math.pi * _progress(signals, self.decay_steps)))
        alpha = share_left * self.alpha_start + (1.0 - share_left) * self.alpha_end
        return alpha, dataclasses.replace(state, alpha=alpha)


def _confidence_token(state: ScheduleState, signals: ScheduleSignals) -> float:
    """1 - H / log V."""
    return 1.0 - signals.token_entropy / math.log(signals.vocab_size)


def _confidence_candidate(state: ScheduleState, signals: ScheduleSignals) -> float:
    """1 - mean over groups of H(p) / log P; 0 while the policy stands on its anchor."""
    p_N = torch.exp(signals.log_p_N)
    entropy_G = -signals.groups.sum(p_N * signals.log_p_N)
    share_G = entropy_G / torch.log(signals.groups.sizes_G.to(torch.float64))
    return 1.0 - float(share_G.mean())


def _confidence_relative(state: ScheduleState, signals: ScheduleSignals) -> float:
    """1 - H / H_0; 0 until H_0, the mean entropy of the first steps, is complete (ours)."""
    if state.entropy_count < REFERENCE_ENTROPY_STEPS or state.entropy_sum <= 0.0:
        return 0.0
    return 1.0 - signals.token_entropy * state.entropy_count / state.entropy_sum


CONFIDENCES: dict[str, Callable[[ScheduleState, ScheduleSignals], float]] = {
    "relative": _confidence_relative,
    "token": _confidence_token,
    "candidate": _confidence_candidate,
}


@dataclass(frozen=True)
class GuardedSchedule:
    """Down only if confident and improving, back up when improvement stalls (arXiv 2512.22953).

    Attributes:
        alpha_max: start and upper bound.
        alpha_min: lower bound; the paper advises 0.3-0.4 for sparse binary rewards.
        rho: smoothing of alpha, in [0, 1); 0 follows the target at once.
        confidence: "relative" (ours), "token" or "candidate".
        rho_r: smoothing of the reward baseline, in [0, 1).
        improvement_scale: rise of the mean reward over its baseline at which g = tanh(1).
    """

    name: str = "guarded"
    alpha_max: float = 0.9
    alpha_min: float = 0.35
    rho: float = 0.8
    confidence: str = "relative"
    rho_r: float = 0.98
    improvement_scale: float = 0.1

    def __post_init__(self) -> None:
        _check_alpha_bounds(self.alpha_min, self.alpha_max)
        for key in ("rho", "rho_r"):
            if not 0.0 <= getattr(self, key) < 1.0:
                raise ValueError(f"schedule.{key} must lie in [0, 1), got {getattr(self, key)}")
        if self.confidence not in CONFIDENCES:
            raise ValueError(
                f"schedule.confidence must be one of {sorted(CONFIDENCES)}, got {self.confidence!r}"
            )
        if not 0.0 < self.improvement_scale < math.inf:
            raise ValueError(
                f"schedule.improvement_scale must be > 0 and finite, got {self.improvement_scale}"
            )

    def step(self, state: ScheduleState, signals: ScheduleSignals) -> tuple[float, ScheduleState]:
        confidence = min(1.0, max(0.0, CONFIDENCES[self.confidence](state, signals)))
        improvement = self._improvement(state, signals)
        target = self.alpha_max - (self.alpha_max - self.alpha_min) * confidence * improvement
        previous = self.alpha_max if state.alpha is None else state.alpha
        # Written as a step from the target, so that alpha = alpha_max stays exactly there.
        alpha = target + self.rho * (previous - target)
        remembered = _remember_entropy(state, signals.token_entropy)
        return alpha, dataclasses.replace(
            remembered,
            alpha=alpha,
            target=target,
            confidence=confidence,
            improvement=improvement,
            reward_baseline=self._next_baseline(state, signals.reward_mean),
        )

    def _improvement(self, state: ScheduleState, signals: ScheduleSignals) -> float:
        """g = tanh(max(0, Rbar_t - b_{t-1}) / scale); 0 at the first step."""
        if state.reward_baseline is None:
            return 0.0
        rise = max(0.0, signals.reward_mean - state.reward_baseline)
        return math.tanh(rise / self.improvement_scale)

    def _next_baseline(self, state: ScheduleState, reward_mean: float) -> float:
        if state.reward_baseline is None:
            return reward_mean
        return self.rho_r * state.reward_baseline + (1.0 - self.rho_r) * reward_mean


def _remember_entropy(state: ScheduleState, entropy: float) -> ScheduleState:
    if state.entropy_count >= REFERENCE_ENTROPY_STEPS:
        return state
    return dataclasses.replace(
        state,
        entropy_sum=state.entropy_sum + entropy,
        entropy_count=state.entropy_count + 1,
    )


@dataclass(frozen=True)
class EssSchedule:
    """Alpha whose mean effective sample size is nearest ``ess_target`` of the group size (ours).

    The weights are w = softmax(a log q + (1 - a) log p), the geometric path from p to q, and the
    effective sample size 1 / sum w^2, as a share of the group's size. It is not monotone in a, so
    a grid over [alpha_min, alpha_max] is scanned and the best bracket refined; of equally good
    alphas the larger is taken. The result is smoothed and moves at most ``max_change`` per step.
    """

    name: str = "ess"
    alpha_max: float = 0.9
    alpha_min: float = 0.35
    ess_target: float = 0.5
    rho: float = 0.9
    max_change: float = 0.05

    def __post_init__(self) -> None:
        _check_alpha_bounds(self.alpha_min, self.alpha_max)
        if not 0.0 < self.ess_target <= 1.0:
            raise ValueError(f"schedule.ess_target must lie in (0, 1], got {self.ess_target}")
        if not 0.0 <= self.rho < 1.0:
            raise ValueError(f"schedule.rho must lie in [0, 1), got {self.rho}")
        if not 0.0 < self.max_change <= 1.0:
            raise ValueError(f"schedule.max_change must lie in (0, 1], got {self.max_change}")

    def step(self, state: ScheduleState, signals: ScheduleSignals) -> tuple[float, ScheduleState]:
        target = self._nearest_alpha(signals)
        previous = self.alpha_max if state.alpha is None else state.alpha
        pull = (1.0 - self.rho) * (target - previous)
        alpha = previous + min(self.max_change, max(-self.max_change, pull))
        return alpha, dataclasses.replace(
            state, alpha=alpha, target=target, ess_share=_ess_share(alpha, signals)
        )

    def _nearest_alpha(self, signals: ScheduleSignals) -> float:
        low, high = self.alpha_min, self.alpha_max
        for _ in range(1 + _ESS_REFINEMENTS):
            grid: list[float] = torch.linspace(high, low, _ESS_GRID, dtype=torch.float64).tolist()
            errors = [abs(_ess_share(a, signals) - self.ess_target) for a in grid]
            best = errors.index(min(errors))
            high, low = grid[max(0, best - 1)], grid[min(_ESS_GRID - 1, best + 1)]
        return grid[best]


def _ess_share(alpha: float, signals: ScheduleSignals) -> float:
    share = effective_sample_share(signals.log_q_N, signals.log_p_N, signals.groups, alpha)
    return float(share)


SCHEDULES: dict[str, type] = {
    "fixed": FixedSchedule,
    "linear": LinearSchedule,
    "cosine": CosineSchedule,
    "guarded": GuardedSchedule,
    "ess": EssSchedule,
}
