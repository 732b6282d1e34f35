"""CPU shims, for tests only: they let the real NeMo-Aligner run over gloo where there is no GPU.

NeMo, megatron-core and Aligner assume a CUDA device and Apex's and Transformer Engine's kernels.
Each function here answers one such assumption, and each was seen to be needed. None of them
touches a loss, a gradient or a sampling decision.

Two stages, both safe to call again:

* ``before_import`` only changes what must be in place when the host's modules are imported;
* ``after_import`` patches torch and the imported modules. It changes the whole process, so it
  belongs into a process that runs nothing else, as the ranks of ``host_ranks`` are.
"""

import contextlib
import functools
import importlib
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

# Names a checkout of the branch, whose ``nemo_aligner`` then takes the place of the installed one.
BRANCH_VARIABLE = "NEMO_ALIGNER_GRPO_PATH"

# What the branch's actor calls on /dev/shm, see ``protect_shared_memory``.
_SHARED_MEMORY_FUNCTIONS = (
    "remove_writable_files",
    "check_shm_space",
    "check_shared_memory_usage",
    "log_shared_memory_usage",
)

_LAYERS_OF_TRANSFORMER_ENGINE = (
    "get_gpt_layer_with_transformer_engine_spec",
    "get_falcon_layer_spec",
    "get_gpt_full_te_layer_autocast_spec",
    "get_gpt_layer_modelopt_spec",
    "get_gpt_layer_with_te_and_hyena_spec",
)
# NeMo imports these only when it chooses.
_GEMMA_LAYERS = "nemo.collections.nlp.models.language_modeling.megatron.gemma2.gemma2_spec"


def install() -> None:
    """Both stages: after this the host can be imported and used in this process."""
    before_import()
    after_import()


@functools.cache
def before_import() -> None:
    """What must be in place before any module of NeMo-Aligner is imported."""
    # NeMo asks which NVIDIA container it runs in, and misreads the absence of one.
    os.environ.setdefault("NVIDIA_PYTORCH_VERSION", "none")
    choose_aligner()
    if not uses_branch():
        _stub_trt_llm()
    _add_loss_reduction()
    _skip_bert_models()
    _silence_memory_log()


@functools.cache
def after_import() -> None:
    """Replace the CUDA, Apex and Transformer Engine parts. Imports NeMo where it is not yet."""
    # Read when CUDA is first asked for, so a machine that has a GPU does not use it either.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    assert not torch.cuda.is_available(), "CUDA was in use before the CPU shims"
    _stay_on_cpu()
    _answer_cuda_queries()
    _redirect_cuda_factories()
    _use_local_layers()
    _use_megatron_parameter_attributes()
    _replace_apex_parts()
    _keep_one_random_state()
    _clip_in_torch()
    _gather_scalars()
    _name_optimizers()
    _load_own_checkpoints()


def uses_branch() -> bool:
    """Whether ``nemo_aligner`` of this process is the branch's and not the installed release."""
    return bool(os.environ.get(BRANCH_VARIABLE))


@functools.cache
def choose_aligner() -> None:
    """Import ``nemo_aligner``, from the branch where its variable names a checkout.

    The checkout is on the path only for this import: later ones go through the package, and the
    checkout has a package ``tests`` that would otherwise hide ours.
    """
    checkout = os.environ.get(BRANCH_VARIABLE)
    if not checkout:
        importlib.import_module("nemo_aligner")
        return
    root = Path(checkout).resolve()
    sys.path.insert(0, str(root))
    try:
        package = importlib.import_module("nemo_aligner")
    finally:
        sys.path.remove(str(root))
    found = Path(str(package.__file__)).resolve()
    assert root in found.parents, f"{BRANCH_VARIABLE} is {root}, but nemo_aligner is {found}"


def protect_shared_memory(actor_module: types.ModuleType) -> None:
    """Keep the branch's actor away from /dev/shm; without effect on a module that leaves it alone.

    Its constructor deletes every writable file there, whoever wrote it, and raises where less than
    520 GB are free.
    """
    for name in _SHARED_MEMORY_FUNCTIONS:
        if hasattr(actor_module, name):
            setattr(actor_module, name, _leave_shared_memory_alone)


