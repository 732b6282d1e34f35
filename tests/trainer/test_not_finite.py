"""Log-probs or coefficients that are not finite: the optimizer steps that hold them are skipped."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nemo_apo import record
from nemo_apo.config import ParallelConfig, UpdateConfig
from nemo_apo.core.alpha_schedule import ScheduleState
from nemo_apo.core.objectives import Weighing
from nemo_apo.step_metrics import Tally
from nemo_apo.trainer.micro_batch import MicroBatch
from nemo_apo.trainer.pending import PendingRollout
from tests.parallel.ranks import run_ranks

from .tiny_runs import WatchedStep, begin, bits_equal, tiny_config

# Two optimizer steps of two groups each.
CONFIG = tiny_config(update=UpdateConfig(mini_batches=2, epochs=1, micro_batch_size=4))


class SpoiledReading(WatchedStep):
    """The first log-prob pass gives some sequences a log-prob that is not finite."""

    spoiled: tuple[int, ...] = (0,)
    value = float("-inf")
    passes = 0

    def _read_logprobs(self, rollouts: object) -> tuple[Tensor, Tensor]:
        logprobs_NT, entropy_NT = super()._read_logprobs(rollouts)  # type: ignore[arg-type]
        if self.passes == 0:
            rows = torch.tensor(self.spoiled)
            logprobs_NT[rows] = torch.where(
                rollouts.mask_NT[rows],  # type: ignore[attr-defined]
                self.value,
                logprobs_NT[rows],
            )
        self.passes += 1
        return logprobs_NT, entropy_NT


class SpoiledWeighing(WatchedStep):
    """The coefficients of the first optimizer step are not all finite."""

    weighed = 0

    def _weigh(self, rollout: PendingRollout, at_n: Tensor) -> Weighing:
        weighing = super()._weigh(rollout, at_n)
        self.weighed += 1
        if self.weighed > 1:
            return weighing
        coefficient_N = weighing.columns.coefficient_N.clone()
        coefficient_N[0] = float("inf")
        return replace(weighing, columns=replace(weighing.columns, coefficient_N=coefficient_N))


@pytest.mark.parametrize("value", [float("-inf"), float("nan")])
@pytest.mark.parametrize("parallel", [ParallelConfig(), ParallelConfig(2), ParallelConfig(1, 2)])
def test_log_probs(value: float, parallel: ParallelConfig) -> None:
    def work() -> None:
        training = begin(replace(CONFIG, parallel=parallel), None, SpoiledReading)
        assert isinstance(training.worker, SpoiledReading)
        training.worker.value = value
        outcome = training.one()
        assert (outcome.optimizer_steps, outcome.skipped) == (1, 1)
        assert outcome.not_finite == "log-probs"
        assert outcome.metrics[record.SKIPPED_LOGPROBS] == 1
        # The schedule and the weights have seen the three other groups only.
        assert math.isfinite(outcome.metrics[record.ALPHA])
        assert all(bool(torch.isfinite(w).all()) for w in training.policy.copy_weights())

    run_ranks(parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size, work)


def test_a_rollout_without_a_finite_group_changes_nothing() -> None:
    def work() -> None:
        training = begin(CONFIG, None, SpoiledReading)
        assert isinstance(training.worker, SpoiledReading)
        training.worker.spoiled = (0, 4, 8, 12)
        # Not even the gap to the sampler, which nothing can be said of, ends the run.
        update = replace(CONFIG.update, max_sampler_mismatch=0.1)
        training.worker.config = replace(CONFIG, update=update)
        before, state = training.policy.copy_weights(), ScheduleState(alpha=0.8)
        outcome = training.worker.run(0, state, 0, 3)
        assert (outcome.optimizer_steps, outcome.skipped, outcome.skipped_in_a_row) == (0, 2, 5)
        assert outcome.schedule_state == state
        assert bits_equal(training.policy.copy_weights(), before)
        assert record.ALPHA not in outcome.metrics
        assert outcome.mismatch is None

    run_ranks(1, work)


def test_coefficients() -> None:
    def work() -> None:
        training = begin(CONFIG, None, SpoiledWeighing)
        steps: list[int] = []
        accumulate = training.policy.accumulate

        def counted(batch: MicroBatch, size: int, loss: object) -> object:
            steps.append(batch.rows)
            return accumulate(batch, size, loss)  # type: ignore[arg-type]

        training.policy.accumulate = counted  # type: ignore[method-assign,assignment]
        outcome = training.one()
        assert (outcome.optimizer_steps, outcome.skipped) == (1, 1)
        assert outcome.not_finite == "coefficients"
        assert outcome.metrics[record.SKIPPED_COEFFICIENTS] == 1
        assert steps == [8], "no forward pass for a step that is skipped"

    run_ranks(1, work)


def test_the_last_reason_is_told() -> None:
    tally = Tally(in_a_row=0)
    for reason in ("loss", "gradient", "loss"):
        tally.skip(reason)
    assert tally.last_skip == "loss"
    assert Tally.from_state_dict(json.loads(json.dumps(tally.state_dict()))) == tally
    assert tally.skip_metrics() == {
        record.SKIPPED_STEPS: 3,
        record.SKIPPED_LOSS: 2,
        record.SKIPPED_GRADIENT: 1,
    }


class OtherSampler(WatchedStep):
    """The sampler says other log-probs than the trainer reads."""

    def _read_logprobs(self, rollouts: object) -> tuple[Tensor, Tensor]:
        logprobs_NT, entropy_NT = super()._read_logprobs(rollouts)  # type: ignore[arg-type]
        return logprobs_NT - 0.25, entropy_NT


@pytest.mark.parametrize(("limit", "stops"), [(None, False), (0.3, False), (0.2, True)])
def test_the_gap_to_the_sampler_is_measured_and_can_stop_the_run(
    limit: float | None, stops: bool
) -> None:
    def work() -> None:
        update = replace(CONFIG.update, max_sampler_mismatch=limit)
        training = begin(replace(CONFIG, update=update), None, OtherSampler)
        before = training.policy.copy_weights()
        outcome = training.one()
        assert outcome.metrics[record.SAMPLER_MISMATCH] == pytest.approx(0.25, abs=1e-5)
        longest = float(training.worker.read[0].lengths_N.max())
        largest = outcome.metrics[record.SAMPLER_MISMATCH_MAX]
        assert largest == pytest.approx(0.25 * longest, abs=1e-4)
        assert outcome.metrics[record.SAMPLER_WEIGHT_SPREAD] > 0.0
        assert (outcome.mismatch is not None) == stops
        assert bits_equal(training.policy.copy_weights(), before) == stops
        if stops:
            assert outcome.mismatch is not None
            assert "max_sampler_mismatch=0.2" in outcome.mismatch

    run_ranks(1, work)
