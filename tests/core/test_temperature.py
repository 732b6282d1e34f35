"""The anchoring temperature."""

import math

import pytest
import torch

from nemo_apo.core.groups import Groups
from nemo_apo.core.temperature import TEMPERATURES, AdaptiveTemperature, FixedTemperature

VOCABULARY = 16


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_fixed() -> None:
    tau_G = FixedTemperature(base=0.7).tau(torch.zeros(2), torch.zeros(2), VOCABULARY)
    assert tau_G.dtype == torch.float64
    assert tau_G.tolist() == [0.7, 0.7]


def test_adaptive_worked_numbers() -> None:
    # Hbar = 0, 1/2, 1 of log 16; rewards 0.2, 0.5, 0.8 scale to 0, 1/2, 1:
    #   0.4 (1 + 0.5 * 0   + 1   * 1)         = 0.8
    #   0.4 (1 + 0.5 * 1/2 + 1/2 * (1 - 1/2)) = 0.6
    #   0.4 (1 + 0.5 * 1   + 0)               = 0.6
    entropy_G = math.log(VOCABULARY) * doubles(0.0, 0.5, 1.0)
    tau_G = AdaptiveTemperature(base=0.4).tau(doubles(0.2, 0.5, 0.8), entropy_G, VOCABULARY)
    assert tau_G.tolist() == pytest.approx([0.8, 0.6, 0.6])


def test_adaptive_weights() -> None:
    rule = AdaptiveTemperature(base=1.0, entropy_weight=0.2, reward_weight=3.0)
    entropy_G = 0.25 * math.log(VOCABULARY) * doubles(1.0, 1.0)
    # 1 + 0.2 * 0.25 + 3 * 0.75 * (1 - 0) and 1 + 0.2 * 0.25.
    assert rule.tau(doubles(0.0, 1.0), entropy_G, VOCABULARY).tolist() == pytest.approx([3.3, 1.05])


def test_equal_rewards_count_as_one_half() -> None:
    tau_G = AdaptiveTemperature(base=1.0).tau(doubles(0.7, 0.7), doubles(0.0, 0.0), VOCABULARY)
    assert tau_G.tolist() == [1.5, 1.5]


@pytest.mark.parametrize("reward", [0.7, 1.0 / 3.0, -0.1])
def test_equal_rewards_in_groups_of_unequal_size(reward: float) -> None:
    # The means of 3, 8 and 6 equal rewards differ in their last bits.
    groups = Groups.from_ids(torch.tensor([0] * 3 + [1] * 8 + [2] * 6))
    mean_G = groups.mean(torch.full((17,), reward, dtype=torch.float64))
    tau_G = AdaptiveTemperature(base=1.0).tau(mean_G, doubles(0.0, 0.0, 0.0), VOCABULARY)
    assert tau_G.tolist() == [1.5, 1.5, 1.5]


def test_small_but_real_differences_are_scaled() -> None:
    tau_G = AdaptiveTemperature(base=1.0).tau(
        doubles(0.7, 0.7 + 1e-9), doubles(0.0, 0.0), VOCABULARY
    )
    assert tau_G.tolist() == [2.0, 1.0]


def test_clamp() -> None:
    rewards_G, entropy_G = doubles(0.0, 1.0), doubles(0.0, 0.0)
    assert AdaptiveTemperature(base=4.0).tau(rewards_G, entropy_G, VOCABULARY).tolist() == [5, 4]
    low = AdaptiveTemperature(base=0.04).tau(rewards_G, entropy_G, VOCABULARY)
    assert low.tolist() == [0.1, 0.1]


def test_tau_is_detached_data() -> None:
    rewards_G = doubles(0.0, 1.0)
    AdaptiveTemperature().tau(rewards_G, doubles(0.0, 0.0), VOCABULARY)
    assert rewards_G.tolist() == [0.0, 1.0]
    assert {name: rule().name for name, rule in TEMPERATURES.items()} == {
        "fixed": "fixed",
        "adaptive": "adaptive",
    }


@pytest.mark.parametrize(
    ("rule", "key", "value"),
    [
        (FixedTemperature, "base", 0.0),
        (AdaptiveTemperature, "base", float("inf")),
        (AdaptiveTemperature, "min", 0.0),
        (AdaptiveTemperature, "min", 6.0),
        (AdaptiveTemperature, "entropy_weight", -0.5),
        (AdaptiveTemperature, "reward_weight", float("nan")),
    ],
)
def test_bad_values_name_key_and_value(rule: type, key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"tau\.{key} must .* got {value}"):
        rule(**{key: value})
