"""The static engine ends completions at stop strings, row by row."""

from dataclasses import replace

import pytest
import torch

from nemo_apo.config import ROLLOUT_ENGINES
from nemo_apo.tasks import Prompt
from nemo_apo.trainer.engines.by_name import ENGINES
from nemo_apo.trainer.engines.interface import Sampling
from nemo_apo.trainer.rollouts import Completions
from nemo_apo.trainer.sampler import generate, uniforms

from ..test_sampler import CountingDown
from ..tiny_runs import TokenSumTask

TASK = TokenSumTask()


def spelled(tokens: list[int]) -> str:
    """Token ids as letters: 2 is b, 3 is c and so on."""
    return "".join(chr(ord("a") + token - 1) for token in tokens)


def counted_down(stop_strings: tuple[str, ...], greedy: bool, batch: int) -> Completions:
    """Completions of a model that counts down from the prompt's last token to the end, token 1."""
    prompts = [Prompt(str(last), (9, 9, last)) for last in (2, 4, 7, 8, 10)]
    sampling = replace(
        Sampling.of(TASK, TASK.vocab_size, 1.0, batch), text=spelled, stop_strings=stop_strings
    )
    draws = None if greedy else uniforms(0, "counting", len(prompts), TASK.max_response_length)
    return generate(CountingDown(), prompts, draws, sampling)


@pytest.mark.parametrize("batch", [1, 3, 5])
@pytest.mark.parametrize("greedy", [True, False])
def test_a_stop_string_ends_a_completion(greedy: bool, batch: int) -> None:
    done = counted_down(("ed", "h"), greedy, batch)
    assert [spelled(done.row(row)) for row in range(5)] == ["a", "cba", "fed", "gfed", "ih"]
    assert done.finished_N.tolist() == [True] * 5
    assert done.lengths_N.tolist() == [1, 3, 3, 4, 2]
    assert (done.tokens_NR[2, 3:] == TASK.pad_id).all()
    assert (done.logprobs_NR[2, 3:] == 0.0).all()


def test_without_one_nothing_changes() -> None:
    plain, other = (counted_down(stops, False, 5) for stops in ((), ("zz",)))
    for name, value in vars(plain).items():
        assert torch.equal(value, getattr(other, name)), name
    assert plain.finished_N.tolist() == [True, True, True, False, False]


def test_the_last_token_may_bring_it() -> None:
    limit = TASK.max_response_length
    done = counted_down((spelled(list(range(9, 9 - limit, -1))),), True, 5)
    assert done.lengths_N.tolist()[4] == limit
    assert done.finished_N.tolist() == [True, True, True, False, True]


def test_the_text_is_asked_for_only_where_there_are_stop_strings() -> None:
    sampling = Sampling.of(TASK, TASK.vocab_size, 1.0, 5)
    assert sampling.stop_strings == ()

    def never(tokens: list[int]) -> str:
        raise AssertionError(tokens)

    generate(CountingDown(), [Prompt("4", (9, 4))], None, replace(sampling, text=never))


def test_every_engine_can_be_chosen() -> None:
    assert set(ENGINES) == set(ROLLOUT_ENGINES)
