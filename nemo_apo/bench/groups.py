"""The tensor-parallel group that the variants of a log-prob want: this rank alone."""

import contextlib
import importlib.util
from collections.abc import Iterator

import torch
import torch.distributed as dist

from nemo_apo.config import ParallelConfig


@contextlib.contextmanager
def group_of_one(device: torch.device) -> Iterator[dist.ProcessGroup]:
    """A group of this rank; with megatron-core its parallel state as well."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if importlib.util.find_spec("megatron") is not None:
        from nemo_apo.parallel import layout

        try:
            yield layout.initialize(ParallelConfig(backend=backend), seed=0).tensor_group
        finally:
            layout.shut_down()
        return
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
