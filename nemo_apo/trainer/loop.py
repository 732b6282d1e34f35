"""A whole run: warm start, RL steps, evaluations, checkpoints, metrics, summary and report.

The loop owns the step, the schedule's state and the diagnostics; ``RLStep`` does the work.
"""

import contextlib
import os
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from nemo_apo import record
from nemo_apo.compose import to_yaml
from nemo_apo.config import Config, RunConfig, vocab_size
from nemo_apo.core.alpha_schedule import ScheduleState
from nemo_apo.core.diagnostics import DiagnosticsState, Finding, observe
from nemo_apo.parallel.gather import all_gather_objects
from nemo_apo.parallel.layout import Layout
from nemo_apo.record import KeptGroup
from nemo_apo.step_metrics import step_figures
from nemo_apo.trainer import checkpoint
from nemo_apo.trainer.anchors import RememberedWeights
from nemo_apo.trainer.checkpoint import TrainerState
from nemo_apo.trainer.checkpoint_search import newest_verified, set_aside
from nemo_apo.trainer.checkpoint_write import SaveFailed
from nemo_apo.trainer.durable_files import replace_text
from nemo_apo.trainer.engines.by_name import ENGINES, check_engine
from nemo_apo.trainer.evaluation import evaluate
from nemo_apo.trainer.interruption import StopCheck, StoppedEarly, check_stop
from nemo_apo.trainer.metrics import MetricsLog
from nemo_apo.trainer.pending import StoredRollout
from nemo_apo.trainer.policy import Policy
from nemo_apo.trainer.ranks import ranks
from nemo_apo.trainer.rl_step import RLStep, StepOutcome, StoppedInRollout
from nemo_apo.trainer.run_folder import (
    TrainingStopped,
    check_folder,
    check_weights,
    on_first_or_stop,
    prepare_folder,
)
from nemo_apo.trainer.same_data import check_same_data
from nemo_apo.trainer.summary import summarize, write_summary
from nemo_apo.trainer.warm_start import run_warm_start
from nemo_apo.versions import versions_of

# Distributions that the figures of a run depend on.
_DISTRIBUTIONS = ("torch", "megatron-core")


class View(Protocol):
    """What the loop tells the console; see ``nemo_apo.report.console``."""

    def phase(self, name: str, done: int, total: int, text: str = "") -> None: ...

    def update(self, step: int, metrics: dict[str, float], findings: list[dict]) -> None: ...

    def note(self, text: str) -> None: ...


class SilentView:
    """For every rank but the first, and for ``run.console=off``."""

    def phase(self, name: str, done: int, total: int, text: str = "") -> None:
        pass

    def update(self, step: int, metrics: dict[str, float], findings: list[dict]) -> None:
        pass

    def note(self, text: str) -> None:
        pass


def run(config: Config) -> None:
    """Train by the configuration; on return the run's folder is complete.

    Raises:
        ConfigError: if the folder holds a run and ``run.if_exists`` is "error", or "resume" and
            its checkpoint is missing or belongs to another configuration; if the weights to start
            from are not there; or if the rollout engine cannot run here. Nothing is changed then.
        TrainingStopped: if ranks have read different data, after too many skipped optimizer steps
            in a row, if sampler and trainer disagree beyond ``update.max_sampler_mismatch``, or if
            a checkpoint cannot be written.
        RanksLost: if some ranks no longer answer; it names them, and the groups stay as they are.
        StoppedEarly: on all ranks, after a signal or ``run.max_time``; what was done is saved.
    """
    folder = Path(config.run.root) / config.run.name
    set_threads(config.run)
    check_folder(folder, config.run.if_exists)
    check_weights(folder, config)
    check_engine(config)
    with ranks(config) as (layout, stop):
        check_same_data(config.task)
        prepare_folder(folder, config)
        with _view(config, layout) as view:
            _Run(config, layout, folder, view, stop).train()
        dist.barrier()
        if layout.rank == 0 and config.run.report:
            from nemo_apo.report import write_report

            write_report([folder], folder)


def build_policy(config: Config, layout: Layout, weights_follow: bool = False) -> Policy:
    """A configuration's policy with its initial weights; ``weights_follow`` as in ``Policy``."""
    task = config.task
    policy = Policy(
        config.model,
        config.optimizer,
        layout,
        vocab_size(config),
        task.max_prompt_length + task.max_response_length,
        config.rollout.temperature,
        config.run.seed,
        config.parallel,
        sampling_ranks=config.rollout.tensor_model_parallel_size,
        weights_follow=weights_follow,
    )
    policy.engine = ENGINES[config.rollout.engine](policy, config)
    return policy


