"""A policy small enough to differentiate whole, and a rollout that is awkward on purpose.

Every token has logits of its own, so a wrong weight of any single token shows in the gradient.
Groups are ragged and interleaved, completions ragged and preceded by prompt tokens, the policy has
moved off the one that sampled, and the anchor and the reference are others again.

Axes: N sequences, B some of them, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_apo.core.advantages import group_advantages
from nemo_apo.core.groups import Groups
from nemo_apo.core.objectives import Columns, GroupBatch, Objective, Regularizers, TokenInputs

SEQUENCE_LENGTH = 8
VOCABULARY = 5
MAX_RESPONSE_LENGTH = 9
# Per group: id, tau, rewards. Ties within groups; the second has no signal at all.
GROUPS = (
    (40, 0.8, (1.0, 0.0, 0.0, 1.0)),
    (3, 0.5, (0.7, 0.7, 0.7)),
    (11, 1.2, (0.2, 0.9)),
    (7, 0.6, (0.0, 0.5, 0.5, 1.0, 0.25)),
)


@dataclass(frozen=True)
class Rollout:
    """A sampled batch under four policies; ``logits_NTV`` is the one being trained."""

    logits_NTV: Tensor
    old_logits_NTV: Tensor
    anchor_logits_NTV: Tensor
    reference_logits_NTV: Tensor
    tokens_NT: Tensor
    mask_NT: Tensor
    group_ids_N: Tensor
    rewards_N: Tensor
    tau_N: Tensor

    @property
    def size(self) -> int:
        return self.rewards_N.numel()

    def logprobs(self, logits_NTV: Tensor) -> Tensor:
        """Log-prob of each sampled token under the policy of these logits, [N, T]."""
        log_pi_NTV = torch.log_softmax(logits_NTV, dim=-1)
        return log_pi_NTV.gather(-1, self.tokens_NT.unsqueeze(-1)).squeeze(-1)

    def sums(self, logits_NTV: Tensor) -> Tensor:
        """Detached sum of the completion tokens' log-probs, [N]."""
        return (self.logprobs(logits_NTV.detach()) * self.mask_NT).sum(dim=-1)


def entropy(logits_NTV: Tensor) -> Tensor:
    """Entropy of the next-token distribution, nats, [N, T]."""
    log_pi_NTV = torch.log_softmax(logits_NTV, dim=-1)
    return -(log_pi_NTV.exp() * log_pi_NTV).sum(dim=-1)


def make_rollout(seed: int = 0) -> Rollout:
    """The rollout of ``GROUPS``, in a shuffled order."""
    random = torch.Generator().manual_seed(seed)
    count = sum(len(rewards) for _, _, rewards in GROUPS)
    shape = (count, SEQUENCE_LENGTH, VOCABULARY)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(shape, generator=random, dtype=torch.float64)

    old_NTV = noise(1.0)
    start_N = torch.randint(0, 3, (count,), generator=random)
    length_N = torch.randint(1, SEQUENCE_LENGTH - 2, (count,), generator=random)
    position_T = torch.arange(SEQUENCE_LENGTH)
    after_prompt_NT = position_T >= start_N.unsqueeze(1)
    order = torch.randperm(count, generator=random)

    def per_sequence(values: list[float]) -> Tensor:
        return torch.tensor(values)[order]

    return Rollout(
        logits_NTV=(old_NTV + noise(0.4)).requires_grad_(),
        old_logits_NTV=old_NTV,
        anchor_logits_NTV=old_NTV + noise(0.3),
        reference_logits_NTV=old_NTV + noise(0.6),
        tokens_NT=torch.randint(0, VOCABULARY, shape[:2], generator=random),
        mask_NT=after_prompt_NT & (position_T < (start_N + length_N).unsqueeze(1)),
        group_ids_N=per_sequence([i for i, _, rewards in GROUPS for _ in rewards]),
        rewards_N=per_sequence([r for _, _, rewards in GROUPS for r in rewards]).double(),
        tau_N=per_sequence([tau for _, tau, rewards in GROUPS for _ in rewards]).double(),
    )


