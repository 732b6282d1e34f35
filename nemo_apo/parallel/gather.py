"""The only place where numbers of different ranks meet, before anything is weighed.

Every rank calls these functions at the same time and gets the same answer, so that every rank
takes the same decision. Tensors are made contiguous first: gloo silently computes wrong results
from a tensor that is not.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_gather_rows(rows: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Concatenate each rank's rows [n, ...] in rank order to [ranks x n, ...].

    ``rows`` has the same shape on all ranks (pad before). ``group`` None means all ranks.
    """
    size = dist.get_world_size(group)
    if size == 1:
        return rows
    rows = rows.contiguous()
    parts = [torch.empty_like(rows) for _ in range(size)]
    dist.all_gather(parts, rows, group=group)
    return torch.cat(parts)


def sum_over(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Element-wise sum over the ranks of a group; a new tensor."""
    total = values.detach().clone().contiguous()
    if dist.get_world_size(group) > 1:
        dist.all_reduce(total, group=group)
    return total


def all_true(flag: bool, device: torch.device) -> bool:
    """Whether the flag is true on every rank."""
    return highest(int(not flag), device) == 0


def highest(value: int, device: torch.device) -> int:
    """The highest value of any rank."""
    if dist.get_world_size() == 1:
        return value
    best = torch.tensor([value], device=device)
    dist.all_reduce(best, op=dist.ReduceOp.MAX)
    return int(best.item())


def first_not_finite(values: Mapping[str, float], device: torch.device) -> str | None:
    """Name of the first value that is not finite on some rank; None if all are on every rank."""
    # The first name counts highest, so that it is the one all ranks hear of.
    names = [None, *reversed(values)]
    bad = [names.index(name) for name, value in values.items() if not math.isfinite(value)]
    return names[highest(max(bad, default=0), device)]


def broadcast_from_last(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The values of the group's last rank, on every rank of it.

    ``values`` must have the right shape and dtype everywhere; its content matters on the last rank.
    """
    size = dist.get_world_size(group)
    if size == 1:
        return values
    values = values.contiguous()
    dist.broadcast(values, src=dist.get_global_rank(group, size - 1), group=group)
    return values


def all_gather_objects(value: Any) -> list[Any]:
    """One small Python object per rank, in rank order."""
    if dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
