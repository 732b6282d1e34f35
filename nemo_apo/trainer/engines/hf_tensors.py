"""The model that samples as a checkpoint's tensors, for an engine that knows those names."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from nemo_apo.hf_checkpoint.decoder import Decoder
from nemo_apo.hf_checkpoint.mapping import Share, Target, pieces, shapes, targets
from nemo_apo.trainer.hf_weights import named_weights, tensors_of


def hf_tensors(module: GPTModel, decoder: Decoder, ranks: int) -> Iterator[tuple[str, Tensor]]:
    """Names and whole tensors, one at a time, in the module's dtype and on its device.

    Collective over the ranks that share the module: all must take every tensor.

    Args:
        module: the whole model, or this rank's tensor-parallel share of it.
        decoder: the model.
        ranks: how many share it.
    """
    if ranks == 1:
        yield from tensors_of(module, decoder)
        return
    group, weights = module.pg_collection.tp, dict(named_weights(module))
    sizes = shapes(decoder)
    for name, target in targets(decoder).items():
        parts = _gathered(weights[target.megatron].detach(), group)
        yield name, _whole(parts, target, sizes[name], decoder)


def _gathered(part: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return parts


def _whole(parts: list[Tensor], target: Target, shape: tuple[int, ...], decoder: Decoder) -> Tensor:
    """A tensor of the checkpoint from all ranks' parts of the parameter that holds it."""
    whole = parts[0].new_empty(shape)
    for rank, part in enumerate(parts):
        for piece in pieces(decoder, target, Share(rank, len(parts), part.shape[0])):
            at = (piece.rows, piece.columns)[: len(shape)]
            whole[at] = part[piece.target_rows]
    return whole
