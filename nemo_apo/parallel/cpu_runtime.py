"""Lets real megatron-core run on a CPU over gloo: a list of patches, each with its reason.

megatron-core assumes CUDA in places where nothing depends on it (a literal ``device="cuda"``, a
call to ``torch.cuda.synchronize``). ``install`` is opt-in (``nemo_apo.parallel.layout`` calls it
for a gloo layout on a machine without CUDA), is idempotent, touches torch and megatron-core of
this process only, and refuses a version of megatron-core that these patches were not tested with.
Nothing in the package is version-locked when a GPU is used.
"""

import importlib
import importlib.metadata
import queue
import types
from collections.abc import Callable
from typing import Any

import torch

TESTED_MEGATRON_VERSIONS = ("0.16.1",)

_MODULES_WITH_CUDA_LITERALS = (
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.strategies.state_dict_saver",
    "models.common.embeddings.rope_utils",
    "optimizer.clip_grads",
    "optimizer.grad_scaler",
    "optimizer.optimizer",
    "pipeline_parallel.schedules",
    "tensor_parallel.data",
    "transformer.utils",
    "utils",
)
_TENSOR_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "empty_like")

_installed = False


class UntestedMegatronError(ImportError):
    """The installed megatron-core is not one that the CPU patches were tested with."""


def install() -> None:
    """Apply every patch of ``PATCHES`` once.

    Raises:
        UntestedMegatronError: for a megatron-core version outside ``TESTED_MEGATRON_VERSIONS``.
    """
    global _installed
    if _installed:
        return
    check_version(importlib.metadata.version("megatron-core"))
    assert not torch.cuda.is_available(), "the CPU patches are for machines without CUDA"
    for apply, _reason in PATCHES:
        apply()
    _installed = True


def check_version(version: str) -> None:
    """Raise ``UntestedMegatronError`` unless the patches were tested with this version."""
    if version not in TESTED_MEGATRON_VERSIONS:
        raise UntestedMegatronError(
            f"megatron-core {version} on a CPU is untested, the CPU patches need "
            f"{' or '.join(TESTED_MEGATRON_VERSIONS)}: pip install megatron-core=="
            f"{TESTED_MEGATRON_VERSIONS[-1]}, or run on GPUs, where no version is required"
        )


def _current_device() -> None:
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment,return-value]


def _synchronize() -> None:
    torch.cuda.synchronize = lambda *args, **kwargs: None


class _NullStream:
    """Stands for a CUDA stream where everything already happens in order."""

    def wait_stream(self, stream: object) -> None:
        pass


def _streams() -> None:
    torch.cuda.Stream = _NullStream  # type: ignore[assignment,misc]
    torch.cuda.current_stream = lambda *args, **kwargs: _NullStream()  # type: ignore[assignment]


def _random_state() -> None:
    from megatron.core.tensor_parallel import random

    def set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    random._get_cuda_rng_state = torch.cuda.get_rng_state
    random._set_cuda_rng_state = set_state


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def _device_literals() -> None:
    proxy = types.ModuleType("torch")
    proxy.__dict__.update(torch.__dict__)
    proxy.__getattr__ = lambda name: getattr(torch, name)  # type: ignore[method-assign]
    for name in _TENSOR_FACTORIES:
        setattr(proxy, name, _on_cpu(getattr(torch, name)))
    for module in _MODULES_WITH_CUDA_LITERALS:
        importlib.import_module(f"megatron.core.{module}").torch = proxy  # type: ignore[attr-defined]


def _tensor_type_names() -> None:
    original = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        is_name = isinstance(result, str)
        return result.replace("torch.", "torch.cuda.", 1) if is_name else result

    torch.Tensor.type = type_name  # type: ignore[assignment,method-assign]


def _tensor_cuda() -> None:
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[assignment,method-assign]


def _checkpoint_queue() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()


# (patch, why it is needed)
PATCHES: tuple[tuple[Callable[[], None], str], ...] = (
    (_current_device, "modules place buffers on torch.cuda.current_device()"),
    (_synchronize, "pipeline communication and checkpoint writers synchronise the device"),
    (_streams, "the gloo refit service waits for a copy stream"),
    (_random_state, "the tensor-parallel RNG tracker saves and restores CUDA generator states"),
    (_device_literals, "ten modules create tensors with a literal device='cuda'"),
    (_tensor_type_names, "the optimizer compares Tensor.type() with 'torch.cuda.FloatTensor'"),
    (_tensor_cuda, "tied embeddings under pipeline parallelism call weight.data.cuda()"),
    (_checkpoint_queue, "a synchronous save would start a manager process that takes seconds"),
)
