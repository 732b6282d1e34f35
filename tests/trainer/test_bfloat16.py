"""bfloat16 weights: how far gradients are from float32's, and from each other in every layout."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from nemo_apo.config import Config, ParallelConfig
from nemo_apo.core.anchoring import sequence_sums
from nemo_apo.core.objectives import Columns
from nemo_apo.trainer.micro_batch import MicroBatch
from tests.parallel.ranks import run_ranks

from .tiny_runs import TINY_MODEL, Training, begin, tiny_config

ROWS, WIDTH = 8, 12
# Of a tensor's norm; .035 was seen between the precisions, .029 between layouts.
BOUND = 5e-2
FLOAT32 = tiny_config()
BFLOAT16 = replace(FLOAT32, model=replace(TINY_MODEL, params_dtype="bfloat16"))


def gradient(config: Config) -> dict[str, Tensor]:
    """Gradient of a linear loss on made sequences, of the whole model by name."""
    training = begin(config)
    # The weights of both precisions are the same numbers.
    for parameter in training.policy.parameters():
        parameter.data.copy_(parameter.data.bfloat16())
    training.policy.optimizer.reload_model_params()
    draw = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, 12, (ROWS, WIDTH + 1), generator=draw)
    columns = Columns(*torch.randn(3, ROWS, generator=draw, dtype=torch.float64))
    batch = MicroBatch.of(tokens, torch.arange(WIDTH).expand(ROWS, -1) >= 4, columns=columns)
    training.policy.accumulate(batch, 2, lambda hidden, part: _loss(training, hidden, part))
    policy = training.policy
    own = [parameter.main_grad.to(parameter.dtype) for parameter in policy.parameters()]
    with policy.holding(own):
        return {name: value.float() for name, value in training.weights().items()}


def _loss(training: Training, hidden: Tensor, part: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
    logprobs, _ = training.policy.token_logprobs(hidden, part)
    assert part.columns is not None
    sums = torch.where(part.mask_BT, logprobs, 0.0).sum(dim=1)
    loss = (part.columns.coefficient_N.to(sums.dtype) * sums).sum()
    return loss, {
        "loss": loss.detach(),
        "clipped": torch.zeros(()),
        "logprob_sums": sequence_sums(logprobs.detach(), part.mask_BT),
    }


@cache
def on_one_rank(config: Config) -> dict[str, Tensor]:
    (single,) = run_ranks(1, gradient, config)
    return single


def largest_gap(mine: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest |a - b| / |b| of any tensor."""
    assert mine.keys() == other.keys()
    return max(float((mine[name] - v).norm() / v.norm()) for name, v in other.items())


def test_gradients_are_those_of_float32_within_the_precision_of_products() -> None:
    gap = largest_gap(on_one_rank(BFLOAT16), on_one_rank(FLOAT32))
    assert 1e-4 < gap < BOUND


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        pytest.param(ParallelConfig(2), 2, id="TP2"),
        pytest.param(ParallelConfig(2, sequence_parallel=True), 2, id="TP2+SP"),
        pytest.param(ParallelConfig(1, 2), 2, id="PP2"),
        pytest.param(ParallelConfig(), 2, id="DP2"),
        pytest.param(ParallelConfig(context_parallel_size=2), 2, id="CP2"),
        pytest.param(ParallelConfig(recompute="full"), 1, id="recompute"),
    ],
)
def test_layouts_agree(layout: ParallelConfig, ranks: int) -> None:
    for got in run_ranks(ranks, gradient, replace(BFLOAT16, parallel=layout)):
        assert largest_gap(got, on_one_rank(BFLOAT16)) < BOUND
