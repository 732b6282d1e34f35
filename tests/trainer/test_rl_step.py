"""The RL step where it gets hard: failed grades, NaN, filters, regularizers, anchors, tau."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_apo import record
from nemo_apo.config import AnchorConfig, Config, OptimizerConfig, RolloutConfig, UpdateConfig
from nemo_apo.core.alpha_schedule import ScheduleState
from nemo_apo.core.filtering import GroupRules
from nemo_apo.core.objectives import OBJECTIVES, Apo, Regularizers
from nemo_apo.core.temperature import AdaptiveTemperature
from nemo_apo.parallel import layout as parallel_layout
from nemo_apo.parallel.layout import Layout
from nemo_apo.tasks import Prompt, SortTask
from nemo_apo.trainer.micro_batch import MicroBatch
from tests.parallel.ranks import run_ranks

from .tiny_runs import (
    EqualRewardTask,
    TokenSumTask,
    Training,
    WatchedStep,
    begin,
    bits_equal,
    parallel,
    tiny_config,
)

ONE_UPDATE = UpdateConfig(mini_batches=1, epochs=1, micro_batch_size=4)
TWO_EPOCHS = UpdateConfig(mini_batches=1, epochs=2, micro_batch_size=4)


def on_one_rank(work: Callable[[Layout], None]) -> None:
    """Run a test's body on a rank of its own, with megatron's groups."""
    run_ranks(1, lambda: work(parallel_layout.initialize(parallel(1, 1), 0)))


# Grades that fail


@dataclass(frozen=True)
class BrokenGrader(SortTask):
    """Fails on about a fifth of the completions: by NaN, by infinity or by raising."""

    length: int = 4
    how: str = "nan"

    def grade(self, prompt: Prompt, completion: list[int]) -> float:
        if not self.fails(completion):
            return sum(completion) % 7 / 7.0
        if self.how == "raises":
            raise RuntimeError("the grader broke")
        return float(self.how)

    def fails(self, completion: list[int]) -> bool:
        return sum(completion) % 5 == 0


@pytest.mark.parametrize("how", ["nan", "inf", "raises"])
def test_a_failed_grade_is_counted_and_settled_by_rule(how: str) -> None:
    task = BrokenGrader(how=how)

    def work(layout: Layout) -> None:
        base = tiny_config(task=task, update=ONE_UPDATE)
        worth = GroupRules(failed_grade="value", failed_reward=-2.0)
        valued = begin(replace(base, groups=worth), layout)
        outcome = valued.one()
        (drawn,) = valued.worker.drawn
        failed = ~torch.isfinite(drawn.rewards_N)
        assert 0 < int(failed.sum()) < 16
        assert outcome.metrics[record.REWARD_FAILED] == int(failed.sum())
        (read,) = valued.worker.read
        wanted = torch.where(failed, -2.0, drawn.rewards_N)
        assert torch.equal(read.rewards_N, wanted)
        assert outcome.optimizer_steps == 1
        assert outcome.skipped == 0
        assert all(math.isfinite(value) for value in outcome.metrics.values())

        dropping = begin(replace(base, groups=GroupRules(failed_grade="drop")), layout)
        outcome = dropping.one()
        clean = ~failed.reshape(4, 4).any(dim=1)
        assert 0 < int(clean.sum()) < 4, "the example drops no group, or all"
        assert outcome.metrics[record.DROPPED_GROUPS] == 4 - int(clean.sum())
        (read,) = dropping.worker.read
        assert read.group_ids_N.unique().tolist() == clean.nonzero().squeeze(1).tolist()
        assert read.count == 4 * int(clean.sum())
        assert outcome.skipped == 0

    on_one_rank(work)


# What is not finite


class PoisonedStep(WatchedStep):
    """Spoils the loss of chosen optimizer steps, on chosen ranks."""

    poisoned_steps: tuple[int, ...] = (0,)
    poisoned_ranks: tuple[int, ...] = (0,)
    kind = "loss"
    seen = -1

    def _train(self, *args: object) -> None:
        self.seen += 1
        super()._train(*args)  # type: ignore[arg-type]

    def _loss(self, logits: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        if self.seen in self.poisoned_steps and dist.get_rank() in self.poisoned_ranks:
            if self.kind == "logits":
                logits = logits * float("nan")
            loss, kept = super()._loss(logits, batch)
            if self.kind == "gradient":
                # The value stays as it was; the derivative is 0 x infinity.
                loss = loss + (logits.sum() * 0.0).sqrt()
            return loss, kept
        return super()._loss(logits, batch)


def state_of(training: Training) -> list[Tensor]:
    """Weights and optimizer moments of this rank."""
    moments = [
        value
        for entry in training.policy.optimizer.optimizer.state.values()
        for value in entry.values()
    ]
    return [value.clone() for value in (*training.policy.copy_weights(), *moments)]


@pytest.mark.parametrize("kind", ["logits", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(kind: str) -> None:
    def work(layout: Layout) -> None:
        training = begin(tiny_config(update=ONE_UPDATE), layout, PoisonedStep)
        worker = training.worker
        assert isinstance(worker, PoisonedStep)
        worker.kind, worker.poisoned_steps = kind, (1, 2)
        first = worker.run(0, ScheduleState(), 0, 0)
        assert (first.optimizer_steps, first.skipped, first.skipped_in_a_row) == (1, 0, 0)
        before = state_of(training)
        second = worker.run(1, first.schedule_state, 1, 0)
        assert (second.optimizer_steps, second.skipped, second.skipped_in_a_row) == (0, 1, 1)
        assert second.metrics[record.SKIPPED_STEPS] == 1
        assert bits_equal(state_of(training), before), "a skipped step left a trace"
        third = worker.run(2, second.schedule_state, 1, second.skipped_in_a_row)
        assert third.skipped_in_a_row == 2
        # The next good step goes on as if nothing had happened, and ends the row.
        fourth = worker.run(3, third.schedule_state, 1, third.skipped_in_a_row)
        assert (fourth.optimizer_steps, fourth.skipped_in_a_row) == (1, 0)
        assert math.isfinite(fourth.metrics[record.GRAD_NORM])
        assert not bits_equal(state_of(training), before)

    on_one_rank(work)


@pytest.mark.parametrize("refresh", ["forward", "stale"])
def test_one_bad_step_does_not_spoil_the_rest_of_the_rollout(refresh: str) -> None:
    def work(layout: Layout) -> None:
        update = UpdateConfig(mini_batches=2, epochs=2, micro_batch_size=4)
        config = tiny_config(update=update, objective=Apo(refresh=refresh))
        training = begin(config, layout, PoisonedStep)
        assert isinstance(training.worker, PoisonedStep)
        training.worker.kind = "logits"
        outcome = training.one()
        assert (outcome.optimizer_steps, outcome.skipped) == (3, 1)
        assert outcome.skipped_in_a_row == 0
        assert all(bool(torch.isfinite(w).all()) for w in training.policy.copy_weights())

    on_one_rank(work)


def skips_on_this_rank(tensor: int, pipeline: int, bad_rank: int, norm_only: bool) -> bool:
    layout = parallel_layout.initialize(parallel(tensor, pipeline), 0)
    config = tiny_config(update=ONE_UPDATE, parallel=parallel(tensor, pipeline))
    training = begin(config, layout, PoisonedStep)
    assert isinstance(training.worker, PoisonedStep)
    training.worker.kind = "gradient"
    training.worker.poisoned_ranks = () if norm_only else (bad_rank,)
    if norm_only and layout.rank == bad_rank:
        optimizer = training.policy.optimizer
        collective = optimizer.get_grad_norm
        optimizer.get_grad_norm = lambda: collective() * float("nan")
    before = training.policy.copy_weights()
    outcome = training.one()
    unchanged = bits_equal(training.policy.copy_weights(), before)
    return (outcome.optimizer_steps, outcome.skipped) == (0, 1) and unchanged


@pytest.mark.parametrize(
    ("tensor", "pipeline", "bad_rank", "norm_only"),
    [
        pytest.param(1, 1, 1, False, id="DP2, loss of one rank"),
        pytest.param(1, 1, 1, True, id="DP2, gradient norm of one rank"),
        pytest.param(1, 2, 1, False, id="PP2, loss of the last stage"),
        pytest.param(2, 1, 0, True, id="TP2, gradient norm of one rank"),
    ],
)
def test_all_ranks_skip_when_one_has_to(
    tensor: int, pipeline: int, bad_rank: int, norm_only: bool
) -> None:
    assert run_ranks(2, skips_on_this_rank, tensor, pipeline, bad_rank, norm_only) == [True, True]


# Groups without signal, dropped groups, resampling


def test_equal_rewards_give_no_gradient_under_any_objective() -> None:
    def work(layout: Layout) -> None:
        for name, objective in OBJECTIVES.items():
            config = tiny_config(task=EqualRewardTask(), objective=objective, update=ONE_UPDATE)
            training = begin(config, layout)
            outcome = training.one()
            assert outcome.metrics[record.NO_SIGNAL_SHARE] == 1.0, name
            assert outcome.metrics[record.GRAD_NORM] < 1e-9, name
            assert outcome.skipped == 0, name

    on_one_rank(work)


@pytest.mark.parametrize(
    ("rollout", "rules"),
    [
        pytest.param(
            RolloutConfig(prompts=4, group_size=1), GroupRules(), id="groups of one completion"
        ),
        pytest.param(
            RolloutConfig(prompts=4, group_size=4),
            GroupRules(truncated="drop", failed_grade="drop"),
            id="every group has a failed grade",
        ),
    ],
)
def test_a_rollout_without_any_group_left_changes_nothing_but_finishes(
    rollout: RolloutConfig, rules: GroupRules
) -> None:
    def work(layout: Layout) -> None:
        task = EqualRewardTask(worth=float("nan") if rollout.group_size > 1 else 1.0)
        training = begin(tiny_config(task=task, rollout=rollout, groups=rules), layout)
        before = training.policy.copy_weights()
        outcome = training.one()
        assert outcome.metrics[record.DROPPED_GROUPS] == 4
        assert (outcome.optimizer_steps, outcome.skipped) == (0, 0)
        assert outcome.samples == 4 * rollout.group_size
        assert bits_equal(training.policy.copy_weights(), before)
        # The schedule did not see a rollout that was not used.
        assert outcome.schedule_state == ScheduleState()

    on_one_rank(work)


def test_groups_with_a_truncated_completion_are_dropped_where_told_to() -> None:
    def work(layout: Layout) -> None:
        config = tiny_config(
            update=ONE_UPDATE,
            rollout=RolloutConfig(prompts=8, group_size=2),
            groups=GroupRules(truncated="drop"),
        )
        training = begin(config, layout)
        outcome = training.one()
        truncated = training.worker.drawn[0].truncated_N.reshape(8, 2).any(dim=1)
        assert 0 < int(truncated.sum()) < 8, "the example drops no group, or all"
        assert outcome.metrics[record.DROPPED_GROUPS] == int(truncated.sum())
        kept = training.worker.read[0].group_ids_N.unique().tolist()
        assert kept == (~truncated).nonzero().squeeze(1).tolist()

    on_one_rank(work)


@dataclass(frozen=True)
class SometimesSignalTask(SortTask):
    """Rewards differ only for prompts that start with an odd digit."""

    length: int = 4

    def grade(self, prompt: Prompt, completion: list[int]) -> float:
        return sum(completion) % 7 / 7.0 if int(prompt.text[0]) % 2 else 0.5


def test_resampling_replaces_groups_without_signal_and_counts_them() -> None:
    def work(layout: Layout) -> None:
        once = tiny_config(
            task=SometimesSignalTask(),
            update=ONE_UPDATE,
            rollout=RolloutConfig(prompts=8, group_size=4),
        )
        plain = begin(once, layout)
        without = plain.one()
        assert 0.0 < without.metrics[record.NO_SIGNAL_SHARE] < 1.0
        assert without.metrics[record.RESAMPLED_GROUPS] == 0
        assert without.samples == 32

        again = replace(once, rollout=replace(once.rollout, resample=4))
        training = begin(again, layout)
        outcome = training.one()
        drawn = training.worker.drawn
        assert outcome.metrics[record.NO_SIGNAL_SHARE] == 0.0
        replaced = sum(rollouts.count for rollouts in drawn[1:]) // 4
        assert outcome.metrics[record.RESAMPLED_GROUPS] == replaced > 0
        assert outcome.samples == 4 * (8 + replaced)
        (read,) = training.worker.read
        assert read.count == 32
        # What was good in the first round is kept, in order.
        good = (
            drawn[0]
            .group_ids_N[::4][drawn[0].rewards_N.reshape(8, 4).std(dim=1, correction=0) > 0]
            .tolist()
        )
        assert read.group_ids_N.unique().tolist()[: len(good)] == good
        # Different prompts were drawn, not the same ones again.
        first_prompts = {tuple(row[:5].tolist()) for row in drawn[0].tokens_NT}
        assert not first_prompts & {tuple(row[:5].tolist()) for row in drawn[1].tokens_NT}

    on_one_rank(work)


# Options of the update


def weights_after(config: Config, layout: Layout, steps: int = 1) -> list[Tensor]:
    training = begin(config, layout)
    for outcome in training.run(steps):
        assert outcome.skipped == 0
        assert math.isfinite(outcome.metrics[record.GRAD_NORM])
    return training.policy.copy_weights()


def test_stale_coefficients_run_and_differ_after_the_first_optimizer_step() -> None:
    def work(layout: Layout) -> None:
        forward, stale = tiny_config(), tiny_config(objective=Apo(refresh="stale"))
        ones = [
            weights_after(replace(config, update=ONE_UPDATE), layout) for config in (forward, stale)
        ]
        assert bits_equal(*ones)
        twos = [
            weights_after(replace(config, update=TWO_EPOCHS), layout) for config in (forward, stale)
        ]
        assert not bits_equal(*twos)
        refreshed = begin(replace(forward, update=TWO_EPOCHS), layout).one()
        spared = begin(replace(stale, update=TWO_EPOCHS), layout).one()
        assert record.REFRESH_SECONDS in refreshed.metrics
        assert record.REFRESH_SECONDS not in spared.metrics

    on_one_rank(work)


@pytest.mark.parametrize(
    "regularizers",
    [
        pytest.param(Regularizers(kl_coef=0.5, kl_estimator=name), id=name)
        for name in ("k1", "k2", "k3")
    ]
    + [pytest.param(Regularizers(entropy_coef=0.5), id="entropy")],
)
def test_regularizers_run_and_have_an_effect(regularizers: Regularizers) -> None:
    def work(layout: Layout) -> None:
        config = tiny_config(update=replace(TWO_EPOCHS, monitor_reference_kl=False))
        with_it = replace(config, regularizers=regularizers)
        # The first rollout is the reference's own, where k1 is 0.
        assert not bits_equal(weights_after(config, layout, 2), weights_after(with_it, layout, 2))

    on_one_rank(work)


def test_the_k3_penalty_holds_the_policy_back_and_the_bonus_keeps_its_entropy() -> None:
    def work(layout: Layout) -> None:
        config = tiny_config(
            update=UpdateConfig(mini_batches=2, epochs=2, micro_batch_size=8),
            optimizer=OptimizerConfig(lr=3e-3),
        )
        plain = begin(config, layout).run(4)[-1].metrics
        held = (
            begin(replace(config, regularizers=Regularizers(kl_coef=20.0)), layout)
            .run(4)[-1]
            .metrics
        )
        assert held[record.KL_REFERENCE] < 0.7 * plain[record.KL_REFERENCE]
        open_ended = (
            begin(replace(config, regularizers=Regularizers(entropy_coef=5.0)), layout)
            .run(4)[-1]
            .metrics
        )
        assert open_ended[record.TOKEN_ENTROPY] > plain[record.TOKEN_ENTROPY] + 0.01

    on_one_rank(work)


@pytest.mark.parametrize(
    ("style", "shares"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("cosine", [1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]),
    ],
)
def test_the_learning_rate_warms_up_and_decays(style: str, shares: list[float]) -> None:
    def work(layout: Layout) -> None:
        optimizer = OptimizerConfig(lr=1e-3, lr_warmup_steps=4, lr_decay_style=style)
        config = tiny_config(optimizer=optimizer)
        training = begin(replace(config, run=replace(config.run, steps=4)), layout)
        rates = [outcome.metrics[record.LEARNING_RATE] for outcome in training.run(4)]
        # Two optimizer steps per RL step; the figure is that of the last one.
        warm = [0.4, 0.8, 1.0, 1.0]
        assert rates == pytest.approx([1e-3 * w * s for w, s in zip(warm, shares, strict=True)])
        in_use = [group["lr"] for group in training.policy.optimizer.param_groups]
        assert in_use == pytest.approx([rates[-1]] * len(in_use))

    on_one_rank(work)


# Anchors


def anchor_gaps(anchor: AnchorConfig, layout: Layout, steps: int) -> tuple[list[float], Training]:
    """Largest |l - l_ref| of each rollout, before its first optimizer step."""
    training = begin(tiny_config(anchor=anchor), layout)
    training.run(steps)
    gaps = [
        float((batch.logprob_sums_N - batch.anchor_logprob_sums_N).abs().max())
        for batch in training.worker.batches
    ]
    return gaps, training


def test_each_anchor_stands_where_it_says() -> None:
    def work(layout: Layout) -> None:
        old, _ = anchor_gaps(AnchorConfig(name="old"), layout, 3)
        assert old == [0.0, 0.0, 0.0]
        reference, training = anchor_gaps(AnchorConfig(name="reference"), layout, 3)
        assert reference[0] == 0.0
        assert min(reference[1:]) > 1e-4
        read = training.worker.read[-1]
        assert read.reference_logprobs_NT is not None
        by_reference = torch.where(read.mask_NT, read.reference_logprobs_NT.double(), 0.0).sum(1)
        assert torch.equal(training.worker.batches[-1].anchor_logprob_sums_N, by_reference)
        lagged, _ = anchor_gaps(AnchorConfig(name="lagged", refresh_every=2), layout, 4)
        assert (lagged[0], lagged[2]) == (0.0, 0.0)
        assert min(lagged[1], lagged[3]) > 1e-4
        ema, _ = anchor_gaps(AnchorConfig(name="ema", decay=0.5), layout, 3)
        assert ema[0] == 0.0
        assert min(ema[1:]) > 1e-5
        # A moving average without memory is the policy itself.
        follows, _ = anchor_gaps(AnchorConfig(name="ema", decay=0.0), layout, 3)
        assert max(follows) < 1e-4

    on_one_rank(work)


def test_moving_anchors_advance_as_documented() -> None:
    def work(layout: Layout) -> None:
        training = begin(tiny_config(anchor=AnchorConfig(name="ema", decay=0.9)), layout)
        start = training.policy.copy_weights()
        training.run(1)
        assert training.remembered.anchor is not None
        after = training.policy.copy_weights()
        assert not bits_equal(start, after)
        for kept, before, now in zip(training.remembered.anchor, start, after, strict=True):
            torch.testing.assert_close(kept, 0.9 * before + 0.1 * now, rtol=1e-6, atol=1e-7)
        assert training.remembered.reference is not None
        assert bits_equal(training.remembered.reference, start), "the reference moved"

        anchor = AnchorConfig(name="lagged", refresh_every=2)
        training = begin(tiny_config(anchor=anchor), layout)
        start = training.policy.copy_weights()
        training.run(1)
        assert training.remembered.anchor is not None
        assert bits_equal(training.remembered.anchor, start)
        training.remembered.advance(training.policy, anchor, 2)
        assert bits_equal(training.remembered.anchor, training.policy.copy_weights())

    on_one_rank(work)


def test_the_anchors_drift_is_seen_from_the_second_optimizer_step_on() -> None:
    def work(layout: Layout) -> None:
        still = begin(tiny_config(update=ONE_UPDATE), layout).one()
        assert still.metrics[record.ANCHOR_DRIFT] == 0.0
        moved = begin(tiny_config(update=TWO_EPOCHS), layout).one()
        assert moved.metrics[record.ANCHOR_DRIFT] > 1e-4

    on_one_rank(work)


def test_holding_other_weights_is_undone() -> None:
    def work(layout: Layout) -> None:
        policy = begin(tiny_config(), layout).policy
        own = policy.copy_weights()
        zeros = [torch.zeros_like(weight) for weight in own]
        with policy.holding(zeros):
            assert bits_equal(policy.copy_weights(), zeros)
        assert bits_equal(policy.copy_weights(), own)
        with pytest.raises(RuntimeError, match="inside"), policy.holding(zeros):
            raise RuntimeError("inside")
        assert bits_equal(policy.copy_weights(), own)

    on_one_rank(work)


# tau


def test_adaptive_tau_follows_entropy_and_reward_of_each_prompt() -> None:
    def work(layout: Layout) -> None:
        tau = AdaptiveTemperature(base=0.5)
        training = begin(tiny_config(tau=tau, update=ONE_UPDATE), layout)
        outcome = training.one()
        (read,), (batch,) = training.worker.read, training.worker.batches
        assert read.entropy_NT is not None
        wanted = []
        rewards = read.rewards_N.reshape(4, 4).mean(dim=1)
        scaled = (rewards - rewards.min()) / (rewards.max() - rewards.min())
        for group in range(4):
            rows = slice(4 * group, 4 * group + 4)
            entropy = read.entropy_NT[rows][read.mask_NT[rows]].double().mean() / math.log(12)
            wanted.append(
                0.5 * (1.0 + 0.5 * entropy + 1.0 * (1.0 - entropy) * (1.0 - scaled[group]))
            )
        taus = batch.tau_N.reshape(4, 4)
        assert torch.equal(taus.min(dim=1).values, taus.max(dim=1).values)
        torch.testing.assert_close(taus[:, 0], torch.stack(wanted), rtol=1e-6, atol=0.0)
        assert outcome.metrics[record.TAU_MEAN] == pytest.approx(float(taus.mean()))
        assert float(taus.max() - taus.min()) > 0.05

    on_one_rank(work)


# The data stream


def test_prompts_and_samples_are_a_function_of_seed_and_step() -> None:
    def work(layout: Layout) -> None:
        def drawn(config: Config, step: int) -> Tensor:
            training = begin(config, layout)
            training.worker.run(step, ScheduleState(), 0, 0)
            return training.worker.drawn[0].tokens_NT

        config = tiny_config(task=TokenSumTask())
        first = drawn(config, 0)
        assert torch.equal(first, drawn(config, 0))
        assert not torch.equal(first, drawn(config, 1))
        other_seed = replace(config, run=replace(config.run, seed=1))
        assert not torch.equal(first, drawn(other_seed, 0))

    on_one_rank(work)
