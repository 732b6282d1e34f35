"""Failure signatures: each fires on its own history, and only it."""

import dataclasses
import json
from collections.abc import Callable

import pytest
import torch

from nemo_apo.core.diagnostics import (
    DiagnosticsState,
    Finding,
    StepFigures,
    Thresholds,
    observe,
    top_share,
)

WINDOW = 20
THRESHOLDS = Thresholds(window=WINDOW)
History = Callable[[int], StepFigures]


def healthy(t: int) -> StepFigures:
    """Reward rises, entropy falls a little, alpha moves, nothing is extreme."""
    return StepFigures(
        reward_mean=0.3 + 0.02 * t,
        token_entropy=1.0 - 0.005 * t,
        no_signal_share=0.3,
        alpha=0.9 - 0.01 * t,
        alpha_start=0.9,
        improvement=0.4,
        anchor_drift=0.2,
        coefficient_top_share=0.3,
        max_log_ratio=4.0,
    )


def but(**changes: Callable[[int], float | None]) -> History:
    """The healthy history with some figures replaced."""
    return lambda t: dataclasses.replace(
        healthy(t), **{key: value(t) for key, value in changes.items()}
    )


SICK: dict[str, tuple[str, History]] = {
    "entropy falls, reward flat": (
        "entropy collapse",
        but(reward_mean=lambda t: 0.3, token_entropy=lambda t: 1.0 - 0.02 * t),
    ),
    "entropy falls, reward falls": (
        "entropy collapse",
        but(reward_mean=lambda t: 0.9 - 0.02 * t, token_entropy=lambda t: 1.0 - 0.02 * t),
    ),
    "reward flat, entropy high, alpha back at its start": (
        "improvement gate closed",
        but(
            reward_mean=lambda t: 0.3,
            token_entropy=lambda t: 1.0,
            alpha=lambda t: 0.9 if t > 1 else 0.895,
        ),
    ),
    "few sequences hold the gradient": (
        "heavy-tailed gradient",
        but(coefficient_top_share=lambda t: 0.85),
    ),
    "q far from p": ("extreme ratio", but(max_log_ratio=lambda t: 45.0)),
    "policy on its anchor": ("schedule inert", but(anchor_drift=lambda t: 1e-5)),
    "alpha never left its bound": ("schedule inert", but(alpha=lambda t: 0.9)),
    "most groups of equal rewards": ("no signal", but(no_signal_share=lambda t: 0.8)),
}


def findings(history: History, steps: int = WINDOW) -> list[Finding]:
    state, found = DiagnosticsState(), []
    for t in range(steps):
        found, state = observe(state, history(t), THRESHOLDS)
    return found


@pytest.mark.parametrize("steps", [1, WINDOW, 2 * WINDOW])
def test_a_healthy_run_shows_nothing(steps: int) -> None:
    assert findings(healthy, steps) == []


@pytest.mark.parametrize("case", SICK)
def test_each_signature_fires_on_its_own_history_alone(case: str) -> None:
    name, history = SICK[case]
    found = findings(history)
    assert [finding.name for finding in found] == [name]
    assert found[0].message
    assert found[0].advice


@pytest.mark.parametrize("case", SICK)
def test_slopes_and_averages_wait_for_a_full_window(case: str) -> None:
    name, history = SICK[case]
    expected = [name] if name == "extreme ratio" else []
    assert [finding.name for finding in findings(history, WINDOW - 1)] == expected


@pytest.mark.parametrize("case", SICK)
def test_a_signature_goes_away_with_its_cause(case: str) -> None:
    _, history = SICK[case]
    recovered = findings(lambda t: history(t) if t < WINDOW else healthy(t - WINDOW), 2 * WINDOW)
    assert recovered == []


def test_falling_entropy_is_fine_while_the_reward_rises() -> None:
    assert findings(but(token_entropy=lambda t: 1.0 - 0.02 * t)) == []


def test_an_objective_without_alpha_or_target_shows_no_such_signature() -> None:
    bare = StepFigures(reward_mean=0.3, token_entropy=1.0, no_signal_share=0.3)
    assert findings(lambda t: bare) == []


def test_the_worst_of_all_worlds_shows_every_signature_that_can_be_together() -> None:
    everything = but(
        reward_mean=lambda t: 0.3,
        token_entropy=lambda t: 1.0 - 0.04 * t,
        alpha=lambda t: 0.9,
        coefficient_top_share=lambda t: 0.95,
        max_log_ratio=lambda t: 200.0,
        no_signal_share=lambda t: 0.9,
    )
    assert {finding.name for finding in findings(everything)} == {
        "entropy collapse",
        "heavy-tailed gradient",
        "extreme ratio",
        "schedule inert",
        "no signal",
    }


def test_the_state_holds_one_window_and_survives_json() -> None:
    state = DiagnosticsState()
    for t in range(3 * WINDOW):
        _, state = observe(state, healthy(t), THRESHOLDS)
    assert len(state.recent) == WINDOW
    assert state.recent[-1] == healthy(3 * WINDOW - 1)
    assert state.first_entropy == healthy(0).token_entropy
    restored = DiagnosticsState.from_state_dict(json.loads(json.dumps(state.state_dict())))
    assert restored == state
    _, sick = SICK["entropy falls, reward flat"]
    assert observe(restored, sick(0), THRESHOLDS) == observe(state, sick(0), THRESHOLDS)


def test_observe_changes_nothing() -> None:
    _, state = observe(DiagnosticsState(), healthy(0), THRESHOLDS)
    before = state.state_dict()
    observe(state, healthy(1), THRESHOLDS)
    assert state.state_dict() == before


def test_top_share_worked_numbers() -> None:
    # The top tenth of 20 are 2: (6 + 4) / (6 + 4 + 18 * 0.5).
    coefficients_N = torch.tensor([0.5, -0.5] * 9 + [-6.0, 4.0], dtype=torch.float64)
    assert float(top_share(coefficients_N)) == pytest.approx(10.0 / 19.0)
    assert float(top_share(torch.tensor([1.0, -3.0]).double())) == 0.75
    assert float(top_share(torch.zeros(5, dtype=torch.float64))) == 0.0


@pytest.mark.parametrize(
    ("key", "value"), [("window", 1), ("entropy_fall", -0.1), ("heavy_tail", float("nan"))]
)
def test_bad_thresholds_name_key_and_value(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"diagnostics\.{key} must be .*{value}"):
        Thresholds(**{key: value})
