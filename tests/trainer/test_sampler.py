"""Sampling with a KV cache: the trainer's own distribution, drawn exactly, ended rightly."""

from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from nemo_apo.parallel import layout as parallel_layout
from nemo_apo.parallel.step import causal_mask
from nemo_apo.tasks import Prompt
from nemo_apo.trainer.engines.interface import Sampling
from nemo_apo.trainer.micro_batch import MicroBatch
from nemo_apo.trainer.model import HiddenStateGPT
from nemo_apo.trainer.policy import Policy
from nemo_apo.trainer.rollouts import Completions, assemble
from nemo_apo.trainer.sampler import draw, generate, uniforms
from tests.parallel.ranks import run_ranks

from .tiny_runs import TokenSumTask, build_policy, parallel, tiny_config

TASK = TokenSumTask()
END, PAD, VOCAB, LIMIT = TASK.end_id, TASK.pad_id, TASK.vocab_size, TASK.max_response_length


def mixed_prompts(count: int) -> list[Prompt]:
    """Prompts of two to five tokens, so that batches are padded on the left."""
    rng = Random(4)
    lengths = [2 + row % 4 for row in range(count)]
    rows = [tuple(rng.randrange(2, VOCAB) for _ in range(length)) for length in lengths]
    return [Prompt(str(row), row) for row in rows]


def sample(
    model: Any, prompts: list[Prompt], draws: Tensor | None, temperature: float, batch: int
) -> Completions:
    return generate(model, prompts, draws, Sampling.of(TASK, VOCAB, temperature, batch))


def trainers_sums(policy: Policy, prompts: list[Prompt], completions: Completions) -> Tensor:
    """Sequence log-probs by the trainer's forward pass."""
    nothing = torch.zeros(len(prompts))
    rollouts = assemble(prompts, completions, nothing.long(), nothing.double(), 5 + LIMIT, PAD)
    logprobs, _ = policy.read_logprobs(MicroBatch.of(rollouts.tokens_NT, rollouts.mask_NT), 8)
    return torch.where(rollouts.mask_NT, logprobs.double(), 0.0).sum(dim=1)


@torch.no_grad()
def greedy_without_cache(model: HiddenStateGPT, prompt: Prompt) -> list[int]:
    """The likeliest token of a whole forward pass, again and again."""
    tokens = list(prompt.tokens)
    for _ in range(LIMIT):
        length = len(tokens)
        hidden = model(
            torch.tensor([tokens]),
            torch.arange(length)[None],
            causal_mask(length, torch.device("cpu")),
        )
        logits = hidden @ model.output_weight.t()
        tokens.append(int(logits[0, -1, :VOCAB].argmax()))
        if tokens[-1] == END:
            break
    return tokens[len(prompt.tokens) :]


def with_loud_padding(model: GPTModel) -> None:
    """Give the padded rows of the vocabulary by far the largest logits."""
    with torch.no_grad():
        model.output_layer.weight[VOCAB:] = 40.0 * model.output_layer.weight[:4]


def check_sampler(temperature: float) -> None:
    config = tiny_config()
    policy = build_policy(config, parallel_layout.initialize(parallel(1, 1), 0))
    policy.temperature = temperature
    model = policy.refit_sampler()
    with_loud_padding(model)
    prompts = mixed_prompts(24)
    draws = uniforms(0, "a stream", 24, LIMIT)
    sampled = sample(model, prompts, draws, temperature, 24)

    # The sampler's distribution is the trainer's.
    gap = (sampled.logprob_sums_N - trainers_sums(policy, prompts, sampled)).abs()
    assert float((gap / sampled.lengths_N).max()) < 1e-5
    assert len(set(sampled.lengths_N.tolist())) > 1, "the example has one length only"

    # Padded tokens are never drawn, loud as they are.
    assert int(sampled.tokens_NR.max()) < VOCAB

    # The samples are a function of the uniform numbers, not of the batches.
    for batch in (1, 7):
        again = sample(model, prompts, draws, temperature, batch)
        assert torch.equal(again.tokens_NR, sampled.tokens_NR)
        torch.testing.assert_close(
            again.logprob_sums_N, sampled.logprob_sums_N, rtol=0.0, atol=1e-5
        )
    other = sample(model, prompts, uniforms(0, "another", 24, LIMIT), temperature, 24)
    assert not torch.equal(other.tokens_NR, sampled.tokens_NR)

    # Greedy decoding takes the likeliest token; temperature has no say.
    greedy = sample(model, prompts[:8], None, temperature, 5)
    for row, prompt in enumerate(prompts[:8]):
        assert greedy.row(row) == greedy_without_cache(model, prompt)
    assert model.training, "the model was left in evaluation mode"


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_sampling_follows_the_trainers_model(temperature: float) -> None:
    run_ranks(1, check_sampler, temperature)


