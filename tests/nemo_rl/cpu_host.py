"""CPU shims, for tests only: they let the real NeMo-RL run over gloo where there is no GPU.

NeMo-RL writes ``"cuda"`` and NCCL into its code. Each function here answers one such assumption,
and each was seen to be needed. None of them touches a loss, a gradient or a sampling decision;
``test_host_harness`` compares the workers' log-probs with those of the plain model.

``install_in_worker`` changes its whole process, so it belongs into the actors of the host; Ray
calls it at the start of each (``worker_process_setup_hook``). It does not work by a
``TorchFunctionMode``: modes hold for one thread, and an actor's methods run in another.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Factories that the host and FSDP call with a device of CUDA.
_FACTORIES = [
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "eye",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randn",
    "randn_like",
    "randperm",
    "tensor",
    "zeros",
    "zeros_like",
]


@contextmanager
def in_driver() -> Iterator[None]:
    """What the driver needs: the host's loss wrappers call ``.cuda()`` on what they are given."""
    cuda = torch.Tensor.cuda
    _stay_on_cpu()
    try:
        yield
    finally:
        torch.Tensor.cuda = cuda  # type: ignore[method-assign]


@functools.cache
def install_in_worker() -> None:
    """All of them, in an actor's process."""
    from tests.nemo_rl import host_source

    host_source.make_importable()
    torch.set_num_threads(1)
    _stay_on_cpu()
    _redirect_factories()
    _redirect_moves()
    _answer_cuda_queries()
    _use_gloo()
    _use_cpu_autocast()


@functools.cache
def attend_without_flash() -> None:
    """Packs of sequences are made for flash attention, which is not on CPUs.

    Torch's own tells the sequences of a pack apart, too, by positions that begin anew.
    """
    from transformers import AutoConfig

    read = AutoConfig.from_pretrained

    def read_for_cpu(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("attn_implementation") == "flash_attention_2":
            kwargs["attn_implementation"] = "sdpa"
        return read(*args, **kwargs)

    AutoConfig.from_pretrained = read_for_cpu  # type: ignore[method-assign]


def _is_cuda(device: Any) -> bool:
    """Whether a device is CUDA's: an index, a name or a ``torch.device``."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return type(device) is int


def _stay_on_cpu() -> None:
    """``.cuda()`` is called on every micro-batch."""

    def stay(self: Any, *_: Any, **__: Any) -> Any:
        return self

    torch.Tensor.cuda = stay  # type: ignore[method-assign]


def _redirect_factories() -> None:
    """Tensors are made with ``device="cuda"``, buffers of FSDP in pinned memory."""
    from torch.utils import _device

    # ``with torch.device("meta")`` asks once which functions make tensors, and looks them up in
    # torch: it must find the originals, or models made under it have other weights.
    _device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return make


def _redirect_moves() -> None:
    """``.to("cuda")`` is called on batches, models and optimizer state."""
    for owner in (torch.Tensor, torch.nn.Module):
        owner.to = _to_cpu(owner.to)  # type: ignore[attr-defined]


def _to_cpu(to: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(to)
    def move(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and _is_cuda(args[0]):
            args = ("cpu", *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return to(self, *args, **kwargs)

    return move


def _answer_cuda_queries() -> None:
    """The device, its name and its memory are asked for without a look whether there is one."""

    def answer(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    answers = {
        "current_device": 0,
        "empty_cache": None,
        "get_device_name": "cpu",
        "max_memory_allocated": 0,
        "memory_allocated": 0,
        "memory_reserved": 0,
        "reset_peak_memory_stats": None,
        "synchronize": None,
    }
    for name, value in answers.items():
        setattr(torch.cuda, name, answer(value))
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = answer(None)


def _use_gloo() -> None:
    """Process groups are made with NCCL, device meshes on CUDA, ranks placed by GPU number."""
    import ray
    from torch.distributed import device_mesh

    init_process_group = torch.distributed.init_process_group
    init_device_mesh = device_mesh.init_device_mesh

    def init_gloo(*_: Any, **__: Any) -> Any:
        return init_process_group(backend="gloo")

    def init_cpu_mesh(device_type: Any = None, *args: Any, **kwargs: Any) -> Any:
        return init_device_mesh("cpu", *args, **kwargs)

    torch.distributed.init_process_group = init_gloo
    device_mesh.init_device_mesh = init_cpu_mesh
    torch.distributed.init_device_mesh = init_cpu_mesh  # type: ignore[attr-defined]
    ray.get_gpu_ids = lambda: [0]


def _use_cpu_autocast() -> None:
    """The forward pass runs under autocast for CUDA, in float32 too."""

    class CpuAutocast(torch.autocast):
        def __init__(self, device_type: str, dtype: torch.dtype | None = None, **_: Any) -> None:
            lower = dtype not in (None, torch.float32)
            super().__init__("cpu", dtype=torch.bfloat16, enabled=lower)

    torch.autocast = CpuAutocast  # type: ignore[misc]
