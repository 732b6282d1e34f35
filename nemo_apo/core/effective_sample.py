"""How many completions of a group carry weight (axes: N sequences, G groups; float64)."""

import torch
from torch import Tensor

from nemo_apo.core.groups import Groups


def effective_sample_share(
    log_q_N: Tensor, log_p_N: Tensor, groups: Groups, alpha: float
) -> Tensor:
    """Mean over groups of the effective sample size over P, scalar in (0, 1] (ours).

    The weights are w = softmax(alpha log q + (1 - alpha) log p), the point of the geometric path
    from the policy to the target at which alpha stands, and the size is 1 / sum w^2.

    Args:
        log_q_N: log target, [N].
        log_p_N: log anchored policy, [N].
        groups: the groups of the N sequences.
        alpha: in [0, 1].
    """
    log_w_N = groups.log_softmax(alpha * log_q_N + (1.0 - alpha) * log_p_N)
    ess_G = 1.0 / groups.sum(torch.exp(2.0 * log_w_N))
    return (ess_G / groups.sizes_G).mean()
