"""The rollout of one RL step: flat, global, the same on every rank.

Axes: N sequences, T tokens of prompt and completion, padded on the right. Token columns are those
of the *targets*: column t holds what concerns token t + 1 of the sequence, so they are one shorter
than the sequence (T - 1) and line up with the model's outputs.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_apo.core.anchoring import sequence_sums
from nemo_apo.tasks import Prompt


@dataclass(frozen=True)
class Completions:
    """What sampling returns for n prompts: completions of at most R tokens.

    Attributes:
        tokens_NR: token ids, int64, the padding id after the end.
        lengths_N: completion tokens, the end token included, int64.
        finished_N: whether the end token was reached, bool.
        logprobs_NR: token log-probs as the sampler computed them, nats, float32, 0 after the end.
        logprob_sums_N: their sums before they were rounded to float32, nats, float64.
    """

    tokens_NR: Tensor
    lengths_N: Tensor
    finished_N: Tensor
    logprobs_NR: Tensor
    logprob_sums_N: Tensor

    def to(self, device: torch.device) -> "Completions":
        """The same on a device."""
        return Completions(**{name: value.to(device) for name, value in vars(self).items()})

    def row(self, index: int) -> list[int]:
        """One completion as a list of token ids."""
        return self.tokens_NR[index, : int(self.lengths_N[index])].tolist()


@dataclass(frozen=True)
class Rollouts:
    """Sampled sequences and what is known of them. All tensors have N rows.

    Attributes:
        tokens_NT: prompt and completion, int64.
        mask_NT: true on completion tokens, [N, T - 1].
        group_ids_N: explicit group id from sampling, int64.
        rewards_N: float64; not finite where a grade failed.
        truncated_N: whether the completion hit the length limit, bool.
        sampler_logprob_sums_N: sequence log-probs by the sampler, nats, float64.
        sampler_logprobs_NT: its log-probs of single tokens, nats, float32, where the importance
            correction asks for them.
        old_logprobs_NT: log-probs under the policy that sampled, by the trainer.
        entropy_NT: its next-token entropies, nats.
        anchor_logprob_sums_N: sequence log-probs under the anchor, nats, float64.
        reference_logprobs_NT: log-probs under the policy at the start of RL.
    """

    tokens_NT: Tensor
    mask_NT: Tensor
    group_ids_N: Tensor
    rewards_N: Tensor
    truncated_N: Tensor
    sampler_logprob_sums_N: Tensor
    sampler_logprobs_NT: Tensor | None = None
    old_logprobs_NT: Tensor | None = None
    entropy_NT: Tensor | None = None
    anchor_logprob_sums_N: Tensor | None = None
    reference_logprobs_NT: Tensor | None = None

    @property
    def count(self) -> int:
        return self.tokens_NT.shape[0]

    @property
    def lengths_N(self) -> Tensor:
        """Completion tokens T_i, float64."""
        return self.mask_NT.sum(dim=1).to(torch.float64)

    @property
    def old_logprob_sums_N(self) -> Tensor:
        """Sequence log-probs under the policy that sampled, nats, float64."""
        assert self.old_logprobs_NT is not None
        return sequence_sums(self.old_logprobs_NT, self.mask_NT)

    def select(self, rows: Tensor) -> "Rollouts":
        """Some of the sequences: rows is a bool mask or an index, [N] or [n]."""
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) is not None
        }
        return Rollouts(**{name: value[rows] for name, value in values.items()})


def concatenate(parts: Sequence[Rollouts]) -> Rollouts:
    """Rollouts of several rounds, in order; they have the same T and the same columns."""
    fields = [
        field.name
        for field in dataclasses.fields(Rollouts)
        if getattr(parts[0], field.name) is not None
    ]
    return Rollouts(**{name: torch.cat([getattr(part, name) for part in parts]) for name in fields})


def assemble(
    prompts: Sequence[Prompt],
    completions: Completions,
    group_ids_N: Tensor,
    rewards_N: Tensor,
    width: int,
    pad_id: int,
    keeps_token_logprobs: bool = False,
) -> Rollouts:
    """Lay prompts and completions side by side in rows of ``width`` tokens.

    Args:
        prompts: one per completion.
        completions: the sampled completions.
        group_ids_N: group id of each.
        rewards_N: reward of each, float64.
        width: T, at least the longest prompt and completion together.
        pad_id: token id that fills the rest of a row.
        keeps_token_logprobs: whether the sampler's log-probs of single tokens are laid out, too.
    """
    device = completions.tokens_NR.device
    prompt_lengths_N1 = torch.tensor([[len(p.tokens)] for p in prompts], device=device)
    rows = [[*p.tokens, *([pad_id] * (width - len(p.tokens)))] for p in prompts]
    tokens_NT = torch.tensor(rows, dtype=torch.int64, device=device)
    offsets_NT = torch.arange(width, device=device) - prompt_lengths_N1
    inside_NT = (offsets_NT >= 0) & (offsets_NT < completions.lengths_N[:, None])
    at_NT = offsets_NT.clamp(0, completions.tokens_NR.shape[1] - 1)
    tokens_NT = torch.where(inside_NT, completions.tokens_NR.gather(1, at_NT), tokens_NT)
    logprobs_NT = None
    if keeps_token_logprobs:
        logprobs_NT = torch.where(inside_NT, completions.logprobs_NR.gather(1, at_NT), 0.0)[:, 1:]
    return Rollouts(
        tokens_NT=tokens_NT,
        mask_NT=inside_NT[:, 1:],
        group_ids_N=group_ids_N,
        rewards_N=rewards_N,
        truncated_N=~completions.finished_N,
        sampler_logprob_sums_N=completions.logprob_sums_N,
        sampler_logprobs_NT=logprobs_NT,
    )


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Raise ``ValueError`` for a token id outside the vocabulary; tokens of any shape.

    Prompts, demonstrations and rollouts are the same on all ranks, so all of them raise.
    """
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"token ids must lie in [0, {vocab_size}), got {low} to {high}")


def known(values: Tensor | None) -> Tensor:
    """A column that is filled in before it is read."""
    assert values is not None
    return values
