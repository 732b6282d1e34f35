"""Random inputs of a log-prob, and what the numbers should be.

Axes: T tokens, H hidden, V vocabulary, c of a chunk of it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_apo.parallel.logprobs import CHUNK

# Standard deviation of the logits: a next-token distribution that is neither flat nor certain.
LOGIT_SPREAD = 3.0


@dataclass(frozen=True)
class Example:
    """Hidden states and output layer, both asking for their gradient, and target ids."""

    hidden_TH: Tensor
    weight_VH: Tensor
    targets_T: Tensor

    @property
    def tokens(self) -> int:
        return self.hidden_TH.shape[0]

    @property
    def vocab(self) -> int:
        return self.weight_VH.shape[0]

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """What a backward pass goes to."""
        return self.hidden_TH, self.weight_VH

    def first(self, count: int) -> "Example":
        """The first tokens alone."""
        hidden_TH = self.hidden_TH.detach()[:count].clone().requires_grad_()
        return Example(hidden_TH, self.weight_VH, self.targets_T[:count].clone())


def draw(tokens: int, hidden: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Example:
    """Normally distributed logits and uniform targets; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(tokens, hidden, generator=generator)
    weight_VH = torch.randn(vocab, hidden, generator=generator)
    weight_VH.mul_(LOGIT_SPREAD / hidden**0.5)
    return Example(
        hidden_TH.to(device, dtype).requires_grad_(),
        weight_VH.to(device, dtype).requires_grad_(),
        torch.randint(vocab, (tokens,), generator=generator).to(device),
    )


@torch.no_grad()
def float64_logprob_sum(example: Example) -> float:
    """Sum of the log-probs of the targets in float64, from the same, perhaps rounded, inputs."""
    hidden_TH = example.hidden_TH.double()
    chunks = [
        torch.logsumexp(hidden_TH @ rows_cH.double().t(), dim=-1)
        for rows_cH in example.weight_VH.split(CHUNK)
    ]
    lse_T = torch.logsumexp(torch.stack(chunks), dim=0)
    target_T = (hidden_TH * example.weight_VH[example.targets_T].double()).sum(dim=-1)
    return float((target_T - lse_T).sum())
