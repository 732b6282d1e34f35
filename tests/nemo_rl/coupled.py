"""Oracles: the loss of an optimizer step over whole groups, from the papers' equations.

Each takes token log-probs under the policy as it stands and under the one that sampled [N, T], the
completion mask [N, T] and advantages [G, P]; axes as in ``nemo_apo.core``. Nothing of the package
is imported.
"""

from collections.abc import Callable

from torch import Tensor

from tests.aligner import whole_group_loss as whole

TAU, BETA_R, ALPHA = 0.24, 0.3, 0.6

CoupledLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _change(new: Tensor, old: Tensor, mask: Tensor, a: Tensor) -> Tensor:
    """How far the sequence log-probs have moved, rows are groups."""
    return ((new - old) * mask).sum(dim=1).view(a.shape)


def _apo(new: Tensor, old: Tensor, mask: Tensor, a: Tensor) -> Tensor:
    return whole.alpha_loss(_change(new, old, mask, a) / TAU, a, ALPHA, BETA_R)


def _adpo_softmax(new: Tensor, old: Tensor, mask: Tensor, a: Tensor) -> Tensor:
    return whole.softmax_loss(_change(new, old, mask, a) / TAU, a, BETA_R)


def _adpo_plackett_luce(new: Tensor, old: Tensor, mask: Tensor, a: Tensor) -> Tensor:
    return whole.plackett_luce_loss(_change(new, old, mask, a) / TAU, a)


def _adpo_pairwise(new: Tensor, old: Tensor, mask: Tensor, a: Tensor) -> Tensor:
    return whole.pairwise_loss(_change(new, old, mask, a) / TAU, a)


def _grpo(new: Tensor, old: Tensor, mask: Tensor, a: Tensor) -> Tensor:
    weights = 1.0 / (mask.sum(dim=1, keepdim=True) * a.numel())
    return whole.clipped_ratio_loss(new, old, mask, a.reshape(-1), weights, clip=0.2)


def _dapo(new: Tensor, old: Tensor, mask: Tensor, a: Tensor) -> Tensor:
    per_group = mask.view(len(a), -1).sum(dim=1).repeat_interleave(a.shape[1])[:, None]
    weights = 1.0 / (len(a) * per_group)
    return whole.clipped_ratio_loss(new, old, mask, a.reshape(-1), weights, 0.2, clip_high=0.28)


def _gspo(new: Tensor, old: Tensor, mask: Tensor, a: Tensor) -> Tensor:
    lengths = mask.sum(dim=1).view(a.shape)
    return whole.sequence_ratio_loss(_change(new, old, mask, a), lengths, a, 0.03, 0.04)


COUPLED: dict[str, CoupledLoss] = {
    "apo": _apo,
    "adpo_softmax": _adpo_softmax,
    "adpo_plackett_luce": _adpo_plackett_luce,
    "adpo_pairwise": _adpo_pairwise,
    "grpo": _grpo,
    "dapo": _dapo,
    "gspo": _gspo,
}
