"""The parallel layout of this process: groups, device and backend."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from nemo_apo.config import ConfigError, ParallelConfig
from nemo_apo.parallel import cpu_runtime


@dataclass(frozen=True)
class Layout:
    """Where this rank stands. Sizes and ranks are those of megatron's groups.

    Attributes:
        device: device of this rank's model.
        rank, world_size: among all ranks.
        tensor_size, pipeline_size, context_size, data_size: parallel sizes; their product is
            ``world_size``.
        tensor_rank, pipeline_rank, context_rank, data_rank: this rank's place in each.
        virtual_size: chunks of layers of a pipeline stage.
    """

    device: torch.device
    rank: int
    world_size: int
    tensor_size: int
    pipeline_size: int
    data_size: int
    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    context_size: int = 1
    context_rank: int = 0
    virtual_size: int = 1

    @property
    def sizes(self) -> str:
        """The parallel sizes, as shown to a person."""
        context = f" x CP{self.context_size}" if self.context_size > 1 else ""
        return f"TP{self.tensor_size} x PP{self.pipeline_size}{context} x DP{self.data_size}"

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def is_model_parallel(self) -> bool:
        """Whether no rank alone could run the model as it is laid out for training."""
        return self.tensor_size * self.pipeline_size * self.context_size > 1

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        return parallel_state.get_tensor_model_parallel_group()

    @property
    def pipeline_group(self) -> dist.ProcessGroup:
        return parallel_state.get_pipeline_model_parallel_group()

    @property
    def context_group(self) -> dist.ProcessGroup:
        return parallel_state.get_context_parallel_group()

    @property
    def data_group(self) -> dist.ProcessGroup:
        """Ranks that hold other sequences."""
        return parallel_state.get_data_parallel_group()

    @property
    def token_group(self) -> dist.ProcessGroup:
        """Ranks that hold other tokens: data and context parallel."""
        return parallel_state.get_data_parallel_group(with_context_parallel=True)


def initialize(parallel: ParallelConfig, seed: int) -> Layout:
    """Start the process group (from torchrun's environment, or alone) and megatron's groups.

    Args:
        parallel: validated sizes, backend and timeout.
        seed: seed of weight initialisation.
    """
    backend = _backend(parallel.backend)
    if backend == "gloo" and torch.cuda.is_available():
        raise ConfigError(
            "parallel.backend=gloo: not supported where CUDA is available; hide the GPUs with "
            "CUDA_VISIBLE_DEVICES= or use nccl"
        )
    device = _device(backend)
    if device.type == "cpu":
        cpu_runtime.install()
    if not dist.is_initialized():
        _start_process_group(backend, parallel.timeout_minutes, device)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        distributed_timeout_minutes=parallel.timeout_minutes,
    )
    model_parallel_cuda_manual_seed(seed)
    return Layout(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        data_size=parallel_state.get_data_parallel_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        context_size=parallel_state.get_context_parallel_world_size(),
        context_rank=parallel_state.get_context_parallel_rank(),
        virtual_size=parallel.virtual_pipeline_model_parallel_size or 1,
    )


def shut_down() -> None:
    """End megatron's groups and the process group; safe to call twice."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def copy_groups(tensor_size: int) -> ProcessGroupCollection:
    """Groups of a whole model on ``tensor_size`` ranks that stand next to one another.

    Tensor parallelism is all the parallelism it has; 1 is a model on this rank alone. Every rank
    has to call this at the same time: making a process group is collective.
    """
    alone, together = _group_of(1), _group_of(tensor_size)
    names = ("pp", "cp", "dp", "dp_cp", "embd", "pos_embd", "ep", "expt_tp", "tp_ep", "tp_ep_pp")
    names += ("expt_dp",)
    tensor = dict.fromkeys(("tp", "mp", "tp_cp"), together)
    return ProcessGroupCollection(**dict.fromkeys(names, alone), **tensor)


def _group_of(size: int) -> dist.ProcessGroup:
    """This rank's group, where ranks are cut into groups of ``size`` in order."""
    mine = None
    for first in range(0, dist.get_world_size(), size):
        members = range(first, first + size)
        group = dist.new_group(list(members))
        if dist.get_rank() in members:
            mine = group
    assert mine is not None, "the size divides the number of ranks"
    return mine


def _backend(requested: str) -> str:
    if requested != "auto":
        return requested
    return "nccl" if torch.cuda.is_available() else "gloo"


def _device(backend: str) -> torch.device:
    if backend != "nccl":
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _start_process_group(backend: str, timeout_minutes: float, device: torch.device) -> None:
    timeout = timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
        return
    store = dist.HashStore()
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
