"""A Qwen-shaped ``GPTModel`` of real megatron-core, its DDP wrapper and its optimizer."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from nemo_apo.config import LOCAL, ModelConfig, OptimizerConfig, ParallelConfig
from nemo_apo.parallel.layout import Layout, copy_groups
from nemo_apo.parallel.step import plain_sum
from nemo_apo.trainer.layer_specs import block_spec


class HiddenStateGPT(GPTModel):
    """A ``GPTModel`` whose last stage hands over hidden states [B, T, H] in place of logits.

    The output layer is applied by ``nemo_apo.parallel.logprobs``, which never holds the logits of
    a batch. With an inference context the model gives logits as ever.
    """

    @property
    def output_weight(self) -> torch.nn.Parameter:
        """This rank's rows of the output layer."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.post_process or kwargs.get("inference_context") is not None:
            return super()._postprocess(hidden_states, *args, **kwargs)
        if self.config.sequence_parallel:
            # Its backward pass sums the ranks' gradients while it scatters them.
            hidden_states = gather_from_sequence_parallel_region(hidden_states)
        return hidden_states.transpose(0, 1)


class Stage(torch.nn.Module):
    """All layers of a rank's pipeline stage as one module, when they are cut into chunks.

    It holds the chunks' own submodules: for what looks at weights by name and layer number.
    """

    def __init__(self, chunks: Sequence[HiddenStateGPT]) -> None:
        super().__init__()
        first, last = chunks[0], chunks[-1]
        self.config, self.pg_collection = first.config, first.pg_collection
        self.pre_process, self.post_process = first.pre_process, last.post_process
        self.share_embeddings_and_output_weights = first.share_embeddings_and_output_weights
        self.decoder = torch.nn.Module()
        layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
        self.decoder.layers = torch.nn.ModuleList(layers)
        if first.pre_process:
            self.embedding = first.embedding
        if last.post_process:
            self.decoder.final_layernorm = last.decoder.final_layernorm
            self.output_layer = last.output_layer


# megatron's settings of each choice of parallel.recompute.
_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def transformer_config(
    model: ModelConfig, layout: Layout, parallel: ParallelConfig, initialize: bool = True
) -> TransformerConfig:
    """megatron's configuration of the model in a layout; ``initialize`` fills in random weights."""
    dtype = _DTYPES[model.params_dtype]
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_method_std,
        # The same initial weights whatever the layout and device; none where a checkpoint's follow.
        use_cpu_initialization=True,
        perform_initialization=initialize,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        attention_softmax_in_fp32=True,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        # The schedules' device synchronisation after every transfer has no meaning on a CPU.
        batch_p2p_sync=layout.device.type != "cpu",
        calculate_per_token_loss=True,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        # megatron's interleaved schedule is silently wrong with two stages otherwise.
        overlap_p2p_comm=parallel.virtual_pipeline_model_parallel_size is not None,
        batch_p2p_comm=parallel.virtual_pipeline_model_parallel_size is None,
        **_RECOMPUTE[parallel.recompute],
    )


def _build(
    model: ModelConfig,
    config: TransformerConfig,
    layout: Layout,
    vocab_size: int,
    max_sequence_length: int,
    stage: tuple[bool, bool],
    groups: ProcessGroupCollection | None,
    chunk: int | None = None,
) -> HiddenStateGPT:
    pre_process, post_process = stage
    gpt = HiddenStateGPT(
        config=config,
        transformer_layer_spec=block_spec(model, config, chunk),
        vocab_size=vocab_size,
        max_sequence_length=max_sequence_length,
        pre_process=pre_process,
        post_process=post_process,
        position_embedding_type="rope",
        rotary_base=model.rotary_base,
        share_embeddings_and_output_weights=model.tied_embeddings,
        pg_collection=groups,
        vp_stage=chunk,
    )
    if not config.perform_initialization:
        _mark_divided(gpt)
    return gpt.to(layout.device, config.params_dtype)


def _mark_divided(gpt: HiddenStateGPT) -> None:
    """Note on every weight which dimension is divided among the tensor-parallel ranks.

    megatron does so where it fills in random weights and nowhere else; without these notes the
    gradient norm would leave out all ranks but the first, and a refit would copy wrong parts.
    """
    divided = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, RowParallelLinear: 1}
    for name, module in gpt.named_modules():
        dimension = divided.get(type(module))
        if dimension is not None and module.weight is not None:
            # Of the two halves of gate and up projection each rank holds a part.
            stride = 2 if name.endswith("linear_fc1") else 1
            set_tensor_model_parallel_attributes(module.weight, True, dimension, stride)


def build_training_model(
    model: ModelConfig,
    layout: Layout,
    parallel: ParallelConfig,
    vocab_size: int,
    max_sequence_length: int,
    initialize: bool = True,
) -> list[DistributedDataParallel]:
    """This rank's stage of the training model, wrapped for gradient accumulation and reduction.

    One module, or several chunks of layers under a virtual pipeline.

    Args:
        model: sizes; ``transformer_impl`` is not "auto".
        layout: where this rank stands.
        parallel: how the model is laid out.
        vocab_size: padded vocabulary.
        max_sequence_length: longest prompt and completion, tokens.
        initialize: whether to fill in random weights; otherwise the caller fills in every one.
    """
    config = transformer_config(model, layout, parallel, initialize)
    plain_sum(config)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=parallel.distributed_optimizer,
    )
    wrapped = []
    for chunk in range(layout.virtual_size):
        ends = (
            layout.pipeline_rank == 0 and chunk == 0,
            layout.is_last_stage and chunk == layout.virtual_size - 1,
        )
        number = chunk if layout.virtual_size > 1 else None
        gpt = _build(model, config, layout, vocab_size, max_sequence_length, ends, None, number)
        wrapped.append(
            DistributedDataParallel(config, ddp_config, gpt, disable_bucketing=chunk > 0)
        )
    return wrapped


def build_replica(
    model: ModelConfig,
    layout: Layout,
    vocab_size: int,
    max_sequence_length: int,
    tensor_size: int,
    initialize: bool = True,
) -> HiddenStateGPT:
    """The whole model on ``tensor_size`` ranks, in evaluation mode and without gradients.

    Its layers are megatron's own, whose attention reads the sampler's masks. ``initialize`` as in
    ``build_training_model``.
    """
    model = replace(model, transformer_impl=LOCAL)
    groups = copy_groups(tensor_size)
    parallel = ParallelConfig(tensor_model_parallel_size=tensor_size)
    config = transformer_config(model, layout, parallel, initialize)
    gpt = _build(model, config, layout, vocab_size, max_sequence_length, (True, True), groups)
    return gpt.eval().requires_grad_(False)


def build_optimizer(
    optimizer: OptimizerConfig, chunks: Sequence[DistributedDataParallel]
) -> MegatronOptimizer:
    """megatron's optimizer (AdamW) over the model's parameters; moments are float32."""
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=0.0,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        params_dtype=chunks[0].config.params_dtype,
        bf16=chunks[0].config.bf16,
        use_distributed_optimizer=chunks[0].ddp_config.use_distributed_optimizer,
    )
    return get_megatron_optimizer(config, list(chunks))
