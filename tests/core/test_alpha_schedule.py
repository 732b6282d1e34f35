"""Alpha schedules: worked numbers, bounds, purity, checkpoints."""

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_apo.core.alpha_schedule import (
    SCHEDULES,
    CosineSchedule,
    EssSchedule,
    FixedSchedule,
    GuardedSchedule,
    LinearSchedule,
    ScheduleSignals,
    ScheduleState,
)
from nemo_apo.core.groups import Groups

VOCABULARY = 16
GROUPS = Groups.from_ids(torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2]))
DETERMINISTIC = settings(derandomize=True, deadline=None, database=None, max_examples=40)


def log_weights(seed: int, spread: float) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    draw_N = torch.randn(GROUPS.index_N.numel(), generator=random, dtype=torch.float64)
    return GROUPS.log_softmax(spread * draw_N)


def signals(
    step: int = 0,
    total_steps: int = 10,
    reward: float = 0.0,
    entropy: float = 1.0,
    spread_q: float = 1.0,
    spread_p: float = 0.0,
) -> ScheduleSignals:
    return ScheduleSignals(
        step=step,
        total_steps=total_steps,
        reward_mean=reward,
        token_entropy=entropy,
        vocab_size=VOCABULARY,
        log_q_N=log_weights(1, spread_q),
        log_p_N=log_weights(2, spread_p),
        groups=GROUPS,
    )


def run(schedule: Any, sequence: list[ScheduleSignals]) -> list[float]:
    state, alphas = ScheduleState(), []
    for one in sequence:
        alpha, state = schedule.step(state, one)
        assert state.alpha == alpha
        alphas.append(alpha)
    return alphas


# Time-driven schedules.


def test_fixed() -> None:
    assert run(FixedSchedule(alpha=0.25), [signals(step=t) for t in range(3)]) == [0.25] * 3


def test_linear_worked_numbers() -> None:
    schedule = LinearSchedule(alpha_start=0.8, alpha_end=0.2, decay_steps=4)
    alphas = run(schedule, [signals(step=t) for t in range(6)])
    assert alphas == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.2, 0.2])


def test_cosine_worked_numbers() -> None:
    # Share left 1, 3/4, 1/2, 1/4, 0 at progress 0, 1/3, 1/2, 2/3, 1.
    schedule = CosineSchedule(alpha_start=0.8, alpha_end=0.2, decay_steps=7)
    alphas = run(schedule, [signals(step=t) for t in (0, 2, 3, 4, 6, 9)])
    assert alphas == pytest.approx([0.8, 0.65, 0.5, 0.35, 0.2, 0.2])


@pytest.mark.parametrize("kind", [LinearSchedule, CosineSchedule])
def test_without_decay_steps_the_last_step_of_the_run_is_at_the_end(kind: type) -> None:
    alphas = run(kind(), [signals(step=t, total_steps=5) for t in range(5)])
    assert alphas[0] == 0.9
    assert alphas[-1] == 0.35
    assert alphas == sorted(alphas, reverse=True)
    assert run(kind(), [signals(total_steps=1)]) == [0.9]


# Guarded.


def test_guarded_worked_numbers() -> None:
    # 1 - H / log 16 is 1/2 at H = log 4 and 1 at H = 0; a rise by the scale gives
    # g = tanh(1) = 0.7615941559557649. alpha = 3/4 previous + 1/4 target, b halves its way to R.
    #   R = 0.2  first step, g = 0            target 0.9                alpha 0.9       b 0.2
    #   R = 0.4  rise 0.2, c = 1/2            target 0.9 - 0.3 g        alpha 0.84288   b 0.3
    #   R = 0.3  no rise                      target 0.9                alpha 0.85716   b 0.3
    #   R = 0.5  rise 0.2, c = 1              target 0.9 - 0.6 g        alpha 0.75363   b 0.4
    #   R = 0.1  a fall is no improvement     target 0.9                alpha 0.79022
    schedule = GuardedSchedule(
        alpha_max=0.9,
        alpha_min=0.3,
        rho=0.75,
        rho_r=0.5,
        improvement_scale=0.2,
        confidence="token",
    )
    half = math.log(4.0)
    steps = [(0.2, half), (0.4, half), (0.3, half), (0.5, 0.0), (0.1, 0.0)]
    alphas = run(schedule, [signals(reward=r, entropy=h) for r, h in steps])
    assert alphas == pytest.approx(
        [0.9, 0.8428804383033177, 0.8571603287274883, 0.7536311231522514, 0.7902233423641886]
    )


