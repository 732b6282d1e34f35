"""A data-parallel rank's part of a batch, cut into micro-batches without needless padding.

Rows are sorted by length, so that those of a micro-batch are about as long, and each micro-batch
ends with its longest row. What a row gives does not depend on where it stands or on its padding,
so nothing but speed changes. Axes: N rows of all ranks, n of this rank, B of a micro-batch, T
tokens.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from nemo_apo.parallel.context import positions_of, whole_sequences
from nemo_apo.parallel.layout import Layout
from nemo_apo.trainer.micro_batch import MicroBatch


@dataclass(frozen=True)
class Share:
    """A rank's part.

    Attributes:
        micro_batches: on the rank's device; under context parallelism with its tokens only.
        order_n: which of the rank's rows, in global order, stands at each place.
        width: T of the whole batch.
    """

    micro_batches: list[MicroBatch]
    order_n: Tensor
    width: int

    def in_row_order(self, values_n: Tensor) -> Tensor:
        """Values of the rank's rows, back in the order in which they came."""
        back_n = torch.argsort(self.order_n).to(values_n.device)
        return values_n[back_n]

    def whole_tokens(self, parts: list[Tensor], layout: Layout) -> Tensor:
        """Values per token of each micro-batch [B, ..., t], as [n, ..., T]; 0 where trimmed."""
        wholes = [whole_sequences(part, layout.context_group) for part in parts]
        return torch.cat([self._fit(whole) for whole in wholes])

    def _fit(self, values_BT: Tensor) -> Tensor:
        values_BT = values_BT[..., : self.width]
        return pad(values_BT, (0, self.width - values_BT.shape[-1]))


def share_of(
    batch: MicroBatch, micro_batch_size: int, layout: Layout, width_multiple: int
) -> Share:
    """This rank's micro-batches of a batch, equally many on every rank.

    Rows that fill up the last micro-batch carry no completion tokens and no weight.

    Args:
        batch: N rows, the same on all ranks.
        micro_batch_size: rows of a micro-batch.
        layout: where this rank stands. Pipeline stages exchange equal shapes, so with several of
            them all micro-batches are as wide as the widest.
        width_multiple: what the width of a micro-batch must be a multiple of.
    """
    per_rank = -(-batch.rows // layout.data_size)
    size = min(micro_batch_size, per_rank)
    # The interleaved schedule wants as many micro-batches as a multiple of its stages.
    together = size * (layout.pipeline_size if layout.virtual_size > 1 else 1)
    per_rank = -(-per_rank // together) * together
    start = layout.data_rank * per_rank
    rows_n = torch.arange(start, start + per_rank)
    real_n = rows_n < batch.rows
    shared = batch.select(rows_n.clamp(max=batch.rows - 1))
    shared = replace(shared, mask_BT=shared.mask_BT & real_n[:, None])
    lengths_n = _lengths(shared.mask_BT)
    order_n = torch.argsort(lengths_n, descending=True, stable=True)
    parts = [order_n[first : first + size] for first in range(0, per_rank, size)]
    widths = [max(1, int(lengths_n[part].max())) for part in parts]
    if layout.pipeline_size > 1:
        widths = [max(widths)] * len(parts)
    micro_batches = [
        _own_tokens(shared.select(part).trimmed(width).padded(width_multiple), layout)
        for part, width in zip(parts, widths, strict=True)
    ]
    return Share([part.to(layout.device) for part in micro_batches], order_n, batch.width)


def _lengths(mask_BT: Tensor) -> Tensor:
    """Columns up to the last completion token of each row, [B]; 0 without one."""
    columns_T = torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device)
    return (mask_BT * columns_T).amax(dim=1)


def _own_tokens(batch: MicroBatch, layout: Layout) -> MicroBatch:
    """The tokens that this rank holds under context parallelism."""
    if layout.context_size == 1:
        return batch
    return batch.at(positions_of(batch.width, layout.context_size, layout.context_rank))