class CountingDown(torch.nn.Module):
    """After token k it all but surely says k - 1; token 1 is the end."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor, **rest: Any) -> Tensor:
        follower = (tokens - 1).clamp(min=0)
        return torch.nn.functional.one_hot(follower, 16).float() * 60.0


@pytest.mark.parametrize("greedy", [True, False])
def test_the_end_token_stops_and_truncation_is_flagged(greedy: bool) -> None:
    prompts = [Prompt(str(last), (9, 9, last)) for last in (2, 4, 7, 8, 10)]
    draws = None if greedy else uniforms(0, "counting", len(prompts), LIMIT)
    assert LIMIT == 6
    done = sample(CountingDown(), prompts, draws, 1.0, 3)
    assert [done.row(row) for row in range(len(prompts))] == [
        [1],
        [3, 2, 1],
        [6, 5, 4, 3, 2, 1],
        [7, 6, 5, 4, 3, 2],
        [9, 8, 7, 6, 5, 4],
    ]
    # Ending with the very last token is ending; the limit without it is truncation.
    assert done.finished_N.tolist() == [True, True, True, False, False]
    assert done.tokens_NR[0].tolist() == [1, PAD, PAD, PAD, PAD, PAD]
    torch.testing.assert_close(
        done.logprob_sums_N, torch.zeros(5, dtype=torch.float64), rtol=0.0, atol=1e-12
    )


PROBABILITIES = st.lists(st.floats(0.0, 1.0), min_size=2, max_size=8).filter(
    lambda weights: sum(weights) > 1e-3
)
JUST_BELOW_1 = 1.0 - 2.0**-53
UNIFORMS = st.one_of(
    st.floats(0.0, 1.0, exclude_max=True), st.sampled_from([0.0, JUST_BELOW_1, 0.5])
)


def log_probabilities(weights: list[float]) -> Tensor:
    values = torch.tensor(weights, dtype=torch.float64)
    return torch.log(values / values.sum())


@given(weights=PROBABILITIES, uniform=UNIFORMS)
@settings(deadline=None, derandomize=True, database=None, max_examples=300)
def test_a_draw_inverts_the_cumulative_distribution(weights: list[float], uniform: float) -> None:
    log_p = log_probabilities(weights)
    (token,) = draw(log_p[None], torch.tensor([uniform], dtype=torch.float64)).tolist()
    p = log_p.exp()
    assert p[token] > 0.0, "a token without probability was drawn"
    below = float(p[:token].sum())
    assert below - 1e-12 <= uniform <= below + float(p[token]) + 1e-12


@given(weights=PROBABILITIES)
@settings(deadline=None, derandomize=True, database=None, max_examples=50)
def test_draws_are_as_frequent_as_probable(weights: list[float]) -> None:
    """Evenly spread uniform numbers hit each token in proportion, up to one at either end."""
    log_p = log_probabilities(weights)
    count = 1000
    even = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = draw(log_p.expand(count, -1), even)
    shares = torch.bincount(tokens, minlength=len(weights)) / count
    assert float((shares - log_p.exp()).abs().max()) <= 1.0 / count + 1e-9


def test_the_ends_of_the_unit_interval() -> None:
    log_p = log_probabilities([0.0, 0.25, 0.0, 0.75, 0.0])
    ends = torch.tensor([0.0, 0.25 - 1e-12, 0.25, JUST_BELOW_1], dtype=torch.float64)
    assert draw(log_p.expand(4, -1), ends).tolist() == [1, 1, 3, 3]


def test_uniform_numbers_are_a_function_of_seed_and_stream() -> None:
    first = uniforms(1, "rollout/3/0", 50, 8)
    assert torch.equal(first, uniforms(1, "rollout/3/0", 50, 8))
    assert first.dtype == torch.float64
    assert 0.0 <= float(first.min()) <= float(first.max()) < 1.0
    for other in (uniforms(2, "rollout/3/0", 50, 8), uniforms(1, "rollout/4/0", 50, 8)):
        assert not torch.equal(first, other)