def test_guarded_defaults_are_those_of_the_specification() -> None:
    assert dataclasses.asdict(GuardedSchedule()) == {
        "name": "guarded",
        "alpha_max": 0.9,
        "alpha_min": 0.35,
        "rho": 0.8,
        "confidence": "relative",
        "rho_r": 0.98,
        "improvement_scale": 0.1,
    }


def test_the_baseline_trails_the_reward() -> None:
    # b_t uses R_t only after g_t was taken: 0.5, 0.75 * 0.5 + 0.25 * 0.9 = 0.6, ...
    schedule, state, baselines = GuardedSchedule(rho_r=0.75), ScheduleState(), []
    for reward in (0.5, 0.9, 0.2):
        _, state = schedule.step(state, signals(reward=reward))
        baselines.append(state.reward_baseline)
    assert baselines == pytest.approx([0.5, 0.6, 0.5])


def test_relative_confidence_compares_with_the_first_three_steps() -> None:
    # H_0 = (3 + 2 + 1) / 3 = 2; the first three steps have no confidence, a risen entropy none.
    schedule, state, seen = GuardedSchedule(), ScheduleState(), []
    for entropy in (3.0, 2.0, 1.0, 0.5, 3.0, 1.0):
        _, state = schedule.step(state, signals(entropy=entropy))
        seen.append(state.confidence)
    assert seen == pytest.approx([0.0, 0.0, 0.0, 0.75, 0.0, 0.5])


def test_token_confidence_is_clipped_at_zero() -> None:
    schedule = GuardedSchedule(confidence="token")
    _, state = schedule.step(ScheduleState(), signals(entropy=1.01 * math.log(VOCABULARY)))
    assert state.confidence == 0.0


def test_candidate_confidence() -> None:
    schedule = GuardedSchedule(confidence="candidate")
    _, state = schedule.step(ScheduleState(), signals(spread_p=0.0))
    assert state.confidence == pytest.approx(0.0, abs=1e-15)

    def share(log_p: np.ndarray) -> float:
        return float(-(np.exp(log_p) * log_p).sum() / np.log(len(log_p)))

    one = signals(spread_p=1.5)
    parts = np.split(one.log_p_N.numpy(), [3, 5])
    _, state = schedule.step(ScheduleState(), one)
    assert state.confidence == pytest.approx(1.0 - np.mean([share(part) for part in parts]))
    assert 0.1 < state.confidence < 0.9


def test_alpha_returns_to_alpha_max_when_improvement_stalls() -> None:
    schedule, state = GuardedSchedule(rho_r=0.5), ScheduleState()
    for t in range(20):
        alpha, state = schedule.step(state, signals(reward=0.05 * t, entropy=1.0 - 0.04 * t))
    assert alpha < 0.75
    for _ in range(60):
        alpha, state = schedule.step(state, signals(reward=0.95, entropy=0.24))
    assert alpha == pytest.approx(0.9, abs=1e-4)


rewards_and_entropies = st.lists(
    st.tuples(st.floats(-2.0, 2.0), st.floats(0.0, 3.0), st.floats(0.0, 4.0)),
    min_size=1,
    max_size=12,
)
unit = st.floats(0.0, 1.0)


