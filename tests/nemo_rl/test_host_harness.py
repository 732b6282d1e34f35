"""The harness itself: the host runs as it is, on CPUs, with the numbers of the plain model."""

from typing import Any

import pytest
import torch

from tests.nemo_rl import host_config, host_session, tiny_model
from tests.nemo_rl.host_config import LR
from tests.nemo_rl.host_session import PlainModel, largest_gap, made_rollout, training_data

pytestmark = pytest.mark.nemo_rl


def test_the_example_is_a_configuration_of_the_host(model: str) -> None:
    config = host_config.master_config(model, "+apo.schedule.alpha_min=0.4")
    assert config.model_extra["apo"] == {"schedule": {"alpha_min": 0.4}}
    assert config.policy["train_global_batch_size"] == 8
    assert config.policy["generation"]["stop_token_ids"] == [tiny_model.END_ID]


@pytest.mark.slow(reason="starts Ray and two workers")
def test_logprobs_of_the_workers_are_those_of_the_plain_model(workers: Any, model: str) -> None:
    workers.put_weights(workers.first_weights)
    rollout = made_rollout(seed=1)
    with torch.no_grad():
        exact = PlainModel(model, lr=0.0).logprobs(rollout.tokens)
    found = host_session.read(workers, rollout)
    assert exact[rollout.mask.bool()].std() > 0.1, "nothing to tell apart"
    gap = (found[:, 1:] - exact) * rollout.mask
    assert float(gap.abs().max()) < 2e-6
    assert not found[:, 0].any()


@pytest.mark.slow(reason="starts Ray and two workers")
def test_the_hosts_own_loss_trains(workers: Any, model: str) -> None:
    """Its token-level clipped loss by hand: the ratio is 1, so nothing is clipped."""
    from nemo_rl.algorithms.loss import ClippedPGLossConfig, ClippedPGLossFn

    workers.put_weights(workers.first_weights)
    rollout = made_rollout(seed=2, groups=2)
    data = training_data(workers, rollout)
    workers.prepare_for_training()
    result = workers.train(data, ClippedPGLossFn(ClippedPGLossConfig()))

    plain = PlainModel(model, LR)
    gains = (plain.logprobs(rollout.tokens) * data["advantages"][:, 1:] * rollout.mask).sum()
    [exact] = [plain.step(-gains / rollout.mask.sum())]
    [found] = workers.gradients()
    assert largest_gap(found, exact) < 1e-6
    assert largest_gap(workers.weights(), dict(plain.model.named_parameters())) < 1e-6
    assert float(sum(result["all_mb_metrics"]["num_valid_samples"])) == len(rollout.rewards)
