"""The transformer layers by megatron's specs: its own modules, or Transformer Engine's.

Transformer Engine's layers hold each norm inside the linear layer behind it, under another name,
and their attention reads no mask: it is causal. That is what training needs, whose rows are padded
on the right; the sampler, which pads on the left, always runs on megatron's own layers.

Transformer Engine's layers have never been run here, for want of a GPU.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)

from nemo_apo.config import LOCAL, TRANSFORMER_ENGINE, ModelConfig
from nemo_apo.parallel.context import AllGatherAttention

# Parameters of a layer of Transformer Engine that megatron's own layers name otherwise.
LOCAL_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """RMSNorm of this rank's part of the sequence; megatron sums its gradient over the ranks.

    megatron's wrapper of torch's norm refuses sequence parallelism.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, **kwargs: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def block_spec(
    model: ModelConfig, config: TransformerConfig, chunk: int | None
) -> TransformerBlockSubmodules:
    """The layers of a stage, or of one of its chunks, and the norm behind the last one.

    Args:
        model: of which ``transformer_impl`` is "local" or "transformer_engine".
        config: megatron's configuration of the stage.
        chunk: its number under a virtual pipeline.
    """
    layer, norm = _LAYERS[model.transformer_impl](model, config)
    count = get_num_layers_to_build(config, vp_stage=chunk)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)


def _local(model: ModelConfig, config: TransformerConfig) -> tuple[ModuleSpec, type]:
    layer = get_gpt_layer_local_spec(qk_layernorm=model.qk_layernorm, normalization="RMSNorm")
    parts, attention = layer.submodules, layer.submodules.self_attention.submodules
    if config.context_parallel_size > 1:
        attention.core_attention = AllGatherAttention
    if not config.sequence_parallel:
        return layer, WrappedTorchNorm
    parts.input_layernorm = parts.pre_mlp_layernorm = SequenceParallelRMSNorm
    if model.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = SequenceParallelRMSNorm
    return layer, SequenceParallelRMSNorm


def _transformer_engine(model: ModelConfig, config: TransformerConfig) -> tuple[ModuleSpec, type]:
    """Sequence and context parallelism (a ring of keys and values) are Transformer Engine's own."""
    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=model.qk_layernorm), TENorm


_LAYERS: dict[str, Callable[[ModelConfig, TransformerConfig], tuple[ModuleSpec, type]]] = {
    LOCAL: _local,
    TRANSFORMER_ENGINE: _transformer_engine,
}


def local_name(name: str) -> str:
    """The name in megatron's own layers of a parameter of either kind of layers."""
    for fused, local in LOCAL_NAMES.items():
        if name.endswith(f".{fused}"):
            return name.removesuffix(fused) + local
    return name


class LocalNames(torch.nn.Module):
    """A stage whose parameters go by the names of megatron's own layers: for the refit.

    It holds nothing itself. megatron's refit looks at parameters by name, at the numbers of layers,
    at the configuration and at the groups of ranks.
    """

    def __init__(self, stage: torch.nn.Module) -> None:
        super().__init__()
        self.config, self.pg_collection = stage.config, stage.pg_collection
        # Not as a submodule, which would put its name before all others.
        object.__setattr__(self, "stage", stage)

    def named_parameters(
        self, *args: Any, **kwargs: Any
    ) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, parameter in self.stage.named_parameters(*args, **kwargs):
            yield local_name(name), parameter

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Module]]:
        return self.stage.named_modules(*args, **kwargs)
