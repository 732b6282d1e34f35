"""Gradients, tensor by tensor, and weights after SGD and AdamW steps are those of one rank.

``test_layouts`` compares rollouts and figures of whole RL steps with Adam, which hides the size of
a gradient; here the gradient itself is compared, of the same rollouts, over two optimizer steps
with SGD between, and how far three steps of AdamW lead.
"""

from dataclasses import dataclass, replace
from functools import cache, partial

import pytest
import torch
from torch import Tensor

from nemo_apo.config import Config, ParallelConfig, RolloutConfig, UpdateConfig
from nemo_apo.core.objectives import OBJECTIVES, Regularizers
from nemo_apo.parallel import layout as parallel_layout
from nemo_apo.trainer.policy import Update
from tests.parallel.ranks import run_ranks

from .tiny_runs import TINY_MODEL, Training, begin, tiny_config

# Relative to a tensor's norm, in float32: what sums in another order leave.
TOLERANCE = 5e-6
# The second step's coefficients divide the rounding of sequence log-probs by tau.
SECOND_TOLERANCE = 1e-5
LEARNING_RATE = 0.02
# Of the way that a tensor has gone after three steps of AdamW, which divides a gradient by its own
# size: where that is little more than rounding, so is its direction. 3e-5 was seen.
ADAMW_TOLERANCE = 1e-4
FOUR_RANKS = pytest.mark.slow(reason="four ranks on the two cores of a small machine")


@dataclass
class Steps:
    """After each optimizer step: the whole model's gradient and weights by name."""

    gradients: list[dict[str, Tensor]]
    weights: list[dict[str, Tensor]]


def sgd_steps(config: Config, layout: parallel_layout.Layout | None = None) -> Steps:
    """One RL step with SGD in the optimizer's place."""
    training = begin(config, layout)
    steps = Steps([], [])
    training.policy.update = partial(_sgd, training, steps)  # type: ignore[method-assign]
    training.run(1)
    return steps


@torch.no_grad()
def _sgd(training: Training, steps: Steps, lr: float, loss_sum: float) -> Update:
    policy = training.policy
    own = [parameter.main_grad.clone() for parameter in policy.parameters()]
    with policy.holding(own):
        steps.gradients.append(training.weights())
    for parameter, gradient in zip(policy.parameters(), own, strict=True):
        parameter.data.add_(gradient, alpha=-LEARNING_RATE)
    steps.weights.append(training.weights())
    return Update(grad_norm=1.0)


@cache
def on_one_rank(config: Config) -> Steps:
    (single,) = run_ranks(1, sgd_steps, config)
    return single


def assert_same(got: Steps, wanted: Steps) -> None:
    assert len(got.gradients) == len(wanted.gradients) == 2
    first, second = zip(got.gradients, wanted.gradients, strict=True)
    assert largest_relative_gap(*first) <= TOLERANCE
    assert largest_relative_gap(*second) <= SECOND_TOLERANCE
    for mine, other in zip(got.weights, wanted.weights, strict=True):
        assert largest_relative_gap(mine, other) <= TOLERANCE


