"""A tiny configuration, tasks that reward even a random policy, and an RL step that is watched."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_apo.config import (
    Config,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    UpdateConfig,
    WarmStartConfig,
)
from nemo_apo.core.alpha_schedule import ScheduleState
from nemo_apo.core.objectives import GroupBatch
from nemo_apo.core.settling import SequenceFigures
from nemo_apo.parallel import layout as parallel_layout
from nemo_apo.parallel.layout import Layout
from nemo_apo.tasks import Prompt, SortTask
from nemo_apo.trainer.anchors import RememberedWeights
from nemo_apo.trainer.loop import build_policy
from nemo_apo.trainer.policy import Policy
from nemo_apo.trainer.rl_step import RLStep, StepOutcome
from nemo_apo.trainer.rollout_source import RolloutSource
from nemo_apo.trainer.rollouts import Rollouts

TINY_MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    # Wide enough that an untrained model prefers some tokens to others.
    init_method_std=0.2,
)


@dataclass(frozen=True)
class TokenSumTask(SortTask):
    """Sorting's prompts with a reward that a random policy gets, too: its token ids modulo 7."""

    length: int = 4

    def grade(self, prompt: Prompt, completion: list[int]) -> float:
        return sum(completion) % 7 / 7.0


@dataclass(frozen=True)
class EqualRewardTask(SortTask):
    """Every completion is worth the same."""

    length: int = 4
    worth: float = 0.7

    def grade(self, prompt: Prompt, completion: list[int]) -> float:
        return self.worth


def tiny_config(**sections: Any) -> Config:
    """A configuration of a few small sequences; sections may be replaced."""
    config = Config(
        run=RunConfig(
            name="tiny",
            steps=8,
            save_every=0,
            console="off",
            tensorboard=False,
            report=False,
        ),
        task=TokenSumTask(),
        model=TINY_MODEL,
        rollout=RolloutConfig(prompts=4, group_size=4, micro_batch_size=16),
        update=UpdateConfig(
            mini_batches=2, epochs=1, micro_batch_size=4, log_prob_micro_batch_size=8
        ),
        # A large epsilon: with Adam's usual 1e-8, a gradient that is rounding error alone would
        # move its weight by a whole learning rate, and no two layouts could agree.
        optimizer=OptimizerConfig(lr=1e-3, adam_eps=1e-4),
        warm_start=WarmStartConfig(steps=0),
        evaluation=EvaluationConfig(every=100, prompts=8, pass_prompts=4, pass_k=2),
    )
    return replace(config, **sections)


class WatchedSource(RolloutSource):
    """A source of rollouts that keeps them as they were sampled, before any group is dropped."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.drawn: list[Rollouts] = []

    def _sample(self, step: int, again: int, count: int) -> Rollouts:
        self.drawn.append(super()._sample(step, again, count))
        return self.drawn[-1]


class WatchedStep(RLStep):
    """An RL step that keeps what it sampled and what it weighed."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.source = WatchedSource(self.policy, self.config, self.task, self.stop)
        self.read: list[Rollouts] = []
        self.batches: list[GroupBatch] = []

    @property
    def drawn(self) -> list[Rollouts]:
        """What was sampled, one entry per round."""
        return self.source.drawn

    def _read(self, rollouts: Rollouts) -> Rollouts:
        self.read.append(super()._read(rollouts))
        return self.read[-1]

    def _settle(self, figures: SequenceFigures) -> GroupBatch:
        self.batches.append(super()._settle(figures))
        return self.batches[-1]


@dataclass
class Training:
    """A policy on this rank with all that belongs to it; ``run`` does RL steps from the start."""

    config: Config
    layout: Layout
    policy: Policy
    remembered: RememberedWeights
    worker: WatchedStep

    def run(self, steps: int = 1) -> list[StepOutcome]:
        """RL steps from the start, as the loop does them."""
        state, done, in_a_row = ScheduleState(), 0, 0
        outcomes = []
        for step in range(steps):
            outcome = self.worker.run(step, state, done, in_a_row)
            outcomes.append(outcome)
            state, in_a_row = outcome.schedule_state, outcome.skipped_in_a_row
            done += outcome.optimizer_steps
            self.remembered.advance(self.policy, self.config.anchor, step + 1)
        return outcomes

    def one(self) -> StepOutcome:
        """The first RL step."""
        return self.run()[0]

    def weights(self) -> dict[str, Tensor]:
        """The whole model by name, whatever the layout."""
        module = self.policy.refit_sampler()
        named = module.named_parameters()
        if self.policy.sampling_ranks == 1:
            return {name: value.detach().clone() for name, value in named}
        group = module.pg_collection.tp
        return {name: _whole(name, value, group) for name, value in named}


def _whole(name: str, part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """A weight from its tensor-parallel parts."""
    if not getattr(part, "tensor_model_parallel", False):
        return part.detach().clone()
    data = part.detach()
    parts = [torch.empty_like(data) for _ in range(group.size())]
    dist.all_gather(parts, data.contiguous(), group=group)
    if not name.endswith("linear_fc1.weight"):
        return torch.cat(parts, dim=part.partition_dim)
    # Each rank holds its rows of the gate, then its rows of the other projection.
    gates, others = zip(*(whole.chunk(2) for whole in parts), strict=True)
    return torch.cat([*gates, *others])


def begin(
    config: Config, layout: Layout | None = None, step_class: type[WatchedStep] = WatchedStep
) -> Training:
    """Build everything on this rank; ``layout`` None starts megatron's groups as well."""
    if layout is None:
        layout = parallel_layout.initialize(config.parallel, config.run.seed)
    policy = build_policy(config, layout)
    needs_reference = config.regularizers.needs_reference or config.update.monitor_reference_kl
    remembered = RememberedWeights.at_start(policy, config.anchor, needs_reference)
    worker = step_class(policy, config, config.task, remembered)
    return Training(config, layout, policy, remembered, worker)


def parallel(tensor: int, pipeline: int) -> ParallelConfig:
    """Tensor- and pipeline-parallel sizes over gloo."""
    return ParallelConfig(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, backend="gloo"
    )


def largest_gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest absolute difference between weights of the same name."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def bits_equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether all tensors are the same to the last bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