class _Run:
    def __init__(
        self, config: Config, layout: Layout, folder: Path, view: View, stop: StopCheck
    ) -> None:
        self.config = config
        self.stop = stop
        self.layout = layout
        self.folder = folder
        self.view = view
        self.task = config.task
        resuming = config.run.if_exists == "resume"
        self.found = newest_verified(folder / record.CHECKPOINT_DIR) if resuming else None
        follow = self.found is not None or config.warm_start.load is not None
        self.policy = build_policy(config, layout, weights_follow=follow)
        self._started = time.perf_counter()
        self._spent_before = 0.0
        # The RL step that the newest checkpoint is of.
        self._saved_step = -1
        # The metrics of the last step that is done.
        self._published: dict[str, float] = {}

    @property
    def wall_s(self) -> float:
        """Seconds of training so far, earlier parts of a resumed run included."""
        return self._spent_before + time.perf_counter() - self._started

    def train(self) -> None:
        """Warm start or resume, then RL to the end."""
        found = self.found
        if found is None:
            warm_start_s = self._warm_start()
        remembered = RememberedWeights.at_start(
            self.policy, self.config.anchor, self._needs_reference()
        )
        rollout = None
        if found is not None:
            state, rollout = checkpoint.load(found.newest, self.policy, remembered, self.config)
            for line in set_aside(found.damaged):
                self.view.note(line)
            self._write_config()
            self._spent_before, self._saved_step = state.wall_s, state.step
            self.view.note(f"resumed from {found.newest.folder} at step {state.step}")
        else:
            state = TrainerState(
                step=0,
                schedule=ScheduleState(),
                diagnostics=DiagnosticsState(),
                warm_start_s=warm_start_s,
            )
        log = None

        def open_log() -> None:
            nonlocal log
            log = MetricsLog(self.folder, self.config, -1 if found is None else state.step)

        on_first_or_stop(open_log)
        try:
            if found is None:
                state = self._evaluated_at_start(state, log)
            state = self._steps(state, rollout, remembered, log)
        finally:
            if log is not None:
                log.close()
        if state.step == self.config.run.steps:
            self._summarize(state)

    def _needs_reference(self) -> bool:
        wanted = self.config.regularizers.needs_reference
        return wanted or self.config.update.monitor_reference_kl

    def _write_config(self) -> None:
        path, text = self.folder / record.CONFIG_FILE, to_yaml(self.config)
        on_first_or_stop(lambda: replace_text(path, text))

    def _warm_start(self) -> float:
        start = time.perf_counter()
        total = self.config.warm_start.steps
        if self.config.warm_start.load is not None:
            checkpoint.load_weights(Path(self.config.warm_start.load), self.policy)
            return time.perf_counter() - start

        def on_step(done: int, loss: float) -> None:
            check_stop(self.stop)
            self.view.phase("warm start", done, total, f"loss {loss:.3f} nats/token")

        run_warm_start(self.policy, self.config, self.task, on_step)
        return time.perf_counter() - start

    def _evaluated_at_start(self, state: TrainerState, log: MetricsLog | None) -> TrainerState:
        metrics = evaluate(self.policy, self.config, self.task).metrics()
        self._publish(log, 0, metrics, [])
        return replace(
            state,
            accuracy_start=metrics[record.EVAL_ACCURACY],
            reward_start=metrics[record.EVAL_REWARD],
        )

    def _steps(
        self,
        state: TrainerState,
        rollout: StoredRollout | None,
        remembered: RememberedWeights,
        log: MetricsLog | None,
    ) -> TrainerState:
        """RL steps to the end; ``rollout`` is that of the first, if it was stopped in it."""
        config = self.config
        worker = RLStep(self.policy, config, self.task, remembered, self.stop)
        last = config.run.stop_after or config.run.steps
        while state.step < last:
            outcome = self._run_step(worker, state, rollout, remembered)
            rollout = None
            state, findings = self._advance(state, outcome)
            remembered.advance(self.policy, config.anchor, state.step)
            metrics = {**outcome.metrics, record.SAMPLES: float(state.samples)}
            if state.step % config.evaluation.every == 0 or state.step == config.run.steps:
                metrics |= evaluate(self.policy, config, self.task).metrics()
            self._publish(log, state.step, metrics, findings, outcome.kept)
            self._stop_if_useless(state, outcome)
            if self._saves_at(state.step):
                self._save(state, remembered, metrics)
        return state

    def _run_step(
        self,
        worker: RLStep,
        state: TrainerState,
        rollout: StoredRollout | None,
        remembered: RememberedWeights,
    ) -> StepOutcome:
        """One RL step; where it is stopped early, what was done is saved first."""
        try:
            check_stop(self.stop)
            return worker.run(
                state.step, state.schedule, state.optimizer_steps, state.skipped_in_a_row, rollout
            )
        except StoppedEarly:
            if self._saved_step != state.step:
                self._save(state, remembered, self._published)
            raise
        except StoppedInRollout as stop:
            self._save(state, remembered, {}, stop.rollout)
            raise StoppedEarly(str(stop)) from None

    def _advance(
        self, state: TrainerState, outcome: StepOutcome
    ) -> tuple[TrainerState, list[Finding]]:
        figures = step_figures(outcome.metrics, self.config.schedule)
        found: list[Finding] = []
        diagnostics = state.diagnostics
        if figures is not None:
            found, diagnostics = observe(diagnostics, figures, self.config.diagnostics)
        state = replace(
            state,
            step=state.step + 1,
            schedule=outcome.schedule_state,
            diagnostics=diagnostics,
            optimizer_steps=state.optimizer_steps + outcome.optimizer_steps,
            skipped_steps=state.skipped_steps + outcome.skipped,
            skipped_in_a_row=outcome.skipped_in_a_row,
            samples=state.samples + outcome.samples,
        )
        return state, found

    def _publish(
        self,
        log: MetricsLog | None,
        step: int,
        metrics: dict[str, float],
        findings: list[Finding],
        kept: tuple[KeptGroup, ...] = (),
    ) -> None:
        def write() -> None:
            assert log is not None
            log.write(step, metrics, findings, kept)

        on_first_or_stop(write)
        self._published = metrics
        self.view.update(step, metrics, [asdict(finding) for finding in findings])

    def _stop_if_useless(self, state: TrainerState, outcome: StepOutcome) -> None:
        if outcome.mismatch is not None:
            raise TrainingStopped(f"{outcome.mismatch}; RL step {state.step}")
        limit = self.config.update.max_skipped_steps
        if state.skipped_in_a_row >= limit:
            raise TrainingStopped(
                f"{state.skipped_in_a_row} optimizer steps in a row were skipped because something "
                f"was not finite, the last time {outcome.not_finite} "
                f"(update.max_skipped_steps={limit}); last RL step {state.step}"
            )

    def _saves_at(self, step: int) -> bool:
        run = self.config.run
        due = run.save_every > 0 and (step % run.save_every == 0 or step == run.steps)
        return due or step == run.stop_after

    def _save(
        self,
        state: TrainerState,
        remembered: RememberedWeights,
        metrics: dict[str, float],
        rollout: StoredRollout | None = None,
    ) -> None:
        state = replace(state, wall_s=self.wall_s)
        root = self.folder / record.CHECKPOINT_DIR
        try:
            path = checkpoint.save(
                root, self.policy, remembered, state, self.config, metrics, rollout
            )
        except SaveFailed as error:
            raise TrainingStopped(str(error)) from error
        self._saved_step = state.step
        self.view.note(f"saved {path}")

    def _summarize(self, state: TrainerState) -> None:
        memories = all_gather_objects(_peak_memory_mib(self.layout))

        def write() -> None:
            summary = summarize(
                self.folder,
                self.config,
                state,
                self.layout,
                wall_s=self.wall_s,
                peak_memory_mib=max(memories),
                versions=versions_of(_DISTRIBUTIONS),
            )
            write_summary(self.folder, summary)
            self.view.note(
                f"held-out accuracy {summary.accuracy_start:.3f} -> {summary.accuracy_final:.3f} "
                f"in {summary.wall_s:.0f} s; {self.folder}"
            )

        on_first_or_stop(write)


@contextlib.contextmanager
def _view(config: Config, layout: Layout) -> Iterator[View]:
    if layout.rank != 0 or config.run.console == "off":
        yield SilentView()
        return
    from nemo_apo.report.console import LiveView

    subtitle = (
        f"{config.task.name}/{config.task.reward}  {config.objective.name}  "
        f"world {layout.world_size} = {layout.sizes}"
    )
    with LiveView(config.run.name, config.run.steps, subtitle) as view:
        yield view


def set_threads(run_config: RunConfig) -> None:
    """CPU threads of this rank, see ``RunConfig.threads``."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = run_config.threads or max(1, (os.cpu_count() or 1) // local_ranks)
    torch.set_num_threads(threads)


def _peak_memory_mib(layout: Layout) -> float:
    """Peak resident memory of this process, or peak GPU memory where there is a GPU, MiB."""
    if layout.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