def largest_relative_gap(mine: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest |a - b| / |b| of any tensor."""
    assert mine.keys() == other.keys()
    assert all(float(value.norm()) > 0.0 for value in other.values())
    return max(float((mine[name] - v).norm() / v.norm()) for name, v in other.items())


BASE = tiny_config(update=UpdateConfig(mini_batches=2, epochs=1, micro_batch_size=4))
ONE_BY_ONE = replace(BASE, update=replace(BASE.update, micro_batch_size=1))
TIED = replace(BASE, model=replace(TINY_MODEL, tied_embeddings=True))
# 3 groups of 5 over two ranks: the second group is cut in the middle.
CUT_GROUPS = replace(
    BASE,
    rollout=RolloutConfig(prompts=3, group_size=5, micro_batch_size=4),
    update=UpdateConfig(mini_batches=1, epochs=2, micro_batch_size=3),
)
TP2 = ParallelConfig(2)
TP2_SP = ParallelConfig(2, sequence_parallel=True)
PP2 = ParallelConfig(1, 2)
CP2 = ParallelConfig(context_parallel_size=2)
TP2_PP2 = ParallelConfig(2, 2)
VPP2 = ParallelConfig(1, 2, virtual_pipeline_model_parallel_size=2)
FOUR_LAYERS = replace(BASE, model=replace(TINY_MODEL, num_layers=4))


LAYOUTS = pytest.mark.parametrize(
    ("config", "layout", "world_size"),
    [
        pytest.param(BASE, TP2, 2, id="TP2"),
        pytest.param(ONE_BY_ONE, TP2, 2, id="TP2, micro-batches of 1"),
        pytest.param(TIED, TP2, 2, id="TP2, tied"),
        pytest.param(BASE, TP2_SP, 2, id="TP2+SP"),
        pytest.param(TIED, TP2_SP, 2, id="TP2+SP, tied"),
        pytest.param(ONE_BY_ONE, PP2, 2, id="PP2, micro-batches of 1"),
        pytest.param(TIED, PP2, 2, id="PP2, tied"),
        pytest.param(BASE, ParallelConfig(), 2, id="DP2"),
        pytest.param(CUT_GROUPS, ParallelConfig(), 2, id="DP2, groups cut"),
        pytest.param(BASE, CP2, 2, id="CP2"),
        pytest.param(FOUR_LAYERS, VPP2, 2, id="VPP2"),
        pytest.param(
            replace(FOUR_LAYERS, update=ONE_BY_ONE.update), VPP2, 2, id="VPP2, micro-batches of 1"
        ),
        pytest.param(
            replace(FOUR_LAYERS, model=replace(FOUR_LAYERS.model, tied_embeddings=True)),
            VPP2,
            2,
            id="VPP2, tied",
        ),
        pytest.param(ONE_BY_ONE, CP2, 2, id="CP2, micro-batches of 1"),
        pytest.param(BASE, ParallelConfig(recompute="full"), 1, id="full recompute"),
        pytest.param(BASE, ParallelConfig(recompute="selective"), 1, id="selective recompute"),
        pytest.param(BASE, TP2_PP2, 4, id="TP2xPP2", marks=FOUR_RANKS),
        pytest.param(CUT_GROUPS, TP2, 4, id="TP2xDP2, groups cut", marks=FOUR_RANKS),
    ],
)


@LAYOUTS
def test_gradients_and_weights_do_not_depend_on_the_layout(
    config: Config, layout: ParallelConfig, world_size: int
) -> None:
    for got in run_ranks(world_size, sgd_steps, replace(config, parallel=layout)):
        assert_same(got, on_one_rank(config))


@dataclass
class Way:
    """The whole model's weights by name: at the start and after the steps."""

    start: dict[str, Tensor]
    end: dict[str, Tensor]


def adamw_steps(config: Config) -> Way:
    """One RL step of three optimizer steps on the whole rollout."""
    update = replace(config.update, mini_batches=1, epochs=3)
    training = begin(replace(config, update=update))
    start = training.weights()
    (outcome,) = training.run(1)
    assert outcome.optimizer_steps == 3
    return Way(start, training.weights())


@cache
def way_on_one_rank(config: Config) -> Way:
    (single,) = run_ranks(1, adamw_steps, config)
    return single


@LAYOUTS
def test_adamw_leads_to_the_same_weights(
    config: Config, layout: ParallelConfig, world_size: int
) -> None:
    wanted = way_on_one_rank(config)
    for got in run_ranks(world_size, adamw_steps, replace(config, parallel=layout)):
        for name, end in wanted.end.items():
            gone = float((end - wanted.start[name]).norm())
            assert gone > 0.0
            assert float((got.end[name] - end).norm()) <= ADAMW_TOLERANCE * gone, name


def test_pipeline_stages_give_the_same_bits() -> None:
    """All rows of an optimizer step at once: with several micro-batches, stages pad them alike."""
    config = replace(BASE, update=replace(BASE.update, micro_batch_size=8))
    wanted = on_one_rank(config)
    for got in run_ranks(2, sgd_steps, replace(config, parallel=PP2)):
        for mine, other in zip(got.gradients, wanted.gradients, strict=True):
            assert all(torch.equal(mine[name], other[name]) for name in other)


def every_objective(parallel: ParallelConfig) -> dict[str, Steps]:
    """Gradients of all objectives, with both regularizers on."""
    layout = parallel_layout.initialize(parallel, 0)
    steps = {}
    for name, objective in OBJECTIVES.items():
        config = replace(
            BASE,
            objective=objective,
            parallel=parallel,
            regularizers=Regularizers(kl_coef=0.1, kl_estimator="k3", entropy_coef=0.01),
        )
        steps[name] = sgd_steps(config, layout)
    return steps


@pytest.mark.slow(reason="four ranks on the two cores of a small machine, every objective")
def test_no_objective_depends_on_the_layout() -> None:
    (wanted,) = run_ranks(1, every_objective, ParallelConfig())
    for got in run_ranks(4, every_objective, TP2_PP2):
        for name in OBJECTIVES:
            assert_same(got[name], wanted[name])
