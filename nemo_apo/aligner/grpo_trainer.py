"""The GRPO trainer of NeMo-Aligner's branch ``llama-nemotron-dev`` with groups that stay whole.

    rollout (global, on every rank) -> order -> rewards settled -> alpha -> the host's chunks
      -> per optimizer step: refresh -> weigh -> columns -> the actor's forward and backward

The host samples, grades, chunks, logs, validates and saves. Ours is what couples the completions
of a group. Every rank computes it from the same numbers and takes the same decision. Axes: N
sequences, b of this rank's part of an optimizer step, G groups, T tokens (targets).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import open_dict
from torch import Tensor

from nemo_apo import record
from nemo_apo.aligner import columns
from nemo_apo.aligner.branch import (
    GRPOTrainer,
    clip_gradients,
    create_mask,
    logging,
    parallel_state,
    set_eval,
)
from nemo_apo.aligner.group_ids import with_group_ids
from nemo_apo.aligner.host_rules import check_groups
from nemo_apo.aligner.rollout import (
    OwnReading,
    RolloutError,
    check_own,
    check_rollout,
    logprob_sums,
    reorder,
    sequence_figures,
    settle_rollout,
)
from nemo_apo.config import ConfigError
from nemo_apo.core.alpha_schedule import ScheduleState
from nemo_apo.core.anchoring import sequence_sums
from nemo_apo.core.diagnostics import observe
from nemo_apo.core.filtering import SettledGroups
from nemo_apo.core.groups import Groups
from nemo_apo.core.objectives import Columns, GroupBatch, Weighing
from nemo_apo.core.settling import (
    RolloutLimits,
    optimizer_step_part,
    schedule_alpha,
    settle,
)
from nemo_apo.core.step_order import whole_group_order
from nemo_apo.parallel.gather import all_gather_rows, all_true
from nemo_apo.step_metrics import (
    Stopwatch,
    Tally,
    UpdateFigures,
    coefficient_error,
    rollout_metrics,
    schedule_metrics,
    step_figures,
)


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why."""


@dataclass
class _Settled:
    """What was settled on the current rollout, for its optimizer steps.

    Attributes:
        batch: the kept sequences, in the reordered rollout's order.
        kept_row_N: for every sequence of the rollout its row in ``batch``, -1 if dropped.
        known_N: the last sequence log-probs known of each row of ``batch``, nats.
        alpha: this RL step's.
        schedule: the schedule's next state.
        metrics: of the rollout.
        usable: whether all log-probs and entropies of the kept sequences are finite.
    """

    batch: GroupBatch | None
    kept_row_N: Tensor
    known_N: Tensor
    alpha: float
    schedule: ScheduleState
    metrics: dict[str, float]
    usable: bool


