"""``nemo-apo bench step``: the time of the trainer's optimizer steps, and where it goes.

The trainer's own RL step runs on random rollouts: two optimizer steps on all sequences with one
refresh of the coefficients in between. The time for sampling and for the log-prob pass before them
is left out.
"""

import statistics
from dataclasses import dataclass, replace
from typing import Any

import torch

from nemo_apo import record
from nemo_apo.bench.flops import model_flops
from nemo_apo.config import Config, ConfigError, vocab_size
from nemo_apo.core.alpha_schedule import ScheduleState
from nemo_apo.parallel import layout as parallel_layout
from nemo_apo.parallel.gather import all_gather_objects
from nemo_apo.parallel.layout import Layout
from nemo_apo.tasks import SortTask
from nemo_apo.trainer.anchors import RememberedWeights
from nemo_apo.trainer.loop import build_policy, set_threads
from nemo_apo.trainer.rl_step import RLStep
from nemo_apo.trainer.rollout_source import Drawn
from nemo_apo.trainer.rollouts import Rollouts

# One pass over all sequences for each of two optimizer steps, no pass for a metric alone, nothing
# saved. The user's own overrides come after these.
OVERRIDES = (
    "update.mini_batches=1",
    "update.epochs=2",
    "update.monitor_reference_kl=false",
    "run.save_every=0",
)
_PARTS = (record.TRAIN_SECONDS, record.WEIGH_SECONDS, record.REFRESH_SECONDS)


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        sequences: of a rollout, whole groups.
        length: completion tokens of each; one prompt token stands before them.
        vocab: size of the vocabulary; None for the task's.
        repeats: RL steps measured, after one that warms up.
        peak_tflops: what a device can do at most, in 1e12 operations per second; None leaves the
            utilisation out.
    """

    sequences: int
    length: int
    vocab: int | None
    repeats: int
    peak_tflops: float | None


@dataclass(frozen=True)
class Row:
    """Medians over the repeats, each the slowest rank's.

    Attributes:
        optimizer_steps: per repeat; the seconds are those of all of them.
        step_s: ``train_s``, ``weigh_s`` and ``refresh_s`` together.
        train_s: forward, backward and optimizer.
        weigh_s: settling the rollout and weighing each optimizer step's sequences.
        refresh_s: the pass that brings the log-probs behind the coefficients up to date.
        tokens_per_s: completion tokens of all optimizer steps over ``step_s``.
        objective_share, refresh_share: ``weigh_s`` and ``refresh_s`` over ``step_s``.
        model_tflops_per_s: operations of forward and backward by the model's shape, per rank and
            second of ``train_s``.
        mfu: the same over the peak of the device; None where that is not known.
        skipped_steps: optimizer steps skipped because something was not finite.
    """

    layout: str
    sequences: int
    length: int
    optimizer_steps: int
    step_s: float
    train_s: float
    weigh_s: float
    refresh_s: float
    tokens_per_s: float
    objective_share: float
    refresh_share: float
    model_tflops_per_s: float
    mfu: float | None
    skipped_steps: int


@dataclass(frozen=True)
class RandomTask(SortTask):
    """Sizes of a task; its prompts and rewards are never asked for."""

    tokens: int = 0
    completion: int = 0

    @property
    def vocab_size(self) -> int:
        return self.tokens

    @property
    def max_prompt_length(self) -> int:
        return 1

    @property
    def max_response_length(self) -> int:
        return self.completion


class _RandomSource:
    """In place of sampling: the same random rollout at every step, on every rank."""

    def __init__(self, rollouts: Rollouts) -> None:
        self.rollouts = rollouts

    def draw(self, step: int) -> Drawn:
        """The rollout, as if it had been sampled."""
        mean = float(self.rollouts.rewards_N.mean())
        return Drawn(self.rollouts, self.rollouts.count, {record.REWARD_MEAN: mean})


class _TimedStep(RLStep):
    """An RL step whose training time lasts until the device has finished."""

    def _train(self, *arguments: Any) -> None:
        super()._train(*arguments)
        if self.policy.layout.device.type == "cuda":
            torch.cuda.synchronize()


def fit(config: Config, request: Request) -> Config:
    """The configuration with as many prompts as the sequences need and a task of their size.

    Raises:
        ConfigError: if the sequences are no whole groups.
    """
    size = config.rollout.group_size
    if request.sequences % size != 0:
        raise ConfigError(
            f"--sequences {request.sequences}: must be a multiple of rollout.group_size={size}"
        )
    vocab = request.vocab or vocab_size(config)
    return replace(
        config,
        task=RandomTask(tokens=vocab, completion=request.length),
        # Random weights take as long as any.
        model=replace(config.model, path=None, vocab_size=None),
        rollout=replace(config.rollout, prompts=request.sequences // size),
    )


def run(config: Config, request: Request) -> tuple[Row, str]:
    """Measure a configuration from ``fit``; the row and the type of the device, on every rank."""
    set_threads(config.run)
    layout = parallel_layout.initialize(config.parallel, config.run.seed)
    try:
        return _measure(config, request, layout), layout.device.type
    finally:
        parallel_layout.shut_down()


def _measure(config: Config, request: Request, layout: Layout) -> Row:
    policy = build_policy(config, layout)
    remembered = RememberedWeights.at_start(
        policy, config.anchor, config.regularizers.needs_reference
    )
    worker = _TimedStep(policy, config, config.task, remembered)
    worker.source = _RandomSource(_rollouts(config))  # type: ignore[assignment]
    measured = [_one_step(worker) for _ in range(1 + request.repeats)][1:]
    return _row(config, request, layout, measured)


def _one_step(worker: RLStep) -> dict[str, float]:
    """Seconds of the parts of an RL step, the slowest rank's, and the optimizer steps skipped."""
    outcome = worker.run(0, ScheduleState(), 0, 0)
    own = {name: outcome.metrics.get(name, 0.0) for name in _PARTS}
    ranks = all_gather_objects(own)
    slowest = {name: max(part[name] for part in ranks) for name in _PARTS}
    return {**slowest, record.SKIPPED_STEPS: outcome.skipped}