def assert_shared_memory_protected(actor_module: types.ModuleType) -> None:
    """To be called right before an actor is made."""
    for name in _SHARED_MEMORY_FUNCTIONS:
        function = getattr(actor_module, name, _leave_shared_memory_alone)
        assert function is _leave_shared_memory_alone, f"{name} would touch /dev/shm"


def silence(module: types.ModuleType) -> None:
    """Make ``print`` of a module do nothing: the branch's actor reports every call by it."""
    module.print = _print_nothing  # type: ignore[attr-defined]


def _leave_shared_memory_alone(*_: Any, **__: Any) -> None:
    """Stands for every function of the branch's actor that works on /dev/shm."""


# Before the import


def _stub_trt_llm() -> None:
    """The release's actors import a generator that does not import without TensorRT-LLM."""

    class GPTGenerateTRTLLM:
        def __init__(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("TensorRT-LLM is replaced by a stub")

    stub = types.ModuleType("nemo_aligner.utils.trt_llm")
    stub.GPTGenerateTRTLLM = GPTGenerateTRTLLM  # type: ignore[attr-defined]
    sys.modules.setdefault(stub.__name__, stub)


def _add_loss_reduction() -> None:
    """The branch imports this function from NeMo, to which only its own patch of NeMo adds it."""
    from megatron.core import parallel_state

    megatron_utils = importlib.import_module("nemo.collections.nlp.modules.common.megatron.utils")

    def reduce_losses_across_data_parallel_group(losses: list[torch.Tensor]) -> torch.Tensor:
        total = torch.cat([loss.clone().detach().float().view(1) for loss in losses])
        torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
        return total

    name = reduce_losses_across_data_parallel_group.__name__
    if not hasattr(megatron_utils, name):
        setattr(megatron_utils, name, reduce_losses_across_data_parallel_group)


def _skip_bert_models() -> None:
    """Listing the pretrained models imports BERT, whose spec needs Transformer Engine."""
    module = importlib.import_module("nemo.collections.nlp.models.nlp_model")
    module.get_megatron_pretrained_bert_models = list


def _silence_memory_log() -> None:
    """The branch prints the memory in use many times per step, asking CUDA for it."""
    module = importlib.import_module("nemo_aligner.utils.utils")
    for name in ("log_memory", "print_memory_info"):
        if hasattr(module, name):
            setattr(module, name, _print_nothing)


def _print_nothing(*_: Any, **__: Any) -> None:
    """Stands for what the branch prints."""


# After the import


def _stay_on_cpu() -> None:
    """``.cuda()`` is called on nearly every batch and on the model."""

    def stay(self: Any, *_: Any, **__: Any) -> Any:
        return self

    torch.Tensor.cuda = stay  # type: ignore[method-assign]
    torch.nn.Module.cuda = stay  # type: ignore[method-assign]


def _answer_cuda_queries() -> None:
    """The device, its memory and its streams are asked for without a look whether there is one."""

    def answer(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    answers = {
        "current_device": torch.device("cpu"),
        "synchronize": None,
        "set_device": None,
        "reset_peak_memory_stats": None,
        "empty_cache": None,
        "memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_allocated": 0,
        "max_memory_reserved": 0,
        "mem_get_info": (0, 0),
        "Stream": None,
    }
    for name, value in answers.items():
        setattr(torch.cuda, name, answer(value))
    torch.cuda.FloatTensor = torch.FloatTensor
    torch.cuda.LongTensor = torch.LongTensor


def _redirect_cuda_factories() -> None:
    """Tensors are made with ``device="cuda"``."""
    from torch.overrides import TorchFunctionMode

    class CudaToCpu(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            kwargs = kwargs or {}
            if str(kwargs.get("device")).startswith("cuda"):
                kwargs = {**kwargs, "device": torch.device("cpu")}
            return func(*args, **kwargs)

    # Entered for good: the process exists for the host alone.
    CudaToCpu().__enter__()


def _use_local_layers() -> None:
    """NeMo builds all its layer specs to choose one of them, and most need Transformer Engine.

    The choice stays NeMo's, so whatever wraps it is tested as it is; what cannot be built is None.
    """
    module = importlib.import_module(
        "nemo.collections.nlp.models.language_modeling.megatron_gpt_model"
    )
    for name in _LAYERS_OF_TRANSFORMER_ENGINE:
        assert hasattr(module, name), name
        setattr(module, name, _no_layer)
    gemma = types.ModuleType(_GEMMA_LAYERS)
    gemma.get_gemma2_layer_spec = _no_layer  # type: ignore[attr-defined]
    sys.modules[_GEMMA_LAYERS] = gemma


def _no_layer(*_: Any, **__: Any) -> None:
    """Stands for every layer spec that needs Transformer Engine."""


def _use_megatron_parameter_attributes() -> None:
    """NeMo takes from Apex a function that megatron-core has as well."""
    from megatron.core.tensor_parallel import layers

    module = importlib.import_module("nemo.collections.nlp.modules.common.megatron.build_model")
    name = "set_defaults_if_not_set_tensor_model_parallel_attributes"
    setattr(module, name, getattr(layers, name))


def _replace_apex_parts() -> None:
    """NeMo refuses to start without Apex, and compares layers with classes it has from there."""
    overrides = importlib.import_module("nemo.collections.nlp.parts.nlp_overrides")
    overrides.HAVE_APEX = True
    module = importlib.import_module("nemo.collections.nlp.modules.common.megatron.utils")
    module.listify_model = lambda model: model if isinstance(model, list) else [model]
    for name in ("FusedLayerNorm", "FastLayerNorm", "MixedFusedRMSNorm"):
        setattr(module, name, torch.nn.LayerNorm)


def _keep_one_random_state() -> None:
    """megatron-core's tracker forks CUDA random states. Without dropout nothing draws from them."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    @contextlib.contextmanager
    def fork(self: Any, name: str | None = None) -> Iterator[None]:
        yield

    CudaRNGStatesTracker.fork = fork


def _clip_in_torch() -> None:
    """NeMo's gradient norm and its clipping call two kernels of Apex."""
    module = importlib.import_module("nemo.collections.nlp.modules.common.megatron.clip_grads")

    def apply(kernel: str, _: Any, tensor_lists: list[list[torch.Tensor]], *args: Any) -> Any:
        if kernel == "norm":
            squares = [tensor.float().norm() ** 2 for tensor in tensor_lists[0]]
            return torch.stack(squares).sum().sqrt(), None
        for source, target in zip(*tensor_lists, strict=True):
            target.copy_(source * args[0])
        return None

    module.amp_C = types.SimpleNamespace(multi_tensor_l2norm="norm", multi_tensor_scale="scale")
    module.multi_tensor_applier = apply


def _gather_scalars() -> None:
    """Aligner's rebalancing gathers tensors without an axis, which gloo, unlike NCCL, refuses."""
    gather = torch.distributed.all_gather_into_tensor

    def all_gather_into_tensor(
        output: torch.Tensor, tensor: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        return gather(output, tensor.reshape(-1) if tensor.ndim == 0 else tensor, *args, **kwargs)

    torch.distributed.all_gather_into_tensor = all_gather_into_tensor


def _name_optimizers() -> None:
    """NeMo's checkpointing compares the optimizer with classes that it imports along with Apex."""
    from nemo.core.optim.mcore_optim import McoreDistributedOptimizer

    module = importlib.import_module("nemo.collections.nlp.parts.nlp_overrides")
    module.McoreDistributedOptimizer = McoreDistributedOptimizer
    module.MegatronDistributedFusedAdam = type("MegatronDistributedFusedAdam", (), {})


def _load_own_checkpoints() -> None:
    """Lightning of that age loads with pickle's objects, which torch since 2.6 refuses to do."""
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