class ApoGRPOTrainer(GRPOTrainer):
    """``GRPOTrainer`` with any objective of this package, for an ``ApoGRPOActor``.

    Raises:
        ConfigError: if batch sizes cannot hold whole groups.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_groups(self.cfg, self.model.cfg)
        # The host computes advantages of its own, which are replaced, and cannot do so with null.
        if self.cfg.use_leave_one_out_baseline is None:
            with open_dict(self.cfg):
                self.cfg.use_leave_one_out_baseline = False
        self.batch_iterator_cls = with_group_ids(self.batch_iterator_cls)
        self.apo = self.model.apo
        self.limits = RolloutLimits(
            vocab_size=self.model.apo_vocab_size,
            max_response_length=self.model.cfg.grpo.length_params.max_length,
        )
        self._settled: _Settled | None = None

    def create_grpo_training_data_from_inferences(
        self, rollout_batch: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The host's training data and metrics, over the reordered rollout, with ours beside."""
        size = self.cfg.samples_per_prompt
        check_rollout(rollout_batch, size, self.limits.vocab_size)
        own = self._own_reading(rollout_batch)
        order_N = self._order(rollout_batch[columns.GROUP_ID])
        rollout = type(rollout_batch)(reorder(rollout_batch, order_N))
        local, host_metrics = super().create_grpo_training_data_from_inferences(rollout)
        mask_NT = _mask(rollout)
        groups = settle_rollout(rollout, mask_NT, self.apo)
        entropy_sums_N = own.entropy_sums_N[order_N.to(own.entropy_sums_N.device)]
        self._settled = self._settle(rollout, mask_NT, entropy_sums_N, groups)
        self._add_columns(local, mask_NT.shape[0])
        host_metrics["nonzero_advantages"] = self._nonzero_advantages()
        return local, host_metrics | self._settled.metrics

    def run_training(self, dataloader_iter: Iterator[dict[str, Any]]) -> tuple[float, dict]:
        """All optimizer steps of the rollout; a step that is not finite is skipped by all ranks."""
        assert self._settled is not None
        settled, state = self._settled, self.model.apo_state
        tally, watch = Tally(state.skipped_in_a_row), Stopwatch()
        loss, metrics = float("nan"), {}
        self.model.prepare_for_training()
        for batch in dataloader_iter:
            loss, metrics = self._optimizer_step(batch, settled, tally, watch)
            self.logger.log_metrics(metrics, step=self.step, prefix="train_optim/")
            self._stop_if_stuck(tally)
        self.overall_iter += 1
        self.model.finish_training()
        self.optimizer.zero_grad()
        self._finish_rl_step(settled, tally, watch)
        return loss, metrics

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The host's counters; they must be of the checkpoint that the schedule's state is from."""
        super().load_state_dict(state_dict)
        saved = self.model.apo_state.rl_steps
        if saved not in (0, self.step):
            raise ConfigError(
                f"the checkpoint's APO state is of RL step {saved}, but its file name says step "
                f"{self.step}: the file was renamed, or is not what it says"
            )

    def _order(self, group_ids_N: Tensor) -> Tensor:
        ranks = parallel_state.get_training_data_parallel_world_size()
        try:
            return whole_group_order(group_ids_N, self.cfg.model_gbs, ranks)
        except ValueError as error:
            raise RolloutError(str(error)) from None

    def _own_reading(self, rollout: Any) -> OwnReading:
        """Sums over the actor's last log-prob pass, gathered in the rollout's (unordered) order."""
        reading = self.model.apo_reading
        mask_NT = _mask(rollout)
        rank = parallel_state.get_training_data_parallel_rank()
        count = mask_NT.shape[0] // parallel_state.get_training_data_parallel_world_size()
        mask_bT = mask_NT[rank * count : (rank + 1) * count]
        fits = reading is not None and reading.logprobs_bT.shape == mask_bT.shape
        if not all_true(fits, mask_NT.device):
            raise RolloutError(
                "the rollout was made without the actor's own log-prob pass over this rank's part "
                "of it; its rollout generator must call get_inference_log_probs"
            )
        sums_b2 = torch.stack(
            [
                sequence_sums(reading.logprobs_bT, mask_bT),
                sequence_sums(reading.entropy_bT, mask_bT),
            ],
            dim=1,
        )
        sums_N2 = all_gather_rows(sums_b2, parallel_state.get_training_data_parallel_group())
        own = OwnReading(sums_N2[:, 0], sums_N2[:, 1])
        check_own(logprob_sums(rollout, mask_NT), own)
        return own

    def _settle(
        self, rollout: Any, mask_NT: Tensor, entropy_sums_N: Tensor, groups: SettledGroups
    ) -> _Settled:
        """Advantages, alpha and metrics of the rollout."""
        keep_N, state = groups.keep_N, self.model.apo_state.schedule
        kept_row_N = torch.where(keep_N, keep_N.to(torch.int64).cumsum(0) - 1, -1)
        metrics = _reward_metrics(groups, mask_NT)
        figures = sequence_figures(rollout, mask_NT, entropy_sums_N, groups, self.apo.anchor.name)
        usable = bool(torch.isfinite(figures.old_logprob_sums_N + figures.entropy_sums_N).all())
        if not (usable and keep_N.any()):
            known_N = figures.old_logprob_sums_N
            return _Settled(None, kept_row_N, known_N, float("nan"), state, metrics, usable)
        apo = self.apo
        batch = settle(figures, apo.objective, apo.tau, apo.regularizers, self.limits)
        alpha, state = schedule_alpha(
            apo.objective,
            apo.schedule,
            state,
            batch,
            step=self.step,
            total_steps=self.max_steps,
            reward_mean=metrics[record.REWARD_MEAN],
            token_entropy=figures.token_entropy,
            limits=self.limits,
        )
        metrics |= rollout_metrics(apo.objective, alpha, figures, batch)
        if apo.objective.uses_alpha:
            metrics |= schedule_metrics(state)
        known_N = batch.logprob_sums_N.clone()
        return _Settled(batch, kept_row_N, known_N, alpha, state, metrics, usable)

    def _add_columns(self, local: dict[str, Any], count: int) -> None:
        """This rank's chunk of the columns that the optimizer steps need."""
        ranks = parallel_state.get_training_data_parallel_world_size()
        rank, share = parallel_state.get_training_data_parallel_rank(), count // ranks
        device = local[columns.MASK].device
        local[columns.ROW] = torch.arange(rank * share, (rank + 1) * share, device=device)
        local[columns.OLD_LOGPROBS] = local["logprobs"]
        local[columns.REFERENCE_LOGPROBS] = local["init_logprobs"]
        local["advantages"] = self._advantages(local[columns.ROW]).unsqueeze(-1).float()

    def _advantages(self, rows_b: Tensor) -> Tensor:
        """Our advantages of some rows of the rollout; 0 for dropped ones."""
        assert self._settled is not None
        if self._settled.batch is None:
            return torch.zeros(len(rows_b), dtype=torch.float64, device=rows_b.device)
        kept_b = self._settled.kept_row_N[rows_b]
        advantages_b = self._settled.batch.advantages_N[kept_b.clamp(min=0)]
        return torch.where(kept_b >= 0, advantages_b, 0.0)

    def _nonzero_advantages(self) -> float:
        """Share of the rollout's sequences with an advantage (the host's metric, of ours)."""
        assert self._settled is not None
        rows_N = torch.arange(len(self._settled.kept_row_N), device=self._settled.kept_row_N.device)
        return float((self._advantages(rows_N) != 0.0).double().mean())

    def _optimizer_step(
        self, batch: dict[str, Any], settled: _Settled, tally: Tally, watch: Stopwatch
    ) -> tuple[float, dict[str, float]]:
        """One optimizer step on whole groups; returns the loss and what is logged of it."""
        rows_N = all_gather_rows(batch[columns.ROW], _data_ranks())
        kept_N = settled.kept_row_N[rows_N]
        kept_n = kept_N[kept_N >= 0]
        if settled.batch is None or kept_n.numel() == 0:
            return self._nothing_to_train(settled, tally)
        _check_whole(kept_n, settled.batch.groups)
        if tally.steps > 0 and self._refreshes:
            settled.known_N[kept_n] = watch.time(
                record.REFRESH_SECONDS, lambda: self._current_sums(batch)[kept_N >= 0]
            )
        weighing = self._weigh(settled, kept_n, tally)
        columns.attach(batch, _own_columns(weighing.columns, kept_N))
        return watch.time(
            record.TRAIN_SECONDS, lambda: self._update(batch, weighing, settled, kept_N, tally)
        )

    @property
    def _refreshes(self) -> bool:
        objective = self.apo.objective
        return objective.weighs_current_policy and not self._is_stale

    @property
    def _is_stale(self) -> bool:
        return getattr(self.apo.objective, "refresh", "forward") == "stale"

    def _weigh(self, settled: _Settled, kept_n: Tensor, tally: Tally) -> Weighing:
        assert settled.batch is not None
        part = optimizer_step_part(settled.batch, kept_n, settled.known_N)
        anchor_is_old = self.apo.anchor.name == "old"
        return tally.weigh(self.apo.objective, part, settled.alpha, anchor_is_old)

    def _current_sums(self, batch: dict[str, Any]) -> Tensor:
        """Sequence log-probs of the optimizer step's rows under the policy as it stands, [N]."""
        tokens_bT, mask_bT = batch[columns.TOKENS], batch[columns.MASK]
        set_eval(self.model)
        # The rollout's micro-batch size need not divide one optimizer step's part.
        size = math.gcd(len(tokens_bT), self.model.forward_micro_batch_size)
        logprobs_bT = self.model.get_inference_log_probs(tokens_bT, forward_micro_batch_size=size)
        sums_b = sequence_sums(logprobs_bT, mask_bT.to(logprobs_bT.device))
        return all_gather_rows(sums_b, _data_ranks())

    def _update(
        self,
        batch: dict[str, Any],
        weighing: Weighing,
        settled: _Settled,
        kept_N: Tensor,
        tally: Tally,
    ) -> tuple[float, dict[str, float]]:
        """Forward, backward and the optimizer's step, or its skipping."""
        self.optimizer.zero_grad()
        self.model.prepare_for_training_step()
        loss, metrics = self.model.get_loss_and_metrics(batch=batch, forward_only=False)
        self.model.finish_training_step()
        grad_norm = float(clip_gradients(self.model, self.cfg.gradient_clip_val))
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        skipped = not all_true(finite, batch[columns.ROW].device)
        lr = self.optimizer.param_groups[0]["lr"]
        sums = self.model.apo_step_sums
        self._note_staleness(weighing, settled, kept_N, sums.logprob_sums_N, tally)
        if skipped:
            self.optimizer.zero_grad()
            logging.warning(f"optimizer step skipped: loss {loss}, gradient norm {grad_norm}")
        else:
            settled.known_N[kept_N[kept_N >= 0]] = sums.logprob_sums_N[kept_N >= 0]
            self.optimizer.step()
            self.scheduler.step()
        metrics = metrics | {
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "optim_step": self.grpo_optimization_step,
        }
        self.grpo_optimization_step += int(not skipped)
        tally.note(
            self.apo.objective,
            weighing,
            UpdateFigures(
                loss=loss,
                clipped_tokens=sums.totals["clipped"],
                tokens=sums.totals["tokens"],
                grad_norm=grad_norm,
                skipped=skipped,
            ),
        )
        return loss, metrics

    def _note_staleness(
        self,
        stale: Weighing,
        settled: _Settled,
        kept_N: Tensor,
        sums_N: Tensor,
        tally: Tally,
    ) -> None:
        """With ``refresh: stale``, the relative error of the coefficients just used.

        The forward pass of the step itself tells what they should have been, at no extra cost.
        """
        if not self._is_stale or tally.steps == 0:
            return
        assert settled.batch is not None
        kept_n = kept_N[kept_N >= 0]
        current_N = settled.known_N.clone()
        current_N[kept_n] = sums_N[kept_N >= 0]
        part = optimizer_step_part(settled.batch, kept_n, current_N)
        exact = self.apo.objective.weigh(part, settled.alpha)
        tally.refresh_bias = coefficient_error(stale, exact)

    def _nothing_to_train(self, settled: _Settled, tally: Tally) -> tuple[float, dict[str, float]]:
        """An optimizer step all of whose groups were dropped, or whose rollout is not finite."""
        if not settled.usable:
            tally.skipped += 1
            tally.in_a_row += 1
            logging.warning("optimizer step skipped: log-probs of the rollout are not finite")
        return float("nan"), {"optim_step": self.grpo_optimization_step}

    def _stop_if_stuck(self, tally: Tally) -> None:
        limit = self.apo.update.max_skipped_steps
        if tally.in_a_row >= limit:
            raise TrainingStopped(
                f"{tally.in_a_row} optimizer steps in a row were skipped because something was not "
                f"finite (model.apo.update.max_skipped_steps={limit}); RL step {self.step}"
            )

    def _finish_rl_step(self, settled: _Settled, tally: Tally, watch: Stopwatch) -> None:
        """Log the rollout's optimizer steps together, look for failure signatures, keep state."""
        metrics = {record.SKIPPED_STEPS: tally.skipped} | watch.seconds
        if tally.values:
            metrics |= tally.metrics(self.apo.objective)
        state = self.model.apo_state
        diagnostics, findings = state.diagnostics, []
        figures = step_figures(settled.metrics | metrics, self.apo.schedule)
        if figures is not None:
            findings, diagnostics = observe(diagnostics, figures, self.apo.diagnostics)
        for finding in findings:
            logging.warning(f"{finding.name}: {finding.message}; {finding.advice}")
        self.logger.log_metrics(metrics, step=self.step, prefix="train_optim/")
        self.model.apo_state = replace(
            state,
            rl_steps=self.step + 1,
            schedule=settled.schedule,
            diagnostics=diagnostics,
            skipped_in_a_row=tally.in_a_row,
        )


