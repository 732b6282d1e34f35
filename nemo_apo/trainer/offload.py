"""Memory that only training needs, handed over while completions are generated.

Gradient buffers are emptied and made again by megatron (they hold nothing between optimizer
steps). Of the optimizer's state, megatron's own way would give tensors new memory, which for
weights trained in float32 parts them from the model; here the memory under a tensor goes and comes
back, so that everything that looks into it still does, and holds the same bits.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from nemo_apo.trainer.optimizer_state import optimizer_parts


@contextlib.contextmanager
def offloaded(
    chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer
) -> Iterator[None]:
    """Without the memory of gradients, moments and main weights; the weights stay.

    To be entered between optimizer steps: gradients come back as zeros, all else bit for bit.
    """
    weights = [parameter for chunk in chunks for parameter in chunk.parameters()]
    on_gpu = weights[0].is_cuda
    for chunk in chunks:
        chunk.offload_grad_buffers(synchronize=on_gpu, empty_cache=False)
    try:
        with on_host(optimizer_tensors(optimizer), keep=weights):
            if on_gpu:
                torch.cuda.empty_cache()
            yield
    finally:
        for chunk in chunks:
            chunk.restore_grad_buffers(synchronize=on_gpu)


def optimizer_tensors(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    """Moments and main weights of an optimizer, and weights where it works on them directly."""
    for part in optimizer_parts(optimizer):
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


@contextlib.contextmanager
def on_host(tensors: Iterable[Tensor], keep: Iterable[Tensor]) -> Iterator[None]:
    """Hold the memory under tensors in the host's memory meanwhile; it comes back bit for bit.

    Until then the tensors must not be read.

    Args:
        tensors: on any device; those that look into the same memory are moved once.
        keep: tensors whose memory stays, whatever else looks into it.
    """
    staying = {tensor.untyped_storage().data_ptr() for tensor in keep}
    moved: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []
    try:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() == 0 or storage.data_ptr() in staying:
                continue
            copy = torch.UntypedStorage(storage.nbytes())
            copy.copy_(storage)
            moved.append((storage, copy))
            storage.resize_(0)
        yield
    finally:
        for storage, copy in moved:
            storage.resize_(copy.nbytes())
            storage.copy_(copy)
