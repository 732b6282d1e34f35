"""The GRPO trainer of NeMo-Aligner's branch ``llama-nemotron-dev`` with groups that stay whole.

    rollout (global, on every rank) -> order -> rewards settled -> alpha -> the host's chunks
      -> per optimizer step: refresh -> weigh -> columns -> the actor's forward and backward

The host samples, grades, chunks, logs, validates and saves. Ours is what couples the completions
of a group. Every rank computes it from the same numbers and takes the same decision. Axes: N
sequences, b of this rank's part of an optimizer step, G groups, T tokens (targets).
"""

import math
from collections.abc import Iterator
from dataclasses import replace
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
    check_own,
    check_rollout,
    logprob_sums,
    reorder,
    sequence_figures,
    settle_rollout,
)
from nemo_apo.config import ConfigError
from nemo_apo.core.anchoring import sequence_sums
from nemo_apo.core.objectives import Weighing
from nemo_apo.core.objectives.anchored import needs_refresh
from nemo_apo.core.settling import RolloutLimits
from nemo_apo.core.step_order import whole_group_order
from nemo_apo.parallel.gather import all_gather_rows, all_true, first_not_finite
from nemo_apo.plugin.bookkeeping import finish_rl_step, note_staleness, stop_if_stuck
from nemo_apo.plugin.columns import attach
from nemo_apo.plugin.rollout import RolloutError
from nemo_apo.plugin.settled import SettledRollout, settle_rollout_steps
from nemo_apo.step_metrics import Stopwatch, Tally, UpdateFigures


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
        self._settled: SettledRollout | None = None

    def create_grpo_training_data_from_inferences(
        self, rollout_batch: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The host's training data and metrics, over the reordered rollout, with ours beside."""
        size = self.cfg.samples_per_prompt
        check_rollout(rollout_batch, size, self.limits.vocab_size)
        mask_NT = _mask(rollout_batch)
        own = self._own_reading(rollout_batch, mask_NT)
        order_N = self._order(rollout_batch[columns.GROUP_ID])
        rollout = type(rollout_batch)(reorder(rollout_batch, order_N))
        local, host_metrics = super().create_grpo_training_data_from_inferences(rollout)
        mask_NT = mask_NT[order_N.to(mask_NT.device)]
        groups = settle_rollout(rollout, mask_NT, self.apo)
        entropy_sums_N = own.entropy_sums_N[order_N.to(own.entropy_sums_N.device)]
        settled = settle_rollout_steps(
            sequence_figures(
                rollout, mask_NT, entropy_sums_N, groups.rewards_N, self.apo.anchor.name
            ),
            groups,
            self.apo,
            self.limits,
            self.model.apo_state.schedule,
            self.step,
            self.max_steps,
        )
        self._settled = settled
        self._add_columns(local, settled)
        every = settled.advantages(torch.arange(len(settled.row_N)))
        host_metrics["nonzero_advantages"] = float((every != 0.0).double().mean())
        return local, host_metrics | settled.metrics

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
            stop_if_stuck(tally, self.apo, self.step)
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
        try:
            return whole_group_order(group_ids_N, self.cfg.model_gbs, _data_ranks())
        except ValueError as error:
            raise RolloutError(str(error)) from None

    def _own_reading(self, rollout: Any, mask_NT: Tensor) -> OwnReading:
        """Sums over the actor's last log-prob pass, gathered in the rollout's (unordered) order."""
        reading = self.model.apo_reading
        rank, count = _data_rank(), mask_NT.shape[0] // _data_ranks()
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
        sums_N2 = all_gather_rows(sums_b2, _data_group())
        own = OwnReading(sums_N2[:, 0], sums_N2[:, 1])
        check_own(logprob_sums(rollout, mask_NT), own)
        return own

    def _add_columns(self, local: dict[str, Any], settled: SettledRollout) -> None:
        """This rank's chunk of the columns that the optimizer steps need."""
        rank, ranks = _data_rank(), _data_ranks()
        share, device = len(settled.row_N) // ranks, local[columns.MASK].device
        positions = torch.arange(rank * share, (rank + 1) * share)
        local[columns.ROW] = positions.to(device)
        local[columns.OLD_LOGPROBS] = local["logprobs"]
        local[columns.REFERENCE_LOGPROBS] = local["init_logprobs"]
        advantages_b = settled.advantages(positions).to(device)
        local["advantages"] = advantages_b.unsqueeze(-1).to(local["advantages"].dtype)

    def _optimizer_step(
        self, batch: dict[str, Any], settled: SettledRollout, tally: Tally, watch: Stopwatch
    ) -> tuple[float, dict[str, float]]:
        """One optimizer step on whole groups; returns the loss and what is logged of it."""
        positions_M = all_gather_rows(batch[columns.ROW], _data_group()).cpu()
        if bool(settled.broken_N[positions_M].any()):
            return self._skip_broken(tally)
        rows_M = settled.row_N[positions_M]
        trained_M, rows_m = rows_M >= 0, rows_M[rows_M >= 0]
        if rows_m.numel() == 0:  # all its groups were dropped
            return float("nan"), {"optim_step": self.grpo_optimization_step}
        if not settled.holds_whole_groups(rows_m):
            raise RolloutError(
                "an optimizer step holds part of a group: the host's split of the rollout is not "
                "the one that it was ordered for"
            )
        if tally.steps > 0 and needs_refresh(self.apo.objective):
            settled.known_n[rows_m] = watch.time(
                record.REFRESH_SECONDS, lambda: self._current_sums(batch)[trained_M]
            )
        part = settled.part(rows_m)
        anchor_is_old = self.apo.anchor.name == "old"
        weighing = tally.weigh(self.apo.objective, part, settled.alpha, anchor_is_old)
        mine = columns.rank_columns(weighing.columns, trained_M, _data_rank(), _data_ranks())
        attach(batch, mine, batch[columns.TOKENS].device)
        # A weight of 0 is not enough: 0 times a log-prob that is not finite is not 0.
        share = len(batch[columns.ROW])
        trained_b = trained_M[_data_rank() * share :][:share].to(batch[columns.MASK].device)
        batch[columns.MASK] = batch[columns.MASK] * trained_b[:, None]
        return watch.time(
            record.TRAIN_SECONDS,
            lambda: self._update(batch, weighing, settled, trained_M, rows_m, tally),
        )

    def _current_sums(self, batch: dict[str, Any]) -> Tensor:
        """Sequence log-probs of the optimizer step's rows under the policy as it stands, [N]."""
        tokens_bT, mask_bT = batch[columns.TOKENS], batch[columns.MASK]
        set_eval(self.model)
        # The rollout's micro-batch size need not divide one optimizer step's part.
        size = math.gcd(len(tokens_bT), self.model.forward_micro_batch_size)
        logprobs_bT = self.model.get_inference_log_probs(tokens_bT, forward_micro_batch_size=size)
        sums_b = sequence_sums(logprobs_bT, mask_bT.to(logprobs_bT.device))
        return all_gather_rows(sums_b, _data_group()).cpu()

    def _update(
        self,
        batch: dict[str, Any],
        weighing: Weighing,
        settled: SettledRollout,
        trained_M: Tensor,
        rows_m: Tensor,
        tally: Tally,
    ) -> tuple[float, dict[str, float]]:
        """Forward, backward and the optimizer's step, or its skipping."""
        self.optimizer.zero_grad()
        self.model.prepare_for_training_step()
        loss, metrics = self.model.get_loss_and_metrics(batch=batch, forward_only=False)
        self.model.finish_training_step()
        grad_norm = float(clip_gradients(self.model, self.cfg.gradient_clip_val))
        figures = {"loss": loss, "gradient": grad_norm}
        not_finite = first_not_finite(figures, batch[columns.ROW].device)
        lr = self.optimizer.param_groups[0]["lr"]
        sums = self.model.apo_step_sums
        current_m = sums.logprob_sums_N.cpu()[trained_M]
        note_staleness(tally, self.apo.objective, weighing, settled, rows_m, current_m)
        if not_finite is not None:
            self.optimizer.zero_grad()
            logging.warning(f"optimizer step skipped: loss {loss}, gradient norm {grad_norm}")
        else:
            settled.known_n[rows_m] = current_m
            self.optimizer.step()
            self.scheduler.step()
        metrics = metrics | {
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "optim_step": self.grpo_optimization_step,
        }
        self.grpo_optimization_step += int(not_finite is None)
        tally.note(
            self.apo.objective,
            weighing,
            UpdateFigures(
                loss=loss,
                clipped_tokens=sums.totals["clipped"],
                tokens=sums.totals["tokens"],
                grad_norm=grad_norm,
                not_finite=not_finite,
            ),
        )
        return loss, metrics

    def _skip_broken(self, tally: Tally) -> tuple[float, dict[str, float]]:
        """An optimizer step with a sequence whose log-probs are not finite; no rank takes it."""
        tally.skip("log-probs")
        logging.warning("optimizer step skipped: log-probs of the rollout are not finite")
        return float("nan"), {"optim_step": self.grpo_optimization_step}

    def _finish_rl_step(self, settled: SettledRollout, tally: Tally, watch: Stopwatch) -> None:
        """Log the rollout's optimizer steps together, look for failure signatures, keep state."""
        state = replace(self.model.apo_state, rl_steps=self.step)
        metrics, findings, following = finish_rl_step(state, settled, tally, watch, self.apo)
        for finding in findings:
            logging.warning(finding)
        self.logger.log_metrics(metrics, step=self.step, prefix="train_optim/")
        self.model.apo_state = following


def _mask(rollout: Any) -> Tensor:
    """The host's mask of completion tokens, [N, T] bool."""
    return create_mask(
        values=rollout["logprobs"],
        prompt_lengths=rollout["prompt_lengths"],
        response_lengths=rollout["response_lengths"],
    ).bool()


def _data_rank() -> int:
    return parallel_state.get_training_data_parallel_rank()


def _data_ranks() -> int:
    return parallel_state.get_training_data_parallel_world_size()


def _data_group() -> Any:
    return parallel_state.get_training_data_parallel_group()
