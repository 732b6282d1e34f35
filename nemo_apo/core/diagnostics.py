"""Figures of one RL step that show trouble, and the failure signatures read off them.

The signatures are those of the APO paper (arXiv 2512.22953), the thresholds ours. A finding is
advice to a person; nothing in training depends on it. Axes: N sequences.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def top_share(coefficients_N: Tensor, share: float = 0.1) -> Tensor:
    """Share of sum |c| held by the largest ``share`` of the sequences, scalar; 0 if all are 0."""
    magnitude_N = coefficients_N.abs().sort(descending=True).values
    top = max(1, math.ceil(share * magnitude_N.numel()))
    return magnitude_N[:top].sum() / magnitude_N.sum().clamp(min=torch.finfo(torch.float64).tiny)


@dataclass(frozen=True)
class StepFigures:
    """What diagnostics look at, one RL step; None where an objective has no such figure.

    Attributes:
        reward_mean: mean reward of the rollout.
        token_entropy: nats per completion token.
        no_signal_share: share of groups whose rewards are all equal.
        alpha, alpha_start: this step's alpha and the schedule's first.
        improvement: the schedule's improvement gate, in [0, 1).
        anchor_drift: standard deviation of u over the optimizer steps of the rollout that do not
            stand on the anchor by construction.
        coefficient_top_share: see ``top_share``.
        max_log_ratio: largest |log q - log p|, nats.
    """

    reward_mean: float
    token_entropy: float
    no_signal_share: float
    alpha: float | None = None
    alpha_start: float | None = None
    improvement: float | None = None
    anchor_drift: float | None = None
    coefficient_top_share: float | None = None
    max_log_ratio: float | None = None


@dataclass(frozen=True)
class Thresholds:
    """When a signature counts as present.

    Attributes:
        window: RL steps over which slopes and averages are taken.
        entropy_fall: relative fall of the entropy over the window.
        reward_rise: rise of the mean reward over the window that counts as progress.
        high_entropy: share of the first entropy above which it counts as still high.
        heavy_tail: share of sum |c| in the top tenth of the sequences.
        extreme_log_ratio: |log q - log p|, nats.
        still_drift: anchor drift below which the schedule can have no effect of its own.
        no_signal: share of groups without signal.
    """

    window: int = 20
    entropy_fall: float = 0.2
    reward_rise: float = 0.01
    high_entropy: float = 0.9
    heavy_tail: float = 0.8
    extreme_log_ratio: float = 30.0
    still_drift: float = 1e-3
    no_signal: float = 0.7

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ValueError(f"diagnostics.window must be at least 2, got {self.window}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not 0.0 <= value < math.inf:
                raise ValueError(f"diagnostics.{field.name} must be >= 0 and finite, got {value}")


@dataclass(frozen=True)
class Finding:
    """A failure signature that is present: its name, what was seen, what to do."""

    name: str
    message: str
    advice: str


@dataclass(frozen=True)
class DiagnosticsState:
    """The figures of the last ``window`` RL steps, oldest first, and the first entropy."""

    recent: tuple[StepFigures, ...] = ()
    first_entropy: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "DiagnosticsState":
        """The inverse of ``state_dict``."""
        recent = tuple(StepFigures(**figures) for figures in state["recent"])
        return cls(recent=recent, first_entropy=state["first_entropy"])


def observe(
    state: DiagnosticsState, figures: StepFigures, thresholds: Thresholds
) -> tuple[list[Finding], DiagnosticsState]:
    """Take in one RL step; return the signatures present now and the new state."""
    recent = (*state.recent, figures)[-thresholds.window :]
    first = figures.token_entropy if state.first_entropy is None else state.first_entropy
    state = DiagnosticsState(recent=recent, first_entropy=first)
    findings = [found for test in SIGNATURES if (found := test(state, thresholds)) is not None]
    return findings, state


def _full(state: DiagnosticsState, thresholds: Thresholds) -> bool:
    return len(state.recent) >= thresholds.window


def _rise(values: list[float]) -> float:
    """Rise over the window by least squares: slope times the number of steps between its ends."""
    middle = (len(values) - 1) / 2.0
    spread = sum((i - middle) ** 2 for i in range(len(values)))
    slope = sum((i - middle) * value for i, value in enumerate(values)) / spread
    return slope * (len(values) - 1)


def _reward_rise(state: DiagnosticsState) -> float:
    return _rise([figures.reward_mean for figures in state.recent])


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _entropy_collapse(state: DiagnosticsState, thresholds: Thresholds) -> Finding | None:
    if not _full(state, thresholds):
        return None
    entropies = [figures.token_entropy for figures in state.recent]
    level = max(sum(entropies) / len(entropies), 1e-12)
    fall, rise = -_rise(entropies) / level, _reward_rise(state)
    if fall < thresholds.entropy_fall or rise >= thresholds.reward_rise:
        return None
    return Finding(
        "entropy collapse",
        f"entropy fell by {fall:.0%} over {len(entropies)} steps, reward rose by {rise:+.3f}",
        "raise schedule.rho or schedule.alpha_min; without a schedule, lower optimizer.lr",
    )


def _suppressed_improvement(state: DiagnosticsState, thresholds: Thresholds) -> Finding | None:
    last = state.recent[-1]
    if not _full(state, thresholds) or last.improvement is None or last.alpha is None:
        return None
    assert state.first_entropy is not None
    assert last.alpha_start is not None
    high = last.token_entropy >= thresholds.high_entropy * state.first_entropy
    at_start = last.alpha_start - last.alpha < 0.01
    if not (high and at_start and abs(_reward_rise(state)) < thresholds.reward_rise):
        return None
    return Finding(
        "improvement gate closed",
        f"reward flat, entropy still high, alpha at {last.alpha:.2f}",
        "look at schedule.improvement_scale and at the noise of the reward",
    )


def _heavy_tail(state: DiagnosticsState, thresholds: Thresholds) -> Finding | None:
    share = _mean([figures.coefficient_top_share for figures in state.recent])
    if not _full(state, thresholds) or share is None or share < thresholds.heavy_tail:
        return None
    return Finding(
        "heavy-tailed gradient",
        f"a tenth of the sequences holds {share:.0%} of the coefficient mass",
        "bound the ratio: objective.ratio_clip (apo), or a larger tau.base",
    )


def _extreme_ratio(state: DiagnosticsState, thresholds: Thresholds) -> Finding | None:
    largest = state.recent[-1].max_log_ratio
    if largest is None or largest < thresholds.extreme_log_ratio:
        return None
    return Finding(
        "extreme ratio",
        f"|log q - log p| reached {largest:.1f} nats",
        "raise tau.base, or set objective.ratio_clip",
    )


def _inert_schedule(state: DiagnosticsState, thresholds: Thresholds) -> Finding | None:
    if not _full(state, thresholds) or state.recent[-1].alpha is None:
        return None
    drift = _mean([figures.anchor_drift for figures in state.recent])
    if drift is not None and drift < thresholds.still_drift:
        return Finding(
            "schedule inert",
            f"anchor drift {drift:.1e}: the policy stands on its anchor, where alpha only "
            "rescales the target",
            "take more optimizer steps per rollout, or another anchor",
        )
    moved = any(f.alpha != f.alpha_start for f in state.recent)
    if moved or state.recent[-1].improvement is None:
        return None
    return Finding(
        "schedule inert",
        f"alpha has not left {state.recent[-1].alpha:.2f} for {len(state.recent)} steps",
        "look at schedule.confidence and schedule.improvement_scale",
    )


def _no_signal(state: DiagnosticsState, thresholds: Thresholds) -> Finding | None:
    share = _mean([figures.no_signal_share for figures in state.recent])
    if not _full(state, thresholds) or share is None or share < thresholds.no_signal:
        return None
    return Finding(
        "no signal",
        f"{share:.0%} of the groups have equal rewards",
        "filter or resample groups (rollout.resample), or bring prompts of other difficulty",
    )


SIGNATURES = (
    _entropy_collapse,
    _suppressed_improvement,
    _heavy_tail,
    _extreme_ratio,
    _inert_schedule,
    _no_signal,
)
