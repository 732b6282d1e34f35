"""Ways to the log-probs of tokens and their gradients, from hidden states and output layer.

Each variant does a forward and a backward pass to hidden states and weight. The loss is the sum of
the log-probs, plus that of the entropies where they are asked for: some of the variants know no
other one. Axes: T tokens, V vocabulary.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nemo_apo.bench.example import Example
from nemo_apo.parallel.logprobs import linear_logprobs


@dataclass(frozen=True)
class Setting:
    """How a variant is run.

    Attributes:
        group: a tensor-parallel group of this rank alone.
        mode: of the kernel of this package; None for the other variants.
        entropy: whether the entropies and their gradient are computed as well.
    """

    group: dist.ProcessGroup
    mode: str | None = None
    entropy: bool = False


def _always(device: torch.device) -> bool:
    return True


@dataclass(frozen=True)
class Variant:
    """A way to the log-probs.

    Attributes:
        run: forward and backward; returns log-probs, or their sum.
        available: whether it can run on a device here.
        has_modes: whether it knows the modes of this package's kernel.
        has_entropy: whether it can give the entropies.
        slow_on_cpu: takes there many times as long as the others; only run if asked for by name.
    """

    run: Callable[[Example, Setting], Tensor]
    available: Callable[[torch.device], bool] = _always
    has_modes: bool = False
    has_entropy: bool = False
    slow_on_cpu: bool = False


def _backward(example: Example, outputs: Sequence[Tensor]) -> None:
    """Gradients of the sum of the outputs; new tensors at every call, dropped at once."""
    slopes = [torch.ones_like(output) for output in outputs]
    torch.autograd.grad(outputs, example.inputs, slopes)


def _nemo_apo(example: Example, setting: Setting) -> Tensor:
    logprobs_T, entropy_T = linear_logprobs(
        *example.inputs,
        example.targets_T,
        vocab_size=example.vocab,
        group=setting.group,
        mode=setting.mode or "exact",
    )
    _backward(example, [logprobs_T, entropy_T] if setting.entropy else [logprobs_T])
    return logprobs_T.detach()


def _logits(example: Example) -> Tensor:
    return example.hidden_TH @ example.weight_VH.t()


def _naive(example: Example, setting: Setting) -> Tensor:
    log_p_TV = torch.log_softmax(_logits(example).float(), dim=-1)
    logprobs_T = log_p_TV.gather(-1, example.targets_T[:, None]).squeeze(-1)
    outputs = [logprobs_T]
    if setting.entropy:
        outputs.append(-(log_p_TV.exp() * log_p_TV).sum(dim=-1))
    _backward(example, outputs)
    return logprobs_T.detach()


def _megatron(example: Example, setting: Setting) -> Tensor:
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    # It overwrites float32 logits. They are not read again, so that only saves memory.
    return _megatron_loss(example, vocab_parallel_cross_entropy)


def _megatron_fused(example: Example, setting: Setting) -> Tensor:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    return _megatron_loss(
        example, lambda *inputs: fused_vocab_parallel_cross_entropy(*inputs, setting.group)
    )


def _megatron_loss(example: Example, cross_entropy: Callable[..., Tensor]) -> Tensor:
    """A cross-entropy of megatron's, which wants the axes sequence, batch, vocabulary."""
    losses_T1 = cross_entropy(_logits(example)[:, None], example.targets_T[:, None])
    _backward(example, [losses_T1])
    return -losses_T1.detach()


def _torch_chunked(example: Example, setting: Setting) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    loss = F.linear_cross_entropy(
        *example.inputs, example.targets_T, reduction="sum", options=options
    )
    _backward(example, [loss])
    return -loss.detach()


def _liger_fused(example: Example, setting: Setting) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    # Without accum_dtype the weight's gradient would be summed over chunks in bf16.
    loss: Any = liger_fused_linear_cross_entropy(
        *example.inputs, example.targets_T, reduction="sum", accum_dtype=torch.float32
    )
    _backward(example, [loss])
    return -loss.detach()


def _trl_selective(example: Example, setting: Setting) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    logprobs_T = selective_log_softmax(_logits(example), example.targets_T)
    _backward(example, [logprobs_T])
    return logprobs_T.detach()


def _with_package(name: str) -> Callable[[torch.device], bool]:
    return lambda device: importlib.util.find_spec(name) is not None


def _with_liger(device: torch.device) -> bool:
    """Its kernels are written in Triton, for GPUs."""
    return device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None


def _with_linear_cross_entropy(device: torch.device) -> bool:
    """Newer versions of torch only; older ones have no chunks or no such function."""
    return hasattr(torch.nn, "LinearCrossEntropyOptions")


VARIANTS: dict[str, Variant] = {
    "nemo_apo": Variant(_nemo_apo, has_modes=True, has_entropy=True),
    "naive": Variant(_naive, has_entropy=True),
    "megatron": Variant(_megatron, _with_package("megatron")),
    "megatron_fused": Variant(_megatron_fused, _with_package("megatron")),
    "torch_chunked": Variant(_torch_chunked, _with_linear_cross_entropy, slow_on_cpu=True),
    "liger_fused": Variant(_liger_fused, _with_liger),
    "trl_selective": Variant(_trl_selective, _with_package("trl")),
}


def default_variants(device: str) -> list[str]:
    """The variants to compare unless some are asked for."""
    return [name for name, way in VARIANTS.items() if not (device == "cpu" and way.slow_on_cpu)]