def _mask(rollout: Any) -> Tensor:
    """The host's mask of completion tokens, [N, T] bool."""
    return create_mask(
        values=rollout["logprobs"],
        prompt_lengths=rollout["prompt_lengths"],
        response_lengths=rollout["response_lengths"],
    ).bool()


def _data_ranks() -> Any:
    return parallel_state.get_training_data_parallel_group()


def _check_whole(kept_n: Tensor, groups: Groups) -> None:
    """Raise unless the rows of an optimizer step are whole groups; the same on all ranks."""
    here_G = torch.bincount(groups.index_N[kept_n], minlength=groups.count)
    if bool(((here_G != 0) & (here_G != groups.sizes_G)).any()):
        raise RolloutError(
            "an optimizer step holds part of a group: the host's split of the rollout is not the "
            "one that it was ordered for"
        )


def _own_columns(columns_n: Columns, kept_N: Tensor) -> Columns:
    """This rank's slice of an optimizer step's columns; dropped sequences weigh nothing."""
    ranks = parallel_state.get_training_data_parallel_world_size()
    rank, share = parallel_state.get_training_data_parallel_rank(), len(kept_N) // ranks
    kept_b = (kept_N >= 0)[rank * share : (rank + 1) * share]
    first = int((kept_N[: rank * share] >= 0).sum())

    def spread(column_n: Tensor) -> Tensor:
        column_b = column_n.new_zeros(share)
        column_b[kept_b] = column_n[first : first + int(kept_b.sum())]
        return column_b

    return Columns(
        coefficient_N=spread(columns_n.coefficient_N),
        advantage_N=spread(columns_n.advantage_N),
        token_weight_N=spread(columns_n.token_weight_N),
    )


def _reward_metrics(groups: SettledGroups, mask_NT: Tensor) -> dict[str, float]:
    """Rewards of the groups that are trained on (of all, if none is), and what was dropped."""
    rewards_N = groups.rewards_N[groups.keep_N] if groups.keep_N.any() else groups.rewards_N
    return {
        record.REWARD_MEAN: float(rewards_N.mean()),
        record.REWARD_STD: float(rewards_N.std(correction=0)),
        record.REWARD_FAILED: groups.failed_grades,
        record.RESPONSE_LENGTH: float(mask_NT.sum(dim=1).double().mean()),
        record.DROPPED_GROUPS: sum(groups.dropped.values()),
    }
