"""The host's policy with groups that stay whole: one global batch, one optimizer step at a time.

    train(rollout) -> rewards -> groups settled -> alpha
      -> per global batch: refresh -> weigh -> columns -> the host's train on that batch

The host samples, grades, shards, packs, steps, logs and saves. Everything here runs on the driver,
on a few numbers per sequence, so there is one decision for all ranks. Axes: N sequences of the
rollout, n of those that are trained on, M of a global batch, m of those of them that are trained
on, T targets.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nemo_apo import record
from nemo_apo.core.anchoring import sequence_sums
from nemo_apo.core.objectives import Weighing
from nemo_apo.core.objectives.anchored import needs_refresh
from nemo_apo.core.settling import RolloutLimits
from nemo_apo.nemo_rl import columns, rollout
from nemo_apo.nemo_rl.baselines import Baselines
from nemo_apo.nemo_rl.checkpoint import load_state, save_state
from nemo_apo.nemo_rl.loss import TOKEN_SUMS, ApoLoss
from nemo_apo.nemo_rl.metrics import joined, token_sum
from nemo_apo.plugin.bookkeeping import TrainingStopped, finish_rl_step, stop_if_stuck
from nemo_apo.plugin.columns import attach
from nemo_apo.plugin.rollout import RolloutError
from nemo_apo.plugin.settings import ApoSettings
from nemo_apo.plugin.settled import SettledRollout, settle_rollout_steps, spread_columns
from nemo_apo.plugin.state import ApoState
from nemo_apo.step_metrics import Stopwatch, Tally, UpdateFigures

# What a forward pass without gradient takes of a batch; the last, where the host replays the
# experts that its sampler chose.
_READ = (
    columns.TOKENS,
    columns.LENGTHS,
    columns.TOKEN_MASK,
    columns.SAMPLE_MASK,
    columns.ROUTED_EXPERTS,
)


@dataclass(frozen=True)
class RunSizes:
    """What the host's configuration fixes for the whole run.

    Attributes:
        group_size: answers per prompt.
        total_steps: RL steps.
        max_response_length: length limit of an answer, tokens.
    """

    group_size: int
    total_steps: int
    max_response_length: int


@dataclass
class ApoRun:
    """What the policy needs beside its own configuration.

    Attributes:
        settings: of the block ``apo``.
        sizes: the run's.
        baselines: where the host's logger notes the group means of the rewards.
        report: takes a line for a person.
        state: schedule and diagnostics; replaced once per RL step.
    """

    settings: ApoSettings
    sizes: RunSizes
    baselines: Baselines
    report: Callable[[str], None] = print
    state: ApoState = field(default_factory=ApoState)


def policy_factory(run: ApoRun, base: type | None = None) -> Callable[..., Any]:
    """What ``setup(policy_factory=...)`` wants.

    Args:
        run: its state is read from the checkpoint that the host resumes from, if it does.
        base: the host's policy class, or one derived from it; its ``Policy`` unless given.
    """

    def make(**kwargs: Any) -> Any:
        run.state = load_state(kwargs.get("weights_path"), run.settings)
        policy = apo_policy_class(base or _host_policy())(**kwargs)
        limits = RolloutLimits(len(kwargs["tokenizer"]), run.sizes.max_response_length)
        policy.start_apo(run, limits)
        return policy

    return make


def apo_policy_class(base: type) -> type:
    """The mixin over one of the host's policy classes."""
    return type(f"Apo{base.__name__}", (ApoPolicyMixin, base), {})


def _host_policy() -> type:
    from nemo_rl.models.policy.lm_policy import Policy

    return Policy


