"""Context parallelism: which tokens of a sequence a rank holds, and attention over all of them.

A sequence is cut into 2 C chunks for C ranks, and rank r holds chunks r and 2 C - 1 - r: under a
causal mask every rank then has the same work. megatron's rotary embedding expects this order.
Axes: T tokens of a sequence (a multiple of 2 C), t of this rank, B sequences.
"""

import copy
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from nemo_apo.parallel.gather import all_gather_rows


def positions_of(length: int, size: int, rank: int) -> Tensor:
    """Positions of the tokens that a rank holds, in its order, [t] int64."""
    chunk = length // (2 * size)
    first = torch.arange(rank * chunk, (rank + 1) * chunk)
    last = torch.arange((2 * size - 1 - rank) * chunk, (2 * size - rank) * chunk)
    return torch.cat([first, last])


def gathered_positions(length: int, size: int) -> Tensor:
    """Position of each token when all ranks' tokens are laid side by side, [T] int64."""
    return torch.cat([positions_of(length, size, rank) for rank in range(size)])


def whole_sequences(values_Bt: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Values of all tokens in order, [B, ..., T], from this rank's [B, ..., t]; no gradient."""
    size = dist.get_world_size(group)
    if size == 1:
        return values_Bt
    side_by_side = all_gather_rows(values_Bt.movedim(-1, 0), group).movedim(0, -1)
    order_T = gathered_positions(side_by_side.shape[-1], size).to(values_Bt.device)
    return side_by_side[..., torch.argsort(order_T)]


class AllGatherAttention(DotProductAttention):
    """Attention whose queries are this rank's tokens and whose keys are everybody's.

    Keys and values are gathered over the context-parallel ranks; their gradients are summed back.
    For where Transformer Engine's ring attention is not to be had: it needs memory for all keys.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        # megatron's own class refuses context parallelism, and this one needs no help with it.
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        kwargs.pop("cp_comm_type", None)
        super().__init__(alone, *args, **kwargs)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs: Any
    ) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        key, value = (
            gather_from_sequence_parallel_region(
                part.contiguous(), tensor_parallel_output_grad=True, group=group
            )
            for part in (key, value)
        )
        length, size, rank = key.shape[0], dist.get_world_size(group), dist.get_rank(group)
        keys_T = gathered_positions(length, size).to(query.device)
        queries_t = positions_of(length, size, rank).to(query.device)
        forbidden = (keys_T[None, :] > queries_t[:, None])[None, None]
        return super().forward(query, key, value, forbidden, **kwargs)
