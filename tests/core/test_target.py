"""The Boltzmann target."""

import math

import pytest
import torch

from nemo_apo.core.groups import Groups
from nemo_apo.core.target import boltzmann_log_target


def test_worked_numbers() -> None:
    # A / beta = (log 4, 0) and (1, 0, -1).
    groups = Groups.from_ids(torch.tensor([0, 0, 1, 1, 1]))
    advantages_N = torch.tensor([0.5 * math.log(4.0), 0.0, 0.5, 0.0, -0.5], dtype=torch.float64)
    norm = math.e + 1.0 + 1.0 / math.e
    expected = [0.8, 0.2, math.e / norm, 1.0 / norm, 1.0 / math.e / norm]
    log_q_N = boltzmann_log_target(advantages_N, groups, beta_r=0.5)
    assert log_q_N.exp().tolist() == pytest.approx(expected)


def test_no_signal_gives_the_uniform_target() -> None:
    groups = Groups.from_ids(torch.tensor([0] * 5))
    log_q_N = boltzmann_log_target(torch.zeros(5, dtype=torch.float64), groups, 0.3)
    assert log_q_N.tolist() == [-math.log(5.0)] * 5


def test_a_cold_target_stays_finite() -> None:
    groups = Groups.from_ids(torch.tensor([0, 0]))
    log_q_N = boltzmann_log_target(torch.tensor([1.0, -1.0]).double(), groups, 1e-3)
    assert log_q_N.tolist() == [0.0, -2000.0]


@pytest.mark.parametrize("beta_r", [0.0, -0.3, float("nan")])
def test_beta_must_be_positive(beta_r: float) -> None:
    with pytest.raises(ValueError, match=f"beta_r must be > 0, got {beta_r}"):
        boltzmann_log_target(torch.zeros(2), Groups.from_ids(torch.tensor([0, 0])), beta_r)
