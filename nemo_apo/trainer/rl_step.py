"""One RL step: sample, settle, schedule, then optimizer steps by *weigh, split, sum*.

    prompts -> rollouts -> rewards -> signals -> alpha
      -> per optimizer step (whole groups): weigh -> columns -> micro-batches -> sum -> update

Every rank holds the same global rollout and takes the same decisions; only forward and backward
are split. Axes: N sequences, G groups, T tokens (see ``nemo_apo.core`` and ``rollouts``).
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_apo import record
from nemo_apo.config import Config
from nemo_apo.core.alpha_schedule import ScheduleState
from nemo_apo.core.anchoring import sequence_sums
from nemo_apo.core.groups import Groups
from nemo_apo.core.importance import importance_ratios, truncated, with_scaled_gradient
from nemo_apo.core.objectives import GroupBatch, TokenInputs, Weighing
from nemo_apo.core.objectives.anchored import needs_refresh, uses_stale_logprobs
from nemo_apo.core.objectives.regularizers import k3
from nemo_apo.core.settling import (
    RolloutLimits,
    SequenceFigures,
    in_finite_groups,
    optimizer_step_part,
    schedule_alpha,
    settle,
)
from nemo_apo.record import KeptGroup
from nemo_apo.step_metrics import (
    Stopwatch,
    Tally,
    UpdateFigures,
    coefficient_error,
    importance_metrics,
    rollout_metrics,
    schedule_metrics,
)
from nemo_apo.tasks import Task
from nemo_apo.trainer.anchors import RememberedWeights
from nemo_apo.trainer.interruption import NeverStop, StopCheck, check_stop
from nemo_apo.trainer.micro_batch import MicroBatch
from nemo_apo.trainer.pending import PendingRollout, StoredRollout, optimizer_step_rows
from nemo_apo.trainer.policy import Policy
from nemo_apo.trainer.rollout_source import RolloutSource
from nemo_apo.trainer.rollouts import Rollouts, known

# Share of the peak learning rate, by the share of the run that is done.
DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


@dataclass(frozen=True)
class StepOutcome:
    """What an RL step leaves behind besides changed weights.

    Attributes:
        schedule_state: to pass to the next RL step.
        optimizer_steps: optimizer steps taken (skipped ones not).
        skipped: optimizer steps skipped because something was not finite.
        skipped_in_a_row: how many were skipped in a row up to now, earlier RL steps included.
        samples: completions drawn.
        metrics: by the names of ``nemo_apo.record``.
        not_finite: what was not finite in the last of those skipped here, if any were.
        mismatch: why nothing was trained: sampler and trainer disagree beyond
            ``update.max_sampler_mismatch``; None if they do not.
        kept: groups for ``samples.jsonl``.
    """

    schedule_state: ScheduleState
    optimizer_steps: int
    skipped: int
    skipped_in_a_row: int
    samples: int
    metrics: dict[str, float]
    not_finite: str | None = None
    mismatch: str | None = None
    kept: tuple[KeptGroup, ...] = ()


class StoppedInRollout(Exception):
    """Raised on all ranks between two optimizer steps: stop early, and keep the rollout."""

    def __init__(self, reason: str, rollout: StoredRollout) -> None:
        super().__init__(reason)
        self.rollout = rollout


class RLStep:
    """The RL step of a policy under a configuration; it keeps no state of its own."""

    def __init__(
        self,
        policy: Policy,
        config: Config,
        task: Task,
        remembered: RememberedWeights,
        stop: StopCheck | None = None,
    ) -> None:
        self.policy = policy
        self.config = config
        self.task = task
        self.remembered = remembered
        self.stop = stop or NeverStop()
        self.source = RolloutSource(policy, config, task, self.stop)
        self.limits = RolloutLimits(policy.vocab_size, task.max_response_length)

    def run(
        self,
        step: int,
        state: ScheduleState,
        optimizer_steps: int,
        skipped_in_a_row: int,
        stored: StoredRollout | None = None,
    ) -> StepOutcome:
        """Run RL step number ``step`` (from 0).

        Args:
            step: index of the RL step; with the seed it determines prompts and samples.
            state: the schedule's state.
            optimizer_steps: optimizer steps of the run before this RL step, for the learning-rate
                warm-up.
            skipped_in_a_row: optimizer steps skipped in a row before this RL step.
            stored: the rollout of this RL step, if it was stopped in it.

        Raises:
            StoppedEarly: on all ranks, if it was asked for before the first optimizer step;
                nothing has changed.
            StoppedInRollout: the same between two optimizer steps.
        """
        began = time.perf_counter()
        if stored is None:
            rollout = self._begin(step, state, Tally(skipped_in_a_row))
        else:
            rollout = self._again(step, stored)
        spent = rollout.watch.seconds
        mismatch = self._mismatch(rollout)
        if mismatch is None:
            self._optimize(step, rollout, optimizer_steps, began)
        tally, metrics = rollout.tally, rollout.metrics | spent
        metrics[record.STEP_SECONDS] = spent.get(record.STEP_SECONDS, 0.0) + _since(began)
        if rollout.parts:
            last_lr = self._learning_rate(step, optimizer_steps + max(0, tally.taken - 1))
            metrics |= {record.LEARNING_RATE: last_lr} | tally.metrics(self.config.objective)
        return StepOutcome(
            rollout.schedule,
            tally.taken,
            tally.skipped,
            tally.in_a_row,
            rollout.samples,
            metrics,
            tally.last_skip,
            mismatch,
            rollout.kept,
        )

    def _begin(self, step: int, state: ScheduleState, tally: Tally) -> PendingRollout:
        """Draw a rollout, read its log-probs, weigh it and step the schedule."""
        drawn, watch = self.source.draw(step), Stopwatch()
        pending = PendingRollout(
            drawn.rollouts,
            state,
            drawn.samples,
            dict(drawn.metrics),
            tally,
            watch=watch,
            kept=drawn.kept,
        )
        if drawn.rollouts.count == 0:
            return pending
        check_stop(self.stop)
        pending.rollouts = watch.time(record.LOGPROB_SECONDS, lambda: self._read(drawn.rollouts))
        check_stop(self.stop)
        figures = _sequence_figures(pending.rollouts)
        watch.time(record.WEIGH_SECONDS, lambda: self._settle_into(pending, figures, step))
        pending.metrics |= _reference_metrics(pending.rollouts)
        pending.metrics |= self._importance_metrics(pending.rollouts)
        if pending.batch is not None:
            pending.known_n = pending.batch.logprob_sums_N.clone()
            finite = figures.select(pending.row_N >= 0)
            self._step_schedule(pending, pending.batch, finite, step)
        return pending

    def _again(self, step: int, stored: StoredRollout) -> PendingRollout:
        """The rollout of a checkpoint, where it was stopped."""
        made = stored.restore()
        self._settle_into(made, _sequence_figures(made.rollouts), step)
        return made

    def _settle_into(self, pending: PendingRollout, figures: SequenceFigures, step: int) -> None:
        """What follows from the rollout alone: the batch to weigh, and the optimizer steps."""
        finite_N = in_finite_groups(figures)
        pending.row_N = torch.where(finite_N, finite_N.to(torch.int64).cumsum(0) - 1, -1)
        if finite_N.any():
            pending.batch = self._settle(figures.select(finite_N))
        update, groups = self.config.update, Groups.from_ids(figures.group_ids_N)
        pending.parts = optimizer_step_rows(
            groups.index_N,
            groups.count,
            update.mini_batches,
            update.epochs,
            (self.config.run.seed * 1_000_003 + step) % 2**63,
        )

    def _step_schedule(
        self, pending: PendingRollout, batch: GroupBatch, figures: SequenceFigures, step: int
    ) -> None:
        """Alpha of this RL step, and what the rollout shows before any update."""
        objective = self.config.objective
        pending.alpha, pending.schedule = schedule_alpha(
            objective,
            self.config.schedule,
            pending.schedule,
            batch,
            step=step,
            total_steps=self.config.run.steps,
            reward_mean=pending.metrics[record.REWARD_MEAN],
            token_entropy=figures.token_entropy,
            limits=self.limits,
        )
        pending.metrics |= rollout_metrics(objective, pending.alpha, figures, batch)
        if objective.uses_alpha:
            pending.metrics |= schedule_metrics(pending.schedule)

    def _mismatch(self, rollout: PendingRollout) -> str | None:
        """Why the rollout must not be trained on: the sampler was another policy."""
        limit = self.config.update.max_sampler_mismatch
        gap = rollout.metrics.get(record.SAMPLER_MISMATCH)
        if limit is None or gap is None or gap <= limit:
            return None
        return (
            f"log-probs of sampler and trainer differ by {gap:.3g} nats per token "
            f"(update.max_sampler_mismatch={limit})"
        )

    def _read(self, rollouts: Rollouts) -> Rollouts:
        """Log-probs of the rollout under the policy, the anchor and the reference."""
        old_NT, entropy_NT = self._read_logprobs(rollouts)
        rollouts = replace(rollouts, old_logprobs_NT=old_NT, entropy_NT=entropy_NT)
        if self.remembered.reference is not None:
            with self.policy.holding(self.remembered.reference):
                reference_NT, _ = self._read_logprobs(rollouts)
            rollouts = replace(rollouts, reference_logprobs_NT=reference_NT)
        return replace(rollouts, anchor_logprob_sums_N=self._anchor_sums(rollouts))

    def _read_logprobs(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        batch = MicroBatch.of(rollouts.tokens_NT, rollouts.mask_NT)
        return self.policy.read_logprobs(batch, self.config.update.log_prob_micro_batch_size)

    def _anchor_sums(self, rollouts: Rollouts) -> Tensor:
        kind = self.config.anchor.name
        if kind == "old":
            return rollouts.old_logprob_sums_N
        if kind == "reference":
            return sequence_sums(known(rollouts.reference_logprobs_NT), rollouts.mask_NT)
        assert self.remembered.anchor is not None
        with self.policy.holding(self.remembered.anchor):
            logprobs_NT, _ = self._read_logprobs(rollouts)
        return sequence_sums(logprobs_NT, rollouts.mask_NT)

    def _importance_metrics(self, rollouts: Rollouts) -> dict[str, float]:
        cap = self.config.rollout.importance_cap
        if cap is None:
            return {}
        return importance_metrics(_importance_ratios(rollouts), rollouts.mask_NT, cap)

    def _settle(self, figures: SequenceFigures) -> GroupBatch:
        config = self.config
        return settle(figures, config.objective, config.tau, config.regularizers, self.limits)

    def _optimize(
        self, step: int, rollout: PendingRollout, optimizer_steps: int, began: float
    ) -> None:
        """The optimizer steps of the rollout that are not done; each holds whole groups."""
        while rollout.done < len(rollout.parts):
            if rollout.done > 0:
                self._stop_in(rollout, began)
            self._optimizer_step(step, rollout, rollout.parts[rollout.done], optimizer_steps)
            rollout.done += 1

    def _stop_in(self, rollout: PendingRollout, began: float) -> None:
        reason = self.stop.requested()
        if reason is not None:
            seconds = rollout.watch.seconds
            seconds[record.STEP_SECONDS] = seconds.get(record.STEP_SECONDS, 0.0) + _since(began)
            raise StoppedInRollout(reason, rollout.stored())

    def _optimizer_step(
        self, step: int, rollout: PendingRollout, rows: Tensor, optimizer_steps: int
    ) -> None:
        """Weigh some groups, and train on them; skipped by all ranks if something is not finite.

        Every rank holds the same log-probs and coefficients, so every rank skips.
        """
        tally, at_n = rollout.tally, rollout.row_N[rows]
        if bool((at_n < 0).any()):
            return tally.skip("log-probs")
        if tally.steps > 0:
            self._refresh(rollout, rows, at_n)
        weighing = rollout.watch.time(record.WEIGH_SECONDS, lambda: self._weigh(rollout, at_n))
        if rollout.done == len(rollout.parts) - 1:
            self._measure_staleness(rollout, rows, at_n, weighing)
        if not weighing.columns.all_finite:
            return tally.skip("coefficients")
        lr = self._learning_rate(step, optimizer_steps + tally.taken)
        return rollout.watch.time(
            record.TRAIN_SECONDS, lambda: self._train(rollout, rows, weighing, lr)
        )

    def _weigh(self, rollout: PendingRollout, at_n: Tensor) -> Weighing:
        assert rollout.batch is not None
        return rollout.tally.weigh(
            self.config.objective,
            optimizer_step_part(rollout.batch, at_n, rollout.known_n),
            rollout.alpha,
            anchor_is_old=self.config.anchor.name == "old",
        )

    def _refresh(self, rollout: PendingRollout, rows: Tensor, at_n: Tensor) -> None:
        """Bring the known log-probs of the rows up to date where the objective asks for it."""
        if needs_refresh(self.config.objective):
            rollout.known_n[at_n] = rollout.watch.time(
                record.REFRESH_SECONDS, lambda: self._current_sums(rollout.rollouts, rows)
            )

    def _current_sums(self, rollouts: Rollouts, rows: Tensor) -> Tensor:
        part = rollouts.select(rows)
        logprobs_NT, _ = self._read_logprobs(part)
        return sequence_sums(logprobs_NT, part.mask_NT)

    def _measure_staleness(
        self, rollout: PendingRollout, rows: Tensor, at_n: Tensor, stale: Weighing
    ) -> None:
        """With ``refresh: stale``, the relative error of the rollout's last coefficients."""
        if not uses_stale_logprobs(self.config.objective) or rollout.tally.steps == 0:
            return
        assert rollout.batch is not None
        current_n = rollout.known_n.clone()
        current_n[at_n] = self._current_sums(rollout.rollouts, rows)
        part = optimizer_step_part(rollout.batch, at_n, current_n)
        exact = self.config.objective.weigh(part, rollout.alpha)
        rollout.tally.refresh_bias = coefficient_error(stale, exact)

    def _train(self, rollout: PendingRollout, rows: Tensor, weighing: Weighing, lr: float) -> None:
        """Forward, backward and the optimizer step on some rows of the rollout."""
        chosen, cap = rollout.rollouts.select(rows), self.config.rollout.importance_cap
        in_loss = self.config.regularizers.needs_reference_in_loss
        part = MicroBatch.of(
            chosen.tokens_NT,
            chosen.mask_NT,
            columns=weighing.columns,
            old_logprobs_BT=known(chosen.old_logprobs_NT),
            reference_logprobs_BT=known(chosen.reference_logprobs_NT) if in_loss else None,
            importance_BT=None if cap is None else truncated(_importance_ratios(chosen), cap),
        )
        size = self.config.update.micro_batch_size
        kept, sums_N = self.policy.accumulate(part, size, self._loss)
        update = self.policy.update(lr, float(kept["loss"]))
        if update.not_finite is None:  # else they may be NaN, and stale coefficients would stay so
            rollout.known_n[rollout.row_N[rows]] = sums_N
        rollout.tally.note(
            self.config.objective,
            weighing,
            UpdateFigures(
                loss=float(kept["loss"]),
                clipped_tokens=float(kept["clipped"]),
                tokens=float(part.mask_BT.sum()),
                grad_norm=update.grad_norm,
                not_finite=update.not_finite,
            ),
        )

    def _loss(self, hidden_BTH: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's loss, a sum: objective plus regularizers."""
        config = self.config
        columns = batch.columns
        assert columns is not None
        logprobs_BT, entropy_BT = self.policy.token_logprobs(hidden_BTH, batch)
        inputs = TokenInputs(
            logprobs_BT=logprobs_BT,
            old_logprobs_BT=known(batch.old_logprobs_BT),
            mask_BT=batch.mask_BT,
            reference_logprobs_BT=batch.reference_logprobs_BT,
            entropy_BT=entropy_BT,
        )
        objective_inputs = inputs
        if batch.importance_BT is not None:
            scaled_BT = with_scaled_gradient(logprobs_BT, batch.importance_BT)
            objective_inputs = replace(inputs, logprobs_BT=scaled_BT)
        loss = config.objective.token_loss(objective_inputs, columns)
        loss = loss + config.regularizers.token_loss(inputs, columns)
        return loss, {
            "loss": loss.detach().clone(),
            "clipped": config.objective.clipped_tokens(inputs, columns).detach(),
            "logprob_sums": sequence_sums(logprobs_BT.detach(), batch.mask_BT),
        }

    def _learning_rate(self, step: int, done: int) -> float:
        """Learning rate of RL step ``step`` after ``done`` optimizer steps of the run."""
        optimizer = self.config.optimizer
        warmup = min(1.0, (done + 1) / (optimizer.lr_warmup_steps + 1))
        return (
            optimizer.lr * warmup * DECAYS[optimizer.lr_decay_style](step / self.config.run.steps)
        )


def _since(began: float) -> float:
    return time.perf_counter() - began


def _sequence_figures(rollouts: Rollouts) -> SequenceFigures:
    """The rollout's row of scalars per sequence."""
    reference_NT = rollouts.reference_logprobs_NT
    has_reference = reference_NT is not None
    return SequenceFigures(
        group_ids_N=rollouts.group_ids_N,
        rewards_N=rollouts.rewards_N,
        lengths_N=rollouts.lengths_N,
        entropy_sums_N=sequence_sums(known(rollouts.entropy_NT), rollouts.mask_NT),
        old_logprob_sums_N=rollouts.old_logprob_sums_N,
        anchor_logprob_sums_N=known(rollouts.anchor_logprob_sums_N),
        reference_logprob_sums_N=sequence_sums(known(reference_NT), rollouts.mask_NT)
        if has_reference
        else None,
        sampler_logprob_sums_N=rollouts.sampler_logprob_sums_N,
    )


def _importance_ratios(rollouts: Rollouts) -> Tensor:
    """Trainer/sampler importance ratio of each token of the rollout, [N, T]."""
    return importance_ratios(
        known(rollouts.old_logprobs_NT), known(rollouts.sampler_logprobs_NT), rollouts.mask_NT
    )


def _reference_metrics(rollouts: Rollouts) -> dict[str, float]:
    """KL to the reference (k3), nats per completion token, where its log-probs are at hand."""
    if rollouts.reference_logprobs_NT is None:
        return {}
    delta_NT = known(rollouts.old_logprobs_NT) - rollouts.reference_logprobs_NT
    kl_N = sequence_sums(k3(delta_NT), rollouts.mask_NT)
    return {record.KL_REFERENCE: float(kl_N.sum() / rollouts.mask_NT.sum())}
