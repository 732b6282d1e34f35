"""One RL step: sample, settle, schedule, then optimizer steps by *weigh, split, sum*.

    prompts -> rollouts -> rewards -> signals -> alpha
      -> per optimizer step (whole groups): weigh -> columns -> micro-batches -> sum -> update

Every rank holds the same global rollout and takes the same decisions; only forward and backward
are split. Axes: N sequences, G groups, T tokens (see ``nemo_apo.core`` and ``rollouts``).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import TypeVar

import torch
from torch import Tensor

from nemo_apo import record
from nemo_apo.config import Config
from nemo_apo.core.advantages import group_advantages
from nemo_apo.core.alpha_schedule import ScheduleSignals, ScheduleState
from nemo_apo.core.anchoring import sequence_sums
from nemo_apo.core.diagnostics import effective_sample_share, top_share
from nemo_apo.core.filtering import SettledGroups, settle_groups
from nemo_apo.core.groups import Groups
from nemo_apo.core.objectives import Apo, GroupBatch, TokenInputs, Weighing
from nemo_apo.core.objectives.anchored import anchored_coordinates
from nemo_apo.tasks import Task
from nemo_apo.trainer.anchors import RememberedWeights
from nemo_apo.trainer.policy import MicroBatch, Policy
from nemo_apo.trainer.rollouts import Rollouts, assemble, check_tokens, concatenate
from nemo_apo.trainer.sampler import uniforms
from nemo_apo.trainer.sampling import complete, grade


T = TypeVar("T")


class Stopwatch:
    """Seconds spent under each metric name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, name: str, work: Callable[[], T]) -> T:
        """Do the work and add its time to ``name``."""
        start = time.perf_counter()
        result = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return result


@dataclass(frozen=True)
class StepOutcome:
    """What an RL step leaves behind besides changed weights.

    Attributes:
        schedule_state: to pass to the next RL step.
        optimizer_steps: optimizer steps taken (skipped ones not).
        skipped: optimizer steps skipped because something was not finite.
        skipped_in_a_row: of these, how many ended the step without a good one in between, added
            to those that the caller passed in.
        samples: completions drawn.
        metrics: by the names of ``nemo_apo.record``.
    """

    schedule_state: ScheduleState
    optimizer_steps: int
    skipped: int
    skipped_in_a_row: int
    samples: int
    metrics: dict[str, float]


@dataclass
class _Tally:
    """Figures gathered over the optimizer steps of one rollout."""

    taken: int = 0
    skipped: int = 0
    in_a_row: int = 0
    values: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    drifts_N: list[Tensor] = field(default_factory=list)
    top_shares: list[float] = field(default_factory=list)
    log_ratios: list[float] = field(default_factory=list)
    clipped: float = 0.0
    counted: float = 0.0


