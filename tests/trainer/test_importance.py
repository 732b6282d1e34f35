"""The importance correction in whole RL steps: one rank against an oracle, layouts against one."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from nemo_apo import record
from nemo_apo.config import Config, ParallelConfig, UpdateConfig
from nemo_apo.core.objectives import OBJECTIVES, Regularizers
from nemo_apo.parallel import layout as parallel_layout
from nemo_apo.trainer.micro_batch import MicroBatch
from nemo_apo.trainer.rollouts import Rollouts, known
from tests.parallel.ranks import run_ranks

from .tiny_runs import (
    TINY_MODEL,
    EqualRewardTask,
    Training,
    WatchedStep,
    begin,
    bits_equal,
    tiny_config,
)

# Relative to a tensor's norm, in float32: what sums in another order leave.
TOLERANCE = 5e-6
CAP = 1.25
BASE = tiny_config(update=UpdateConfig(mini_batches=2, epochs=1, micro_batch_size=4))
CAPPED = replace(BASE, rollout=replace(BASE.rollout, importance_cap=CAP))


def gap_of(tokens: Tensor) -> Tensor:
    """By how many nats the engine of these tests is off, a function of the token: -0.4 to 0.4."""
    return 0.2 * (tokens % 5).to(torch.float32) - 0.4


class OffStep(WatchedStep):
    """An RL step whose samples come from an engine with log-probs of its own."""

    def _read(self, rollouts: Rollouts) -> Rollouts:
        rollouts = super()._read(rollouts)
        if rollouts.sampler_logprobs_NT is None:
            return rollouts
        theirs_NT = known(rollouts.old_logprobs_NT) - gap_of(rollouts.tokens_NT[:, 1:])
        return replace(rollouts, sampler_logprobs_NT=theirs_NT)


class ByHandStep(WatchedStep):
    """The corrected loss of a linear objective written out: sum of c_i w_it log pi_it."""

    def _loss(self, hidden_BTH: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        _, kept = super()._loss(hidden_BTH, batch)
        assert batch.columns is not None
        logprobs_BT, _ = self.policy.token_logprobs(hidden_BTH, batch)
        weights_BT = gap_of(batch.targets_BT).exp().clamp(max=CAP)
        terms_BT = batch.columns.coefficient_N[:, None].float() * weights_BT * logprobs_BT
        return terms_BT[batch.mask_BT].sum(), kept


class ExactStep(WatchedStep):
    """An engine whose log-probs are the trainer's to the last bit."""

    def _read(self, rollouts: Rollouts) -> Rollouts:
        rollouts = super()._read(rollouts)
        return replace(rollouts, sampler_logprobs_NT=rollouts.old_logprobs_NT)


def first_gradient(training: Training) -> dict[str, Tensor]:
    """The whole model's gradient at the first optimizer step of the first rollout."""
    found: list[dict[str, Tensor]] = []
    policy, update = training.policy, training.policy.update

    def watched(lr: float, loss_sum: float) -> object:
        own = [parameter.main_grad.clone() for parameter in policy.parameters()]
        with policy.holding(own):
            found.append(training.weights())
        return update(lr, loss_sum)

    policy.update = watched  # type: ignore[method-assign, assignment]
    training.run(1)
    return found[0]