@DETERMINISTIC
@given(
    rewards_and_entropies,
    st.sampled_from(["relative", "token", "candidate"]),
    st.tuples(unit, unit).map(sorted),
    st.floats(0.0, 0.99),
)
def test_guarded_stays_in_bounds_and_falls_only_if_confident_and_improving(
    steps: list[tuple[float, float, float]], confidence: str, bounds: list[float], rho: float
) -> None:
    low, high = bounds
    schedule = GuardedSchedule(alpha_min=low, alpha_max=high, confidence=confidence, rho=rho)
    state, previous = ScheduleState(), high
    for reward, entropy, spread in steps:
        alpha, state = schedule.step(
            state, signals(reward=reward, entropy=entropy, spread_p=spread)
        )
        # The bounds hold up to the rounding of high - (high - low); [0, 1] holds exactly.
        assert low - 1e-15 <= alpha <= high + 1e-15
        assert 0.0 <= alpha <= 1.0
        if alpha < previous - 1e-15:
            assert state.confidence > 0.0
            assert state.improvement > 0.0
        previous = alpha


@pytest.mark.parametrize("kind", [LinearSchedule, CosineSchedule])
def test_time_driven_schedules_never_leave_the_unit_interval(kind: type) -> None:
    # alpha outside [0, 1] by one rounding would be refused by the divergence.
    for ends in ((1.0, 1.0), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 0.1)):
        schedule = kind(alpha_start=ends[0], alpha_end=ends[1], decay_steps=1000)
        alphas = [
            schedule.step(ScheduleState(), ScheduleSignals(t, 1, 0, 0, 2, *[None] * 3))[0]
            for t in range(1001)
        ]
        assert min(alphas) >= 0.0
        assert max(alphas) <= 1.0


# Effective sample size.


def ess_shares(one: ScheduleSignals, alphas: np.ndarray) -> np.ndarray:
    """Mean over groups of 1 / (P sum w^2), w = softmax(a log q + (1 - a) log p), at each alpha."""
    shares = []
    for rows in np.split(np.arange(GROUPS.index_N.numel()), [3, 5]):
        log_q, log_p = one.log_q_N.numpy()[rows], one.log_p_N.numpy()[rows]
        w = np.exp(np.outer(alphas, log_q) + np.outer(1.0 - alphas, log_p))
        w /= w.sum(axis=1, keepdims=True)
        shares.append(1.0 / (w**2).sum(axis=1) / len(rows))
    return np.mean(shares, axis=0)


@pytest.mark.parametrize("target", [0.3, 0.5, 0.8])
@pytest.mark.parametrize(("spread_q", "spread_p"), [(2.0, 0.0), (3.0, 1.0), (1.0, 3.0), (4.0, 4.0)])
def test_ess_finds_the_nearest_alpha(target: float, spread_q: float, spread_p: float) -> None:
    schedule = EssSchedule(ess_target=target, rho=0.0, max_change=1.0)
    one = signals(spread_q=spread_q, spread_p=spread_p)
    alpha, state = schedule.step(ScheduleState(), one)
    grid = np.linspace(0.35, 0.9, 100_001)
    best = np.abs(ess_shares(one, grid) - target).min()
    assert 0.35 <= alpha <= 0.9
    assert abs(ess_shares(one, np.array([alpha]))[0] - target) <= best + 1e-4
    assert state.ess_share == pytest.approx(ess_shares(one, np.array([alpha]))[0])
    assert state.target == pytest.approx(alpha)


def test_ess_on_the_anchor_with_no_signal_takes_the_larger_of_equal_alphas() -> None:
    schedule = EssSchedule(rho=0.0, max_change=1.0)
    alpha, _ = schedule.step(ScheduleState(alpha=0.4), signals(spread_q=0.0, spread_p=0.0))
    assert alpha == 0.9


def test_ess_is_smoothed_and_its_change_is_bounded() -> None:
    one = signals(spread_q=40.0)  # far too sharp a target: alpha_min is nearest
    _, state = EssSchedule().step(ScheduleState(), one)
    assert state.target == 0.35
    assert state.alpha == pytest.approx(0.9 - 0.05)  # 0.1 * 0.55 would be 0.055
    _, state = EssSchedule().step(state, one)
    assert state.alpha == pytest.approx(0.85 - 0.1 * (0.85 - 0.35))
    up = signals(spread_q=0.0)
    assert EssSchedule(rho=0.0).step(ScheduleState(alpha=0.5), up)[0] == pytest.approx(0.55)


