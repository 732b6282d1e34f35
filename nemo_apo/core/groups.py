"""Segment operations over flat tensors: N sequences, each with a group id; groups may be ragged.

Axes: N sequences, G groups (see ``nemo_apo.core``).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def as_float64(values_N: Tensor) -> Tensor:
    """Group arithmetic is float64 whatever the model's dtype, and never differentiated through."""
    return values_N.detach().to(torch.float64)


@dataclass(frozen=True)
class Groups:
    """Which sequence belongs to which group.

    Attributes:
        index_N: int64 [N], the position of each sequence's group in ``ids_G``.
        ids_G: int64 [G], the distinct group ids in ascending order.
        sizes_G: int64 [G], the number of sequences in each group (at least 1).
    """

    index_N: Tensor
    ids_G: Tensor
    sizes_G: Tensor

    @classmethod
    def from_ids(cls, group_ids_N: Tensor) -> "Groups":
        """Groups from explicit integer ids [N], in any order; ids need not be consecutive.

        Raises:
            ValueError: if the ids are not a one-dimensional integer tensor.
        """
        if group_ids_N.ndim != 1 or group_ids_N.is_floating_point() or group_ids_N.is_complex():
            raise ValueError(
                "group ids must be a one-dimensional integer tensor, "
                f"got shape {tuple(group_ids_N.shape)} and dtype {group_ids_N.dtype}"
            )
        ids_G, index_N, sizes_G = torch.unique(
            group_ids_N.to(torch.int64), return_inverse=True, return_counts=True
        )
        return cls(index_N=index_N, ids_G=ids_G, sizes_G=sizes_G)

    @property
    def count(self) -> int:
        """The number of groups G."""
        return self.ids_G.numel()

    def spread(self, values_G: Tensor) -> Tensor:
        """Copy a value per group [G] to each of its sequences [N]."""
        return values_G[self.index_N]

    def sum(self, values_N: Tensor) -> Tensor:
        """Sum over each group, [N] -> [G]."""
        return values_N.new_zeros(self.count).index_add(0, self.index_N, values_N)

    def mean(self, values_N: Tensor) -> Tensor:
        """Mean over each group, [N] -> [G]."""
        return self.sum(values_N) / self.sizes_G

    def max(self, values_N: Tensor) -> Tensor:
        """Largest value of each group, [N] -> [G]."""
        return self._extreme(values_N, "amax")

    def min(self, values_N: Tensor) -> Tensor:
        """Smallest value of each group, [N] -> [G]."""
        return self._extreme(values_N, "amin")

    def all_equal(self, values_N: Tensor) -> Tensor:
        """Whether the values of a group are all the same number, bool [G].

        Decided by comparison: the standard deviation of equal values such as 0.7 is about 1e-8 in
        floating point, not 0.
        """
        return self.max(values_N) == self.min(values_N)

    def logsumexp(self, values_N: Tensor) -> Tensor:
        """log sum exp over each group, [N] -> [G]."""
        peak_G = self.max(values_N)
        return peak_G + torch.log(self.sum(torch.exp(values_N - self.spread(peak_G))))

    def log_softmax(self, values_N: Tensor) -> Tensor:
        """Logarithm of the softmax within each group, [N] -> [N]."""
        shifted_N = values_N - self.spread(self.max(values_N))
        return shifted_N - self.spread(torch.log(self.sum(torch.exp(shifted_N))))

    def pad(self, values_N: Tensor, fill: float) -> Tensor:
        """Lay the groups out as rows, [N] -> [G, P] with P the largest size; gaps hold ``fill``."""
        width = int(self.sizes_G.max())
        padded_GP = values_N.new_full((self.count, width), fill)
        padded_GP[self.index_N, self._rank_in_group()] = values_N
        return padded_GP

    def flatten(self, padded_GP: Tensor) -> Tensor:
        """The inverse of ``pad``: [G, P] -> [N]."""
        return padded_GP[self.index_N, self._rank_in_group()]

    def _rank_in_group(self) -> Tensor:
        order = torch.argsort(self.index_N, stable=True)
        starts_G = torch.cumsum(self.sizes_G, 0) - self.sizes_G
        rank_N = torch.empty_like(self.index_N)
        rank_N[order] = (
            torch.arange(order.numel(), device=order.device) - starts_G[self.index_N[order]]
        )
        return rank_N

    def _extreme(self, values_N: Tensor, reduce: str) -> Tensor:
        start_G = values_N.new_zeros(self.count)
        return start_G.scatter_reduce(0, self.index_N, values_N, reduce, include_self=False)