class RLStep:
    """The RL step of a policy under a configuration; it keeps no state of its own."""

    def __init__(
        self, policy: Policy, config: Config, task: Task, remembered: RememberedWeights
    ) -> None:
        self.policy = policy
        self.config = config
        self.task = task
        self.remembered = remembered

    def run(
        self, step: int, state: ScheduleState, optimizer_steps: int, skipped_in_a_row: int
    ) -> StepOutcome:
        """Run RL step number ``step`` (from 0).

        Args:
            step: index of the RL step; with the seed it determines prompts and samples.
            state: the schedule's state.
            optimizer_steps: optimizer steps of the run so far, for the learning-rate warm-up.
            skipped_in_a_row: optimizer steps skipped in a row so far.
        """
        watch = Stopwatch()
        began = time.perf_counter()
        rollouts, settled, drawn, metrics = self._sample(step, watch)
        metrics[record.SAMPLES] = drawn
        rollouts = rollouts.select(settled.keep_N)
        rollouts = replace(rollouts, rewards_N=settled.rewards_N[settled.keep_N])
        tally = _Tally(in_a_row=skipped_in_a_row)
        if rollouts.count > 0:
            rollouts = watch.time(record.LOGPROB_SECONDS, lambda: self._read(rollouts))
            batch = watch.time(record.WEIGH_SECONDS, lambda: self._group_batch(rollouts))
            alpha, state = self._schedule(step, state, rollouts, batch)
            metrics |= self._rollout_metrics(rollouts, batch)
            metrics |= self._schedule_metrics(state)
            self._optimize(step, alpha, rollouts, batch, optimizer_steps, tally, watch)
            metrics |= self._update_metrics(tally, optimizer_steps)
        metrics |= watch.seconds
        metrics[record.STEP_SECONDS] = time.perf_counter() - began
        return StepOutcome(state, tally.taken, tally.skipped, tally.in_a_row, drawn, metrics)

    def _sample(
        self, step: int, watch: Stopwatch
    ) -> tuple[Rollouts, SettledGroups, int, dict[str, float]]:
        """Draw a rollout; with ``rollout.resample`` replace groups without signal by new ones."""
        wanted = self.config.rollout.prompts
        rollouts = watch.time(record.ROLLOUT_SECONDS, lambda: self._draw(step, 0, wanted))
        drawn = rollouts.count
        first = rollouts
        for again in range(1, self.config.rollout.resample + 1):
            missing = wanted - int(self._with_signal(rollouts).sum())
            if missing <= 0:
                break
            extra = watch.time(
                record.ROLLOUT_SECONDS, lambda n=again, m=missing: self._draw(step, n, m)
            )
            drawn += extra.count
            rollouts = concatenate([rollouts, extra])
        resampled = rollouts.count - first.count
        if resampled:
            rollouts = self._prefer_signal(rollouts, wanted)
        settled = self._settle(rollouts)
        metrics = {
            record.REWARD_MEAN: float(settled.rewards_N.mean()),
            record.REWARD_STD: float(settled.rewards_N.std(correction=0)),
            record.REWARD_FAILED: settled.failed_grades,
            record.RESPONSE_LENGTH: float(first.lengths_N.mean()),
            record.TRUNCATED_SHARE: float(first.truncated_N.double().mean()),
            record.TOKENS_PER_SECOND: float(first.lengths_N.sum())
            / watch.seconds[record.ROLLOUT_SECONDS],
            record.DROPPED_GROUPS: sum(settled.dropped.values()),
            record.RESAMPLED_GROUPS: resampled // self.config.rollout.group_size,
        }
        return rollouts, settled, drawn, metrics

    def _draw(self, step: int, again: int, count: int) -> Rollouts:
        """Sample ``count`` groups; prompts and draws are a function of seed, step and round."""
        config, task = self.config, self.task
        stream = f"rollout/{step}/{again}"
        distinct = task.train_prompts(count, Random(f"{config.run.seed}/{stream}"))
        prompts = [prompt for prompt in distinct for _ in range(config.rollout.group_size)]
        draws = uniforms(config.run.seed, stream, len(prompts), task.max_response_length)
        completions = complete(self.policy, task, config.rollout, prompts, draws)
        group_ids_N = torch.arange(count).repeat_interleave(config.rollout.group_size)
        rollouts = assemble(
            prompts,
            completions,
            group_ids_N + again * config.rollout.prompts,
            grade(task, prompts, completions),
            task.max_prompt_length + task.max_response_length,
            task.pad_id,
        )
        check_tokens(rollouts.tokens_NT, task.vocab_size)
        return rollouts

    def _settle(self, rollouts: Rollouts) -> SettledGroups:
        return settle_groups(
            rollouts.rewards_N,
            rollouts.mask_NT.sum(dim=1),
            rollouts.truncated_N,
            Groups.from_ids(rollouts.group_ids_N),
            self.config.groups,
        )

    def _with_signal(self, rollouts: Rollouts) -> Tensor:
        """Groups that would be kept and whose rewards differ, bool [G]."""
        groups = Groups.from_ids(rollouts.group_ids_N)
        settled = self._settle(rollouts)
        kept_G = groups.min(settled.keep_N.to(torch.int64)) > 0
        return kept_G & ~groups.all_equal(settled.rewards_N)

    def _prefer_signal(self, rollouts: Rollouts, wanted: int) -> Rollouts:
        """``wanted`` groups of the rollout: those with signal first, in order of sampling."""
        groups = Groups.from_ids(rollouts.group_ids_N)
        signal_G = self._with_signal(rollouts)
        chosen_G = torch.argsort((~signal_G).to(torch.int64), stable=True)[:wanted]
        keep_G = torch.zeros(groups.count, dtype=torch.bool)
        keep_G[chosen_G] = True
        return rollouts.select(groups.spread(keep_G))

    def _read(self, rollouts: Rollouts) -> Rollouts:
        """Log-probs of the rollout under the policy, the anchor and the reference."""
        micro_batch = MicroBatch(rollouts.tokens_NT, rollouts.mask_NT)
        size = self.config.update.log_prob_micro_batch_size
        old_NT, entropy_NT = self.policy.read_logprobs(micro_batch, size)
        rollouts = replace(rollouts, old_logprobs_NT=old_NT, entropy_NT=entropy_NT)
        if self.remembered.reference is not None:
            with self.policy.holding(self.remembered.reference):
                reference_NT, _ = self.policy.read_logprobs(micro_batch, size)
            rollouts = replace(rollouts, reference_logprobs_NT=reference_NT)
        return replace(rollouts, anchor_logprob_sums_N=self._anchor_sums(rollouts, micro_batch))

    def _anchor_sums(self, rollouts: Rollouts, micro_batch: MicroBatch) -> Tensor:
        kind = self.config.anchor.name
        if kind == "old":
            return rollouts.old_logprob_sums_N
        if kind == "reference":
            assert rollouts.reference_logprobs_NT is not None
            return sequence_sums(rollouts.reference_logprobs_NT, rollouts.mask_NT)
        assert self.remembered.anchor is not None
        with self.policy.holding(self.remembered.anchor):
            size = self.config.update.log_prob_micro_batch_size
            logprobs_NT, _ = self.policy.read_logprobs(micro_batch, size)
        return sequence_sums(logprobs_NT, rollouts.mask_NT)

    def _group_batch(self, rollouts: Rollouts) -> GroupBatch:
        """Per-sequence scalars of the whole rollout; an optimizer step takes some of its groups."""
        groups = Groups.from_ids(rollouts.group_ids_N)
        rewards_N = self._penalised_rewards(rollouts)
        entropies_N = sequence_sums(_known(rollouts.entropy_NT), rollouts.mask_NT)
        entropy_G = groups.sum(entropies_N) / groups.sum(rollouts.lengths_N)
        tau_G = self.config.tau.tau(groups.mean(rewards_N), entropy_G, self.task.vocab_size)
        old_N = rollouts.old_logprob_sums_N
        return GroupBatch(
            groups=groups,
            advantages_N=group_advantages(rewards_N, groups, self.config.objective.advantages),
            lengths_N=rollouts.lengths_N,
            logprob_sums_N=old_N,
            old_logprob_sums_N=old_N,
            anchor_logprob_sums_N=_known(rollouts.anchor_logprob_sums_N),
            tau_N=groups.spread(tau_G),
            max_response_length=self.task.max_response_length,
        )

    def _penalised_rewards(self, rollouts: Rollouts) -> Tensor:
        """Rewards, less the k1 penalty where one is set."""
        if not self.config.regularizers.needs_reference:
            return rollouts.rewards_N
        reference_NT = _known(rollouts.reference_logprobs_NT)
        return self.config.regularizers.penalised_rewards(
            rollouts.rewards_N,
            rollouts.old_logprob_sums_N,
            sequence_sums(reference_NT, rollouts.mask_NT),
        )

    def _schedule(
        self, step: int, state: ScheduleState, rollouts: Rollouts, batch: GroupBatch
    ) -> tuple[float, ScheduleState]:
        """Alpha of this RL step; an objective without alpha leaves the state alone."""
        objective = self.config.objective
        if not isinstance(objective, Apo):
            return float("nan"), state
        log_q_N, log_p_N = objective.log_target_and_policy(batch)
        signals = ScheduleSignals(
            step=step,
            total_steps=self.config.run.steps,
            reward_mean=float(rollouts.rewards_N.mean()),
            token_entropy=_token_mean(_known(rollouts.entropy_NT), rollouts.mask_NT),
            vocab_size=self.task.vocab_size,
            log_q_N=log_q_N,
            log_p_N=log_p_N,
            groups=batch.groups,
        )
        return self.config.schedule.step(state, signals)

    def _optimize(
        self,
        step: int,
        alpha: float,
        rollouts: Rollouts,
        batch: GroupBatch,
        optimizer_steps: int,
        tally: _Tally,
        watch: Stopwatch,
    ) -> None:
        """All optimizer steps of the rollout."""
        config = self.config
        # The last log-probs that are known of each sequence, for coefficients after the first step.
        known_N = batch.logprob_sums_N.clone()
        order = torch.Generator().manual_seed(config.run.seed * 1_000_003 + step)
        for epoch in range(config.update.epochs):
            shuffled_G = torch.randperm(batch.groups.count, generator=order)
            for chosen_G in torch.tensor_split(shuffled_G, config.update.mini_batches):
                if chosen_G.numel() == 0:
                    continue
                rows = torch.isin(batch.groups.index_N, chosen_G).nonzero().squeeze(1)
                later = tally.taken + tally.skipped > 0
                self._refresh(rollouts, rows, known_N, later, watch)
                part = _select(batch, rows, known_N)
                weighing = watch.time(
                    record.WEIGH_SECONDS,
                    lambda p=part: config.objective.weigh(p, alpha),
                )
                if later and config.objective.uses_anchor:
                    self._note_drift(part, tally)
                lr = self._learning_rate(optimizer_steps + tally.taken)
                watch.time(
                    record.TRAIN_SECONDS,
                    lambda r=rows, w=weighing, x=lr: self._train(rollouts, r, w, x, known_N, tally),
                )

    def _refresh(
        self, rollouts: Rollouts, rows: Tensor, known_N: Tensor, later: bool, watch: Stopwatch
    ) -> None:
        """Bring the known log-probs of the rows up to date where the objective asks for it."""
        objective = self.config.objective
        stale = getattr(objective, "refresh", "forward") == "stale"
        if not later or stale or not objective.weighs_current_policy:
            return
        known_N[rows] = watch.time(
            record.REFRESH_SECONDS, lambda: self._current_sums(rollouts, rows)
        )

    def _current_sums(self, rollouts: Rollouts, rows: Tensor) -> Tensor:
        part = MicroBatch(rollouts.tokens_NT[rows], rollouts.mask_NT[rows])
        size = self.config.update.log_prob_micro_batch_size
        logprobs_NT, _ = self.policy.read_logprobs(part, size)
        return sequence_sums(logprobs_NT, part.mask_BT)

    def _train(
        self,
        rollouts: Rollouts,
        rows: Tensor,
        weighing: Weighing,
        lr: float,
        known_N: Tensor,
        tally: _Tally,
    ) -> None:
        """Forward, backward and the optimizer step on some rows of the rollout."""
        reference_NT = rollouts.reference_logprobs_NT
        in_loss = self.config.regularizers.needs_reference_in_loss
        part = MicroBatch(
            tokens_BT=rollouts.tokens_NT[rows],
            mask_BT=rollouts.mask_NT[rows],
            columns=weighing.columns,
            old_logprobs_BT=_known(rollouts.old_logprobs_NT)[rows],
            reference_logprobs_BT=_known(reference_NT)[rows] if in_loss else None,
        )
        size = self.config.update.micro_batch_size
        kept, sums_N = self.policy.accumulate(part, size, self._loss)
        known_N[rows] = sums_N
        loss = float(kept["loss"])
        update = self.policy.update(lr, loss)
        self._note(weighing, part, kept, update.grad_norm, tally)
        if update.skipped:
            tally.skipped += 1
            tally.in_a_row += 1
        else:
            tally.taken += 1
            tally.in_a_row = 0

    def _loss(self, logits_BTv: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's loss, a sum: objective plus regularizers."""
        config = self.config
        assert batch.columns is not None and batch.old_logprobs_BT is not None
        logprobs_BT, entropy_BT = self.policy.token_logprobs(logits_BTv, batch)
        inputs = TokenInputs(
            logprobs_BT=logprobs_BT,
            old_logprobs_BT=batch.old_logprobs_BT,
            mask_BT=batch.mask_BT,
            reference_logprobs_BT=batch.reference_logprobs_BT,
            entropy_BT=entropy_BT,
        )
        loss = config.objective.token_loss(inputs, batch.columns)
        loss = loss + config.regularizers.token_loss(inputs, batch.columns)
        return loss, {
            "loss": loss.detach().clone(),
            "clipped": config.objective.clipped_tokens(inputs, batch.columns).detach(),
            "logprob_sums": sequence_sums(logprobs_BT.detach(), batch.mask_BT),
        }

    def _learning_rate(self, done: int) -> float:
        warmup = self.config.optimizer.lr_warmup_steps
        return self.config.optimizer.lr * min(1.0, (done + 1) / (warmup + 1))

    def _note_drift(self, part: GroupBatch, tally: _Tally) -> None:
        reduction = self.config.objective.logprob_reduction  # type: ignore[attr-defined]
        tally.drifts_N.append(anchored_coordinates(part, reduction))

    def _note(
        self,
        weighing: Weighing,
        part: MicroBatch,
        kept: dict[str, Tensor],
        grad_norm: float,
        tally: _Tally,
    ) -> None:
        value = kept["loss"] if weighing.value is None else weighing.value
        tally.values.append(float(value))
        tally.grad_norms.append(grad_norm)
        if self.config.objective.weighs_current_policy:
            tally.top_shares.append(float(top_share(weighing.columns.coefficient_N)))
        if weighing.log_ratio_N is not None:
            tally.log_ratios.append(float(weighing.log_ratio_N.abs().max()))
        if weighing.clipped_N is not None:
            tally.clipped += float(weighing.clipped_N.sum())
            tally.counted += weighing.clipped_N.numel()
        else:
            tally.clipped += float(kept["clipped"])
            tally.counted += float(part.mask_BT.sum())

    def _rollout_metrics(self, rollouts: Rollouts, batch: GroupBatch) -> dict[str, float]:
        groups = batch.groups
        lengths = rollouts.lengths_N.sum()
        gap_N = (rollouts.sampler_logprob_sums_N - batch.old_logprob_sums_N).abs()
        metrics = {
            record.TOKEN_ENTROPY: _token_mean(_known(rollouts.entropy_NT), rollouts.mask_NT),
            record.NO_SIGNAL_SHARE: float(groups.all_equal(rollouts.rewards_N).double().mean()),
            record.SAMPLER_MISMATCH: float(gap_N.sum() / lengths),
        }
        if rollouts.reference_logprobs_NT is not None:
            delta_NT = _known(rollouts.old_logprobs_NT) - rollouts.reference_logprobs_NT
            k3_NT = torch.expm1(-delta_NT) + delta_NT
            metrics[record.KL_REFERENCE] = _token_mean(k3_NT, rollouts.mask_NT)
        if isinstance(self.config.objective, Apo):
            _, log_p_N = self.config.objective.log_target_and_policy(batch)
            metrics[record.ESS_SHARE] = float(effective_sample_share(log_p_N, groups))
        if self.config.objective.uses_anchor:
            metrics[record.TAU_MEAN] = float(batch.tau_N.mean())
        return metrics

    def _schedule_metrics(self, state: ScheduleState) -> dict[str, float]:
        named = {
            record.ALPHA: state.alpha,
            record.ALPHA_TARGET: state.target,
            record.CONFIDENCE: state.confidence,
            record.IMPROVEMENT: state.improvement,
            record.SCHEDULE_ESS: state.ess_share,
        }
        return {name: value for name, value in named.items() if value is not None}

    def _update_metrics(self, tally: _Tally, optimizer_steps: int) -> dict[str, float]:
        metrics = {
            record.OBJECTIVE_VALUE: _mean(tally.values),
            record.GRAD_NORM: _mean(tally.grad_norms),
            record.LEARNING_RATE: self._learning_rate(optimizer_steps + max(0, tally.taken - 1)),
            record.SKIPPED_STEPS: tally.skipped,
            record.CLIPPED_SHARE: tally.clipped / max(1.0, tally.counted),
        }
        if tally.drifts_N:
            metrics[record.ANCHOR_DRIFT] = float(torch.cat(tally.drifts_N).std(correction=0))
        elif self.config.objective.uses_anchor:
            metrics[record.ANCHOR_DRIFT] = 0.0
        if tally.top_shares:
            metrics[record.COEFFICIENT_TOP_SHARE] = _mean(tally.top_shares)
        if tally.log_ratios:
            metrics[record.MAX_LOG_RATIO] = max(tally.log_ratios)
        return metrics


def _select(batch: GroupBatch, rows: Tensor, known_N: Tensor) -> GroupBatch:
    """The rows of one optimizer step, with the log-probs known of them now."""
    return GroupBatch(
        groups=Groups.from_ids(batch.groups.ids_G[batch.groups.index_N[rows]]),
        advantages_N=batch.advantages_N[rows],
        lengths_N=batch.lengths_N[rows],
        logprob_sums_N=known_N[rows],
        old_logprob_sums_N=batch.old_logprob_sums_N[rows],
        anchor_logprob_sums_N=batch.anchor_logprob_sums_N[rows],
        tau_N=batch.tau_N[rows],
        max_response_length=batch.max_response_length,
    )


def _known(values: Tensor | None) -> Tensor:
    assert values is not None, "this column is filled in before it is read"
    return values


def _token_mean(values_NT: Tensor, mask_NT: Tensor) -> float:
    """Mean over completion tokens of the whole rollout."""
    return float(sequence_sums(values_NT, mask_NT).sum() / mask_NT.sum())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