@settings(DETERMINISTIC, max_examples=12)
@given(
    st.lists(st.tuples(st.floats(0.0, 8.0), st.floats(0.0, 8.0)), min_size=1, max_size=4),
    st.tuples(unit, unit).map(sorted),
    st.floats(0.05, 1.0),
    st.floats(0.0, 0.95),
)
def test_ess_stays_in_bounds(
    steps: list[tuple[float, float]], bounds: list[float], target: float, rho: float
) -> None:
    low, high = bounds
    schedule = EssSchedule(alpha_min=low, alpha_max=high, ess_target=target, rho=rho)
    state, previous = ScheduleState(), high
    for spread_q, spread_p in steps:
        alpha, state = schedule.step(state, signals(spread_q=spread_q, spread_p=spread_p))
        assert low - 1e-15 <= alpha <= high + 1e-15
        assert 0.0 <= alpha <= 1.0
        assert abs(alpha - previous) <= 0.05 + 1e-15
        previous = alpha


# Every schedule.


def story(t: int) -> ScheduleSignals:
    return signals(
        step=t,
        total_steps=12,
        reward=0.3 + 0.05 * t + 0.1 * math.sin(t),
        entropy=1.2 - 0.07 * t,
        spread_q=1.0 + 0.3 * t,
        spread_p=0.1 * t,
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_step_is_pure(name: str) -> None:
    schedule, state = SCHEDULES[name](), ScheduleState()
    for t in range(6):
        one, before = story(t), dataclasses.asdict(state)
        first, second = schedule.step(state, one), schedule.step(state, one)
        assert first == second
        assert dataclasses.asdict(state) == before
        assert torch.equal(one.log_q_N, story(t).log_q_N)
        assert torch.equal(one.log_p_N, story(t).log_p_N)
        state = first[1]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("saved_after", [0, 1, 2, 5])
def test_a_checkpoint_continues_bit_for_bit(name: str, saved_after: int) -> None:
    schedule, state, resumed = SCHEDULES[name](), ScheduleState(), None
    for t in range(12):
        if t == saved_after:
            resumed = ScheduleState.from_state_dict(json.loads(json.dumps(state.state_dict())))
        alpha, state = schedule.step(state, story(t))
        if resumed is not None:
            again, resumed = schedule.step(resumed, story(t))
            assert again == alpha
            assert resumed == state


def test_a_state_with_other_fields_is_refused() -> None:
    good = ScheduleState().state_dict()
    for bad in ({**good, "beta": 1.0}, {k: v for k, v in good.items() if k != "target"}):
        with pytest.raises(ValueError, match="schedule state has fields"):
            ScheduleState.from_state_dict(bad)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_listed_under_their_name(name: str) -> None:
    assert SCHEDULES[name]().name == name


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("fixed", "alpha", 1.1),
        ("fixed", "alpha", float("nan")),
        ("linear", "alpha_start", -0.1),
        ("linear", "alpha_end", 2.0),
        ("linear", "decay_steps", 0),
        ("cosine", "alpha_start", 1.5),
        ("cosine", "decay_steps", -3),
        ("guarded", "alpha_max", 1.2),
        ("guarded", "alpha_min", -0.2),
        ("guarded", "alpha_min", 0.95),
        ("guarded", "rho", 1.0),
        ("guarded", "rho_r", -0.1),
        ("guarded", "confidence", "entropy"),
        ("guarded", "improvement_scale", 0.0),
        ("guarded", "improvement_scale", float("inf")),
        ("ess", "alpha_min", 0.91),
        ("ess", "ess_target", 0.0),
        ("ess", "ess_target", 1.01),
        ("ess", "rho", 1.0),
        ("ess", "max_change", 0.0),
    ],
)
def test_bad_parameters_name_key_and_value(name: str, key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"schedule\.{key} must .*{value}"):
        SCHEDULES[name](**{key: value})
