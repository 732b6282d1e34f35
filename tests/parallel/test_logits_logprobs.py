"""Vocabulary-parallel log-probs and entropy against plain float64 torch, on 1, 2 and 4 ranks."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_apo.parallel.logits_logprobs import vocab_parallel_logprobs

from .ranks import run_ranks

VOCAB = 12


@dataclass
class Numbers:
    logprobs: Tensor
    entropy: Tensor
    grad: Tensor


def example(width: int, scale: float = 3.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Logits [2, 6, width]."""
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(2, 6, VOCAB, generator=generator, dtype=torch.float64) * scale
    padding = torch.zeros(2, 6, width - VOCAB, dtype=torch.float64)
    return torch.cat([logits, padding], dim=-1).to(dtype)


# Every token id once, so that each rank holds some of the targets.
TARGETS = torch.arange(VOCAB).reshape(2, 6)
# Weights of the 2 x 6 log-probs and entropies in the sum that is differentiated.
WEIGHTS = torch.linspace(-1.0, 2.0, 24, dtype=torch.float64).reshape(2, 2, 6)


def expected(logits: Tensor) -> Numbers:
    """The same by the definition, on the unpadded vocabulary, in float64."""
    leaf = logits.detach().to(torch.float64).requires_grad_()
    log_p = torch.log_softmax(leaf[..., :VOCAB], dim=-1)
    logprobs = log_p.gather(-1, TARGETS.unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    (WEIGHTS[0] * logprobs + WEIGHTS[1] * entropy).sum().backward()
    assert leaf.grad is not None
    return Numbers(logprobs.detach(), entropy.detach(), leaf.grad)


def computed(logits: Tensor) -> Numbers:
    """By the code, from this rank's slice of the logits."""
    width = logits.shape[-1] // dist.get_world_size()
    part = logits[..., dist.get_rank() * width :][..., :width]
    leaf = part.detach().clone().requires_grad_()
    logprobs, entropy = vocab_parallel_logprobs(leaf, TARGETS, VOCAB, dist.group.WORLD)
    (WEIGHTS[0] * logprobs + WEIGHTS[1] * entropy).sum().backward()
    assert leaf.grad is not None
    return Numbers(logprobs.detach(), entropy.detach(), leaf.grad)


def assert_equal(numbers: Numbers, wanted: Numbers, tolerance: float = 1e-12) -> None:
    for name in ("logprobs", "entropy", "grad"):
        actual = getattr(numbers, name).to(torch.float64)
        torch.testing.assert_close(
            actual, getattr(wanted, name), rtol=tolerance, atol=tolerance, msg=name
        )


def test_one_rank_follows_the_definition() -> None:
    def work() -> None:
        assert_equal(computed(example(VOCAB)), expected(example(VOCAB)))
        # Large logits overflow exp unless the peak is taken off first.
        large = example(VOCAB, scale=2000.0)
        assert_equal(computed(large), expected(large))
        # All tokens alike: the entropy is log V.
        flat = torch.full((2, 6, VOCAB), 5.0, dtype=torch.float64)
        torch.testing.assert_close(
            computed(flat).entropy, torch.full((2, 6), math.log(VOCAB), dtype=torch.float64)
        )

    run_ranks(1, work)


def test_gradients_pass_gradcheck() -> None:
    def work() -> None:
        logits = example(VOCAB + 2).requires_grad_()

        def both(x: Tensor) -> tuple[Tensor, Tensor]:
            return vocab_parallel_logprobs(x, TARGETS, VOCAB, dist.group.WORLD)

        assert torch.autograd.gradcheck(both, (logits,))

    run_ranks(1, work)


@pytest.mark.parametrize("filler", [1e30, float("inf"), float("nan")])
def test_padding_columns_take_no_part(filler: float) -> None:
    def work() -> None:
        wanted = expected(example(16))
        padded = example(16)
        padded[..., VOCAB:] = filler
        numbers = computed(padded)
        assert_equal(numbers, wanted)
        assert (numbers.grad[..., VOCAB:] == 0.0).all()

    run_ranks(1, work)


def test_bf16_logits_are_computed_in_float32() -> None:
    def work() -> None:
        logits = example(16, dtype=torch.bfloat16)
        wanted = expected(logits)
        numbers = computed(logits)
        assert numbers.logprobs.dtype == numbers.entropy.dtype == torch.float32
        assert numbers.grad.dtype == torch.bfloat16
        for name in ("logprobs", "entropy"):
            torch.testing.assert_close(
                getattr(numbers, name).double(), getattr(wanted, name), rtol=2e-6, atol=2e-6
            )
        # The gradient is rounded once, at the end: half a unit in the last of bf16's 8 bits.
        torch.testing.assert_close(numbers.grad.double(), wanted.grad, rtol=2**-8, atol=1e-6)

    run_ranks(1, work)


@pytest.mark.parametrize(
    ("world_size", "width"),
    [
        pytest.param(2, 12, id="two ranks, no padding"),
        pytest.param(2, 20, id="two ranks, padding in the last"),
        pytest.param(4, 16, id="four ranks, the last holds padding only"),
        pytest.param(4, 28, id="four ranks, padding within the second, the rest padding only"),
    ],
)
def test_shards_give_what_one_rank_gives(world_size: int, width: int) -> None:
    logits = example(width)
    logits[..., VOCAB:] = float("nan")
    wanted = expected(torch.nan_to_num(logits))

    ranks = run_ranks(world_size, lambda: computed(logits))
    shards = torch.cat([numbers.grad for numbers in ranks], dim=-1)
    for numbers in ranks:
        assert_equal(Numbers(numbers.logprobs, numbers.entropy, shards), wanted)


def test_shards_agree_in_float32() -> None:
    logits = example(16, dtype=torch.float32)
    wanted = expected(logits)

    ranks = run_ranks(2, lambda: computed(logits))
    shards = torch.cat([numbers.grad for numbers in ranks], dim=-1)
    for numbers in ranks:
        assert_equal(Numbers(numbers.logprobs, numbers.entropy, shards), wanted, 3e-6)