class ApoPolicyMixin:
    """See the module's docstring; stands before a policy class of the host.

    Attributes:
        apo: the run.
    """

    def start_apo(self, run: ApoRun, limits: RolloutLimits) -> None:
        """To be called once, before training."""
        self.apo = run
        self._limits = limits

    def train(
        self,
        data: Any,
        loss_fn: Any,
        eval_mode: bool = False,
        gbs: int | None = None,
        mbs: int | None = None,
        timer: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """All optimizer steps of a rollout; any loss but ours is trained as ever.

        Raises:
            RolloutError: if the rollout cannot be trained on as groups.
            TrainingStopped: if an update was not finite, or too many in a row had to be skipped.
        """
        host_train = partial(super().train, mbs=mbs, timer=timer, **kwargs)  # type: ignore[misc]
        if eval_mode or not isinstance(loss_fn, ApoLoss):
            return host_train(data, loss_fn, eval_mode=eval_mode, gbs=gbs)
        size = gbs or self.cfg["train_global_batch_size"]  # type: ignore[attr-defined]
        settled, mask_NT = self._settle(data)
        tally, watch = Tally(self.apo.state.skipped_in_a_row), Stopwatch()
        results = []
        for step in self._optimizer_steps(data, mask_NT, size):
            if self._weigh(step, settled, tally, watch):
                update = partial(host_train, step.data, loss_fn, gbs=size)
                results.append(watch.time(record.TRAIN_SECONDS, update))
                self._note(step, results[-1], tally)
            stop_if_stuck(tally, self.apo.settings, self.apo.state.rl_steps)
        return self._finish(results, settled, tally, watch)

    def save_checkpoint(self, weights_path: str, *args: Any, **kwargs: Any) -> Any:
        """The host's checkpoint, and our state beside the weights."""
        result = super().save_checkpoint(weights_path, *args, **kwargs)  # type: ignore[misc]
        save_state(weights_path, self.apo.state, self.apo.settings)
        return result

    def _optimizer_steps(self, data: Any, mask_NT: Tensor, size: int) -> Iterator["_OptimizerStep"]:
        """The rollout cut into global batches, in order."""
        group_size = self.apo.sizes.group_size
        if size % group_size != 0 or data.size % size != 0:
            raise RolloutError(
                f"a rollout of {data.size} sequences cannot be cut into global batches of "
                f"policy.train_global_batch_size={size} that hold whole groups of {group_size}"
            )
        for first in range(0, data.size, size):
            rows = slice(first, first + size)
            positions_M = torch.arange(first, first + size)
            yield _OptimizerStep(data.slice(first, first + size), mask_NT[rows], positions_M)

    def _settle(self, data: Any) -> tuple[SettledRollout, Tensor]:
        """What the rollout's optimizer steps have in common, and its completion tokens [N, T]."""
        apo, sizes = self.apo.settings, self.apo.sizes
        ids_N = rollout.group_ids(data.size, sizes.group_size)
        mask_NT = rollout.completion_mask(data)
        rewards_N = rollout.rewards(data, self.apo.baselines)
        groups = rollout.settle_rollout(data, rewards_N, mask_NT, ids_N)
        needs_reference = apo.regularizers.needs_reference or apo.anchor.name == "reference"
        figures = rollout.sequence_figures(
            data, groups.rewards_N, mask_NT, ids_N, apo.anchor.name, needs_reference
        )
        state = self.apo.state
        settled = settle_rollout_steps(
            figures, groups, apo, self._limits, state.schedule, state.rl_steps, sizes.total_steps
        )
        return settled, mask_NT

    def _weigh(
        self, step: "_OptimizerStep", settled: SettledRollout, tally: Tally, watch: Stopwatch
    ) -> bool:
        """Put the columns into the step's batch; False if there is nothing to train on."""
        objective = self.apo.settings.objective
        if bool(settled.broken_N[step.positions_M].any()):
            tally.skip("log-probs")
            return False
        rows_M = settled.row_N[step.positions_M]
        trained_M, rows_m = rows_M >= 0, rows_M[rows_M >= 0]
        if rows_m.numel() == 0:  # all its groups were dropped
            return False
        if tally.steps > 0 and needs_refresh(objective):
            sums_M = watch.time(record.REFRESH_SECONDS, lambda: self._current_sums(step))
            settled.known_n[rows_m] = sums_M[trained_M]
            if not bool(sums_M[trained_M].isfinite().all()):
                tally.skip("log-probs")
                return False
        batch = settled.part(rows_m)
        is_old = self.apo.settings.anchor.name == "old"
        weighing = tally.weigh(objective, batch, settled.alpha, is_old)
        if not weighing.columns.all_finite:
            tally.skip("coefficients")
            return False
        step.take(weighing, trained_M)
        return True

    def _current_sums(self, step: "_OptimizerStep") -> Tensor:
        """Sequence log-probs of a global batch under the policy as it stands, [M] float64."""
        read = type(step.data)({name: step.data[name] for name in _READ if name in step.data})
        read.update(step.data.get_multimodal_dict(as_tensors=False))
        self.prepare_for_lp_inference()  # type: ignore[attr-defined]
        logprobs_MS = self.get_logprobs(read)["logprobs"]  # type: ignore[attr-defined]
        self.prepare_for_training()  # type: ignore[attr-defined]
        return sequence_sums(columns.targets(logprobs_MS).cpu(), step.mask_MT)

    def _note(self, step: "_OptimizerStep", result: dict[str, Any], tally: Tally) -> None:
        """Take in what an optimizer step left behind."""
        loss = float(sum(result["all_mb_metrics"]["loss"]))
        grad_norm = float(result["grad_norm"].float().mean())
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise TrainingStopped(
                f"loss {loss}, gradient norm {grad_norm} in RL step {self.apo.state.rl_steps}: the "
                "host's workers have taken this step, so the weights may be lost; resume from the "
                "last checkpoint, with a lower learning rate or policy.max_grad_norm"
            )
        clipped, tokens = (token_sum(result, name) for name in TOKEN_SUMS)
        assert step.weighing is not None
        update = UpdateFigures(loss, clipped, tokens, grad_norm)
        tally.note(self.apo.settings.objective, step.weighing, update)

    def _finish(
        self,
        results: list[dict[str, Any]],
        settled: SettledRollout,
        tally: Tally,
        watch: Stopwatch,
    ) -> dict[str, Any]:
        """The RL step's figures; keeps the state for the next."""
        metrics, findings, self.apo.state = finish_rl_step(
            self.apo.state, settled, tally, watch, self.apo.settings
        )
        for finding in findings:
            self.apo.report(finding)
        nothing = float("nan")
        loss, grad_norm = (
            metrics.get(name, nothing) for name in (record.OBJECTIVE_VALUE, record.GRAD_NORM)
        )
        return joined(results, settled.metrics | metrics, loss, grad_norm)


@dataclass
class _OptimizerStep:
    """One global batch.

    Attributes:
        data: the host's batch.
        mask_MT: completion tokens, of masked sequences too.
        positions_M: of its sequences in the rollout.
        weighing: once it is weighed.
    """

    data: Any
    mask_MT: Tensor
    positions_M: Tensor
    weighing: Weighing | None = None

    def take(self, weighing: Weighing, trained_M: Tensor) -> None:
        """Put the columns into the batch; sequences that are not trained on count for nothing."""
        self.weighing = weighing
        spread = spread_columns(weighing.columns, trained_M)
        attach(self.data, spread, self.data[columns.TOKENS].device)
        # A weight of 0 is not enough: 0 times a log-prob that is not finite is not 0.
        mask_M = self.data[columns.SAMPLE_MASK]
        self.data[columns.SAMPLE_MASK] = mask_M * trained_M.to(mask_M)
