"""The whole RL step gives the same rollouts, figures and weights in every parallel layout."""

from dataclasses import dataclass, replace
from functools import cache

import pytest
from torch import Tensor

from nemo_apo import record
from nemo_apo.config import Config, ParallelConfig, RolloutConfig, UpdateConfig
from nemo_apo.core.objectives import OBJECTIVES, Regularizers
from nemo_apo.parallel import layout as parallel_layout
from tests.parallel.ranks import run_ranks

from .tiny_runs import TINY_MODEL, begin, bits_equal, largest_gap, parallel, tiny_config

# What float32 sums in another order may change, far below what an optimizer step changes (> 1e-4).
WEIGHT_TOLERANCE = 2e-6
FOUR_RANKS = pytest.mark.slow(reason="four ranks on the two cores of a small machine")
EXACT_FIGURES = (record.REWARD_MEAN, record.TOKEN_ENTROPY, record.ALPHA, record.TAU_MEAN)


@dataclass
class Trace:
    """What an RL run left on one rank."""

    tokens: list[Tensor]
    metrics: list[dict[str, float]]
    optimizer_steps: int
    first: dict[str, Tensor]
    last: dict[str, Tensor]


def trace(config: Config, steps: int, layout: parallel_layout.Layout | None = None) -> Trace:
    training = begin(config, layout)
    first = training.weights()
    outcomes = training.run(steps)
    return Trace(
        tokens=[rollouts.tokens_NT for rollouts in training.worker.drawn],
        metrics=[outcome.metrics for outcome in outcomes],
        optimizer_steps=sum(outcome.optimizer_steps for outcome in outcomes),
        first=first,
        last=training.weights(),
    )


@cache
def on_one_rank(config: Config, steps: int) -> Trace:
    (single,) = run_ranks(1, trace, config, steps)
    return single


def assert_same(got: Trace, wanted: Trace) -> None:
    assert largest_gap(got.first, wanted.first) == 0.0, "initial weights depend on the layout"
    assert bits_equal(got.tokens, wanted.tokens), "other tokens were sampled"
    assert got.optimizer_steps == wanted.optimizer_steps
    for mine, other in zip(got.metrics, wanted.metrics, strict=True):
        assert set(mine) == set(other)
        for name in EXACT_FIGURES:
            if name in other:
                assert mine[name] == pytest.approx(other[name], rel=0.0, abs=1e-5), name
        for name in (record.GRAD_NORM, record.OBJECTIVE_VALUE):
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
        assert mine[record.SAMPLER_MISMATCH] < 1e-5
    assert largest_gap(got.last, wanted.last) < WEIGHT_TOLERANCE
    # The comparison means something: every weight matrix has moved.
    assert largest_gap(got.last, got.first) > 1e-4


# Two optimizer steps per rollout, here as two mini-batches and below as two epochs.
BASE = tiny_config(update=UpdateConfig(mini_batches=2, epochs=1, micro_batch_size=3))
# 3 groups of 5 over two ranks: the second group is cut in the middle.
CUT_GROUPS = replace(
    BASE,
    rollout=RolloutConfig(prompts=3, group_size=5, micro_batch_size=4),
    update=UpdateConfig(mini_batches=1, epochs=2, micro_batch_size=3),
)
TIED = replace(BASE, model=replace(TINY_MODEL, tied_embeddings=True))


@pytest.mark.parametrize(
    ("config", "tensor", "pipeline", "world_size"),
    [
        pytest.param(BASE, 2, 1, 2, id="TP2"),
        pytest.param(BASE, 1, 2, 2, id="PP2"),
        pytest.param(BASE, 1, 1, 2, id="DP2"),
        pytest.param(BASE, 2, 2, 4, id="TP2xPP2"),
        pytest.param(BASE, 1, 2, 4, id="PP2xDP2", marks=FOUR_RANKS),
        pytest.param(CUT_GROUPS, 1, 1, 2, id="DP2, groups cut"),
        pytest.param(TIED, 1, 2, 2, id="PP2, tied embeddings"),
        pytest.param(TIED, 2, 1, 2, id="TP2, tied embeddings"),
    ],
)
def test_apo_does_not_depend_on_the_layout(
    config: Config, tensor: int, pipeline: int, world_size: int
) -> None:
    wanted = on_one_rank(config, 2)
    assert wanted.optimizer_steps == 4
    config = replace(config, parallel=parallel(tensor, pipeline))
    for got in run_ranks(world_size, trace, config, 2):
        assert_same(got, wanted)


