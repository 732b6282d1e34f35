"""Truncated importance correction: rollouts drawn by an engine that is not quite the trainer.

Another implementation of the same weights gives other log-probs, so its samples are not those of
the policy that the objective takes them to be. Each token's gradient is therefore weighed by

    w_t = min(exp(old_t - sampler_t), cap)        old: the trainer's log-prob under the policy
                                                  that sampled; sampler: the engine's own

which is truncated importance sampling, as trainers in the field apply it token by token
against the mismatch of a separate engine. Truncation bounds the variance and biases towards the
engine's distribution; the weights of single tokens leave the mismatch of a token's prefix aside.

For every objective alike: the value of a token's log-prob stays, and with it all that depends on
it (ratios, clips, coefficients c_i of a group loss); its gradient is scaled,

    grad loss = sum_t w_t (d loss / d log pi_t) grad log pi_t

and w itself is a number, never differentiated. For a group loss that is sum_i c_i sum_t w_it
grad log pi_it. Regularizers are not scaled: a KL penalty or an entropy bonus is to hold on every
token that was seen, however unlikely the trainer finds it.

Axes: N or B sequences, T tokens.
"""

import torch
from torch import Tensor


def importance_ratios(
    old_logprobs_BT: Tensor, sampler_logprobs_BT: Tensor, mask_BT: Tensor
) -> Tensor:
    """exp(old - sampler) of each completion token, exactly 1 elsewhere; the dtype of old."""
    gap_BT = old_logprobs_BT - sampler_logprobs_BT.to(old_logprobs_BT.dtype)
    return torch.where(mask_BT.bool(), gap_BT, 0.0).exp()


def truncated(ratios_BT: Tensor, cap: float) -> Tensor:
    """w = min(ratio, cap); a NaN stays one."""
    return ratios_BT.clamp(max=cap)


def with_scaled_gradient(logprobs_BT: Tensor, weights_BT: Tensor) -> Tensor:
    """The same log-probs to the last bit, whose gradient is ``weights_BT`` times as large.

    Args:
        logprobs_BT: differentiable, nats.
        weights_BT: w, detached; where it is 1 the gradient keeps its bits, and where it is not
            finite, neither is the result.
    """
    fixed_BT = logprobs_BT.detach()
    return fixed_BT + weights_BT.detach().to(logprobs_BT.dtype) * (logprobs_BT - fixed_BT)
