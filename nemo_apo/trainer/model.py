"""A Qwen3-shaped ``GPTModel`` of real megatron-core, its DDP wrapper and its optimizer."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from nemo_apo.config import ModelConfig, OptimizerConfig
from nemo_apo.parallel.layout import Layout
from nemo_apo.parallel.step import plain_sum


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
        return hidden_states.transpose(0, 1)


def transformer_config(model: ModelConfig, layout: Layout) -> TransformerConfig:
    """megatron's configuration of the training model, float32."""
    return _transformer_config(model, layout, layout.tensor_size, layout.pipeline_size)


def _transformer_config(
    model: ModelConfig, layout: Layout, tensor_size: int, pipeline_size: int
) -> TransformerConfig:
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
        add_qkv_bias=False,
        qk_layernorm=model.qk_layernorm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_method_std,
        # The same initial weights whatever the layout and device.
        use_cpu_initialization=True,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        attention_softmax_in_fp32=True,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        # The schedules' device synchronisation after every transfer has no meaning on a CPU.
        batch_p2p_sync=layout.device.type != "cpu",
        calculate_per_token_loss=True,
        tensor_model_parallel_size=tensor_size,
        pipeline_model_parallel_size=pipeline_size,
    )


def _build(
    model: ModelConfig,
    config: TransformerConfig,
    layout: Layout,
    vocab_size: int,
    max_sequence_length: int,
    stage: tuple[bool, bool],
    groups: ProcessGroupCollection | None,
) -> HiddenStateGPT:
    pre_process, post_process = stage
    return HiddenStateGPT(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(
            qk_layernorm=model.qk_layernorm, normalization="RMSNorm"
        ),
        vocab_size=vocab_size,
        max_sequence_length=max_sequence_length,
        pre_process=pre_process,
        post_process=post_process,
        position_embedding_type="rope",
        rotary_base=model.rotary_base,
        share_embeddings_and_output_weights=model.tied_embeddings,
        pg_collection=groups,
    ).to(layout.device)


def build_training_model(
    model: ModelConfig, layout: Layout, vocab_size: int, max_sequence_length: int
) -> DistributedDataParallel:
    """This rank's stage of the training model, wrapped for gradient accumulation and reduction.

    Args:
        model: sizes.
        layout: where this rank stands.
        vocab_size: padded vocabulary.
        max_sequence_length: longest prompt and completion, tokens.
    """
    config = transformer_config(model, layout)
    stage = (layout.pipeline_rank == 0, layout.is_last_stage)
    gpt = _build(model, config, layout, vocab_size, max_sequence_length, stage, None)
    plain_sum(config)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=False
    )
    return DistributedDataParallel(config, ddp_config, gpt)


def build_replica(
    model: ModelConfig,
    layout: Layout,
    vocab_size: int,
    max_sequence_length: int,
    groups: ProcessGroupCollection,
) -> HiddenStateGPT:
    """The whole model on this rank alone, in evaluation mode and without gradients."""
    config = _transformer_config(model, layout, 1, 1)
    gpt = _build(model, config, layout, vocab_size, max_sequence_length, (True, True), groups)
    return gpt.eval().requires_grad_(False)


def build_optimizer(
    optimizer: OptimizerConfig, model: DistributedDataParallel
) -> MegatronOptimizer:
    """megatron's optimizer (AdamW) over the model's float32 parameters."""
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=0.0,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        params_dtype=torch.float32,
        use_distributed_optimizer=False,
    )
    return get_megatron_optimizer(config, [model])