def _rollouts(config: Config) -> Rollouts:
    """Random tokens and rewards; every token but the first is part of the completion."""
    draw = torch.Generator().manual_seed(config.run.seed)
    groups, size = config.rollout.prompts, config.rollout.group_size
    count, length = groups * size, config.task.max_response_length
    return Rollouts(
        tokens_NT=torch.randint(config.task.vocab_size, (count, 1 + length), generator=draw),
        mask_NT=torch.ones(count, length, dtype=torch.bool),
        group_ids_N=torch.arange(groups).repeat_interleave(size),
        rewards_N=torch.rand(count, generator=draw, dtype=torch.float64),
        truncated_N=torch.zeros(count, dtype=torch.bool),
        sampler_logprob_sums_N=torch.zeros(count, dtype=torch.float64),
    )


def _row(
    config: Config,
    request: Request,
    layout: Layout,
    measured: list[dict[str, float]],
) -> Row:
    train_s, weigh_s, refresh_s = (
        statistics.median(part[name] for part in measured) for name in _PARTS
    )
    step_s = train_s + weigh_s + refresh_s
    optimizer_steps = config.update.mini_batches * config.update.epochs
    tokens = config.update.epochs * request.sequences * request.length
    per_token = model_flops(config.model, config.task.vocab_size, request.length)
    tflops_per_s = tokens * per_token / layout.world_size / train_s / 1e12
    peak = request.peak_tflops
    return Row(
        layout=layout.sizes,
        sequences=request.sequences,
        length=request.length,
        optimizer_steps=optimizer_steps,
        step_s=step_s,
        train_s=train_s,
        weigh_s=weigh_s,
        refresh_s=refresh_s,
        tokens_per_s=tokens / step_s,
        objective_share=weigh_s / step_s,
        refresh_share=refresh_s / step_s,
        model_tflops_per_s=tflops_per_s,
        mfu=None if peak is None else tflops_per_s / peak,
        skipped_steps=int(sum(part[record.SKIPPED_STEPS] for part in measured)),
    )
