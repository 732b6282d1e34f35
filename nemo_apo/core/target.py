"""The Boltzmann target over each group (axes: N sequences; float64)."""

from torch import Tensor

from nemo_apo.core.groups import Groups


def boltzmann_log_target(advantages_N: Tensor, groups: Groups, beta_r: float) -> Tensor:
    """log q = log softmax(A / beta_r) within each group, [N] (arXiv 2512.22953).

    Args:
        advantages_N: group-relative advantages, [N] float64.
        groups: the groups of the N sequences.
        beta_r: target temperature, > 0; small values put all weight on the best completion.

    Raises:
        ValueError: if beta_r is not positive.
    """
    if not beta_r > 0.0:
        raise ValueError(f"beta_r must be > 0, got {beta_r}")
    return groups.log_softmax(advantages_N / beta_r)
