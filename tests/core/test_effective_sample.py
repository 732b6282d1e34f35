"""Effective sample size of the path between policy and target."""

import pytest
import torch

from nemo_apo.core.effective_sample import effective_sample_share
from nemo_apo.core.groups import Groups

GROUPS = Groups.from_ids(torch.tensor([0, 0, 1, 1, 1]))


def log_probs(*values: float) -> torch.Tensor:
    return GROUPS.log_softmax(torch.tensor(values, dtype=torch.float64))


def test_worked_numbers() -> None:
    # 1 for uniform weights, 1/3 where one of three has it all: 2/3 on average.
    log_q_N, log_p_N = log_probs(0, 0, 900, 0, 0), log_probs(0, 0, 0, 0, 0)
    assert float(effective_sample_share(log_q_N, log_p_N, GROUPS, 1.0)) == pytest.approx(2 / 3)
    assert float(effective_sample_share(log_q_N, log_p_N, GROUPS, 0.0)) == pytest.approx(1.0)


def test_halfway_between_policy_and_target() -> None:
    # Group 0: q = (4/5, 1/5), p uniform, alpha 1/2: w = (2/3, 1/3), 1 / (4/9 + 1/9) / 2 = 0.9.
    log_q_N = log_probs(torch.log(torch.tensor(4.0)).item(), 0, 0, 0, 0)
    log_p_N = log_probs(0, 0, 0, 0, 0)
    share = float(effective_sample_share(log_q_N, log_p_N, GROUPS, 0.5))
    assert share == pytest.approx((0.9 + 1.0) / 2, abs=1e-7)
