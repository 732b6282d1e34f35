"""The order of a rollout under which every optimizer step holds whole groups (ours).

Some hosts give each data-parallel rank a contiguous chunk of the rollout and let an optimizer step
take a slice of every chunk, which may cut a group across optimizer steps. The order found here is
applied before the host cuts: optimizer step s then holds the rows s B .. (s + 1) B of the rollout
sorted by group, whatever the number of ranks. Axes: N sequences, B of an optimizer step.
"""

import torch
from torch import Tensor

from nemo_apo.core.groups import Groups


def whole_group_order(group_ids_N: Tensor, batch_size: int, ranks: int) -> Tensor:
    """Index [N] int64 that puts the rollout in the order that the host's cut needs.

    Row k of the reordered rollout is row ``order[k]`` of the given one. Groups keep the order of
    their first appearance, completions theirs within the group.

    Args:
        group_ids_N: group id of each sequence; groups of equal size, in any order.
        batch_size: sequences of an optimizer step over all ranks, B.
        ranks: data-parallel ranks; the host gives each a contiguous chunk of N / ranks rows, of
            which every optimizer step takes the next B / ranks.

    Raises:
        ValueError: if groups differ in size, or a size does not divide the next one up.
    """
    groups = Groups.from_ids(group_ids_N)
    total, size = group_ids_N.numel(), int(groups.sizes_G[0])
    if bool((groups.sizes_G != size).any()):
        sizes = sorted(set(groups.sizes_G.tolist()))
        raise ValueError(f"the rollout's groups must all have the same size, got sizes {sizes}")
    _check_divides(size, batch_size, "the group size", "the optimizer step's batch size")
    _check_divides(batch_size, total, "the optimizer step's batch size", "the rollout's size")
    _check_divides(ranks, batch_size, "the data-parallel size", "the optimizer step's batch size")
    sorted_N = torch.argsort(_first_appearance(groups), stable=True)
    return sorted_N.view(total // batch_size, ranks, -1).transpose(0, 1).reshape(-1)


def _first_appearance(groups: Groups) -> Tensor:
    """For each sequence, where its group first appears, [N]."""
    positions_N = torch.arange(groups.index_N.numel(), device=groups.index_N.device)
    return groups.spread(groups.min(positions_N))


def _check_divides(part: int, whole: int, part_name: str, whole_name: str) -> None:
    if whole % part:
        raise ValueError(f"{part_name} must divide {whole_name}, got {part} and {whole}")
