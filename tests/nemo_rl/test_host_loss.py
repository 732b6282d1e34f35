"""The loss behind the host's own wrappers: packed as unpacked, and what the host asks of a loss."""

import os
import pickle
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_apo.nemo_rl.loss import ApoLoss
from nemo_apo.nemo_rl.settings import read_settings
from tests.nemo_rl import cpu_host

pytestmark = pytest.mark.nemo_rl

SEQUENCES, TOKENS, VOCABULARY, PROMPT, PAD_TO = 8, 12, 17, 3, 4
LENGTHS = torch.tensor([12, 7, 9, 5, 11, 12, 6, 8])


@pytest.fixture
def one_rank() -> Iterator[Any]:
    """A group of this process alone; the host's wrappers gather over it, and call ``.cuda()``."""
    with tempfile.TemporaryDirectory() as folder, cpu_host.in_driver():
        store = torch.distributed.FileStore(os.path.join(folder, "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            yield torch.distributed.group.WORLD
        finally:
            torch.distributed.destroy_process_group()


class Case:
    """A micro-batch as the host holds it, and the logits of its tokens."""

    def __init__(self) -> None:
        from nemo_rl.distributed.batched_data_dict import BatchedDataDict

        draw = torch.Generator().manual_seed(5)
        place = torch.arange(TOKENS)
        token_mask = ((place >= PROMPT) & (place < LENGTHS[:, None])).float()
        sample_mask = torch.ones(SEQUENCES)
        sample_mask[6] = 0.0

        def logprobs() -> Tensor:
            return -2.0 - torch.rand(SEQUENCES, TOKENS, generator=draw)

        self.logits = torch.randn(SEQUENCES, TOKENS, VOCABULARY, generator=draw, requires_grad=True)
        self.data = BatchedDataDict(
            {
                "input_ids": torch.randint(0, VOCABULARY, (SEQUENCES, TOKENS), generator=draw),
                "input_lengths": LENGTHS,
                "token_mask": token_mask,
                "sample_mask": sample_mask,
                "prev_logprobs": logprobs(),
                "generation_logprobs": logprobs(),
                "reference_policy_logprobs": logprobs(),
                "apo_coefficient": torch.randn(SEQUENCES, generator=draw),
                "apo_advantage": torch.randn(SEQUENCES, generator=draw),
                "apo_token_weight": torch.rand(SEQUENCES, generator=draw),
            }
        )
        counted = token_mask[:, 1:] * sample_mask[:, None]
        self.counts = {"global_valid_seqs": sample_mask.sum(), "global_valid_toks": counted.sum()}

    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        """The logits in one row, each sequence padded; and where the sequences begin, in two ways.

        Returns:
            the row; the beginnings without and with padding.
        """
        padded = (LENGTHS + PAD_TO - 1) // PAD_TO * PAD_TO
        rows = []
        for logits, length, whole in zip(self.logits, LENGTHS, padded, strict=True):
            rows += [logits[:length], torch.zeros(int(whole - length), VOCABULARY)]
        return torch.cat(rows)[None], _beginnings(LENGTHS), _beginnings(padded)

    def result(self, value: Tensor, metrics: dict[str, Any]) -> dict[str, Tensor]:
        gradient = torch.autograd.grad(value, self.logits, retain_graph=True)[0]
        return {
            "loss": value.detach(),
            "gradient": gradient,
            **{name: torch.as_tensor(figure) for name, figure in metrics.items()},
        }

    def unpacked(self, loss: ApoLoss) -> dict[str, Tensor]:
        from nemo_rl.algorithms.loss import prepare_loss_input

        inputs, data = prepare_loss_input(self.logits, self.data, loss)
        return self.result(*loss(data=data, **self.counts, **inputs))


def _beginnings(lengths: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def loss_of(objective: str, **regularizers: Any) -> ApoLoss:
    settings = read_settings({"objective": {"name": objective}, "regularizers": regularizers})
    return ApoLoss(settings.objective, settings.regularizers)


def sequence_by_sequence(case: Case, loss: ApoLoss, group: Any) -> dict[str, Tensor]:
    from nemo_rl.algorithms.loss import SequencePackingLossWrapper, prepare_loss_input

    row, starts, padded_starts = case.packed()
    wrapper = SequencePackingLossWrapper(loss, prepare_loss_input, starts, padded_starts)
    return case.result(*wrapper(row, case.data, *case.counts.values()))


def fused(case: Case, loss: ApoLoss, group: Any) -> dict[str, Tensor]:
    from nemo_rl.algorithms.loss import (
        SequencePackingFusionLossWrapper,
        prepare_packed_loss_input,
    )

    row, starts, padded_starts = case.packed()
    wrapper = SequencePackingFusionLossWrapper(
        loss,
        prepare_packed_loss_input,
        starts,
        padded_starts,
        vocab_parallel_rank=0,
        vocab_parallel_group=group,
    )
    return case.result(*wrapper(row, case.data, *case.counts.values()))


@pytest.mark.parametrize("wrapped", [sequence_by_sequence, fused])
@pytest.mark.parametrize(
    "loss",
    [
        partial(loss_of, "apo"),
        partial(loss_of, "grpo"),
        partial(loss_of, "gspo"),
        partial(loss_of, "dapo", kl_coef=0.1, kl_estimator="k3"),
    ],
    ids=["apo", "grpo", "gspo", "dapo with kl"],
)
def test_packed_as_unpacked(one_rank: Any, loss: Any, wrapped: Any) -> None:
    case = Case()
    packed, exact = wrapped(case, loss(), one_rank), case.unpacked(loss())
    assert float(exact["gradient"].abs().max()) > 1e-2
    assert packed.keys() == exact.keys()
    for name, value in exact.items():
        torch.testing.assert_close(packed[name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_it_is_what_the_host_calls_a_loss() -> None:
    from nemo_rl.algorithms.loss.interfaces import LossInputType, LossType

    loss = pickle.loads(pickle.dumps(loss_of("apo")))
    assert loss.loss_type is LossType.SEQUENCE_LEVEL
    assert loss.input_type is LossInputType.LOGPROB