@pytest.mark.parametrize(
    ("config", "layout", "world_size"),
    [
        pytest.param(BASE, ParallelConfig(context_parallel_size=2), 2, id="CP2"),
        pytest.param(BASE, ParallelConfig(2, sequence_parallel=True), 2, id="TP2+SP"),
        pytest.param(
            replace(BASE, model=replace(TINY_MODEL, num_layers=4)),
            ParallelConfig(1, 2, virtual_pipeline_model_parallel_size=2),
            2,
            id="VPP2",
        ),
        pytest.param(TIED, ParallelConfig(2, sequence_parallel=True), 2, id="TP2+SP, tied"),
        pytest.param(BASE, ParallelConfig(recompute="full"), 1, id="full recompute"),
        pytest.param(BASE, ParallelConfig(recompute="selective"), 1, id="selective recompute"),
        pytest.param(BASE, ParallelConfig(distributed_optimizer=True), 2, id="DP2, sharded"),
        pytest.param(CUT_GROUPS, ParallelConfig(context_parallel_size=2), 4, id="CP2xDP2"),
        pytest.param(
            BASE,
            ParallelConfig(2, context_parallel_size=2, sequence_parallel=True, recompute="full"),
            4,
            id="TP2xCP2+SP, recompute",
            marks=FOUR_RANKS,
        ),
        pytest.param(
            BASE,
            ParallelConfig(1, 2, context_parallel_size=2),
            4,
            id="PP2xCP2",
            marks=FOUR_RANKS,
        ),
    ],
)
def test_nor_on_how_a_layout_saves_memory(
    config: Config, layout: ParallelConfig, world_size: int
) -> None:
    wanted = on_one_rank(config, 2)
    for got in run_ranks(world_size, trace, replace(config, parallel=layout), 2):
        assert_same(got, wanted)


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [
        pytest.param(ParallelConfig(2), 2, id="TP2 samples as it trains"),
        pytest.param(ParallelConfig(1, 2), 2, id="PP2 samples in TP2"),
        pytest.param(ParallelConfig(1), 2, id="DP2 samples in TP2"),
        pytest.param(ParallelConfig(2, sequence_parallel=True), 4, id="TP2+SP", marks=FOUR_RANKS),
    ],
)
def test_nor_on_the_ranks_that_share_the_sampling_model(
    layout: ParallelConfig, world_size: int
) -> None:
    wanted = on_one_rank(TIED, 2)
    rollout = replace(TIED.rollout, tensor_model_parallel_size=2)
    config = replace(TIED, rollout=rollout, parallel=layout)
    for got in run_ranks(world_size, trace, config, 2):
        assert_same(got, wanted)


def test_padding_up_to_the_tensor_size_changes_nothing() -> None:
    """Vocabulary 12 padded to 16: with TP4 the last rank holds padding only."""
    model = replace(TINY_MODEL, num_query_groups=4)
    config = replace(BASE, model=model)
    wanted = on_one_rank(config, 1)
    for got in run_ranks(4, trace, replace(config, parallel=parallel(4, 1)), 1):
        assert_same(got, wanted)


def all_objectives(tensor: int, pipeline: int) -> dict[str, Trace]:
    """One RL step of every other objective, with both regularizers on."""
    layout = parallel_layout.initialize(parallel(tensor, pipeline), 0)
    traces = {}
    for name, objective in OBJECTIVES.items():
        if name == "apo":
            continue
        config = replace(
            BASE,
            objective=objective,
            parallel=parallel(tensor, pipeline),
            update=UpdateConfig(mini_batches=1, epochs=2, micro_batch_size=3),
            regularizers=Regularizers(kl_coef=0.1, kl_estimator="k3", entropy_coef=0.01),
        )
        traces[name] = trace(config, 1, layout)
    return traces


@cache
def every_objective_on_one_rank() -> dict[str, Trace]:
    (single,) = run_ranks(1, all_objectives, 1, 1)
    return single


@pytest.mark.parametrize(
    ("tensor", "pipeline", "world_size"),
    [
        pytest.param(1, 1, 2, id="DP2"),
        pytest.param(
            2,
            2,
            4,
            id="TP2xPP2",
            marks=FOUR_RANKS,
        ),
    ],
)
def test_no_objective_depends_on_the_layout(tensor: int, pipeline: int, world_size: int) -> None:
    wanted = every_objective_on_one_rank()
    assert set(wanted) == set(OBJECTIVES) - {"apo"}
    for traces in run_ranks(world_size, all_objectives, tensor, pipeline):
        for name in wanted:
            assert_same(traces[name], wanted[name])
