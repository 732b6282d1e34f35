"""The Csiszar alpha-divergence between two distributions over each group, and its gradient.

    D_a(q || p) = (1 - sum_i q_i^a p_i^(1-a)) / (a (1 - a))        a in [0, 1]
    a -> 1: KL(q || p), mode covering          a -> 0: KL(p || q), mode seeking

(APO, arXiv 2512.22953.) As written it is 0/0 at both ends. Ours, with d = log q - log p and the
Box-Cox function phi_a(x) = expm1(a x) / a, phi_0(x) = x, is finite and accurate on all of [0, 1]:

    a <  1/2:  D = -sum_i p_i phi_a(d_i) / (1 - a)
    a >= 1/2:  D = -sum_i q_i phi_{1-a}(-d_i) / a
    all a:     dD/du_i = -(t_i - p_i sum_j t_j),   t_i = p_i phi_a(d_i),   p = softmax(u)

Axes: N sequences, G groups. All tensors float64.
"""

import torch
from torch import Tensor

from nemo_apo.core.groups import Groups


def _check_alpha(alpha: float) -> None:
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")


def log_ratio(log_q_N: Tensor, log_p_N: Tensor, ratio_clip: float | None = None) -> Tensor:
    """d = log q - log p [N], bounded to [-ratio_clip, ratio_clip] where a clip is given."""
    d_N = log_q_N - log_p_N
    return d_N if ratio_clip is None else d_N.clamp(-ratio_clip, ratio_clip)


def weighted_box_cox(log_weight_N: Tensor, x_N: Tensor, a: float) -> Tensor:
    """w phi_a(x) with w = exp(log_weight): never 0 times inf, though exp(a x) may overflow.

    Args:
        log_weight_N: logarithm of the weight, [N] float64.
        x_N: argument of the Box-Cox function, [N] float64.
        a: its parameter, in [0, 1].
    """
    weight_N = torch.exp(log_weight_N)
    if a == 0.0:
        return weight_N * x_N
    exponent_N = a * x_N
    near_N = weight_N * torch.expm1(exponent_N.clamp(max=1.0)) / a
    far_N = (torch.exp(log_weight_N + exponent_N) - weight_N) / a
    return torch.where(exponent_N < 1.0, near_N, far_N)


def alpha_divergence(
    log_q_N: Tensor, log_p_N: Tensor, groups: Groups, alpha: float, ratio_clip: float | None = None
) -> Tensor:
    """D_alpha(q || p) of each group, [G] float64, nats; arXiv 2512.22953, in our Box-Cox form.

    Args:
        log_q_N: log target, normalised within each group, [N] float64.
        log_p_N: log anchored policy, normalised within each group, [N] float64.
        groups: the groups of the N sequences.
        alpha: in [0, 1], both ends included.
        ratio_clip: if given, log q - log p is bounded to +-ratio_clip inside phi (ours).

    Raises:
        ValueError: if alpha lies outside [0, 1].
    """
    _check_alpha(alpha)
    d_N = log_ratio(log_q_N, log_p_N, ratio_clip)
    if alpha < 0.5:
        return -groups.sum(weighted_box_cox(log_p_N, d_N, alpha)) / (1.0 - alpha)
    return -groups.sum(weighted_box_cox(log_q_N, -d_N, 1.0 - alpha)) / alpha


def alpha_divergence_grad(
    log_q_N: Tensor, log_p_N: Tensor, groups: Groups, alpha: float, ratio_clip: float | None = None
) -> Tensor:
    """dD_alpha/du [N] float64, where p = softmax(u): the closed form above, not autograd.

    Its sum over a group is 0. With ``ratio_clip`` d is bounded inside phi and the closed form is
    kept, so the result is a bounded coefficient and no longer the derivative of the clipped value.
    Arguments and errors as in ``alpha_divergence``.
    """
    _check_alpha(alpha)
    t_N = weighted_box_cox(log_p_N, log_ratio(log_q_N, log_p_N, ratio_clip), alpha)
    return torch.exp(log_p_N) * groups.spread(groups.sum(t_N)) - t_N
