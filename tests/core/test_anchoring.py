"""Sequence log-probs and anchored coordinates."""

import pytest
import torch

from nemo_apo.core.anchoring import (
    LOGPROB_REDUCTIONS,
    anchored_logits,
    reduce_logprobs,
    sequence_sums,
    token_factor,
)


def test_sums_are_float64_over_completion_tokens_only() -> None:
    # 2^24 + 1 is the first integer that float32 cannot hold.
    values_BT = torch.tensor([[1.0, 2.0**24, 1.0, 1.0]], dtype=torch.float32)
    mask_BT = torch.tensor([[0, 1, 1, 0]])
    assert sequence_sums(values_BT, mask_BT).tolist() == [2.0**24 + 1.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_masked_values_are_never_read(bad: float) -> None:
    values_BT = torch.tensor([[bad, -1.5, bad], [bad, bad, bad]])
    mask_BT = torch.tensor([[0, 1, 0], [0, 0, 0]])
    assert sequence_sums(values_BT, mask_BT).tolist() == [-1.5, 0.0]


def test_reductions() -> None:
    sums_N, lengths_N = torch.tensor([-6.0, -5.0]).double(), torch.tensor([3, 2])
    assert reduce_logprobs(sums_N, lengths_N, "sum").tolist() == [-6.0, -5.0]
    assert reduce_logprobs(sums_N, lengths_N, "mean").tolist() == pytest.approx([-2.0, -2.5])
    assert token_factor(lengths_N, "sum").tolist() == [1.0, 1.0]
    # 1/3 to all digits of float64, although lengths are integers.
    assert token_factor(lengths_N, "mean").tolist() == [1.0 / 3.0, 0.5]
    assert LOGPROB_REDUCTIONS == ("sum", "mean")
    with pytest.raises(ValueError, match="unknown sequence log-prob reduction 'max'"):
        token_factor(lengths_N, "max")


def test_anchored_logits_divide_the_difference_by_each_tau() -> None:
    u_N = anchored_logits(
        torch.tensor([-3.0, -4.0]), torch.tensor([-4.0, -3.0]), torch.tensor([0.5, 2.0])
    )
    assert u_N.tolist() == [2.0, -0.5]
