"""The host's data in our terms."""

import pytest
import torch

from nemo_apo.nemo_rl import rollout as ours
from nemo_apo.nemo_rl.baselines import Baselines
from nemo_apo.plugin.rollout import RolloutError

from .small_host import GROUP, batch_with, rollout


def test_groups_are_rows_in_place() -> None:
    assert ours.group_ids(6, 3).tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(RolloutError, match=r"7 sequences.*num_generations_per_prompt=3"):
        ours.group_ids(7, 3)


@pytest.mark.parametrize("values", [[1.0, 0.0, 0.0, 0.0], [0.7, 0.1, 0.1, 0.4], [0.3] * 4])
def test_rewards_come_back_from_advantages_and_means(values: list[float]) -> None:
    rewards = torch.tensor(values)
    mean = rewards.mean()
    baselines = Baselines()
    baselines.note(mean.expand(4).numpy())
    found = ours.rewards({"advantages": (rewards - mean)[:, None].expand(4, 3)}, baselines)
    assert found.dtype == torch.float64
    assert torch.allclose(found, rewards.double(), atol=6e-8)
    if values[1] == values[2]:
        assert found[1] == found[2], "equal rewards stay equal to the last bit"


def test_means_of_another_rollout_are_refused() -> None:
    baselines = Baselines()
    baselines.note([0.5] * 8)
    with pytest.raises(RolloutError, match="8 group means for 4 sequences"):
        baselines.rewards(torch.zeros(4))


def test_figures_are_sums_over_completion_tokens() -> None:
    data = batch_with(
        prev_logprobs=torch.tensor([[0.0, -1.0, -2.0, -4.0]]),
        reference_policy_logprobs=torch.tensor([[0.0, -1.0, -3.0, -5.0]]),
        generation_logprobs=torch.tensor([[0.0, -8.0, -2.5, -4.5]]),
    )
    mask = torch.tensor([[False, True, True]])
    figures = ours.sequence_figures(
        data, torch.ones(1).double(), mask, torch.zeros(1).long(), "reference", True
    )
    assert figures.lengths_N.tolist() == [2.0]
    assert figures.old_logprob_sums_N.tolist() == [-6.0]
    assert figures.anchor_logprob_sums_N.tolist() == [-8.0]
    assert figures.sampler_logprob_sums_N.tolist() == [-7.0]
    assert figures.token_entropy == 3.0, "minus the mean log-prob of what was sampled"


def test_the_entropy_of_sampled_tokens_is_right_on_average() -> None:
    """Many answers of one token each: minus their log-probs averages to the entropy."""
    probabilities = torch.tensor([0.6, 0.3, 0.1])
    tokens = torch.multinomial(
        probabilities, 40_000, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    old = torch.nn.functional.pad(probabilities[tokens].log()[:, None], (1, 0))
    data = batch_with(prev_logprobs=old, generation_logprobs=old)
    count = len(tokens)
    figures = ours.sequence_figures(
        data,
        torch.zeros(count).double(),
        torch.ones(count, 1, dtype=torch.bool),
        torch.arange(count) // GROUP,
        "old",
        False,
    )
    exact = float(-(probabilities * probabilities.log()).sum())
    assert figures.token_entropy == pytest.approx(exact, abs=0.01)


def test_an_empty_answer_drops_its_group_and_is_no_foreign_prompt() -> None:
    data, rewards = rollout(seed=1)
    row = 5
    prompt_length = int(data["token_mask"][row].argmax())
    data["token_mask"][row] = 0.0
    data["input_lengths"][row] = prompt_length
    mask = ours.completion_mask(data)
    settled = ours.settle_rollout(data, rewards.double(), mask, ours.group_ids(data.size, GROUP))
    assert settled.keep_N.view(-1, GROUP).all(dim=1).tolist() == [True, False, True, True]
