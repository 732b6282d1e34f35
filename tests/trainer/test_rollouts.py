"""Rollouts: prompts and completions side by side, masks of the targets, token checks."""

import pytest
import torch

from nemo_apo.tasks import Prompt
from nemo_apo.trainer.rollouts import Completions, Rollouts, assemble, check_tokens, concatenate

PAD = 0


def example(width: int = 7, token_logprobs: bool = False) -> Rollouts:
    prompts = [Prompt("a", (5, 6)), Prompt("b", (7, 8, 9)), Prompt("c", (4,))]
    completions = Completions(
        tokens_NR=torch.tensor([[10, 11, 1, 0], [10, 1, 0, 0], [3, 3, 3, 3]]),
        lengths_N=torch.tensor([3, 2, 4]),
        finished_N=torch.tensor([True, True, False]),
        logprobs_NR=torch.tensor(
            [[-0.2, -0.3, -0.5, 0.0], [-1.5, -0.5, 0.0, 0.0], [-0.75, -0.75, -0.75, -0.75]]
        ),
        logprob_sums_N=torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64),
    )
    rewards = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    groups = torch.tensor([0, 0, 1])
    return assemble(
        prompts, completions, groups, rewards, width, PAD, keeps_token_logprobs=token_logprobs
    )


def test_a_row_is_prompt_completion_padding() -> None:
    assert example().tokens_NT.tolist() == [
        [5, 6, 10, 11, 1, PAD, PAD],
        [7, 8, 9, 10, 1, PAD, PAD],
        [4, 3, 3, 3, 3, PAD, PAD],
    ]


def test_the_mask_is_true_where_the_target_is_a_completion_token() -> None:
    rollouts = example()
    assert rollouts.mask_NT.int().tolist() == [
        [0, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0],
    ]
    targets = rollouts.tokens_NT[:, 1:]
    assert targets[0][rollouts.mask_NT[0]].tolist() == [10, 11, 1]
    assert rollouts.lengths_N.tolist() == [3.0, 2.0, 4.0]
    assert rollouts.truncated_N.tolist() == [False, False, True]


def test_the_samplers_logprobs_stand_where_their_tokens_do() -> None:
    assert example().sampler_logprobs_NT is None
    logprobs = example(token_logprobs=True).sampler_logprobs_NT
    assert logprobs is not None
    torch.testing.assert_close(
        logprobs,
        torch.tensor(
            [
                [0.0, -0.2, -0.3, -0.5, 0.0, 0.0],
                [0.0, 0.0, -1.5, -0.5, 0.0, 0.0],
                [-0.75, -0.75, -0.75, -0.75, 0.0, 0.0],
            ]
        ),
        rtol=0.0,
        atol=0.0,
    )


def test_the_width_may_be_just_enough() -> None:
    rollouts = example(width=5)
    assert rollouts.tokens_NT.shape == (3, 5)
    assert rollouts.mask_NT.sum(dim=1).tolist() == [3, 2, 4]


def test_old_logprob_sums_leave_prompt_and_padding_out() -> None:
    rollouts = example()
    logprobs = torch.where(rollouts.mask_NT, -1.0, float("nan"))
    filled = Rollouts(**{**vars(rollouts), "old_logprobs_NT": logprobs})
    assert filled.old_logprob_sums_N.tolist() == [-3.0, -2.0, -4.0]
    assert filled.old_logprob_sums_N.dtype == torch.float64


def test_selecting_and_concatenating_keep_rows_together() -> None:
    rollouts = example()
    by_mask = rollouts.select(torch.tensor([True, False, True]))
    by_index = rollouts.select(torch.tensor([0, 2]))
    for part in (by_mask, by_index):
        assert part.count == 2
        assert part.tokens_NT.tolist() == rollouts.tokens_NT[[0, 2]].tolist()
        assert part.rewards_N.tolist() == [1.0, 0.5]
        assert part.old_logprobs_NT is None
    both = concatenate([by_index, rollouts.select(torch.tensor([1]))])
    assert both.rewards_N.tolist() == [1.0, 0.5, 0.0]
    assert both.group_ids_N.tolist() == [0, 1, 0]
    assert rollouts.select(torch.zeros(3, dtype=torch.bool)).count == 0


@pytest.mark.parametrize("token", [-1, 12, 15])
def test_a_token_outside_the_vocabulary_is_refused(token: int) -> None:
    tokens = torch.tensor([[0, 11], [3, token]])
    with pytest.raises(ValueError, match=rf"\[0, 12\).*{token}"):
        check_tokens(tokens, 12)


def test_every_token_of_the_vocabulary_passes() -> None:
    check_tokens(torch.arange(12).reshape(3, 4), 12)
