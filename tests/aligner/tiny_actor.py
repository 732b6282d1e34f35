"""Real NeMo-Aligner actors on a tiny model, built as Aligner's own training scripts build them.

Nothing of the host is imported with this module, so that tests can be collected without it.
"""

import importlib
import logging
import types
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf

from tests.aligner import cpu_host

Kind = Literal["grpo", "ppo", "reinforce"]

# kind: module and class. The first is the branch's, the others are the release's.
_ACTORS = {
    "grpo": (
        "nemo_aligner.experimental.grpo.models.nlp.gpt.megatron_gpt_grpo_actor",
        "MegatronGPTActorModel",
    ),
    "ppo": ("nemo_aligner.models.nlp.gpt.megatron_gpt_ppo_actor", "MegatronGPTActorModel"),
    "reinforce": (
        "nemo_aligner.models.nlp.gpt.megatron_gpt_reinforce_actor",
        "MegatronGPTReinforceActorModel",
    ),
}

# Without a schedule of the learning rate, so that two optimizer steps differ by gradients alone.
OPTIMIZERS: Mapping[str, Mapping[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 1e-2},
    "adamw": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.0, "betas": [0.9, 0.98]},
}

SEQUENCE_LENGTH = 64
# The vocabulary is padded to a multiple of this at every TP, so its rows are the same at each.
_VOCABULARY_MULTIPLE = 64


@dataclass(frozen=True)
class Built:
    """An actor ready for training, with what Aligner's trainers are given beside it."""

    trainer: Any
    actor: Any
    optimizer: torch.optim.Optimizer
    scheduler: Any