def largest_gap(mine: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest |a - b| / |b| of any tensor."""
    assert mine.keys() == other.keys()
    return max(float((mine[name] - v).norm() / v.norm()) for name, v in other.items())


@pytest.mark.parametrize("name", ["apo", "gspo"])
def test_the_gradient_is_that_of_the_weighted_log_probs(name: str) -> None:
    def work() -> None:
        layout = parallel_layout.initialize(ParallelConfig(), 0)
        config = replace(CAPPED, objective=OBJECTIVES[name])
        off = replace(config, rollout=BASE.rollout)
        got = first_gradient(begin(config, layout, OffStep))
        wanted = first_gradient(begin(off, layout, ByHandStep))
        plain = first_gradient(begin(off, layout))
        assert largest_gap(got, wanted) < 2e-6
        assert largest_gap(got, plain) > 0.05, "the correction does not matter in this example"

    run_ranks(1, work)


def test_an_engine_that_is_exact_changes_no_bit() -> None:
    def work() -> None:
        layout = parallel_layout.initialize(ParallelConfig(), 0)
        for objective in OBJECTIVES.values():
            config = replace(BASE, objective=objective)
            plain = begin(config, layout)
            exact = begin(replace(CAPPED, objective=objective), layout, ExactStep)
            assert record.IMPORTANCE_WEIGHT not in plain.one().metrics
            metrics = exact.one().metrics
            assert metrics[record.IMPORTANCE_WEIGHT] == 1.0
            assert metrics[record.IMPORTANCE_CAPPED_SHARE] == 0.0
            assert bits_equal(exact.policy.copy_weights(), plain.policy.copy_weights())
            assert plain.worker.read[0].sampler_logprobs_NT is None

    run_ranks(1, work)


def test_the_metrics_are_those_of_the_tokens_drawn() -> None:
    def work() -> None:
        training = begin(CAPPED, None, OffStep)
        metrics = training.one().metrics
        (rollouts,) = training.worker.read
        ratios = [
            math.exp(0.2 * (token % 5) - 0.4)
            for row, mask in zip(rollouts.tokens_NT[:, 1:], rollouts.mask_NT, strict=True)
            for token in row[mask].tolist()
        ]
        mean = sum(min(ratio, CAP) for ratio in ratios) / len(ratios)
        capped = sum(ratio > CAP for ratio in ratios) / len(ratios)
        assert 0.0 < capped < 1.0
        assert metrics[record.IMPORTANCE_WEIGHT] == pytest.approx(mean, abs=1e-6)
        assert metrics[record.IMPORTANCE_CAPPED_SHARE] == pytest.approx(capped, abs=1e-12)

    run_ranks(1, work)


def test_the_static_engine_agrees_with_the_trainer_token_by_token() -> None:
    def work() -> None:
        training = begin(CAPPED)
        metrics = training.one().metrics
        (rollouts,) = training.worker.read
        gap = known(rollouts.old_logprobs_NT) - known(rollouts.sampler_logprobs_NT)
        assert float(gap[rollouts.mask_NT].abs().max()) < 1e-5
        sums = torch.where(rollouts.mask_NT, known(rollouts.sampler_logprobs_NT), 0.0)
        torch.testing.assert_close(
            sums.double().sum(dim=1), rollouts.sampler_logprob_sums_N, rtol=1e-6, atol=1e-6
        )
        assert metrics[record.IMPORTANCE_WEIGHT] == pytest.approx(1.0, abs=1e-5)

    run_ranks(1, work)


class FarReferenceStep(OffStep):
    """An RL step whose policy is not its reference, so that a penalty has a gradient."""

    def _read(self, rollouts: Rollouts) -> Rollouts:
        rollouts = super()._read(rollouts)
        reference_NT = known(rollouts.reference_logprobs_NT) - 0.5
        return replace(rollouts, reference_logprobs_NT=reference_NT)


def test_regularizers_are_not_scaled() -> None:
    """With equal rewards the objective has no gradient, and that of the regularizers is left."""

    def work() -> None:
        layout = parallel_layout.initialize(ParallelConfig(), 0)
        regularizers = Regularizers(kl_coef=0.2, kl_estimator="k3", entropy_coef=0.1)
        found = []
        for config in (BASE, CAPPED):
            config = replace(config, task=EqualRewardTask(), regularizers=regularizers)
            config = replace(config, objective=OBJECTIVES["grpo"])
            training = begin(config, layout, FarReferenceStep)
            found.append(first_gradient(training))
        plain, capped = found
        assert all(torch.equal(plain[name], capped[name]) for name in plain)
        assert max(float(value.abs().max()) for value in plain.values()) > 1e-5

    run_ranks(1, work)


def off_gradient(config: Config, parallel: ParallelConfig) -> dict[str, Tensor]:
    layout = parallel_layout.initialize(parallel, 0)
    return first_gradient(begin(replace(config, parallel=parallel), layout, OffStep))


@cache
def on_one_rank(config: Config) -> dict[str, Tensor]:
    (single,) = run_ranks(1, off_gradient, config, ParallelConfig())
    return single


@pytest.mark.parametrize(
    ("config", "parallel"),
    [
        pytest.param(CAPPED, ParallelConfig(2), id="TP2"),
        pytest.param(CAPPED, ParallelConfig(2, sequence_parallel=True), id="TP2+SP"),
        pytest.param(
            replace(CAPPED, update=replace(BASE.update, micro_batch_size=1)),
            ParallelConfig(1, 2),
            id="PP2, micro-batches of 1",
        ),
        pytest.param(CAPPED, ParallelConfig(), id="DP2"),
        pytest.param(CAPPED, ParallelConfig(context_parallel_size=2), id="CP2"),
        pytest.param(
            replace(CAPPED, objective=OBJECTIVES["grpo"]), ParallelConfig(), id="DP2, GRPO"
        ),
        pytest.param(
            replace(CAPPED, model=replace(TINY_MODEL, num_layers=4)),
            ParallelConfig(1, 2, virtual_pipeline_model_parallel_size=2),
            id="VPP2",
        ),
    ],
)
def test_two_ranks_have_the_gradient_of_one(config: Config, parallel: ParallelConfig) -> None:
    for got in run_ranks(2, off_gradient, config, parallel):
        assert largest_gap(got, on_one_rank(config)) < TOLERANCE


@pytest.mark.parametrize("size", [1, 3])
def test_the_micro_batches_do_not_matter(size: int) -> None:
    split = replace(CAPPED, update=replace(BASE.update, micro_batch_size=size))
    assert largest_gap(on_one_rank(split), on_one_rank(CAPPED)) < TOLERANCE
