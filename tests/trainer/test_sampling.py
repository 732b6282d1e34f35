"""Completions of all ranks: every prompt once, in order, whatever ranks hold a copy together."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from nemo_apo.parallel import layout as parallel_layout
from nemo_apo.tasks import Prompt
from nemo_apo.trainer.engines.interface import Sampling
from nemo_apo.trainer.interruption import StoppedEarly
from nemo_apo.trainer.rollouts import Completions
from nemo_apo.trainer.sampler import uniforms
from nemo_apo.trainer.sampling import complete
from tests.parallel.ranks import run_ranks

from .tiny_runs import TokenSumTask, begin, bits_equal, parallel, tiny_config

TASK = TokenSumTask()
LIMIT = TASK.max_response_length


class EchoEngine:
    """Says each prompt's last token, and nothing sensible on any but a copy's first rank."""

    def __init__(self, rank: int, ranks_per_copy: int) -> None:
        self.ranks_per_copy = ranks_per_copy
        self.first = rank % ranks_per_copy == 0
        self.calls: list[str] = []
        self.asked: list[str] = []

    def wake(self) -> None:
        self.calls.append("wake")

    def refit(self) -> None:
        self.calls.append("refit")

    def generate(
        self,
        prompts: Sequence[Prompt],
        uniforms_NR: Tensor | None,
        sampling: Sampling,
        between: Callable[[], None],
    ) -> Completions:
        self.calls.append("generate")
        between()
        self.asked += [prompt.text for prompt in prompts]
        said_N = torch.tensor([prompt.tokens[-1] for prompt in prompts]) * int(self.first)
        tokens_NR = said_N[:, None].expand(-1, LIMIT).contiguous()
        draws_NR = torch.zeros(len(prompts), LIMIT) if uniforms_NR is None else uniforms_NR
        return Completions(
            tokens_NR=tokens_NR,
            lengths_N=said_N,
            finished_N=said_N % 2 == 0,
            logprobs_NR=draws_NR.float(),
            logprob_sums_N=-said_N.double(),
        )

    def sleep(self) -> None:
        self.calls.append("sleep")


class StopNow:
    def requested(self) -> str | None:
        return "the test"


def echoed(ranks_per_copy: int, count: int) -> list[str]:
    """What this rank was asked; every rank is told the same."""
    training = begin(tiny_config())
    engine = EchoEngine(training.layout.rank, ranks_per_copy)
    training.policy.engine = engine
    prompts = [Prompt(str(row), (5, 2 + row)) for row in range(count)]
    draws = uniforms(0, "echo", count, LIMIT)
    done = complete(training.policy, TASK, training.config.rollout, prompts, draws)
    assert done.tokens_NR[:, 0].tolist() == [2 + row for row in range(count)]
    assert done.finished_N.tolist() == [row % 2 == 0 for row in range(count)]
    assert done.logprob_sums_N.tolist() == [-2.0 - row for row in range(count)]
    assert torch.equal(done.logprobs_NR, draws.float())
    assert engine.calls == ["wake", "refit", "generate", "sleep"]

    with pytest.raises(StoppedEarly):
        complete(training.policy, TASK, training.config.rollout, prompts, None, StopNow())
    assert engine.calls[4:] == ["wake", "refit", "generate", "sleep"]
    return engine.asked


@pytest.mark.parametrize(
    ("ranks_per_copy", "count", "expected"),
    [
        (1, 5, ["01", "23", "44", "44"]),
        (2, 5, ["012", "012", "344", "344"]),
        (4, 3, ["012"] * 4),
        (2, 4, ["01", "01", "23", "23"]),
    ],
)
def test_ranks_of_a_copy_are_asked_the_same_and_each_prompt_counts_once(
    ranks_per_copy: int, count: int, expected: list[str]
) -> None:
    asked = run_ranks(4, echoed, ranks_per_copy, count)
    assert ["".join(texts) for texts in asked] == expected


def drawn(tensor: int, pipeline: int) -> Completions:
    layout = parallel(tensor, pipeline)
    training = begin(tiny_config(parallel=layout), parallel_layout.initialize(layout, 0))
    prompts = TASK.test_prompts(7)
    draws = uniforms(0, "a stream", 7, LIMIT)
    return complete(training.policy, TASK, training.config.rollout, prompts, draws)


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2)])
def test_the_static_engine_says_the_same_on_two_ranks(tensor: int, pipeline: int) -> None:
    (wanted,) = run_ranks(1, drawn, 1, 1)
    assert torch.equal((wanted.logprobs_NR != 0.0).sum(dim=1), wanted.lengths_N), (
        "a log-prob after the end, or none before it"
    )
    torch.testing.assert_close(
        wanted.logprobs_NR.double().sum(dim=1), wanted.logprob_sums_N, rtol=1e-6, atol=1e-6
    )
    for got in run_ranks(2, drawn, tensor, pipeline):
        exact = ["tokens_NR", "lengths_N", "finished_N"]
        assert bits_equal(*([getattr(each, name) for name in exact] for each in (got, wanted)))
        torch.testing.assert_close(got.logprobs_NR, wanted.logprobs_NR, rtol=0.0, atol=1e-5)