def tiny_config(
    kind: Kind,
    tp: int = 1,
    pp: int = 1,
    micro_batch_size: int = 1,
    global_batch_size: int = 4,
    *,
    optimizer: str = "sgd",
    **changes: Any,
) -> DictConfig:
    """The actor's configuration: a byte-level GPT of two layers in float32.

    Args:
        kind: the actor, whose own section the configuration then has.
        tp: tensor-parallel size.
        pp: pipeline-parallel size.
        micro_batch_size: sequences of one forward pass.
        global_batch_size: sequences of one optimizer step over all data-parallel ranks.
        optimizer: a name in ``OPTIMIZERS``.
        changes: further fields; a dotted one goes in as ``**{"grpo.ratio_eps": 0.3}``.
    """
    config = OmegaConf.create(
        {
            **_MODEL,
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "micro_batch_size": micro_batch_size,
            "global_batch_size": global_batch_size,
            "make_vocab_size_divisible_by": max(1, _VOCABULARY_MULTIPLE // tp),
            "optim": dict(OPTIMIZERS[optimizer]),
            kind: deepcopy(_ALGORITHM),
        }
    )
    for name, value in changes.items():
        OmegaConf.update(config, name, value, force_add=True)
    return config


def import_host() -> None:
    """Import all that building an actor needs. Patches nothing but the import's own obstacles."""
    cpu_host.before_import()
    importlib.import_module("lightning.pytorch")
    importlib.import_module("nemo_aligner.utils.train_script_utils")
    for kind in ("grpo",) if cpu_host.uses_branch() else ("ppo", "reinforce"):
        _actor_module(kind)


def real_actor_class(kind: Kind) -> type:
    """The actor's class, on which the caller may build its own; /dev/shm is safe from it."""
    return getattr(_actor_module(kind), _ACTORS[kind][1])


def build(
    kind: Kind,
    config: DictConfig,
    world_size: int,
    actor_class: type | None = None,
) -> Built:
    """An actor on this rank, by the steps of Aligner's scripts. To be called on every rank.

    Args:
        kind: the actor.
        config: of ``tiny_config``.
        world_size: number of ranks.
        actor_class: a class derived from ``real_actor_class(kind)``, to be made in its place.
    """
    module = _actor_module(kind)
    script = importlib.import_module("nemo_aligner.utils.train_script_utils")
    actor_class = actor_class or real_actor_class(kind)
    assert issubclass(actor_class, real_actor_class(kind))
    _log_errors_only()

    trainer = _trainer(world_size)
    cpu_host.assert_shared_memory_protected(module)
    actor = actor_class(config, trainer)
    script.init_peft(actor, config)
    refer_to_present_weights(actor)
    script.init_distributed(trainer, actor, False)
    # The data only tell NeMo how many steps there are.
    script.init_using_ptl(trainer, actor, torch.utils.data.DataLoader(range(8)), list(range(8)))
    optimizer, scheduler = script.extract_optimizer_scheduler_from_ptl_model(actor)
    _add_buffers_of_distributed_adam(optimizer)
    return Built(trainer, actor, optimizer, scheduler)


def refer_to_present_weights(actor: Any) -> None:
    """Make a copy of the policy's weights as they are now the reference policy."""
    host = importlib.import_module("nemo_aligner.utils.utils")
    actor.init_policy_state_dict = host.retrieve_model_state_dict_in_cpu(
        actor, megatron_amp_O2=False
    )


def _actor_module(kind: str) -> types.ModuleType:
    cpu_host.before_import()
    module = importlib.import_module(_ACTORS[kind][0])
    cpu_host.protect_shared_memory(module)
    cpu_host.silence(module)
    return module


def _trainer(world_size: int) -> Any:
    from lightning.pytorch import Trainer
    from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy

    strategy = NLPDDPStrategy(
        no_ddp_communication_hook=True,
        gradient_as_bucket_view=False,
        find_unused_parameters=False,
    )
    return Trainer(
        accelerator="cpu",
        devices=world_size,
        num_nodes=1,
        precision="32-true",
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        max_epochs=1,
        max_steps=4,
    )


def _add_buffers_of_distributed_adam(optimizer: torch.optim.Optimizer) -> None:
    """The branch's actor clears these before inference, whatever the optimizer is."""
    for name in ("_grad_buffers", "_grads_buckets", "_params_buckets", "_param_buffers"):
        if not hasattr(optimizer, name):
            setattr(optimizer, name, {})


def _log_errors_only() -> None:
    """NeMo logs the whole configuration and every process group, Lightning every device."""
    from nemo.utils import logging as nemo_logging

    nemo_logging.setLevel(logging.ERROR)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


_MODEL: dict[str, Any] = {
    # shape
    "mcore_gpt": True,
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": None,
    "encoder_seq_length": SEQUENCE_LENGTH,
    "max_position_embeddings": SEQUENCE_LENGTH,
    "activation": "swiglu",
    "normalization": "rmsnorm",
    "layernorm_epsilon": 1e-5,
    "bias": False,
    "position_embedding_type": "rope",
    "rotary_percentage": 1.0,
    "share_embeddings_and_output_weights": False,
    "pre_process": True,
    "post_process": True,
    # Wider than usual, so that log-probs differ clearly between tokens.
    "init_method_std": 0.1,
    "use_scaled_init_method": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    # parallel
    "virtual_pipeline_model_parallel_size": None,
    "context_parallel_size": 1,
    "sequence_parallel": False,
    # a CPU, and no fused kernels
    "seed": 1234,
    "precision": 32,
    "use_cpu_initialization": True,
    "transformer_engine": False,
    "megatron_amp_O2": False,
    "native_amp_init_scale": 1,
    "fp8": False,
    "apply_query_key_layer_scaling": False,
    "attention_softmax_in_fp32": True,
    "persist_layer_norm": False,
    "bias_activation_fusion": False,
    "bias_dropout_add_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "get_attention_mask_from_fusion": False,
    "apply_rope_fusion": False,
    "grad_div_ar_fusion": False,
    "async_grad_allreduce": False,
    "gradient_as_bucket_view": False,
    "activations_checkpoint_granularity": None,
    "activations_checkpoint_method": None,
    "activations_checkpoint_num_layers": None,
    "activations_checkpoint_layers_per_pipeline": None,
    "num_micro_batches_with_partial_activation_checkpoints": None,
    # what else NeMo reads
    "tokenizer": {
        "library": "byte-level",
        "type": None,
        "model": None,
        "vocab_file": None,
        "merge_file": None,
        "delimiter": None,
        "sentencepiece_legacy": False,
    },
    "data": {
        "data_impl": "jsonl",
        "data_prefix": None,
        "seq_length": SEQUENCE_LENGTH,
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "num_workers": 0,
    },
    "peft": {"peft_scheme": "none", "restore_from_path": None},
}

# The section of the algorithm: what any of the three actors reads.
_ALGORITHM: dict[str, Any] = {
    "forward_micro_batch_size": 1,
    "offload_adam_states": False,
    "ratio_eps": 0.2,
    "ratio_eps_low": 0.2,
    "ratio_eps_high": 0.28,
    "entropy_bonus": 0.0,
    "initial_policy_kl_penalty": 0.01,
    "dapo": {"token_loss": False, "clip_higher": False},
    "length_params": {"max_length": 8, "min_length": 1},
    "sampling_params": {
        "use_greedy": False,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "add_BOS": False,
        "all_probs": False,
        "compute_logprob": False,
        "end_strings": ["<|endoftext|>"],
    },
    # The branch wants exactly one backend enabled in ``config``; the outer switch starts it.
    "share_dir": "none",
    "inference_backend": {
        "type": "none",
        "enable": False,
        "reshard": False,
        "config": {"trt_llm": {"enable": True}},
    },
}
