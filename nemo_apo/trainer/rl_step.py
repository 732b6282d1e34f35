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
from nemo_apo.core.objectives import GroupBatch, TokenInputs, Weighing
from nemo_apo.core.objectives.anchored import needs_refresh, uses_stale_logprobs
from nemo_apo.core.objectives.regularizers import k3
from nemo_apo.core.settling import (
    RolloutLimits,
    SequenceFigures,
    optimizer_step_part,
    schedule_alpha,
    settle,
)
from nemo_apo.step_metrics import (
    Stopwatch,
    Tally,
    UpdateFigures,
    coefficient_error,
    rollout_metrics,
    schedule_metrics,
)
from nemo_apo.tasks import Task
from nemo_apo.trainer.anchors import RememberedWeights
from nemo_apo.trainer.micro_batch import MicroBatch
from nemo_apo.trainer.policy import Policy
from nemo_apo.trainer.rollout_source import Drawn, RolloutSource
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
    """

    schedule_state: ScheduleState
    optimizer_steps: int
    skipped: int
    skipped_in_a_row: int
    samples: int
    metrics: dict[str, float]


class RLStep:
    """The RL step of a policy under a configuration; it keeps no state of its own."""

    def __init__(
        self, policy: Policy, config: Config, task: Task, remembered: RememberedWeights
    ) -> None:
        self.policy = policy
        self.config = config
        self.task = task
        self.remembered = remembered
        self.source = RolloutSource(policy, config, task)
        self.limits = RolloutLimits(task.vocab_size, task.max_response_length)

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
        began = time.perf_counter()
        drawn = self.source.draw(step)
        metrics = dict(drawn.metrics)
        tally = Tally(skipped_in_a_row)
        if drawn.rollouts.count > 0:
            state, trained = self._train_on(drawn, step, state, optimizer_steps, tally)
            metrics |= trained
        metrics[record.STEP_SECONDS] = time.perf_counter() - began
        return StepOutcome(
            state, tally.taken, tally.skipped, tally.in_a_row, drawn.samples, metrics
        )

    def _train_on(
        self,
        drawn: Drawn,
        step: int,
        state: ScheduleState,
        optimizer_steps: int,
        tally: Tally,
    ) -> tuple[ScheduleState, dict[str, float]]:
        """Weigh the rollout, step the schedule and take the optimizer steps."""
        watch = Stopwatch()
        config = self.config
        rollouts = watch.time(record.LOGPROB_SECONDS, lambda: self._read(drawn.rollouts))
        figures = _sequence_figures(rollouts)
        batch = watch.time(record.WEIGH_SECONDS, lambda: self._settle(figures))
        alpha, state = schedule_alpha(
            config.objective,
            config.schedule,
            state,
            batch,
            step=step,
            total_steps=config.run.steps,
            reward_mean=drawn.metrics[record.REWARD_MEAN],
            token_entropy=figures.token_entropy,
            limits=self.limits,
        )
        metrics = rollout_metrics(config.objective, alpha, figures, batch)
        metrics |= _reference_metrics(rollouts)
        if config.objective.uses_alpha:
            metrics |= schedule_metrics(state)
        self._optimize(step, alpha, rollouts, batch, optimizer_steps, tally, watch)
        last_lr = self._learning_rate(step, optimizer_steps + max(0, tally.taken - 1))
        metrics |= {record.LEARNING_RATE: last_lr}
        return state, metrics | tally.metrics(config.objective) | watch.seconds

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

    def _settle(self, figures: SequenceFigures) -> GroupBatch:
        config = self.config
        return settle(figures, config.objective, config.tau, config.regularizers, self.limits)

    def _optimize(
        self,
        step: int,
        alpha: float,
        rollouts: Rollouts,
        batch: GroupBatch,
        optimizer_steps: int,
        tally: Tally,
        watch: Stopwatch,
    ) -> None:
        """All optimizer steps of the rollout; each holds whole groups."""
        update = self.config.update
        # The last log-probs known of each sequence: what coefficients are computed from.
        known_N = batch.logprob_sums_N.clone()
        shuffle = torch.Generator().manual_seed((self.config.run.seed * 1_000_003 + step) % 2**63)
        parts = [
            part_G
            for _ in range(update.epochs)
            for part_G in torch.tensor_split(
                torch.randperm(batch.groups.count, generator=shuffle), update.mini_batches
            )
            if part_G.numel() > 0
        ]
        for index, part_G in enumerate(parts):
            rows = torch.isin(batch.groups.index_N, part_G).nonzero().squeeze(1)
            if tally.steps > 0:
                self._refresh(rollouts, rows, known_N, watch)
            weighing = watch.time(
                record.WEIGH_SECONDS,
                lambda r=rows: tally.weigh(
                    self.config.objective,
                    optimizer_step_part(batch, r, known_N),
                    alpha,
                    anchor_is_old=self.config.anchor.name == "old",
                ),
            )
            if index == len(parts) - 1:
                self._measure_staleness(rollouts, batch, rows, alpha, weighing, tally)
            lr = self._learning_rate(step, optimizer_steps + tally.taken)
            watch.time(
                record.TRAIN_SECONDS,
                lambda r=rows, w=weighing, x=lr: self._train(rollouts, r, w, x, known_N, tally),
            )

    def _refresh(self, rollouts: Rollouts, rows: Tensor, known_N: Tensor, watch: Stopwatch) -> None:
        """Bring the known log-probs of the rows up to date where the objective asks for it."""
        if needs_refresh(self.config.objective):
            known_N[rows] = watch.time(
                record.REFRESH_SECONDS, lambda: self._current_sums(rollouts, rows)
            )

    def _current_sums(self, rollouts: Rollouts, rows: Tensor) -> Tensor:
        part = rollouts.select(rows)
        logprobs_NT, _ = self._read_logprobs(part)
        return sequence_sums(logprobs_NT, part.mask_NT)

    def _measure_staleness(
        self,
        rollouts: Rollouts,
        batch: GroupBatch,
        rows: Tensor,
        alpha: float,
        stale: Weighing,
        tally: Tally,
    ) -> None:
        """With ``refresh: stale``, the relative error of the rollout's last coefficients."""
        if not uses_stale_logprobs(self.config.objective) or tally.steps == 0:
            return
        current_N = batch.logprob_sums_N.clone()
        current_N[rows] = self._current_sums(rollouts, rows)
        exact = self.config.objective.weigh(optimizer_step_part(batch, rows, current_N), alpha)
        tally.refresh_bias = coefficient_error(stale, exact)

    def _train(
        self,
        rollouts: Rollouts,
        rows: Tensor,
        weighing: Weighing,
        lr: float,
        known_N: Tensor,
        tally: Tally,
    ) -> None:
        """Forward, backward and the optimizer step on some rows of the rollout."""
        in_loss = self.config.regularizers.needs_reference_in_loss
        part = MicroBatch.of(
            rollouts.tokens_NT[rows],
            rollouts.mask_NT[rows],
            columns=weighing.columns,
            old_logprobs_BT=known(rollouts.old_logprobs_NT)[rows],
            reference_logprobs_BT=known(rollouts.reference_logprobs_NT)[rows] if in_loss else None,
        )
        size = self.config.update.micro_batch_size
        kept, sums_N = self.policy.accumulate(part, size, self._loss)
        update = self.policy.update(lr, float(kept["loss"]))
        if not update.skipped:  # else they may be NaN, and stale coefficients would stay so
            known_N[rows] = sums_N
        tally.note(
            self.config.objective,
            weighing,
            UpdateFigures(
                loss=float(kept["loss"]),
                clipped_tokens=float(kept["clipped"]),
                tokens=float(part.mask_BT.sum()),
                grad_norm=update.grad_norm,
                skipped=update.skipped,
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
        loss = config.objective.token_loss(inputs, columns)
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


def _reference_metrics(rollouts: Rollouts) -> dict[str, float]:
    """KL to the reference (k3), nats per completion token, where its log-probs are at hand."""
    if rollouts.reference_logprobs_NT is None:
        return {}
    delta_NT = known(rollouts.old_logprobs_NT) - rollouts.reference_logprobs_NT
    kl_N = sequence_sums(k3(delta_NT), rollouts.mask_NT)
    return {record.KL_REFERENCE: float(kl_N.sum() / rollouts.mask_NT.sum())}
