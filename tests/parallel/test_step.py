"""The gradient of ``Policy.accumulate`` is the plain sum over rows, however they are cut."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_apo.core.anchoring import sequence_sums
from nemo_apo.core.objectives import Columns
from nemo_apo.parallel import layout as parallel_layout
from nemo_apo.parallel.step import causal_mask
from nemo_apo.trainer.micro_batch import MicroBatch
from nemo_apo.trainer.policy import Policy
from tests.trainer.tiny_runs import build_policy, parallel, tiny_config

from .ranks import run_ranks

# Float32 sums in another order, relative to the largest entry of a tensor.
ORDER_OF_SUMMATION = 5e-6
ROWS, LENGTH = 7, 9


def example() -> MicroBatch:
    """Seven rows, so that neither two ranks nor any micro-batch size but one divides them."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 12, (ROWS, LENGTH), generator=generator)
    lengths = torch.tensor([[8], [1], [5], [3], [8], [2], [6]])
    weights = torch.randn(3, ROWS, generator=generator, dtype=torch.float64)
    return MicroBatch.of(tokens, torch.arange(LENGTH - 1) < lengths, columns=Columns(*weights))


def sum_of(logprobs: Tensor, entropy: Tensor, batch: MicroBatch) -> Tensor:
    """A loss that is not linear in the log-probs and differs from row to row."""
    assert batch.columns is not None
    values = batch.columns.coefficient_N.float()[:, None] * logprobs + logprobs.square() / 10.0
    values = values + batch.columns.advantage_N.float()[:, None] * entropy
    return torch.where(batch.mask_BT, values, 0.0).sum()


@dataclass
class Accumulated:
    loss: float
    logprob_sums: Tensor
    gradients: dict[str, Tensor]


def accumulated(policy: Policy, batch: MicroBatch, micro_batch_size: int) -> Accumulated:
    def loss(logits: Tensor, part: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs, entropy = policy.token_logprobs(logits, part)
        value = sum_of(logprobs, entropy, part)
        return value, {
            "loss": value.detach().clone(),
            "clipped": part.mask_BT.sum(),
            "logprob_sums": sequence_sums(logprobs.detach(), part.mask_BT),
        }

    kept, sums = policy.accumulate(batch, micro_batch_size, loss)
    assert float(kept["clipped"]) == float(batch.mask_BT.sum()), "filled-up rows were counted"
    gradients = {
        name: parameter.main_grad.clone() for name, parameter in policy.stage.named_parameters()
    }
    return Accumulated(float(kept["loss"]), sums, gradients)


def directly(policy: Policy, batch: MicroBatch) -> Accumulated:
    """The same sum in one piece by plain torch, without wrapper, schedule or our log-probs."""
    module = policy.stage
    positions = torch.arange(LENGTH - 1).expand(ROWS, LENGTH - 1)
    hidden = module(batch.inputs_BT, positions, causal_mask(LENGTH - 1, torch.device("cpu")))
    logits = hidden @ module.output_weight.t()
    log_p = torch.log_softmax(logits[..., :12], dim=-1)
    logprobs = log_p.gather(-1, batch.targets_BT[..., None]).squeeze(-1)
    loss = sum_of(logprobs, -(log_p.exp() * log_p).sum(-1), batch)
    names = [name for name, _ in module.named_parameters()]
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    sums = torch.where(batch.mask_BT, logprobs.detach().double(), 0.0).sum(1)
    return Accumulated(loss.item(), sums, dict(zip(names, gradients, strict=True)))


def assert_same(got: Accumulated, wanted: Accumulated) -> None:
    assert abs(got.loss - wanted.loss) < 1e-4
    torch.testing.assert_close(got.logprob_sums, wanted.logprob_sums, rtol=0.0, atol=1e-5)
    assert got.gradients.keys() == wanted.gradients.keys()
    for name, gradient in got.gradients.items():
        scale = float(wanted.gradients[name].abs().max())
        assert scale > 0.0, name
        gap = float((gradient - wanted.gradients[name]).abs().max())
        assert gap <= ORDER_OF_SUMMATION * scale, f"{name}: {gap / scale:.1e} relative"


def gradients_on_one_rank() -> Accumulated:
    layout = parallel_layout.initialize(parallel(1, 1), 0)
    policy = build_policy(tiny_config(), layout)
    batch = example()
    wanted = directly(policy, batch)
    for size in (1, 2, 3, 8):
        assert_same(accumulated(policy, batch, size), wanted)
    order = torch.tensor([4, 0, 6, 2, 5, 1, 3])
    shuffled = accumulated(policy, batch.select(order), 3)
    restored = torch.empty_like(shuffled.logprob_sums)
    restored[order] = shuffled.logprob_sums
    assert_same(replace(shuffled, logprob_sums=restored), wanted)
    return wanted


def gradients_on_two_ranks() -> list[Accumulated]:
    layout = parallel_layout.initialize(parallel(1, 1), 0)
    policy = build_policy(tiny_config(), layout)
    return [accumulated(policy, example(), size) for size in (1, 3, 8)]


def test_the_gradient_is_the_plain_sum_over_rows_micro_batches_and_ranks() -> None:
    (wanted,) = run_ranks(1, gradients_on_one_rank)
    for rank in run_ranks(2, gradients_on_two_ranks):
        for got in rank:
            assert_same(got, wanted)


def test_log_probs_do_not_depend_on_the_cut() -> None:
    def work() -> list[tuple[Tensor, Tensor]]:
        layout = parallel_layout.initialize(parallel(1, 1), 0)
        policy = build_policy(tiny_config(), layout)
        return [policy.read_logprobs(example(), size) for size in (1, 3, 8)]

    (single,) = run_ranks(1, work)
    pair = run_ranks(2, work)
    wanted_logprobs, wanted_entropy = single[0]
    assert wanted_logprobs.shape == (ROWS, LENGTH - 1)
    for logprobs, entropy in [*single, *pair[0], *pair[1]]:
        torch.testing.assert_close(logprobs, wanted_logprobs, rtol=0.0, atol=2e-6)
        torch.testing.assert_close(entropy, wanted_entropy, rtol=0.0, atol=2e-6)