def group_batch(rollout: Rollout, objective: Objective) -> GroupBatch:
    """What ``weigh`` is given."""
    groups = Groups.from_ids(rollout.group_ids_N)
    return GroupBatch(
        groups=groups,
        advantages_N=group_advantages(rollout.rewards_N, groups, objective.advantages),
        lengths_N=rollout.mask_NT.sum(dim=-1).double(),
        logprob_sums_N=rollout.sums(rollout.logits_NTV),
        old_logprob_sums_N=rollout.sums(rollout.old_logits_NTV),
        anchor_logprob_sums_N=rollout.sums(rollout.anchor_logits_NTV),
        tau_N=rollout.tau_N,
        max_response_length=MAX_RESPONSE_LENGTH,
    )


def token_inputs(rollout: Rollout, rows: Tensor) -> TokenInputs:
    """What ``token_loss`` is given for a micro-batch of these sequences."""
    return TokenInputs(
        logprobs_BT=rollout.logprobs(rollout.logits_NTV)[rows],
        old_logprobs_BT=rollout.logprobs(rollout.old_logits_NTV)[rows],
        mask_BT=rollout.mask_NT[rows],
        reference_logprobs_BT=rollout.logprobs(rollout.reference_logits_NTV)[rows],
        entropy_BT=entropy(rollout.logits_NTV)[rows],
    )


def split_loss(
    rollout: Rollout,
    objective: Objective,
    regularizers: Regularizers,
    columns: Columns,
    micro_batches: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Sum of the micro-batch losses and its gradient in the logits, one backward per piece."""
    total = torch.zeros((), dtype=torch.float64)
    grad_NTV = torch.zeros_like(rollout.logits_NTV)
    for rows in micro_batches:
        inputs, part = token_inputs(rollout, rows), columns.select(rows)
        loss = objective.token_loss(inputs, part) + regularizers.token_loss(inputs, part)
        grad_NTV += torch.autograd.grad(loss, rollout.logits_NTV)[0]
        total += loss.detach()
    return total, grad_NTV


def cut(rows: Tensor, size: int) -> list[Tensor]:
    """The rows in micro-batches of at most ``size``."""
    return list(torch.split(rows, size))


def hand_batch(
    ids: Sequence[int],
    advantages: Sequence[float],
    u: Sequence[float] | None = None,
    tau: float = 0.8,
    lengths: Sequence[int] | None = None,
    old: Sequence[float] | None = None,
) -> GroupBatch:
    """Scalars written by hand: l_ref = 0 and l = tau u, for the reduction "sum"."""
    count = len(ids)
    zeros_N = torch.zeros(count, dtype=torch.float64)
    u_N = zeros_N if u is None else torch.tensor(u, dtype=torch.float64)
    return GroupBatch(
        groups=Groups.from_ids(torch.tensor(ids)),
        advantages_N=torch.tensor(advantages, dtype=torch.float64),
        lengths_N=torch.tensor([4] * count if lengths is None else lengths).double(),
        logprob_sums_N=tau * u_N,
        old_logprob_sums_N=zeros_N if old is None else torch.tensor(old, dtype=torch.float64),
        anchor_logprob_sums_N=zeros_N,
        tau_N=torch.full_like(zeros_N, tau),
        max_response_length=16,
    )


def random_batch(seed: int, sizes: Sequence[int] = (3, 2, 4), spread: float = 2.0) -> GroupBatch:
    """Per-sequence scalars without a policy behind them; graded rewards, centered."""
    random = torch.Generator().manual_seed(seed)
    ids_N = torch.cat([torch.full((size,), i) for i, size in enumerate(sizes)])
    groups, count = Groups.from_ids(ids_N), ids_N.numel()

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(count, generator=random, dtype=torch.float64)

    old_N = -12.0 + normal(spread)
    return GroupBatch(
        groups=groups,
        advantages_N=group_advantages(normal(1.0), groups, "centered"),
        lengths_N=torch.randint(1, 9, (count,), generator=random).double(),
        logprob_sums_N=old_N + normal(0.5),
        old_logprob_sums_N=old_N,
        anchor_logprob_sums_N=old_N + normal(0.5),
        tau_N=torch.full((count,), 0.8, dtype=torch.float64),
        max_response_length=16,
    )


def on_anchor(batch: GroupBatch) -> GroupBatch:
    """The same batch with the policy standing on its anchor, u = 0."""
    return replace(batch, logprob_sums_N=batch.anchor_logprob_sums_N)
