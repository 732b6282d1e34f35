"""Token log-probs and entropy from vocabulary-parallel logits.

With x the logits of a position, split over the tensor-parallel ranks along the vocabulary:

    log pi(y) = x_y - lse(x)          H = lse(x) - sum_v p_v x_v          p = softmax(x)
    d log pi(y) / dx = 1_y - p        dH / dx = -p (log p + H)

Arithmetic is at least float32. Rows of a padded vocabulary take no part: the numbers are the same
for every tensor-parallel size. Axes: B sequences, T tokens, V vocabulary (v on this rank).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _LogProbsAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_BTv: Tensor, targets_BT: Tensor, vocab_size: int, group: Any
    ) -> tuple[Tensor, Tensor]:
        width = logits_BTv.shape[-1]
        first = dist.get_rank(group) * width
        valid = min(max(vocab_size - first, 0), width)
        x_BTv = logits_BTv[..., :valid].to(torch.promote_types(logits_BTv.dtype, torch.float32))
        peak_BT = _peak(x_BTv, group)
        x_BTv = x_BTv - peak_BT.unsqueeze(-1)
        exp_BTv = torch.exp(x_BTv)
        local_BT = targets_BT - first
        here_BT = (local_BT >= 0) & (local_BT < valid)
        sums_3BT = torch.stack(
            [
                exp_BTv.sum(dim=-1),
                (exp_BTv * x_BTv).sum(dim=-1),
                _pick(x_BTv, local_BT, here_BT),
            ]
        )
        if dist.get_world_size(group) > 1:
            dist.all_reduce(sums_3BT, group=group)
        total_BT, moment_BT, target_BT = sums_3BT
        lse_BT = torch.log(total_BT)
        entropy_BT = lse_BT - moment_BT / total_BT
        log_p_BTv = x_BTv - lse_BT.unsqueeze(-1)
        ctx.save_for_backward(log_p_BTv, entropy_BT, local_BT, here_BT)
        ctx.width, ctx.dtype = width, logits_BTv.dtype
        return target_BT - lse_BT, entropy_BT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_logprob_BT, grad_entropy_BT = grads
        log_p_BTv, entropy_BT, local_BT, here_BT = ctx.saved_tensors
        p_BTv = torch.exp(log_p_BTv)
        surprise_BTv = log_p_BTv + entropy_BT.unsqueeze(-1)
        grad_BTv = -p_BTv * (
            grad_logprob_BT.unsqueeze(-1) + grad_entropy_BT.unsqueeze(-1) * surprise_BTv
        )
        if grad_BTv.shape[-1] > 0:
            at_target_BT1 = local_BT.clamp(0, grad_BTv.shape[-1] - 1).unsqueeze(-1)
            grad_BTv.scatter_add_(-1, at_target_BT1, (grad_logprob_BT * here_BT).unsqueeze(-1))
        padding = ctx.width - grad_BTv.shape[-1]
        grad_BTv = torch.nn.functional.pad(grad_BTv, (0, padding))
        return grad_BTv.to(ctx.dtype), None, None, None


def _peak(x_BTv: Tensor, group: Any) -> Tensor:
    """Largest logit over the whole vocabulary, [B, T]; a rank may hold padding only."""
    if x_BTv.shape[-1] == 0:
        peak_BT = x_BTv.new_full(x_BTv.shape[:-1], float("-inf"))
    else:
        peak_BT = x_BTv.amax(dim=-1).contiguous()
    if dist.get_world_size(group) > 1:
        dist.all_reduce(peak_BT, op=dist.ReduceOp.MAX, group=group)
    return peak_BT


def _pick(x_BTv: Tensor, local_BT: Tensor, here_BT: Tensor) -> Tensor:
    """The target's entry where this rank holds it, 0 elsewhere."""
    if x_BTv.shape[-1] == 0:
        return x_BTv.new_zeros(local_BT.shape)
    at_BT1 = local_BT.clamp(0, x_BTv.shape[-1] - 1).unsqueeze(-1)
    return torch.where(here_BT, x_BTv.gather(-1, at_BT1).squeeze(-1), 0.0)


def vocab_parallel_logprobs(
    logits_BTv: Tensor, targets_BT: Tensor, vocab_size: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each position, both [B, T], nats, differentiable.

    Args:
        logits_BTv: this rank's slice of the logits, any floating dtype.
        targets_BT: token ids in [0, vocab_size), int64, the same on all ranks of the group.
        vocab_size: the unpadded vocabulary.
        group: the tensor-parallel group, in whose rank order the vocabulary is split evenly.
    """
    return _LogProbsAndEntropy.apply(logits_BTv, targets_BT, vocab_size, group)
